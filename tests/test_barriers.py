"""Every barrier of the CUDA kernels is needed: without one of them a result is wrong or a fault is reported.

For each line in csrc/cuda where threads wait for each other or for data, the SIMT shim leaves out that line, and
problems which the whole kernel passes have to fail. Fences, which order memory between blocks, are beyond the shim.
"""

from __future__ import annotations

import re

import pytest
import simt_backend
import torch
from support import assert_within_budget
from test_tree_attention import problem

from lbr_kernels import ops
from lbr_kernels.ops import _extension

KERNEL = _extension.source_dir() / "cuda" / "tree_attention.cuh"
WAITS = re.compile(r"^ *(block_barrier|copy_async_wait<.*>|copy_async_commit)\(\);")
SOURCE = KERNEL.read_text()
LINES = [number for number, line in enumerate(SOURCE.splitlines(), 1) if WAITS.match(line)]
assert len(LINES) == len(re.findall(r"(?:block_barrier|copy_async_wait<.*>|copy_async_commit)\(", SOURCE)) > 0
SCHEDULES = 200


@pytest.fixture(scope="module")
def cases():
    """Problems with trees in several tiles, windows, and what they should give."""
    made = []
    for extras in ({}, {"window": 70}):
        for shape in ({"N": 3, "T": 9, "group": 4}, {"N": 9, "T": 70, "group": 7}):
            p = problem(B=2, Hk=1, D=64, Dv=64, longest=420, dtype=torch.float16, **shape)
            wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
            want, plain = ops.tree_attention_ref(**wide, **extras)[0], ops.tree_attention_ref(**p, **extras)[0]
            made.append((p, extras, want, plain))
    return made


def first_failure(cases, seeds: int, without: int = 0) -> str | None:
    """What goes wrong first, in one and in many parts, over schedules."""
    assert ops.backends("cpu")["tree_attention"][simt_backend.NAME] is None
    module = simt_backend.MODULE[0]
    try:
        for seed in range(seeds):
            for p, extras, want, plain in cases:
                for multiprocessors in (1, 20):
                    module.configure(
                        seed=1000 * simt_backend.SEED + seed, multiprocessors=multiprocessors, without=without
                    )
                    try:
                        out = ops.tree_attention(**p, **extras, backend=simt_backend.NAME)
                        assert_within_budget(out, want, plain, roundings=8)
                    except (AssertionError, RuntimeError) as error:
                        return f"seed {seed}: {error}"
    finally:
        module.configure(seed=simt_backend.SEED)
    return None


def test_the_kernel_as_it_is(cases):
    assert first_failure(cases, SCHEDULES) is None


@pytest.mark.parametrize("line", LINES)
def test_without(line, cases):
    failure = first_failure(cases, SCHEDULES, without=line)
    print(failure)
    assert failure is not None
