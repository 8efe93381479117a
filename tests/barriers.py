"""Leaves out one synchronisation of a CUDA kernel at a time, on the SIMT shim, to see that each is needed.

Contract
--------
:func:`waits` finds the lines of a file in csrc/cuda where threads wait for each other or for data: each stands on a
line of its own. :func:`first_failure` runs cases, which raise ``AssertionError`` where a result is wrong, under many
schedules, with one such line left out or none, and says what goes wrong first. Fences, which order memory between
blocks, are beyond the shim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import simt_backend
import torch

from lbr_kernels import ops
from lbr_kernels.ops import _extension, _flags

_WAIT = r"(?:block_barrier|\w+\.barrier|copy_async_wait<.*>|copy_async_commit)\("
SCHEDULES = 200


def waits(file: str) -> list[int]:
    """The numbers of those lines in csrc/cuda/``file``."""
    source = (_extension.source_dir() / "cuda" / file).read_text(encoding="utf-8")
    lines = [number for number, line in enumerate(source.splitlines(), 1) if re.match(rf" *{_WAIT}\);", line)]
    assert len(lines) == len(re.findall(_WAIT, source)) > 0
    return lines


def first_failure(
    op: str,
    cases: Sequence[Callable[[], None]],
    *,
    multiprocessors: Sequence[int],
    without: int = 0,
    schedules: int = SCHEDULES,
) -> str | None:
    """What goes wrong first in the cases of ``op``, on devices of each size; None if nothing does."""
    assert ops.backends("cpu")[op][simt_backend.NAME] is None
    module = simt_backend.MODULE[0]
    try:
        for seed in range(schedules):
            for case in cases:
                for count in multiprocessors:
                    module.configure(seed=1000 * simt_backend.SEED + seed, multiprocessors=count, without=without)
                    try:
                        case()
                    except (AssertionError, RuntimeError) as error:
                        return f"seed {seed}: {error}"
    finally:
        module.configure(seed=simt_backend.SEED)
        _flags.word(torch.device("cpu")).zero_()
    return None
