"""Figures and tables of the synthetic study, from its JSON alone. What that lacks is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_kernels.evaluation.statistics import mean_interval
from lbr_kernels.files import write_whole

COLOURS = {
    "cot": "#c46a1a", "soft": "#8a6fb0", "oracle": "#2e8b57", "lbr": "#1f5fa8", "independent": "#7fa8cf",
}  # fmt: skip
BY_DEPTH = {"lbr": {1: COLOURS["lbr"], 2: "#0b2545"}, "independent": {1: COLOURS["independent"], 2: "#b58900"}}
NAMES = {
    "cot": "Discrete CoT",
    "soft": "Soft Thinking",
    "oracle": "LBR, legal candidates",
    "lbr": "LBR, drawn candidates",
    "independent": "… independent router",
}
DECODED = {
    "cot": "greedy",
    "soft": "legal tokens mixed",
    "oracle": "greedy router",
    "lbr": "K=3, L=1, sampled",
    "independent": "K=3, L=1, sampled",
}

# What the paper's section 4 and appendix B report: figure, quantity, its numbers, where ours are in the JSON.
Source = tuple[str, str, str]
PAPER: Sequence[tuple[str, str, str, Sequence[Source]]] = [
    ("4a", "target accuracy, LBR", "0.967", [("decoded", "oracle", "oracle")]),
    ("4a", "target accuracy, CoT", "0.914", [("decoded", "cot", "greedy")]),
    ("4a", "target accuracy, Soft Thinking", "0.845", [("decoded", "soft", "soft, oracle")]),
    ("4a", "router accuracy, beginning → end", "0.943 → 0.978", [("curve", "oracle", "router accuracy")]),
    ("4a", "divergence at branchings, beginning → end", "0.022 → 0.005", [("curve", "oracle", "router divergence")]),
    *(
        (
            "4b",
            f"target from {name}, {order} branching, before / right / wrong",
            numbers,
            [("probes", arm, f"target name, branching {which}, {place}") for place in ("before", "right", "wrong")],
        )
        for name, arm, which, order, numbers in (
            ("LBR", "oracle", 1, "first", ".33 / .59 / .325"),
            ("LBR", "oracle", 2, "second", ".38 / .73 / .23"),
            ("CoT", "cot", 1, "first", ".58 / .63 / .515"),
            ("CoT", "cot", 2, "second", ".64 / .605 / .405"),
        )
    ),
    *(
        (
            "7",
            f"identity of the first node, {name}, last digit / arrow",
            numbers,
            [("probes", arm, f"node, {place}") for place in ("last digit", "arrow")],
        )
        for name, arm, numbers in (
            ("CoT", "cot", "1.000 / 1.000"),
            ("LBR", "oracle", "1.000 / 1.000"),
            ("Soft Thinking", "soft", "0.759 / 0.803"),
        )
    ),
]


Run = tuple[str, str]  # a method, and how it was decoded


class Study:
    """The runs of one size, by seed; ``KeyError`` where there are none."""

    def __init__(self, path: Path) -> None:
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.seeds: dict[str, dict[str, Any]] = self.data["seeds"]
        if not self.seeds:
            raise KeyError("seeds")

    def arm(self, name: str) -> dict[str, dict[str, Any]]:
        """A method's runs by seed, of every seed that has one."""
        return {seed: told["arms"][name] for seed, told in self.seeds.items() if name in told["arms"]}

    def curve(self, arm: str, key: str) -> NDArray[np.float64]:
        """``[seeds, points]`` of what was kept along the way."""
        return np.array([[point[key] for point in run["curve"]] for run in self.arm(arm).values()], dtype=np.float64)

    def decoded(self, arm: str, way: str, key: str, kind: str = "last") -> NDArray[np.float64]:
        """One figure of a way of decoding for each seed that has it, ``[seeds]``."""
        ways = [run["decoded"] for run in self.arm(arm).values() if way in run["decoded"]]
        return np.array([told[way][kind][key] for told in ways], dtype=np.float64)

    def probe(self, arm: str, name: str) -> NDArray[np.float64]:
        """A probe's accuracy for each seed that has it, ``[seeds]``."""
        runs = self.arm(arm).values()
        return np.array([run["probes"][name] for run in runs if name in run["probes"]], dtype=np.float64)

    def ways(self) -> list[tuple[str, str]]:
        """Methods, and the ways in which they were decoded."""
        names = {arm: dict.fromkeys(way for run in self.arm(arm).values() for way in run["decoded"]) for arm in NAMES}
        return [(arm, way) for arm, ways in names.items() for way in ways]

    def differences(self, first: Run, second: Run) -> NDArray[np.float64]:
        """Accuracy of one way of decoding above another's, for each seed: both started from one model."""
        runs = [self.arm(arm) for arm, _ in (first, second)]
        seeds = [seed for seed in runs[0] if seed in runs[1]]
        told = [
            [run[seed]["decoded"][way]["last"]["accuracy"] for run, (_, way) in zip(runs, (first, second), strict=True)]
            for seed in seeds
            if all(way in run[seed]["decoded"] for run, (_, way) in zip(runs, (first, second), strict=True))
        ]
        return np.array([above - below for above, below in told], dtype=np.float64)

    def seconds(self, arm: str, way: str) -> tuple[float, float, float] | None:
        """Seconds per problem: the median over rounds, and the quartiles; None for what was not timed."""
        rounds = self.data["times"]["seconds_per_problem"].get(arm, {}).get(way)
        if rounds is None:
            return None
        low, middle, high = np.quantile(rounds, (0.25, 0.5, 0.75))
        return float(middle), float(low), float(high)


def spread(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Mean and 95 % interval over seeds; nothing of none."""
    if not len(values):
        return ""
    middle, half = mean_interval(list(map(float, values)))
    return f"{middle:.3f} ± {half:.3f}" if len(values) > 1 else f"{middle:.3f}"


def paper_table(study: Study) -> str:
    """The paper's numbers beside ours."""
    lines = ["| figure | what | paper | here |", "|---|---|---|---|"]
    for figure, what, theirs, sources in PAPER:
        parts = []
        for kind, name, key in sources:
            if kind == "curve":
                values = study.curve(name, key)
                parts += [f"{spread(values[:, 0])} → {spread(values[:, -1])}"] if len(values) else []
            else:
                values = study.decoded(name, key, "accuracy") if kind == "decoded" else study.probe(name, key)
                parts += [spread(values)] if len(values) else []
        if parts:
            lines.append(f"| {figure} | {what} | {theirs} | {' / '.join(parts)} |")
    return "\n".join(lines)


def ways_table(study: Study) -> str:
    """Every way of decoding: accuracy of the last and of the best checkpoint, and what it costs."""
    hops = list(next(iter(study.arm("cot").values()))["decoded"]["greedy"]["last"]["by_hops"])
    lines = [
        f"| trained as | decoded | accuracy, last | best | {' | '.join(f'{count} hops' for count in hops)} | legal | "
        "nodes per problem | ms per problem |",
        "|---|---|---|---|" + "---|" * len(hops) + "---|---|---|",
    ]
    for arm, way in study.ways():
        runs = [run["decoded"][way]["last"]["by_hops"] for run in study.arm(arm).values() if way in run["decoded"]]
        time = study.seconds(arm, way)
        cells = [
            NAMES[arm],
            way,
            *(spread(study.decoded(arm, way, "accuracy", kind)) for kind in ("last", "best")),
            *(f"{np.mean([run[count] for run in runs]):.3f}" for count in hops),
            f"{study.decoded(arm, way, 'legal').mean():.3f}",
            f"{study.decoded(arm, way, 'nodes_per_problem').mean():.1f}",
            "" if time is None else "{:.1f} ({:.1f} to {:.1f})".format(*(1000 * value for value in time)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def router_table(study: Study) -> str:
    """The full router against the one that judges every candidate alone (the paper's Figure 5, on this task)."""
    settings = [f"K={width} L={depth}" for depth in (1, 2) for width in (2, 3)]
    lines = [
        "| K, L | accuracy, full router | independent | difference | router accuracy, full | independent |",
        "|---|---|---|---|---|---|",
    ]
    for setting in settings:
        accuracies = [study.decoded(arm, setting, "accuracy") for arm in ("lbr", "independent")]
        difference = study.differences(("lbr", setting), ("independent", setting))
        routers = [study.curve(arm, f"router accuracy {setting}")[:, -1] for arm in ("lbr", "independent")]
        cells = [setting, *map(spread, accuracies), spread(difference), *map(spread, routers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


GREEDY: Run = ("cot", "greedy")
# What is worth telling apart, and what from.
PAIRS: Sequence[tuple[Run, Run]] = [
    (("oracle", "oracle"), GREEDY),
    (GREEDY, ("soft", "soft, oracle")),
    *(
        (("lbr", f"K={width} L={depth}"), plain)
        for plain in (("lbr", "greedy"), GREEDY)
        for depth in (1, 2)
        for width in (2, 3)
    ),
    (("independent", "K=3 L=2"), ("independent", "greedy")),
    (("lbr", "greedy"), GREEDY),
    *((("lbr", "K=3 L=2"), (arm, f"majority of {count}")) for arm in ("cot", "lbr") for count in (3, 9)),
    *((("lbr", "K=3 L=2, majority of 3"), (arm, "majority of 9")) for arm in ("cot", "lbr")),
]


def pairs_table(study: Study) -> str:
    """Differences of accuracy, seed by seed from one start, and how many times as many nodes the first takes."""
    lines = ["| | against | difference | lowest to highest seed | nodes |", "|---|---|--:|--:|--:|"]
    for pair in PAIRS:
        each = study.differences(*pair)
        if not len(each):
            continue
        nodes = [study.decoded(arm, way, "nodes_per_problem").mean() for arm, way in pair]
        names = [f"{NAMES[arm]}, {way}" for arm, way in pair]
        cells = [*names, spread(each), f"{each.min():+.3f} to {each.max():+.3f}", f"{nodes[0] / nodes[1]:.2f} times"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


HEADLINE: dict[str, Run] = {
    "plain decoding, greedy": ("cot", "greedy"),
    "plain decoding, sampled": ("cot", "sampled"),
    "majority vote of 3 samples": ("cot", "majority of 3"),
    "majority vote of 9 samples": ("cot", "majority of 9"),
    "Multiplex Thinking, K=3, untrained": ("cot", "Multiplex Thinking, K=3"),
    "Soft Thinking, trained, among legal tokens": ("soft", "soft, oracle"),
    "**LBR, K=3, L=1**": ("lbr", "K=3 L=1"),
    "**LBR, K=3, L=2**": ("lbr", "K=3 L=2"),
    "**majority vote of 3 LBR texts, K=3, L=2**": ("lbr", "K=3 L=2, majority of 3"),
    "LBR among legal tokens (the paper's setting)": ("oracle", "oracle"),
}


def headline_table(study: Study) -> str:
    """What a reader wants to know first."""
    lines = ["| decoding | right answers | nodes forwarded per problem | ms per problem |", "|---|--:|--:|--:|"]
    for name, (arm, way) in HEADLINE.items():
        accuracy, nodes = study.decoded(arm, way, "accuracy"), study.decoded(arm, way, "nodes_per_problem")
        if not len(accuracy):
            continue
        shown = f"{accuracy.mean():.3f} ({accuracy.min():.3f} to {accuracy.max():.3f})"
        time = study.seconds(arm, way)
        cells = [name, shown, f"{nodes.mean():.1f}", "" if time is None else f"{1000 * time[0]:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Study], str]] = {
    "headline": headline_table,
    "paper": paper_table,
    "ways": ways_table,
    "router": router_table,
    "pairs": pairs_table,
}


def write_tables(path: Path, page: Path) -> None:
    """Put tables between their marks on a page, ``<!-- NAME --> ... <!-- /NAME -->``, those that it has."""
    study, text = Study(path), page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        first = text.index(begin) + len(begin)
        text = text[:first] + table(study) + text[text.index(end, first) :]
    write_whole(page, text)


def draw(path: Path) -> list[Path]:
    """All figures, beside the JSON; their files."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams.update({
        "svg.hashsalt": "lbr_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "legend.frameon": False, "svg.fonttype": "none",
    })  # fmt: skip
    study, files = Study(path), []
    drawings = {"training": _training, "cost": _cost}
    if any(run["probes"] for arm in NAMES for run in study.arm(arm).values()):
        drawings["probes"] = _probes
    figures = {name: drawing(plt, study) for name, drawing in drawings.items()}  # all, before one is written
    for name, figure in figures.items():
        figure.tight_layout()
        files.append(path.with_name(f"{path.stem}-{name}.svg"))
        figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return files


def _line(axis: Any, x: NDArray[np.float64], y: NDArray[np.float64], colour: str, label: str, **style: Any) -> None:
    """The mean over seeds, and between the lowest and the highest a shade."""
    axis.plot(x, y.mean(axis=0), color=colour, label=label, **{"linewidth": 1.5, **style})
    axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _training(plt: Any, study: Study) -> Any:
    """Accuracy, router accuracy and divergence along the way (the paper's Figure 4a)."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    for arm in NAMES:
        steps, minutes, accuracy = (study.curve(arm, key) for key in ("step", "minutes", "accuracy"))
        if not len(steps):
            continue
        label = f"{NAMES[arm]} ({DECODED[arm]})"
        _line(axes[0], steps[0], accuracy, COLOURS[arm], label)
        _line(axes[1], np.median(minutes, axis=0), accuracy, COLOURS[arm], label)
    routers = [("oracle", "", COLOURS["oracle"])]
    routers += [(arm, f" K=3 L={depth}", BY_DEPTH[arm][depth]) for arm in BY_DEPTH for depth in (1, 2)]
    for arm, name, colour in routers:
        steps, label = study.curve(arm, "step"), f"{NAMES[arm]}{name}"
        if not len(steps):
            continue
        for axis, key in ((axes[2], "router accuracy"), (axes[3], "router divergence")):
            _line(axis, steps[0], study.curve(arm, key + name), colour, label)
    titles = ("target accuracy, validation graphs", "the same by time", "router accuracy", "KL to the right candidates")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="steps")
    axes[1].set(xlabel="minutes of one CPU core, median")
    axes[3].set(ylabel="nats", ylim=(0, None))
    for axis, where, columns in ((axes[0], 0.27, 2), (axes[2], 0.76, 2)):
        figure.legend(
            *axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(where, 0.0), ncol=columns, fontsize=8
        )
    return figure


def _probes(plt: Any, study: Study) -> Any:
    """What linear probes tell (the paper's Figures 4b and 7)."""
    figure, axes = plt.subplots(1, 5, figsize=(14, 3.2), width_ratios=[1, 1, 1, 1, 1])
    arms, places = ("cot", "oracle", "lbr"), ("before", "right", "wrong")
    panels = [(kind, which) for kind in ("name", "order") for which in (1, 2)]
    for axis, (kind, which) in zip(axes, panels, strict=False):
        for index, arm in enumerate(arms):
            for place, name in enumerate(places):
                values = study.probe(arm, f"target {kind}, branching {which}, {name}")
                if not len(values):
                    continue
                where = place + (index - 1) * 0.27
                axis.bar(where, values.mean(), 0.25, color=COLOURS[arm], label=NAMES[arm] if place == 0 else None)
                axis.plot([where] * len(values), values, ".", color="black", markersize=3)
        axis.set_xticks(range(3), ["before", "after\nright", "after\nwrong"])
        chance = 1 / 16 if kind == "name" else 1 / 2
        axis.axhline(chance, color="black", linewidth=0.6, linestyle=":")
        what = "the target's name" if kind == "name" else "which of the two targets"
        axis.set(title=f"{what},\n{'first' if which == 1 else 'second'} branching", ylim=(0, 1))
    for index, arm in enumerate(("cot", "oracle", "soft")):
        for place, name in enumerate(("last digit", "arrow")):
            values = study.probe(arm, f"node, {name}")
            if not len(values):
                continue
            where = place + (index - 1) * 0.27
            axes[4].bar(where, values.mean(), 0.25, color=COLOURS[arm], label=NAMES[arm] if place == 0 else None)
            axes[4].plot([where] * len(values), values, ".", color="black", markersize=3)
    axes[4].set_xticks(range(2), ["last digit", "arrow"])
    axes[4].set(title="the first node\nthat was generated", ylim=(0, 1))
    for axis, where in ((axes[0], 0.4), (axes[4], 0.88)):
        figure.legend(
            *axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(where, 0.0), ncol=3, fontsize=8
        )
    return figure


# In the picture of costs: what is named, and where the name stands; what has none lies on its neighbours.
LABELS: dict[Run, tuple[str, tuple[int, int]]] = {
    ("cot", "sampled"): ("sampled", (-6, -9)),
    ("cot", "greedy"): ("greedy", (-6, 4)),
    ("cot", "majority of 3"): ("majority of 3", (6, 3)),
    ("cot", "majority of 9"): ("majority of 9", (6, -9)),
    ("cot", "Multiplex Thinking, K=3"): ("Multiplex, K=3", (6, -3)),
    ("soft", "soft, oracle"): ("Soft Thinking", (-6, 4)),
    ("oracle", "oracle"): ("LBR among legal tokens", (-6, 4)),
    ("lbr", "K=2 L=1"): ("K=2 L=1", (6, -8)),
    ("lbr", "K=3 L=1"): ("K=3 L=1", (6, -9)),
    ("lbr", "K=2 L=2"): ("K=2 L=2", (6, -3)),
    ("lbr", "K=3 L=2"): ("K=3 L=2", (6, -3)),
    ("lbr", "majority of 3"): ("majority of 3", (6, -9)),
    ("lbr", "majority of 9"): ("majority of 9", (6, 1)),
    ("lbr", "K=3 L=2, majority of 3"): ("K=3 L=2, majority of 3", (-6, 5)),
}


def _cost(plt: Any, study: Study) -> Any:
    """Accuracy against what it costs: nodes forwarded, and seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for (arm, way), (name, (right, up)) in LABELS.items():
        accuracy = study.decoded(arm, way, "accuracy")
        if not len(accuracy):
            continue
        marker = "^" if "oracle" in way else "o"
        style = {"color": COLOURS[arm], "marker": marker, "linestyle": "", "markersize": 5}
        costs, time = [study.decoded(arm, way, "nodes_per_problem").mean()], study.seconds(arm, way)
        costs += [] if time is None else [1000 * time[0]]
        for axis, cost in zip(axes, costs, strict=False):
            middle = accuracy.mean()
            axis.errorbar(cost, middle, [[middle - accuracy.min()], [accuracy.max() - middle]], elinewidth=0.8, **style)
            axis.annotate(name, (cost, middle), xytext=(right, up), textcoords="offset points", fontsize=8,
                          color=COLOURS[arm], ha="left" if right > 0 else "right")  # fmt: skip
    for axis, label in zip(axes, ("nodes forwarded per problem", "milliseconds per problem"), strict=True):
        least, most = axis.dataLim.intervalx
        axis.set(xlabel=label, xscale="log", xlim=(0.6 * least, 1.6 * most))
        axis.set_xticks([tick for tick in (3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60) if 0.6 * least < tick < 1.6 * most])
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].set(ylabel="target accuracy, test graphs")
    for arm in dict.fromkeys(arm for arm, _ in LABELS):
        axes[0].plot([], [], "s", color=COLOURS[arm], label=f"trained: {NAMES[arm]}")
    axes[0].plot([], [], "^", color="black", label="an oracle says what is legal")
    axes[0].plot([], [], "k-", linewidth=0.8, label="lowest to highest seed")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=3, fontsize=8
    )
    return figure
