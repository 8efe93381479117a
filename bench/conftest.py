"""Options and fixtures of the benchmarks, and what a run's JSON says of the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter

from lbr_kernels.evaluation.machine import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--quick``: a small selection."""
    parser.addoption("--quick", action="store_true", help="only what `make bench-quick` runs: a small selection")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--quick`` only benchmarks that are marked ``quick`` are left."""
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("quick") is None]
        items[:] = [item for item in items if item.get_closest_marker("quick") is not None]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def meter() -> Meter:
    """What reads the machine's roof."""
    return Meter()


@pytest.fixture(autouse=True)
def _inference(benchmark: BenchmarkFixture) -> Any:
    """Nothing here needs a gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """What a run says of the machine: what its speed depends on, not whose it is."""
    machine_info.clear()
    machine_info.update(machine())
