"""Local Branch Routing: decoding with a rolling lookahead tree and a router that looks before it commits.

``generate`` takes the place of ``model.generate``; ``Router`` is what is trained; ``ops`` are the kernels alone.
"""

from lbr_kernels.decoding.adapter import ModelReport, UnsupportedModelError, check_model
from lbr_kernels.decoding.config import LBRConfig
from lbr_kernels.decoding.engine import release
from lbr_kernels.decoding.generate import LBRGenerateOutput, generate
from lbr_kernels.decoding.loop import DecodingStats, StepView
from lbr_kernels.decoding.trajectory import DecodingSettings, TreeTrajectory
from lbr_kernels.decoding.warmup import WarmUp, warmup
from lbr_kernels.router import Router, RouterConfig

__version__ = "0.1.0"

__all__ = [
    "DecodingSettings",
    "DecodingStats",
    "LBRConfig",
    "LBRGenerateOutput",
    "ModelReport",
    "Router",
    "RouterConfig",
    "StepView",
    "TreeTrajectory",
    "UnsupportedModelError",
    "WarmUp",
    "check_model",
    "generate",
    "release",
    "warmup",
]
