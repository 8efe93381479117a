"""Where the GPU benchmarks run and how they take times: a GPU, and a CPU in its place for dry runs.

Contract
--------
A call is timed only after its result was found right, and a graph only after the result of its last replay was, which
had been filled with what cannot be right (:func:`make_ready`). Sides alternate in rounds, and a round begins with
another side each time (:func:`alternate`).

A replay stands behind a kernel that only waits, so that the host's part of a launch is in no time; the gaps between the
kernels of a graph are.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor

import lbr_kernels

T = TypeVar("T")
Work = Callable[[], Any]
Record = dict[str, Any]

MIN_CALLS = 4  # of a graph, unless a call is slow
SLOW_CALL = 5e-3  # seconds
LONG_ENOUGH = 1e-3  # seconds of a measurement, by which the clock's steps do not matter
MOST_REPLAYS = 10
HOST_AHEAD = 100_000_000  # cycles for which the device waits: some fifty milliseconds, in which a step is launched

console = Console()


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Machine(Protocol):
    """Where the sides run, and its clock."""

    device: torch.device
    dtype: torch.dtype
    cache_bytes: int
    rounds: tuple[int, int]
    """At least and at most."""

    def describe(self) -> dict[str, Any]:
        """Name, driver, sizes."""

    def free_bytes(self) -> int:
        """Memory that can be had, after what is no longer used was given back."""

    def first(self, work: Callable[[], T]) -> T:
        """The result of a first run, waited for; on the stream that captures."""

    def capture(self, work: Callable[[], T]) -> tuple[Work, T | None]:
        """What replays ``work``, and where the result of its last call will stand, if that can be said."""

    def seconds(self, work: Work, times: int) -> float:
        """Of one run, the mean of so many."""

    def wall(self, work: Work) -> float:
        """Seconds of one run on the host's clock, until the device has done it all."""

    def peak(self, work: Work) -> dict[str, int]:
        """Bytes in use ``before`` a run, and the most that were ``allocated`` and ``reserved`` in it."""

    def mark(self) -> Any:
        """A point in the device's time."""

    def between(self, one: Any, other: Any) -> float:
        """Seconds from one mark to another, which have been reached."""

    def let_host_run_ahead(self) -> None:
        """The device waits for some time, in which the host launches what is to be timed without the host's part."""

    def healthy(self) -> bool:
        """Whether anything can still be run."""

    def roof(self) -> dict[str, list[float]]:
        """Samples of the copy rate, bytes per second, and of the matrix rate, operations per second."""


class Gpu:
    """The current CUDA device: graphs and events."""

    dtype = torch.bfloat16
    rounds = (5, 30)

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes: int = self._properties.L2_cache_size
        self._stream = torch.cuda.Stream()
        self._pool: Any = None

    def describe(self) -> dict[str, Any]:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        p = self._properties
        return {
            "name": p.name, "driver": driver, "memory_bytes": p.total_memory, "l2_bytes": self.cache_bytes,
            "multiprocessors": p.multi_processor_count, "capability": [p.major, p.minor],
        }  # fmt: skip

    def free_bytes(self) -> int:
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        # On the stream that captures: workspaces belong to streams, and they are to be there before the capture.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def first(self, work: Callable[[], T]) -> T:
        with self._aside():
            out = work()
        torch.cuda.synchronize()
        return out

    def capture(self, work: Callable[[], T]) -> tuple[Work, T | None]:
        # The graphs of a shape share their memory, one being replayed at a time and its result of no further use: else
        # what a side that expands its keys occupies would be lost to all others.
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._stream, pool=self._pool):
                last = work()
        except Exception as error:
            # The end of a capture that failed raises an error of its own, and leaves its stream behind.
            torch.cuda.set_stream(current)
            self._pool = torch.cuda.graph_pool_handle()
            if isinstance(error.__context__, Exception):
                raise error.__context__ from None
            raise
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, last

    def seconds(self, work: Work, times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # cycles: until the host has launched what follows
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times

    def wall(self, work: Work) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self, work: Work) -> dict[str, int]:
        self.free_bytes()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return {
            "before": before,
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: torch.cuda.Event, other: torch.cuda.Event) -> float:
        return float(one.elapsed_time(other)) / 1e3

    def let_host_run_ahead(self) -> None:
        torch.cuda._sleep(HOST_AHEAD)

    def healthy(self) -> bool:
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device=self.device).item() == 1)
        except RuntimeError:
            return False

    def roof(self) -> dict[str, list[float]]:
        return _roof(self, copied=4 << 30, side=8192, runs=4, samples=10)


class DryRun:
    """A CPU in the place of a GPU: to exercise the script; its times mean nothing."""

    device = torch.device("cpu")
    dtype = torch.float32
    cache_bytes = 0
    rounds = (3, 3)

    def describe(self) -> dict[str, Any]:
        return {"name": "dry run on a CPU", "driver": "none", "l2_bytes": self.cache_bytes}

    def free_bytes(self) -> int:
        return 1 << 30

    def first(self, work: Callable[[], T]) -> T:
        return work()

    def capture(self, work: Callable[[], T]) -> tuple[Work, T | None]:
        return work, None

    def seconds(self, work: Work, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - start) / times

    def wall(self, work: Work) -> float:
        return self.seconds(work, 1)

    def peak(self, work: Work) -> dict[str, int]:
        work()
        return {"before": 0, "allocated": 0, "reserved": 0}

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, one: float, other: float) -> float:
        return other - one

    def let_host_run_ahead(self) -> None:
        pass

    def healthy(self) -> bool:
        return True

    def roof(self) -> dict[str, list[float]]:
        return _roof(self, copied=1 << 20, side=64, runs=1, samples=3)


def _roof(machine: Machine, *, copied: int, side: int, runs: int, samples: int) -> dict[str, list[float]]:
    """Samples of a large copy, bytes read and written, and of a matrix product, both of random data."""

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=machine.device, dtype=machine.dtype)

    source = random(copied // machine.dtype.itemsize)
    target = torch.empty_like(source)
    left, right = random(side, side), random(side, side)
    product = torch.empty_like(left)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    found = {}
    for name, work, amount in (("copy", copy, 2 * copied), ("matmul", multiply, 2 * side**3)):
        for _ in range(3):
            machine.seconds(work, runs)
        found[name] = [amount / machine.seconds(work, runs) for _ in range(samples)]
    return found


class BrokenDeviceError(RuntimeError):
    """A side has left the device unusable."""


def first_line(error: BaseException) -> str:
    """An error for a record; what is not kept of it are the frames that hold memory."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Ready:
    """A side that passed its checks, and how it is timed."""

    def __init__(self, run: Work, calls: int, seconds: float) -> None:
        self.run, self.calls = run, calls
        self.times = max(1, min(MOST_REPLAYS, math.ceil(LONG_ENOUGH / max(seconds, 1e-9))))
        self.estimate = seconds * self.times + LONG_ENOUGH


def poison(result: Any) -> None:
    """Fill every tensor of a result with what it cannot hold."""
    for tensor in result if isinstance(result, tuple) else (result,):
        if isinstance(tensor, Tensor):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -77)


def make_ready(
    machine: Machine,
    call: Callable[[int], T],
    turns: int,
    checked: Callable[[Callable[[], T], Sequence[int]], Record],
    *,
    least_calls: int = MIN_CALLS,
    most_seconds: float = math.inf,
) -> tuple[Record, Ready | None]:
    """Check, capture, and check what was captured; the record, and what is to be timed.

    Args:
        machine: where it runs.
        call: does the work on the data of a turn, ``0 .. turns - 1``.
        turns: how many sets of data there are. A run passes over all of them, the first one last.
        checked: is given what runs and the turns that it takes; says for the record how the result compares, with
            ``status`` and ``why`` if it is wrong.
        least_calls: of a run, unless a call is slow.
        most_seconds: of a run, which then takes fewer turns.
    """
    record = checked(lambda: machine.first(lambda: call(0)), [0])
    if "status" in record:
        return record, None
    seconds = machine.seconds(lambda: call(0), 1)
    passes = 1 if seconds > SLOW_CALL else math.ceil(least_calls / turns)
    order = [*range(1, turns), 0] * passes
    order = order[-max(1, int(min(len(order), most_seconds / seconds))) :]

    def run() -> T:
        for turn in order[:-1]:
            call(turn)
        return call(order[-1])

    replay: Work = run
    record["graph"] = machine.device.type == "cuda"
    try:
        replay, last = machine.capture(run)
    except Exception as error:
        if not machine.healthy():
            raise
        record |= {"graph": False, "why": f"not captured, timed without a graph: {first_line(error)}"}
    else:

        def again() -> Any:
            poison(last)
            found = replay()
            return found if last is None else last

        found = checked(again, order)
        if "status" in found:
            return {**record, **found, "why": f"replayed: {found['why']}"}, None
    machine.seconds(replay, 1)
    seconds = machine.seconds(replay, 1)
    return {**record, "status": "timed", "calls": len(order)}, Ready(replay, len(order), seconds)


def alternate(machine: Machine, ready: Mapping[str, Ready], end: float) -> dict[str, list[float]]:
    """Seconds of a call, for every side one of each round; as many rounds as there is time for until ``end``."""
    names = list(ready)
    samples: dict[str, list[float]] = {name: [] for name in names}
    least, most = machine.rounds
    whole = sum(one.estimate for one in ready.values())
    rounds = max(least, min(most, int((end - time.monotonic()) / whole))) if names else 0
    for turn in range(rounds):
        if turn >= least and time.monotonic() > end:
            break
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            one = ready[name]
            samples[name].append(machine.seconds(one.run, one.times) / one.calls)
    return samples


def versions() -> dict[str, str | None]:
    """Of what figures depend on; None for what is not there."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "transformers": of("transformers"),
        "Triton": of("triton"),
        "flash-attn": of("flash-attn"),
        "FlashInfer": of("flashinfer-python"),
        "Python": platform.python_version(),
        "lbr_kernels": lbr_kernels.__version__,
    }
