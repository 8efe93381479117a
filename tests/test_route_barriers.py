"""Every barrier of route's CUDA kernel is needed: without one a result is wrong or a fault is reported.

Problems that the whole kernel passes have to fail without any one line where threads wait (tests/barriers.py). What is
waited for value by value has no such lines: tests/test_route_cuda.py has what must not be taken for it.
"""

from __future__ import annotations

import pytest
import torch
from barriers import first_failure, waits
from test_route import random_router
from test_route_cuda import decide

from lbr_kernels.ops.tree_shape import num_slots

MULTIPROCESSORS = (1, 3, 5)
SCHEDULES = 20


@pytest.fixture(scope="module")
def cases():
    """A row at a time for its many slots, of which few hold a node; hidden states with a norm; rows that are bad."""
    torch.manual_seed(3)
    made = []

    def add(router, hidden, want, **call):
        def case():
            got = decide(router, hidden, **call)
            assert all(
                torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in zip(got, want, strict=True)
            )

        made.append(case)

    router = random_router(6, 8, 8, num_heads=2)
    valid = torch.zeros(3, num_slots(3, 6), dtype=torch.bool)
    valid[:, :6] = True
    hidden = torch.randn(3, valid.shape[1], 8)
    call = {"width": 3, "depth": 6, "valid": valid}
    add(router, hidden, decide(router, hidden, backend="cpu", **call), **call)

    router = random_router(3, 20, 8, num_heads=2, input_norm=True)
    hidden, valid = torch.randn(4, 39, 20), torch.ones(4, 39, dtype=torch.bool)
    call = {"width": 3, "depth": 3}
    log_probs, choice = decide(router, hidden, backend="cpu", **call)
    valid[2, 3] = False
    log_probs[2], choice[2] = torch.nan, -1
    add(router, hidden, (log_probs, choice), valid=valid, **call)
    return made


def test_the_kernel_as_it_is(cases):
    assert first_failure("route", cases, multiprocessors=MULTIPROCESSORS, schedules=SCHEDULES) is None


@pytest.mark.parametrize("line", waits("route.cuh"))
def test_without(line, cases):
    failure = first_failure("route", cases, multiprocessors=MULTIPROCESSORS, without=line, schedules=SCHEDULES)
    print(failure)
    assert failure is not None
