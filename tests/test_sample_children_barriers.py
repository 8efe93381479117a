"""Every barrier of sample_children's CUDA kernel is needed: without one a token is wrong or a fault is reported.

Rows that the whole kernel passes have to fail without any one line where threads or blocks wait (tests/barriers.py).
"""

from __future__ import annotations

import pytest
import torch
from barriers import first_failure, waits
from test_sample_children_cuda import SIMT, logits_of

from lbr_kernels import ops

MULTIPROCESSORS = (1, 3)  # one block for a row and several


@pytest.fixture(scope="module")
def cases():
    """Rows one after the other, with each kind of pass, so that what one leaves meets the next."""
    made = []
    tied = torch.zeros(1, 12_000)
    tied[:, ::3] = 1
    for logits in (logits_of(1, 14_000), tied, logits_of(4, 3000, torch.bfloat16)):
        for filters in ({}, {"top_k": 700}, {"top_p": 0.5}, {"top_k": 900, "top_p": 0.8}):
            uniforms = torch.rand(len(logits), 40, dtype=torch.float64)
            for op, argument in ((ops.sample_children, uniforms), (ops.top_children, 20)):
                want = op(logits, argument, backend="cpu", **filters)[0]

                def case(op=op, argument=argument, logits=logits, filters=filters, want=want):
                    assert torch.equal(op(logits, argument, backend=SIMT, **filters)[0], want)

                made.append(case)
    return made


@pytest.mark.parametrize("line", waits("sample_children.cuh"))
def test_without(line, cases):
    failure = first_failure("sample_children", cases, multiprocessors=MULTIPROCESSORS, without=line)
    print(failure)
    assert failure is not None
