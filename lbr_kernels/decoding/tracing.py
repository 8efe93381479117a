"""Names for the phases of decoding in a profiler's timeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """An NVTX range ``lbr:<name>`` around the block, where there is CUDA to see it."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(f"lbr:{name}")
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
