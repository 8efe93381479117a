"""route against the router module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from pytest_benchmark.fixture import BenchmarkFixture

from lbr_kernels import Router, RouterConfig, ops
from lbr_kernels.ops.tree_shape import num_slots


@pytest.mark.parametrize("depth", [1, 2])
def bench_route(benchmark: BenchmarkFixture, depth: int) -> None:
    router = Router(RouterConfig(1536, depth)).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    weights = router.packed()
    hidden = torch.randn(1, num_slots(3, depth), 1536)

    def plain() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = router(hidden, 3)
            return result

    def check(ours: Any, module: Any) -> None:
        torch.testing.assert_close(ours[0], module, rtol=1e-4, atol=1e-4)

    compare(
        benchmark,
        lambda: ops.route(hidden, weights, width=3, depth=depth),
        plain,
        check=check,
        group=f"route D=1536, K=3, L={depth}",
        baseline="the router module, eager",
    )
