"""Table and results page's section of the benchmark of packed trees; all figures are read from its JSON.

A time is the median over rounds, of a forward and a backward pass; a ratio is the median over rounds of another side's
time divided by ours in the same round. The rate counts only pairs of a query and a key that it sees.
"""

from __future__ import annotations

from typing import Any

from gpu_packed import FLEX, FLEX_BEFORE, SHAPES
from gpu_report import COMMAND, NOT_MEASURED, Entry, Run, describe, ours, ratio, seconds, timed
from report import number, spread


class PackedRun(Run):
    """One run, as its JSON tells it."""

    suffix = "-packed.json"


def _rate(entry: Entry, name: str) -> float:
    return float(entry["flops"]) / seconds(entry, name) / 1e12


def _cell(entry: Entry, name: str) -> str:
    side = entry["sides"].get(name, {"status": NOT_MEASURED})
    if side["status"] != "timed":
        return str(side["status"])
    mark = "" if side.get("graph", True) else ", no graph"
    return f"{number(1e3 * seconds(entry, name))} ms{mark}"


def tables(run: PackedRun) -> str:
    """The whole run as Markdown."""
    names = list(dict.fromkeys(name for entry in run.entries for name in entry["sides"]))
    lines = [
        f"| forward and backward | {' | '.join(names)} | ours, TFLOP/s | times as long as ours |",
        f"|---|{'---|' * len(names)}--:|---|",
    ]
    for entry in run.entries:
        mine = ours(entry)
        rest = []
        for name in timed(entry):
            if mine is not None and not name.startswith("ours"):
                low, median, high = ratio(entry, name, mine)
                rest.append(f"{name}: {number(median)} ({number(low)} to {number(high)})")
        cells = [entry["shape"]["name"], *(_cell(entry, name) for name in names)]
        cells += ["" if mine is None else number(_rate(entry, mine)), "<br>".join(rest)]
        lines.append(f"| {' | '.join(cells)} |")
    parts = [f"# {run.stem}", describe(run), run.data["method"], "\n".join(lines)]
    notes = [f"- {one['shape']}: skipped: {one['why']}" for one in run.data["skipped"]]
    notes += [
        f"- {entry['shape']['name']}; {name}: {side['status']}: {side['why']}"
        for entry in run.entries
        for name, side in entry["sides"].items()
        if "why" in side
    ]
    if notes:
        parts.append("## Not timed, or not as meant\n\n" + "\n".join(line.replace("|", "\\|") for line in notes))
    return "\n\n".join(parts) + "\n"


def _figures(run: PackedRun | None) -> list[tuple[str, str, str]]:
    """Figure, bar, what was measured."""
    known = {entry["shape"]["name"]: entry for entry in run.entries} if run is not None else {}
    rows = []
    for shape in SHAPES:
        entry: Any = known.get(str(shape))
        mine = ours(entry) if entry is not None else None
        figure = NOT_MEASURED
        if mine is not None:
            figure = f"{number(1e3 * seconds(entry, mine))} ms, {number(_rate(entry, mine))} TFLOP/s"
        rows.append((str(shape), "", figure))
    for name in (FLEX, FLEX_BEFORE):
        both = [entry for entry in known.values() if name in timed(entry) and ours(entry) is not None]
        ratios = [ratio(entry, name, str(ours(entry)))[1] for entry in both]
        figure = (
            f"{spread(ratios)}; {sum(r > 1 for r in ratios)} of {len(ratios)} shapes pass" if both else NOT_MEASURED
        )
        rows.append((f"{name}: times as long as ours", "> 1", figure))
    return rows


def results_part(runs: list[PackedRun]) -> str:
    """The results page's part on packed trees, made from the runs that are kept, the newest first."""
    parts = [
        "## packed_tree_attention",
        f"From the `*{PackedRun.suffix}` files. Forward and backward, bf16, head size 128: trajectories with all "
        "branches that were not taken, on the committed tokens; all sides in turns and checked first. The bars are the "
        "project's goals.",
        f"```console\n{COMMAND} packed   # measures every figure below; at most 5 minutes\n```",
    ]
    sections: list[PackedRun | None] = [*runs] if runs else [None]
    for run in sections:
        if run is None:
            parts.append("No GPU has run this yet.")
        else:
            parts += [f"### {run.data['device']['name']}, {run.data['date']}", describe(run)]
        lines = ["| figure | bar | measured |", "|---|---|---|"]
        lines += [f"| {figure} | {bar} | {value.replace('|', '/')} |" for figure, bar, value in _figures(run)]
        parts.append("\n".join(lines))
        if run is not None:
            parts.append(f"All shapes: [{run.stem}.md]({run.stem}.md), raw samples beside it.")
    return "\n\n".join(parts) + "\n"
