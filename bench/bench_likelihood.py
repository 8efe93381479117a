"""The likelihood of a trajectory and its gradients: one packed forward, against the trunk and its branches as rows.

The record also holds what both take of memory beside plain causal training on the same number of tokens, each in a
process of its own (``likelihood_memory.py``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_rows import BranchRows, random_trajectory
from compare import compare
from likelihood_memory import small_model
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lbr_kernels import Router
from lbr_kernels.training import trajectory_log_probs

PROMPT = 64
DECISIONS_EACH = [32, 128]


@pytest.mark.parametrize("steps", [pytest.param(128, marks=[pytest.mark.quick]), 512])
def bench_likelihood(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, steps: int) -> None:
    width = 3
    torch.manual_seed(0)
    model = small_model()
    router = Router.for_model(model)
    for parameter in router.score.parameters():
        torch.nn.init.normal_(parameter)
    trajectory = random_trajectory(model, prompt=PROMPT, steps=steps, width=width, depth=1)
    parameters = [*model.parameters(), *router.parameters()]

    def gradient() -> Tensor:
        parts = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        return torch.cat(parts)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            result = trajectory_log_probs(model, router, trajectory, on_policy=False)
            nodes, decided = result.node_log_probs.sum(), result.router_log_probs.sum()
            (nodes + decided).backward()
        return nodes.detach(), decided.detach(), gradient()

    def rows(decisions_each: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            nodes, decided = BranchRows(model, router, decisions_each=decisions_each)(trajectory)
        return nodes, decided, gradient()

    def check(mine: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
        for a, b in zip(mine, other, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-4

    quick = request.config.getoption("--quick")
    together = DECISIONS_EACH[:1] if quick else DECISIONS_EACH
    compare(
        benchmark,
        ours,
        {f"branches as rows, {count} decisions": partial(rows, count) for count in together},
        op="likelihood",
        shape={"parameters": model.num_parameters(), "prompt": PROMPT, "T": steps, "K": width, "L": 1},
        dtype=torch.float32,
        check=check,
        rounds=3,
    )
    if not benchmark.disabled and not quick:
        benchmark.extra_info["peak_megabytes"] = {
            side: peak_megabytes(side, steps) for side in ("ours", "plain", "rows")
        }


def peak_megabytes(side: str, steps: int) -> Any:
    """What a step of training takes at its peak, beside what the process had before it."""
    program = Path(__file__).with_name("likelihood_memory.py")
    result = subprocess.run([sys.executable, program, side, str(steps)], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)["megabytes"]
