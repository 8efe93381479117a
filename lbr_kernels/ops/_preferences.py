"""Which of the kernels for GPUs is the faster, per op and class of shapes.

``bench/gpu.py`` measures both in one run and prints the tables below: ``attention`` that of tree attention, ``step``
that of the other ops. :data:`SOURCE` and :data:`OPS_SOURCE` name the runs they are from.
"""

from __future__ import annotations

SOURCE: str | None = None
"""The file in bench/results whose figures these are; None: nothing has been measured yet."""

TREE_ATTENTION: dict[tuple[int, int], str] = {}
"""By rows per key head (N * Hq / Hk) and head size, each rounded up to the next of the lists below. What is not in the
table takes ``"cuda"`` first."""

OPS_SOURCE: str | None = None
"""The same for the next table."""

OPS: dict[str, str] = {}
"""By op, for the others, of which one backend serves all shapes. What is not in the table takes ``"cuda"`` first."""

ROWS = (16, 32, 64, 128)
"""More rows count as the last."""
HEAD_SIZES = (64, 128, 256)


def shape_class(rows: int, head_size: int) -> tuple[int, int]:
    """Where a shape stands in the table."""
    row_class = next((most for most in ROWS if rows <= most), ROWS[-1])
    return row_class, next((most for most in HEAD_SIZES if head_size <= most), HEAD_SIZES[-1])


def tree_attention(rows: int, head_size: int) -> tuple[str, str]:
    """The two backends, the one to be taken first."""
    return _in_order(TREE_ATTENTION.get(shape_class(rows, head_size)))


def of_op(op: str) -> tuple[str, str]:
    """The same for an op that has no table of its own."""
    return _in_order(OPS.get(op))


def source(op: str) -> str | None:
    """The run that decided for an op; None: nothing has been measured yet."""
    return SOURCE if op == "tree_attention" else OPS_SOURCE


def _in_order(faster: str | None) -> tuple[str, str]:
    return ("triton", "cuda") if faster == "triton" else ("cuda", "triton")
