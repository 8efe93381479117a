"""route against the router module; weights and states are cold, as they are between two steps of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import Cost, compare, rotating
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter

from lbr_kernels import Router, RouterConfig, ops
from lbr_kernels.ops.tree_shape import num_slots


@pytest.mark.parametrize(
    "depth", [pytest.param(1, marks=pytest.mark.quick), pytest.param(2, marks=pytest.mark.quick), 3]
)
def bench_route(benchmark: BenchmarkFixture, meter: Meter, depth: int) -> None:
    def router() -> Router:
        made = Router(RouterConfig(1536, depth)).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return made

    hidden = torch.randn(1, num_slots(3, depth), 1536)
    one = router()
    weights = one.packed()
    size = 4 * weights.data.numel()
    modules = rotating(router, size, most=70)
    packed = rotating(lambda: router().packed(), size, most=70)

    def check(ours: Any, module: Any) -> None:
        torch.testing.assert_close(ours[0], module, rtol=1e-4, atol=1e-4)

    check(ops.route(hidden, weights, width=3, depth=depth), one(hidden, 3))
    compare(
        benchmark,
        lambda: ops.route(hidden, packed(), width=3, depth=depth),
        {"the router module, eager": lambda: modules()(hidden, 3)},
        op="route",
        shape={"hidden size": 1536, "width": 3, "depth": depth},
        dtype=torch.float32,
        check=lambda a, b: None if a[0].shape == b.shape else pytest.fail("shapes differ"),
        cost=Cost(size + 4 * hidden.numel(), 2 * 1536 * 128 * hidden.shape[1]),
        meter=meter,
        rounds=31,
        cold=True,
    )
