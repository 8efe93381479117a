"""How the benchmarks measure: two ways of doing one thing, checked against each other, then timed in turns.

Contract
--------
:func:`compare` refuses to time what is not equal. Both sides run alternately in one process, so that a machine whose
speed drifts slows both; what counts is the ratio of each pair of runs, with its quartiles. pytest-benchmark keeps the
times of our side; the other side's, the ratios and the machine go into the record's ``extra_info``.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from pytest_benchmark.fixture import BenchmarkFixture

Work = Callable[[], Any]


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"low": low, "median": median, "high": high}


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def compare(
    benchmark: BenchmarkFixture,
    ours: Work,
    plain: Work,
    *,
    group: str,
    check: Callable[[Any, Any], None],
    rounds: int = 15,
    before: Work | None = None,
    **about: Any,
) -> None:
    """Check, then time ``ours`` and ``plain`` in turns.

    Args:
        benchmark: the fixture.
        ours, plain: the two sides.
        group: op and shape, under which the record is listed.
        check: is given both results and raises if they differ.
        rounds: pairs of runs.
        before: runs before each timed run, untimed.
        about: what else the record shall say.
    """
    check(ours(), plain())
    prepare = before or (lambda: None)
    pairs = []
    for _ in range(rounds):
        prepare()
        mine = seconds(ours)
        prepare()
        pairs.append((mine, seconds(plain)))
    benchmark.group = group
    benchmark.extra_info.update(
        about,
        ours_seconds=quartiles([mine for mine, _ in pairs]),
        plain_seconds=quartiles([other for _, other in pairs]),
        speedup=quartiles([other / mine for mine, other in pairs]),
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    benchmark.pedantic(ours, setup=prepare, rounds=5)
