"""How the benchmarks measure: several ways of doing one thing, checked against each other, then timed in turns.

Contract
--------
:func:`compare` refuses to time what does not pass its check. All sides run alternately in one process, so that a
machine whose speed drifts slows all of them; what counts is the ratio within each round, with its quartiles. Where one
call takes less than some milliseconds, a run is several calls, one after the other, as the layers of a model are.
pytest-benchmark times our side, and the others run in the set-up of each of its rounds. A record says op, shape, dtype,
bytes, operations, the share of the machine's roof, the machine and the versions; see :func:`compare`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter, Roof, median

from lbr_kernels.evaluation.machine import machine

T = TypeVar("T")
Work = Callable[[], Any]

COLD_BYTES = 3 << 26
"""What has to be read in between for data to have left the caches: 192 MB, more than six times a large L3's share."""


def seconds(work: Work, calls: int = 1) -> float:
    """Wall-clock seconds of one call, the mean of so many."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"low": low, "median": median, "high": high}


def rotating(make: Callable[[], T], size: int, *, most: int = 1000) -> Callable[[], T]:
    """Copies of ``size`` bytes each, handed out in turn, so many that one has left the caches when its turn comes.

    So the data is cold and the code is not, as between two uses of a layer.
    """
    copies = [make() for _ in range(min(most, max(2, -(-COLD_BYTES // max(size, 1)))))]
    turn = count()
    return lambda: copies[next(turn) % len(copies)]


def _calls(work: Work) -> int:
    """How many calls a run has: some milliseconds' worth."""
    return max(1, min(16, int(4e-3 / seconds(work))))


@dataclass(frozen=True)
class Cost:
    """What a piece of work has to read and to compute at least."""

    bytes: float
    operations: float


def compare(
    benchmark: BenchmarkFixture,
    ours: Work,
    others: Mapping[str, Work],
    *,
    op: str,
    shape: Mapping[str, Any],
    dtype: torch.dtype,
    check: Callable[[Any, Any], None],
    cost: Cost | None = None,
    meter: Meter | None = None,
    rounds: int = 15,
    cold: bool = False,
    **about: Any,
) -> None:
    """Check, then time ``ours`` and ``others`` in turns, and fill the record.

    Args:
        benchmark: the fixture.
        ours, others: the sides; the others by name.
        op, shape, dtype: what is measured; the record is grouped by them.
        check: is given our result and another's, and raises if they differ.
        cost: for the share of the roof.
        meter: reads the machine's roof in every round.
        rounds: runs of every side.
        cold: whether the data has left the caches before each run (see :func:`rotating`); for the record.
        about: what else the record shall say.
    """
    mine = ours()
    calls = {"ours": _calls(ours)}
    for name, work in others.items():
        start = time.perf_counter()
        check(mine, work())
        # Only what is fast is run once more to be timed.
        calls[name] = 1 if time.perf_counter() - start > 0.1 else _calls(work)
    times: dict[str, list[float]] = {name: [] for name in others}
    readings: list[Roof] = []

    def run_others() -> None:
        if meter is not None:
            readings.append(meter.read())
        for name, work in others.items():
            times[name].append(seconds(work, calls[name]))

    def run() -> None:
        for _ in range(calls["ours"]):
            ours()

    names = ", ".join(f"{key} {value}" for key, value in shape.items())
    kind = str(dtype).removeprefix("torch.")
    benchmark.group = f"{op}: {names}, {kind}"
    benchmark.pedantic(run, setup=run_others, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled or benchmark.stats is None:
        return
    taken = [run / calls["ours"] for run in benchmark.stats.stats.data]
    ratios = {
        name: quartiles([other / own for other, own in zip(values[-len(taken) :], taken, strict=True)])
        for name, values in times.items()
    }
    record: dict[str, Any] = {
        "op": op,
        "shape": dict(shape),
        "dtype": kind,
        "cold": cold,
        "calls_per_run": calls,
        "seconds": {"ours": quartiles(taken)} | {n: quartiles(v[-len(taken) :]) for n, v in times.items()},
        "times_as_long": ratios,
        **machine(),
        **about,
    }
    if cost is not None and readings:
        roof = median(readings)
        least = roof.seconds(cost.bytes, cost.operations, dtype)
        record |= {
            "bytes": cost.bytes,
            "flops": cost.operations,
            "roof": roof.describe(),
            "roof_seconds": least,
            "percent_of_roof": 100 * least / record["seconds"]["ours"]["median"],
        }
    benchmark.extra_info.update(record)
