"""The benchmarks on a GPU: ``ops.tree_attention``, the decoding step with its other ops, and packed trees for training.

    .venv/bin/python bench/gpu.py attention             at most 8 minutes; JSON, table, plot into bench/results/
    .venv/bin/python bench/gpu.py step                  at most 10 minutes; likewise
    .venv/bin/python bench/gpu.py packed                at most 5 minutes; JSON and table
    .venv/bin/python bench/gpu.py ... --quick           a selection
    .venv/bin/python bench/gpu.py ... --dry-run         no GPU: the same code on tiny shapes; keeps nothing
    .venv/bin/python bench/gpu.py results               bench/results/gpu.md, from the runs that are kept

``lbr-kernels build`` comes first where kernels have to be compiled; optional sides are those whose package can be
imported (flash_attn, flash_attn_interface, flashinfer; the last compiles at first use). What follows is of
``attention``; ``gpu_step.py`` and ``gpu_ops.py`` say how ``step`` measures, ``gpu_packed.py`` how ``packed`` does.

Contract
--------
A side is timed only after its output was compared with the reference in fp32, and a graph only after its last output,
filled with NaN, was written anew and compared again. What is wrong or fails is recorded with the reason, and the
command then ends with 1 (of other people's sides it is only what is wrong that does so).

Caches are cold because sets of buffers are used in turn, as the layers of a model are: one replay of a side's graph
passes over more than three times the L2's bytes, and comes back to a set only when all others have been read. Flushing
the L2 between calls instead would time single launches and leave dirty lines to be written back. Where one set is that
large it is the only one; what the L2 holds of its end when its beginning is read is at most a third of it. A replay
stands behind a kernel that only waits, so that the host's part of a launch is in no time; the gaps between the kernels
of a graph are, for every side. All sides alternate in rounds, and a round begins with another side each time.

The time is kept by design: what is left is shared equally among the shapes that are left, the rounds are as many as
the slice holds, FlexAttention is left out where its compilation would not fit, and shapes that no time is left for are
listed. Results are written after every shape.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import gpu_machine
import gpu_ops
import gpu_packed
import gpu_packed_report
import gpu_report
import gpu_step
import gpu_step_report
import torch
import typer
from gpu_attention import (
    DRY,
    QUICK,
    SHAPES,
    TOLERANCE,
    Problem,
    Shape,
    Side,
    make_problem,
    reference,
    relative_error,
    set_bytes,
    sides_for,
)
from gpu_machine import BrokenDeviceError, DryRun, Gpu, Machine, Ready, alternate, first_line, say, versions
from report import number
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PAGE = "gpu.md"

COLD = 3  # times the L2's bytes
RESERVE = 15.0  # seconds for the roof's second reading, tables and plot

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


def _checked(problem: Problem, out: Tensor, wanted: dict[int, Tensor], tolerance: float) -> dict[str, Any]:
    """For the record: the error, and ``status`` if the side is wrong."""
    error = relative_error(problem, out, wanted)
    record: dict[str, Any] = {"error": error if math.isfinite(error) else None, "tolerance": tolerance}
    if not error <= tolerance:
        record |= {"status": "wrong", "why": f"relative error {error:.3g}, allowed {tolerance:g}"}
    return record


def make_ready(
    machine: Machine, problem: Problem, side: Side, wanted: dict[int, Tensor], tolerance: float
) -> tuple[dict[str, Any], Ready | None]:
    """Prepare, check, capture, and check what was captured; the record, and what is to be timed."""
    record: dict[str, Any] = {}
    try:
        prepared = side.prepare(problem)
        compute = prepared.compute
        if prepared.apart:
            record["apart"] = dict(prepared.apart)
        found, ready = gpu_machine.make_ready(
            machine, lambda turn: compute(*problem.sets[turn]), len(problem.sets),
            lambda run, turns: _checked(problem, run(), wanted, tolerance),
        )  # fmt: skip
    except Exception as error:
        why = first_line(error)
        if not machine.healthy():
            raise BrokenDeviceError(f"{problem.shape}; {side.name}: {why}") from None
        return {**record, "status": "failed", "why": why}, None
    return {**record, **found}, ready


class Schedule:
    """Shares the time that is left among the shapes that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds - min(RESERVE, seconds / 10)
        self.longest_compilation = 0.0

    def slice_end(self, shapes_left: int) -> float | None:
        """When the next shape has to be done; None if there is no time for it."""
        now = time.monotonic()
        return now + (self._end - now) / shapes_left if now < self._end else None

    def allows_compilation(self, end: float) -> bool:
        return time.monotonic() + self.longest_compilation < end


def time_shape(
    machine: Machine, problem: Problem, sides: Sequence[Side], schedule: Schedule, end: float
) -> dict[str, dict[str, Any]]:
    """The records of all sides at one shape."""
    wanted, tolerance = reference(problem), TOLERANCE[machine.dtype]
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, Ready] = {}
    for side in sides:
        if side.compiles and not schedule.allows_compilation(end):
            why = f"compiling it takes up to {schedule.longest_compilation:.0f} s, which belong to other shapes"
            records[side.name] = {"status": "skipped", "why": why}
            continue
        start = time.monotonic()
        records[side.name], one = make_ready(machine, problem, side, wanted, tolerance)
        if one is not None:
            ready[side.name] = one
        if side.compiles:
            schedule.longest_compilation = max(schedule.longest_compilation, time.monotonic() - start)
    for name, seconds in alternate(machine, ready, end).items():
        records[name] |= {"replays": ready[name].times, "seconds": seconds}
    return records


def method(machine: Machine) -> str:
    """How it was measured, for the record and the table."""
    if machine.device.type != "cuda":
        return "Two sets of buffers in turn, host clock, sides in turns."
    return (
        f"Sets of buffers in turn, in all more than {COLD} times the {machine.cache_bytes / 1e6:.0f} MB of L2 (one set "
        "where that is enough), so that caches are cold; CUDA graphs of at least one pass over the sets, timed by "
        "events behind a waiting kernel, all sides in turns; outputs checked against the fp32 reference before and "
        f"after capture (relative error of every head and node at most {TOLERANCE[machine.dtype]:g})."
    )


@torch.no_grad()
def measure(
    machine: Machine,
    shapes: Sequence[Shape],
    sides: Sequence[Side],
    missing: dict[str, str],
    seconds: float,
    *,
    dry_run: bool,
    quick: bool,
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """The whole run; ``keep`` is given what is known after every shape."""
    schedule = Schedule(seconds)
    data: dict[str, Any] = {
        "benchmark": "attention", "dry_run": dry_run, "quick": quick, "complete": False, "aborted": None,
        "date": date.today().isoformat(), "device": machine.describe(), "versions": versions(),
        "dtype": str(machine.dtype).removeprefix("torch."), "method": method(machine),
        "roof": [machine.roof()], "not_available": missing, "skipped": [], "shapes": [], "preference": [],
    }  # fmt: skip
    problem: Problem | None = None
    for index, shape in enumerate(shapes):
        end = schedule.slice_end(len(shapes) - index)
        free = machine.free_bytes()
        size = set_bytes(shape, machine.dtype)
        why = None
        if end is None:
            why = "the time was used up"
        elif size > free / 4:
            why = f"one set has {size / 1e9:.3g} GB, more than a quarter of the {free / 1e9:.3g} GB that are free"
        if why is not None or end is None:
            data["skipped"].append({"shape": str(shape), "why": why})
            say(f"{shape}: skipped: {why}")
            continue
        used = shape.cache_bytes(machine.dtype)
        sets = max(2 if machine.cache_bytes == 0 else 1, COLD * machine.cache_bytes // used + 1)
        sets = max(1, min(sets, int(free / 4 / size)))
        try:
            problem = make_problem(shape, sets, machine.device, machine.dtype, seed=index)
            records = time_shape(machine, problem, sides, schedule, end)
        except Exception as error:
            data["aborted"] = f"{shape}: {first_line(error)}"
            say(f"aborted: {data['aborted']}")
            break
        finally:
            problem = None  # its memory is the next shape's
        data["shapes"].append({
            "shape": shape.describe(), "cache_bytes": used, "bytes": shape.bytes(machine.dtype), "flops": shape.flops(),
            "sets": sets, "cold": sets * used > COLD * machine.cache_bytes, "seed": index, "sides": records,
        })  # fmt: skip
        data["preference"] = gpu_report.preference(data["shapes"])
        keep(data)
        _say_shape(shape, data["shapes"][-1])
    if data["aborted"] is None:
        machine.free_bytes()
        data["roof"].append(machine.roof())
        data["complete"] = True
    return data


def _say_shape(shape: Shape, entry: dict[str, Any]) -> None:
    parts = []
    for name, side in entry["sides"].items():
        timed = side["status"] == "timed"
        what = f"{number(1e6 * gpu_report.seconds(entry, name))} µs" if timed else side["status"].upper()
        parts.append(f"{name} {what}")
    say(f"{shape}: {'; '.join(parts)}")


def troubles(data: dict[str, Any]) -> list[str]:
    """What makes the command end with 1: wrong sides, failures of ours, an abort."""
    found = [f"aborted: {data['aborted']}"] if data["aborted"] else []
    for entry in data["shapes"]:
        for name, side in entry["sides"].items():
            if side["status"] == "wrong" or (side["status"] == "failed" and name.startswith("ours")):
                found.append(f"{gpu_report.shape_name(entry)}; {name}: {side['status']}: {side['why']}")
    return found


def stem_of(data: dict[str, Any]) -> str:
    """``<date>-<device>-<benchmark>``; a selection is named so, lest it take a whole run's place."""
    device = re.sub(r"[^a-z0-9]+", "-", data["device"]["name"].lower()).strip("-")
    return f"{data['date']}-{device}-{data['benchmark']}{'-quick' if data['quick'] else ''}"


def write_json(data: dict[str, Any], directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem_of(data)}.json"
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


Out = Annotated[
    Path | None, typer.Option(help="Where JSON, table and plot go; bench/results by default.", file_okay=False)
]
Quick = Annotated[bool, typer.Option("--quick", help="A small selection.")]
Dry = Annotated[
    bool, typer.Option("--dry-run", help="No GPU: tiny shapes on the CPU; keeps nothing unless --out is given.")
]
Minutes = Annotated[float, typer.Option(help="All that follows Python's start.", min=0.1)]


def _machine(out: Path | None, dry_run: bool) -> Machine:
    if dry_run and out is not None and out.resolve() == RESULTS.resolve():
        raise typer.BadParameter("a dry run has no place in bench/results")
    if not dry_run and not torch.cuda.is_available():
        say("no GPU: torch.cuda.is_available() is False; --dry-run exercises the script on a CPU")
        raise typer.Exit(2)
    return DryRun() if dry_run else Gpu()


@contextlib.contextmanager
def _directory(out: Path | None, dry_run: bool) -> Iterator[Path]:
    """Where results go; a dry run's are gone afterwards, unless it was said where they are to be kept."""
    with tempfile.TemporaryDirectory() as scratch:
        yield out or (Path(scratch) if dry_run else RESULTS)


def _finish(data: dict[str, Any], directory: Path, write: Callable[[Path], str], found: list[str], kept: bool) -> None:
    """Write JSON, table and plot, show the table, and end with 1 if anything was found wrong."""
    path = write_json(data, directory)
    text = write(path)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    say(text)
    if directory.resolve() == RESULTS.resolve():
        write_page()
    if kept:
        say(f"{path}, table and plot beside it")
    for line in found:
        say(line)
    if found:
        raise typer.Exit(1)


@app.command()
def attention(out: Out = None, quick: Quick = False, dry_run: Dry = False, minutes: Minutes = 7.5) -> None:
    """Measure ops.tree_attention against the other ways of computing it; ends with 1 if anything is wrong."""
    started = time.monotonic()
    machine = _machine(out, dry_run)
    # Every shape has a compiled variant of its own, and beyond the limit nothing would be compiled.
    torch._dynamo.config.recompile_limit = 1000
    sides, missing = sides_for(machine.device)
    shapes = DRY if dry_run else QUICK if quick else SHAPES

    def write(path: Path) -> str:
        run = gpu_report.Run.load(path)
        gpu_report.draw(run, path.with_suffix(".svg"))
        return gpu_report.tables(run)

    with _directory(out, dry_run) as directory:
        data = measure(
            machine, shapes, sides, missing, 60 * minutes - (time.monotonic() - started), dry_run=dry_run, quick=quick,
            keep=lambda known: write_json(known, directory),
        )  # fmt: skip
        _finish(data, directory, write, troubles(data), not dry_run or out is not None)


@app.command()
def step(out: Out = None, quick: Quick = False, dry_run: Dry = False, minutes: Minutes = 9.0) -> None:
    """Measure a decoding step's other ops, the engines and plain decoding; ends with 1 if anything is wrong."""
    started = time.monotonic()
    machine = _machine(out, dry_run)
    scale = gpu_step.DRY if dry_run else gpu_step.FULL
    data: dict[str, Any] = {
        "benchmark": "step", "dry_run": dry_run, "quick": quick, "complete": False, "aborted": None,
        "date": date.today().isoformat(), "device": machine.describe(), "versions": versions(),
        "dtype": str(machine.dtype).removeprefix("torch."),
    }  # fmt: skip

    def write(path: Path) -> str:
        run = gpu_step_report.StepRun.load(path)
        gpu_step_report.draw(run, path.with_suffix(".svg"))
        return gpu_step_report.tables(run)

    with _directory(out, dry_run) as directory:
        gpu_step.measure(
            machine, gpu_step.quick(scale) if quick else scale, gpu_ops.cases(dry_run),
            60 * minutes - (time.monotonic() - started), data, keep=lambda known: write_json(known, directory),
        )  # fmt: skip
        _finish(data, directory, write, gpu_step.troubles(data), not dry_run or out is not None)


@app.command()
def packed(out: Out = None, quick: Quick = False, dry_run: Dry = False, minutes: Minutes = 4.5) -> None:
    """Measure ops.packed_tree_attention, forward and backward, against FlexAttention; ends with 1 if wrong."""
    started = time.monotonic()
    machine = _machine(out, dry_run)
    torch._dynamo.config.recompile_limit = 1000
    shapes = gpu_packed.DRY if dry_run else gpu_packed.QUICK if quick else gpu_packed.SHAPES
    data: dict[str, Any] = {
        "benchmark": "packed", "dry_run": dry_run, "quick": quick, "complete": False, "aborted": None,
        "date": date.today().isoformat(), "device": machine.describe(), "versions": versions(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "method": "A forward and a backward pass on one set of buffers, sides in turns; each was compared with the "
        "fp32 reference on a small problem of the same kind and with the first side on this one (relative error of "
        f"every tensor at most {gpu_packed.TOLERANCE[machine.dtype]:g}).",
    }  # fmt: skip

    with _directory(out, dry_run) as directory:
        gpu_packed.measure(
            machine, shapes, gpu_packed.sides_for(machine.device), 60 * minutes - (time.monotonic() - started), data,
            keep=lambda known: write_json(known, directory),
        )  # fmt: skip
        _finish(
            data, directory, lambda path: gpu_packed_report.tables(gpu_packed_report.PackedRun.load(path)),
            gpu_packed.troubles(data), not dry_run or out is not None,
        )  # fmt: skip


def page_text() -> str:
    """The results page, made from the runs in bench/results."""
    parts = [
        "# On GPUs",
        f"Made by `{gpu_report.COMMAND} results` from the JSON files beside it.",
        gpu_report.results_part(gpu_report.Run.kept(RESULTS)).rstrip(),
        gpu_step_report.results_part(gpu_step_report.StepRun.kept(RESULTS)).rstrip(),
        gpu_packed_report.results_part(gpu_packed_report.PackedRun.kept(RESULTS)),
    ]
    return "\n\n".join(parts)


def write_page() -> Path:
    page = RESULTS / PAGE
    page.write_text(page_text(), encoding="utf-8")
    return page


@app.command()
def results() -> None:
    """Write bench/results/gpu.md from the runs that are kept."""
    say(str(write_page()))


if __name__ == "__main__":
    app()
