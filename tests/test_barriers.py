"""Every barrier of tree_attention's CUDA kernel is needed: without one a result is wrong or a fault is reported.

Problems that the whole kernel passes have to fail without any one line where threads wait (tests/barriers.py).
"""

from __future__ import annotations

import pytest
import simt_backend
import torch
from barriers import first_failure, waits
from support import assert_within_budget
from test_tree_attention import problem

from lbr_kernels import ops

MULTIPROCESSORS = (1, 20)  # one part and many


@pytest.fixture(scope="module")
def cases():
    """Problems with trees in several tiles, windows, and what they should give."""
    made = []
    for extras in ({}, {"window": 70}):
        for shape in ({"N": 3, "T": 9, "group": 4}, {"N": 9, "T": 70, "group": 7}):
            p = problem(B=2, Hk=1, D=64, Dv=64, longest=420, dtype=torch.float16, **shape)
            wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
            want, plain = ops.tree_attention_ref(**wide, **extras)[0], ops.tree_attention_ref(**p, **extras)[0]

            def case(p=p, extras=extras, want=want, plain=plain):
                out = ops.tree_attention(**p, **extras, backend=simt_backend.NAME)
                assert_within_budget(out, want, plain, roundings=8)

            made.append(case)
    return made


def test_the_kernel_as_it_is(cases):
    assert first_failure("tree_attention", cases, multiprocessors=MULTIPROCESSORS) is None


@pytest.mark.parametrize("line", waits("tree_attention.cuh"))
def test_without(line, cases):
    failure = first_failure("tree_attention", cases, multiprocessors=MULTIPROCESSORS, without=line)
    print(failure)
    assert failure is not None
