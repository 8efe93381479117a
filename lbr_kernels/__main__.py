"""``python -m lbr_kernels`` is ``lbr-kernels``."""

from lbr_kernels.cli import app

app(prog_name="lbr-kernels")
