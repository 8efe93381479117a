"""Tables, plot and results page of the GPU benchmark; all figures are read from its JSON and nowhere else.

A time is the median over rounds. A ratio is the median over rounds of another side's time divided by ours in the same
round, so that more than 1 means that ours is faster. "Ours" is the faster of our backends at that shape: the library is
to choose it by :func:`preference`. The roof is the larger of the readings at the start and at the end of the run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import number, spread

from lbr_kernels.ops._preferences import shape_class

if TYPE_CHECKING:
    from typing_extensions import Self

Entry = dict[str, Any]

MEGA = 1_000_000
SHARE_BARS = ((250 * MEGA, 80.0), (64 * MEGA, 55.0))
"""From so many bytes of cache per layer on, so many per cent of the roof."""
TIME_BAR = (16 * MEGA, 10e-6)
"""Below so many bytes of cache per layer, at most so many seconds."""

COMMAND = ".venv/bin/python bench/gpu.py"
OTHERS = (
    "SDPA, dense mask, enable_gqa",
    "SDPA, dense mask, heads folded",
    "FlexAttention",
    "two-pass, torch",
    "two-pass, flash-attn 2",
    "two-pass, flash-attn 3",
    "FlashInfer, paged prefill",
)
NOT_MEASURED = "not measured"


class Run:
    """One run of the benchmark, as its JSON tells it."""

    suffix = "-attention.json"

    def __init__(self, data: dict[str, Any], stem: str) -> None:
        self.data, self.stem = data, stem
        self.entries: list[Entry] = data["shapes"]

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(json.loads(path.read_text(encoding="utf-8")), path.stem)

    @classmethod
    def kept(cls, directory: Path) -> list[Self]:
        """The runs in a directory, the newest first; dry runs and selections are none."""
        runs = [cls.load(path) for path in sorted(directory.glob(f"*{cls.suffix}"), reverse=True)]
        return [run for run in runs if not run.data["dry_run"] and not run.data["quick"]]

    def rate(self, name: str) -> float:
        """``copy`` in bytes or ``matmul`` in operations per second; the larger of the readings."""
        return float(max(statistics.median(reading[name]) for reading in self.data["roof"]))

    def roof_seconds(self, entry: Entry) -> float:
        return max(float(entry["bytes"]) / self.rate("copy"), float(entry["flops"]) / self.rate("matmul"))

    def share(self, entry: Entry) -> float | None:
        """Per cent of the roof that ours reaches."""
        name = ours(entry)
        return None if name is None else 100 * self.roof_seconds(entry) / seconds(entry, name)


def timed(entry: Entry) -> list[str]:
    """The sides that were timed at a shape."""
    return [name for name, side in entry["sides"].items() if side["status"] == "timed"]


def seconds(entry: Entry, name: str) -> float:
    return float(statistics.median(entry["sides"][name]["seconds"]))


def ours(entry: Entry) -> str | None:
    """The faster of ours."""
    return fastest(entry, [name for name in timed(entry) if name.startswith("ours")])


def fastest(entry: Entry, names: list[str]) -> str | None:
    return min(names, key=lambda name: seconds(entry, name)) if names else None


def others(entry: Entry) -> list[str]:
    return [name for name in timed(entry) if not name.startswith("ours")]


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def ratio(entry: Entry, name: str, to: str) -> tuple[float, float, float]:
    """Quartiles over rounds of one side's time in units of another's."""
    pairs = zip(entry["sides"][name]["seconds"], entry["sides"][to]["seconds"], strict=True)
    return quartiles([one / other for one, other in pairs])


def speed_bar(entry: Entry) -> tuple[str, float] | None:
    """The bar of a shape's size: ``("share", per cent at least)`` or ``("seconds", at most)``."""
    if entry["cache_bytes"] < TIME_BAR[0]:
        return "seconds", TIME_BAR[1]
    return next((("share", share) for least, share in SHARE_BARS if entry["cache_bytes"] >= least), None)


def meets_speed_bar(run: Run, entry: Entry) -> bool | None:
    """None where there is no bar or nothing of ours was timed."""
    name, bar, share = ours(entry), speed_bar(entry), run.share(entry)
    if name is None or share is None or bar is None:
        return None
    return seconds(entry, name) <= bar[1] if bar[0] == "seconds" else share >= bar[1]


def is_ahead(entry: Entry) -> bool | None:
    """Whether ours is faster than every other side that was timed; None where there is nothing to compare."""
    name, rest = ours(entry), others(entry)
    if name is None or not rest:
        return None
    return all(ratio(entry, other, name)[1] > 1 for other in rest)


def preference(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """For every class of shapes which of our two backends is faster: by the geometric mean of triton / cuda.

    Classes are rows per key head and head size; only shapes at which both were timed count.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for entry in entries:
        if {"ours, cuda", "ours, triton"} <= set(timed(entry)):
            shape = entry["shape"]
            ratios = found.setdefault(shape_class(shape["rows"], shape["head_size"]), [])
            ratios.append(ratio(entry, "ours, triton", "ours, cuda")[1])
    return [
        {
            "rows": rows,
            "head_size": head_size,
            "backend": "cuda" if statistics.fmean(map(math.log, ratios)) >= 0 else "triton",
            "triton_over_cuda": ratios,
        }
        for (rows, head_size), ratios in sorted(found.items())
    ]


def preference_literal(run: Run) -> str:
    """The preference as the library holds it."""
    lines = [
        f'    ({one["rows"]}, {one["head_size"]}): "{one["backend"]}",  '
        f"# triton takes {spread(one['triton_over_cuda'])} times as long; shapes: {len(one['triton_over_cuda'])}"
        for one in run.data["preference"]
    ]
    return "\n".join([f'SOURCE = "{run.stem}.json"', "TREE_ATTENTION = {", *lines, "}"])


def verdict(met: bool | None) -> str:
    return {True: "pass", False: "FAIL", None: ""}[met]


def shape_name(entry: Entry) -> str:
    s = entry["shape"]
    return f"batch {s['batch']}, prefix {s['prefix']}, nodes {s['nodes']}, heads {s['heads']}/{s['kv_heads']}"


def describe(run: Run) -> str:
    """Device, versions, roof, date."""
    data = run.data
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    device = data["device"]
    text = (
        f"{device['name']}, driver {device['driver']}, {versions}, {data['date']}. Its memory copies "
        f"{number(run.rate('copy') / 1e9)} GB/s (read and written), its matrix units do "
        f"{number(run.rate('matmul') / 1e12)} TFLOP/s in {data['dtype']} on random data; both measured in the run."
    )
    if data["dry_run"]:
        text = "**Dry run: tiny shapes on a CPU, to exercise the script. No figure here means anything.** " + text
    if data["quick"]:
        text += " A selection of the shapes."
    if not data["complete"]:
        text += " **The run did not come to its end.**"
    return text


def tables(run: Run) -> str:
    """The whole run as Markdown."""
    parts = [f"# {run.stem}", describe(run), run.data["method"]]
    parts.append(
        "Ours is the faster of our backends. Times are medians; other sides in units of ours, in parentheses the "
        "quartiles over rounds. `bar` is the goal for this size of cache (from 250 MB 80 % of the roof, from 64 MB "
        "55 %, below 16 MB 10 µs); `ahead` is whether every other side that was timed is slower."
    )
    lines = [
        "| shape | cache, MB | roof, µs | ours, µs | % of roof | bar | ahead | times as long as ours |",
        "|---|--:|--:|---|--:|---|---|---|",
    ]
    for entry in run.entries:
        name, share = ours(entry), run.share(entry)
        mine = [
            f"{side.removeprefix('ours, ')} {number(1e6 * seconds(entry, side))}"
            for side in timed(entry)
            if side.startswith("ours")
        ]
        rest = []
        for side, record in entry["sides"].items():
            mark = "" if record.get("graph", True) else ", no graph"
            if record["status"] != "timed":
                rest.append(f"{side}: {record['status']}")
            elif side.startswith("ours"):
                if mark:
                    rest.append(f"{side}: not in a graph")
            elif name is None:
                rest.append(f"{side}: {number(1e6 * seconds(entry, side))} µs{mark}")
            else:
                low, median, high = ratio(entry, side, name)
                rest.append(f"{side}: {number(median)} ({number(low)} to {number(high)}{mark})")
        cells = [
            shape_name(entry),
            number(entry["cache_bytes"] / MEGA),
            number(1e6 * run.roof_seconds(entry)),
            "<br>".join(mine) or "",
            "" if share is None else number(share),
            verdict(meets_speed_bar(run, entry)),
            verdict(is_ahead(entry)),
            "<br>".join(rest),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    parts.append("\n".join(lines))
    parts += _notes(run)
    return "\n\n".join(parts) + "\n"


def _notes(run: Run) -> list[str]:
    """What was not timed and why, what was timed apart, and the preference."""
    parts = []
    data = run.data
    notes = [f"- {name}: {why}" for name, why in data["not_available"].items()]
    notes += [f"- {one['shape']}: skipped: {one['why']}" for one in data["skipped"]]
    notes += [
        f"- {shape_name(entry)}; {name}: {side['status']}: {side['why']}"
        for entry in run.entries
        for name, side in entry["sides"].items()
        if "why" in side
    ]
    if notes:
        parts.append("## Not timed, or not as meant\n\n" + "\n".join(line.replace("|", "\\|") for line in notes))
    apart: dict[str, list[float]] = {}
    for entry in run.entries:
        for name, side in entry["sides"].items():
            for what, taken in side.get("apart", {}).items():
                apart.setdefault(f"{name}: {what}", []).append(taken)
    if apart:
        rows = [f"- {what}: {spread(1e6 * value for value in values)} µs" for what, values in apart.items()]
        parts.append("## Prepared once for a shape, not in the times\n\n" + "\n".join(rows))
    known = f"```python\n{preference_literal(run)}\n```" if data["preference"] else NOT_MEASURED
    parts.append(f"## Which of our backends\n\n{known}")
    return parts


def _figures(run: Run | None) -> list[tuple[str, str, str]]:
    """Figure, bar, what was measured."""

    def over(entries: list[Entry], value: Any, unit: str, met: Any) -> str:
        found = [(value(entry), met(entry)) for entry in entries if ours(entry) is not None]
        if not found:
            return NOT_MEASURED
        passed = sum(bool(ok) for _, ok in found)
        return f"{spread(figure for figure, _ in found)} {unit}; {passed} of {len(found)} shapes pass"

    entries = run.entries if run is not None else []
    rows = []
    above: float = math.inf
    for least, bar in SHARE_BARS:
        here = [e for e in entries if least <= e["cache_bytes"] < above]
        size = f"from {least // MEGA} MB" + ("" if above == math.inf else f" to {int(above) // MEGA} MB")
        figure = NOT_MEASURED
        if run is not None:
            figure = over(here, run.share, "%", lambda entry: meets_speed_bar(run, entry))
        rows.append((f"share of the roof, {size} of cache per layer", f"≥ {bar:.0f} %", figure))
        above = least
    small = [e for e in entries if e["cache_bytes"] < TIME_BAR[0]]
    figure = NOT_MEASURED
    if run is not None:
        figure = over(
            small, lambda entry: 1e6 * seconds(entry, str(ours(entry))), "µs", lambda entry: meets_speed_bar(run, entry)
        )
    rows.append((f"time, below {TIME_BAR[0] // MEGA} MB of cache per layer", f"≤ {1e6 * TIME_BAR[1]:.0f} µs", figure))
    for name in OTHERS:
        figure = NOT_MEASURED
        both = [e for e in entries if name in timed(e) and ours(e) is not None]
        if both:
            ratios = [ratio(entry, name, str(ours(entry)))[1] for entry in both]
            figure = f"{spread(ratios)}; {sum(value > 1 for value in ratios)} of {len(ratios)} shapes pass"
        elif run is not None and name in run.data["not_available"]:
            figure = f"{NOT_MEASURED}: {run.data['not_available'][name]}"
        rows.append((f"{name}: times as long as ours", "> 1", figure))
    preferred = run.data["preference"] if run is not None else []
    chosen = ", ".join(f"{one['rows']} rows, head size {one['head_size']}: {one['backend']}" for one in preferred)
    rows.append(("which of our backends is the faster", "", chosen or NOT_MEASURED))
    return rows


def results_part(runs: list[Run]) -> str:
    """The results page's part on tree attention, made from the runs that are kept, the newest first."""
    parts = [
        "## tree_attention",
        f"From the `*{Run.suffix}` files. bf16, head size 128, caches cold, all "
        "sides in turns in CUDA graphs and checked first; ours is the faster of our backends. The bars are the "
        "project's goals.",
        f"```console\n{COMMAND} attention   # measures every figure below; at most 8 minutes\n```",
    ]
    sections: list[Run | None] = [*runs] if runs else [None]
    for run in sections:
        if run is None:
            parts.append("No GPU has run this yet.")
        else:
            parts.append(f"### {run.data['device']['name']}, {run.data['date']}")
            parts.append(describe(run))
        lines = ["| figure | bar | measured |", "|---|---|---|"]
        lines += [f"| {figure} | {bar} | {value.replace('|', '/')} |" for figure, bar, value in _figures(run)]
        parts.append("\n".join(lines))
        if run is not None:
            parts.append(f"![Against the roof]({run.stem}.svg)")
            parts.append(f"All shapes: [{run.stem}.md]({run.stem}.md), raw samples beside it.")
    return "\n\n".join(parts) + "\n"


def draw(run: Run, path: Path) -> None:
    """Operations per second against operations per byte, and the share of the roof against the size of the cache."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams.update({
        "svg.hashsalt": "lbr_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "legend.frameon": False, "svg.fonttype": "none",
    })  # fmt: skip
    figure, (roofline, shares) = plt.subplots(1, 2, figsize=(10, 3.8))
    copy, matmul = run.rate("copy"), run.rate("matmul")
    intensity = [entry["flops"] / entry["bytes"] for entry in run.entries]
    xs = sorted([1.0, matmul / copy, *intensity, 2 * matmul / copy])
    roofline.plot(xs, [min(x * copy, matmul) / 1e12 for x in xs], color="black", linewidth=1, label="roof")
    mine = [(x, entry, name) for x, entry in zip(intensity, run.entries, strict=True) if (name := ours(entry))]
    rest = [(x, entry, fastest(entry, others(entry))) for x, entry in zip(intensity, run.entries, strict=True)]
    best = [(x, entry, name) for x, entry, name in rest if name]
    for label, color, marker, points in (
        ("tree_attention", "#1f5fa8", "o", mine),
        ("the fastest other side", "#c46a1a", "x", best),
    ):
        rates = [entry["flops"] / seconds(entry, name) / 1e12 for _, entry, name in points]
        roofline.scatter([x for x, _, _ in points], rates, s=18, color=color, marker=marker, label=label)
        percents = [100 * run.roof_seconds(entry) / seconds(entry, name) for _, entry, name in points]
        sizes = [entry["cache_bytes"] / MEGA for _, entry, _ in points]
        shares.scatter(sizes, percents, s=18, color=color, marker=marker, label=label)
    roofline.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    roofline.legend(loc="lower right")
    right = max([entry["cache_bytes"] / MEGA for entry in run.entries] + [SHARE_BARS[0][0] / MEGA]) * 1.5
    for least, bar in SHARE_BARS:
        shares.plot([least / MEGA, right], [bar, bar], color="black", linewidth=0.7, linestyle=":")
    shares.set(xscale="log", xlabel="MB of keys and values", ylabel="% of the roof", ylim=(0, None))
    title = f"tree attention, {run.data['dtype']}, {run.data['device']['name']}, caches cold"
    figure.suptitle(f"DRY RUN: {title}" if run.data["dry_run"] else title, y=1.0)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
