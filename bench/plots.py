"""The plots of a benchmark run: roofline, latency against one axis at a time, milliseconds per token.

Contract
--------
:func:`draw` writes SVG files that depend on the run alone, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from report import Record, Run

OURS, SDPA, NAIVE, PLAIN = "#1f5fa8", "#c46a1a", "#8a8a8a", "#c46a1a"
MARKERS = {"float32": "o", "bfloat16": "s"}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def draw(run: Run, directory: Path) -> list[Path]:
    """All plots for which the run has records; returns the files."""
    mpl.rcParams.update({
        "svg.hashsalt": "lbr_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "legend.frameon": False, "svg.fonttype": "none",
    })  # fmt: skip
    written = []
    for name, figure in (("attention", _attention(run)), ("sweeps", _sweeps(run)), ("generate", _generate(run))):
        if figure is None:
            continue
        path = directory / f"{run.path.stem}-{name}.svg"
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def _best_sdpa(record: Record) -> float:
    times: dict[str, Any] = record["seconds"]
    return min(float(value["median"]) for name, value in times.items() if name.startswith("SDPA"))


def _ours(record: Record) -> float:
    return float(record["seconds"]["ours"]["median"])


def _attention(run: Run) -> Figure | None:
    """A roofline for each dtype: operations per byte against operations per second."""
    records = run.of("tree_attention", prefix=(8192, 16384, 32768), batch=1)
    if not records:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        here = [r for r in records if r["dtype"] == dtype]
        if not here:
            continue
        read = sorted(r["roof"]["read_bytes"] for r in here)[len(here) // 2]
        peak = sorted(r["roof"][dtype] for r in here)[len(here) // 2]
        xs = sorted([0.5, peak / read, 256])
        axis.plot(xs, [min(x * read, peak) / 1e9 for x in xs], color="black", linewidth=1, label="roof")
        axis.plot(
            xs, [0.6 * min(x * read, peak) / 1e9 for x in xs], color="black", linewidth=0.7, linestyle=":", label="60 %"
        )
        intensity = [r["flops"] / r["bytes"] for r in here]
        for label, color, marker, time in (("tree_attention", OURS, "o", _ours), ("best SDPA", SDPA, "x", _best_sdpa)):
            axis.scatter(
                intensity, [r["flops"] / time(r) / 1e9 for r in here], s=18, color=color, marker=marker, label=label
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="operations per byte of keys and values",
            title=f"{SHORT[dtype]}, prefix ≥ 8192",
        )
        axis.legend(loc="lower right")
    axes[0].set_ylabel("GFLOP/s")
    figure.suptitle("tree attention against the machine's roof, caches cold", y=1.02)
    return figure


def _line(axis: Axes, records: list[Record], key: str, time: Callable[[Record], float], **style: Any) -> None:
    records = sorted(records, key=lambda r: r["shape"][key])
    axis.plot([r["shape"][key] for r in records], [1e3 * time(r) for r in records], markersize=4, linewidth=1, **style)


def _sweeps(run: Run) -> Figure | None:
    """Latency against prefix, nodes and batch, everything else held."""
    held: dict[str, Any] = {"heads": "32/8", "head size": 64}
    panels: list[tuple[str, dict[str, Any]]] = [
        ("prefix", {"nodes": 3, "batch": 1}),
        ("nodes", {"prefix": 8192, "batch": 1}),
        ("batch", {"prefix": 2048, "nodes": 3}),
    ]
    if not run.of("tree_attention", prefix=2048):
        return None  # a selection
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for axis, (key, fixed) in zip(axes, panels, strict=True):
        for dtype in ("float32", "bfloat16"):
            here = run.of("tree_attention", dtype=dtype, **held, **fixed)
            style = {"marker": MARKERS[dtype], "linestyle": "-" if dtype == "float32" else "--"}
            _line(axis, here, key, _ours, color=OURS, label=f"ours, {SHORT[dtype]}", **style)
            _line(axis, here, key, _best_sdpa, color=SDPA, label=f"best SDPA, {SHORT[dtype]}", **style)
        axis.set(xlabel=key, yscale="log")
        if key != "nodes":
            axis.set_xscale("log", base=2)
    axes[0].set_ylabel("milliseconds")
    for axis, title in zip(axes, ("3 nodes", "prefix 8192", "3 nodes, prefix 2048"), strict=True):
        axis.set_title(title)
    axes[0].legend(loc="upper left", fontsize=7)
    figure.suptitle("tree attention, heads 32/8, head size 64, caches cold", y=1.02)
    return figure


def _generate(run: Run) -> Figure | None:
    """Milliseconds per committed token for every K and L, beside plain decoding and naive branch routing."""
    records = run.of("generate")
    if not records:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        here = sorted((r for r in records if r["dtype"] == dtype), key=lambda r: (r["shape"]["L"], r["shape"]["K"]))
        names = [f"K={r['shape']['K']}\nL={r['shape']['L']}" for r in here]
        ours = [r["milliseconds_per_token"]["ours"] for r in here]
        plain = [r["milliseconds_per_token"]["model.generate"] for r in here]
        axis.bar(range(len(here)), ours, color=OURS, width=0.6, label="lbr_kernels.generate")
        axis.plot(
            range(len(here)), plain, color=PLAIN, marker="_", markersize=18, linestyle="none", label="model.generate"
        )
        naive = [
            (i, r["milliseconds_per_token"]["naive LBR"])
            for i, r in enumerate(here)
            if "naive LBR" in r["milliseconds_per_token"]
        ]
        if naive:
            axis.plot(*zip(*naive, strict=True), color=NAIVE, marker="v", linestyle="none", label="naive LBR")
        for i, value in enumerate(ours):
            axis.text(i, value, f"{1e3 / value:.0f}/s", ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(here)), names)
        axis.set(title=SHORT[dtype], ylim=(0, None))
    axes[0].set_ylabel("milliseconds per committed token")
    axes[0].legend(loc="lower center", bbox_to_anchor=(1.1, -0.42), ncols=3)
    parameters = records[0]["shape"]["parameters"] / 1e6
    figure.suptitle(
        f"a decoding step of a Qwen2 of {parameters:.0f} M parameters; above the bars tokens per second", y=1.03
    )
    return figure
