"""Tables, plot and the results page's sections of the benchmark of the decoding step; all figures are from its JSON.

A time is the median over rounds, a ratio the median over rounds of two sides' times in the same round. Plain decoding
is the same engine with K = 1, L = 1. Tokens per second of a call count its new tokens over all of its time, the
prompt's included; those of steps leave the prompt out.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_ops import Case, cases
from gpu_report import COMMAND, NOT_MEASURED, Entry, Run, describe, fastest, quartiles, seconds, timed, verdict
from gpu_step import FULL, PLAIN, SETTINGS, entries, setting_name, step_seconds
from report import number, spread

STEP_BARS = {(3, 1): 1.10, (3, 2): 1.25}
"""By width and depth, at most so many times plain decoding's time for a committed token."""
GENERATE_BAR = 5.0
"""At least so many times as many tokens per second as ``model.generate``."""
GIGA = 1_000_000_000


class StepRun(Run):
    """One run, as its JSON tells it."""

    suffix = "-step.json"

    def __init__(self, data: dict[str, Any], stem: str) -> None:
        super().__init__({**data, "shapes": data["ops"]}, stem)

    @property
    def engine(self) -> str:
        """What the settings are compared on."""
        return str(self.data["engine"])

    def steps(self, batch: int) -> Entry | None:
        return next((entry for entry in self.data["steps"] if entry["batch"] == batch), None)

    def side(self, width: int, depth: int) -> str:
        return f"{setting_name(width, depth)}, {self.engine}"


def preference_literal(run: StepRun) -> str:
    """The preference as the library holds it."""
    lines = [
        f'    "{op}": "{one["backend"]}",  # triton takes {spread(one["triton_over_cuda"])} times as long'
        for op, one in run.data["preference"].items()
    ]
    return "\n".join([f'OPS_SOURCE = "{run.stem}.json"', "OPS = {", *lines, "}"])


def fastest_backend(entry: Entry) -> str | None:
    """The faster of our backends at a case; in a dry run whatever is not the reference."""
    return fastest(entry, [name for name in timed(entry) if name != "reference"])


def meets_bar(entry: Entry) -> bool | None:
    """None where there is no bar or nothing of ours was timed."""
    name = fastest_backend(entry)
    return None if name is None or entry["bar"] is None else seconds(entry, name) <= entry["bar"]


def times_plain(run: StepRun, entry: Entry, width: int, depth: int) -> tuple[float, float, float] | None:
    """Quartiles of a step's time in units of plain decoding's; None where one of them was not timed."""
    one, plain = run.side(width, depth), run.side(*SETTINGS[0])
    if not {one, plain} <= set(timed(entry)):
        return None
    pairs = zip(step_seconds(entry, one), step_seconds(entry, plain), strict=True)
    return quartiles([mine / its for mine, its in pairs])


def times_generate(entry: Entry, name: str) -> tuple[float, float, float] | None:
    """Quartiles of a side's tokens per second of a call in units of ``model.generate``'s."""
    if not {name, PLAIN} <= set(timed(entry)):
        return None
    sides = entry["sides"]
    return quartiles([its / mine for mine, its in zip(sides[name]["long"], sides[PLAIN]["long"], strict=True)])


def call_tokens(entry: Entry, name: str) -> float:
    """Tokens per second of a call."""
    return float(entry["batch"] * entry["new"][1] / statistics.median(entry["sides"][name]["long"]))


def step_tokens(entry: Entry, name: str) -> float:
    """Tokens per second of steps."""
    return float(entry["batch"] / statistics.median(step_seconds(entry, name)))


def peak(side: dict[str, Any]) -> float:
    """Bytes reserved at the peak; what graphs hold is among them."""
    return float(side["reserved"])


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)])


def _shown(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return NOT_MEASURED
    low, median, high = found
    return f"{number(median)} ({number(low)} to {number(high)})"


def tables(run: StepRun) -> str:
    """The whole run as Markdown."""
    data = run.data
    parts = [f"# {run.stem}", describe(run), data["method"]]
    if data["model"]:
        model = data["model"]
        parts.append(
            f"The model is a Qwen2 of {number(model['parameters'] / 1e9)} billion random weights: "
            f"{model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, heads "
            f"{model['num_attention_heads']}/{model['num_key_value_heads']}, vocabulary {model['vocab_size']}. In "
            "parentheses are the quartiles over rounds."
        )
    sections: list[tuple[str, Callable[[StepRun], str]]] = [
        ("Checked first", _checks), ("The ops", _ops), ("Which of our backends", _preference), ("A step", _steps),
        ("Tokens per second of steps, by batch", _batches), ("Where a step's time goes", _phases),
        ("The engines", _engines), ("Memory", _memory), ("Not measured, or not as meant", _notes), ("Time", _time),
    ]  # fmt: skip
    for title, make in sections:
        if text := make(run):
            parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _checks(run: StepRun) -> str:
    rows = [[one["engine"], one["what"], one["status"], one.get("why", "")] for one in run.data["checks"]]
    return _table(["engine", "check", "outcome", ""], rows)


def _ops(run: StepRun) -> str:
    names = list(dict.fromkeys(name for entry in run.entries for name in entry["sides"]))
    rows = []
    for entry in run.entries:
        here = set(timed(entry))
        cells = []
        for name in names:
            side = entry["sides"].get(name, {"status": ""})
            mark = "" if side.get("graph", True) else ", no graph"
            if name in here:
                cells.append(_shown(quartiles([1e6 * taken for taken in side["seconds"]])) + mark)
            else:
                cells.append(side["status"])
        roof = number(1e6 * entry["bytes"] / run.rate("copy")) if entry["cold"] else ""
        bar = "" if entry["bar"] is None else f"≤ {1e6 * entry['bar']:.0f}"
        rows.append([f"`{entry['op']}`", entry["case"], roof, *cells, bar, verdict(meets_bar(entry))])
    heads = ["op", "case", "roof, µs", *(f"{name}, µs" for name in names), "bar, µs", ""]
    return _table(heads, rows) + "\n\nThe roof is what the least bytes take at the rate of a copy, where data is cold."


def _preference(run: StepRun) -> str:
    return f"```python\n{preference_literal(run)}\n```" if run.data["preference"] else NOT_MEASURED


def _steps(run: StepRun) -> str:
    rows = []
    for entry in sorted(run.data["steps"], key=lambda entry: int(entry["batch"])):
        for name in timed(entry):
            side = entry["sides"][name]
            setting = (side["width"], side["depth"])
            ours = side["engine"] is not None
            ratio_plain = times_plain(run, entry, *setting) if ours and setting != SETTINGS[0] else None
            bar = STEP_BARS.get(setting) if ours else None
            met = None if ratio_plain is None or bar is None else ratio_plain[1] <= bar
            against = times_generate(entry, name) if ours else None
            rows.append([
                str(entry["batch"]), name, _shown(quartiles([1e3 * taken for taken in step_seconds(entry, name)])),
                "" if ratio_plain is None else _shown(ratio_plain), "" if bar is None else f"≤ {bar:.2f}", verdict(met),
                number(call_tokens(entry, name)), "" if against is None else _shown(against),
                "" if against is None else f"≥ {GENERATE_BAR:.0f}",
                verdict(None if against is None else against[1] >= GENERATE_BAR),
                number(side["nodes_per_token"]) if ours else "", number(side["warm_up"]) if "warm_up" in side else "",
            ])  # fmt: skip
    heads = [
        "batch", "side", "ms a step", "times plain", "bar", "", "tokens/s of a call", f"times {PLAIN}'s", "bar", "",
        "nodes per token", "warm-up, s",
    ]  # fmt: skip
    return _table(heads, rows)


def _batches(run: StepRun) -> str:
    names = [run.side(*setting) for setting in SETTINGS]
    rows = []
    for entry in sorted(run.data["steps"], key=lambda entry: int(entry["batch"])):
        here = set(timed(entry))
        rows.append([
            str(entry["batch"]),
            *(number(step_tokens(entry, name)) if name in here else NOT_MEASURED for name in (*names, PLAIN)),
        ])  # fmt: skip
    return _table(["batch", *names, PLAIN], rows)


def shares(taken: dict[str, float]) -> dict[str, float]:
    """Per cent of a step."""
    return {phase: 100 * value / sum(taken.values()) for phase, value in taken.items()}


def _phases(run: StepRun) -> str:
    rows = []
    for entry in run.data["phases"]:
        for name, record in entry["settings"].items():
            if record["status"] == "timed":
                cells = [
                    f"{phase} {number(share)} % ({number(1e3 * record['seconds'][phase])} ms)"
                    for phase, share in shares(record["seconds"]).items()
                ]
                rows.append([str(entry["batch"]), name, "; ".join(cells)])
    text = "Of the engine static, by the device's clock; forward is the layers and the head."
    return f"{_table(['batch', 'setting', 'share of the step'], rows)}\n\n{text}"


def _engines(run: StepRun) -> str:
    rows = []
    for entry in run.data["engines"]:
        here = timed(entry)
        for name in here:
            side = entry["sides"][name]
            fast = run.side(side["width"], side["depth"])
            against = ""
            if fast in here and name != fast:
                pairs = zip(step_seconds(entry, name), step_seconds(entry, fast), strict=True)
                against = _shown(quartiles([its / mine for its, mine in pairs]))
            rows.append([
                str(entry["batch"]), name, _shown(quartiles([1e3 * taken for taken in step_seconds(entry, name)])),
                against, number(side["warm_up"]) if "warm_up" in side else "",
            ])  # fmt: skip
    return _table(["batch", "side", "ms a step", f"times {run.engine}", "warm-up, s"], rows)


def _memory(run: StepRun) -> str:
    rows = [
        [str(entry["batch"]), name, *(number(side[kind] / GIGA) for kind in ("before", "allocated", "reserved"))]
        for entry in run.data["memory"]
        for name, side in entry["sides"].items()
        if side["status"] == "measured"
    ]
    return _table(["batch", "side", "before, GB", "most allocated, GB", "most reserved, GB"], rows)


def _notes(run: StepRun) -> str:
    data = run.data
    lines = [f"- {one['what']}: skipped: {one['why']}" for one in data["skipped"]]
    for where, sides in entries(data):
        lines += [
            f"- {where}; {name}: {side['status']}: {side['why']}" for name, side in sides.items() if "why" in side
        ]
    return "\n".join(lines).replace("|", "\\|")


def _time(run: StepRun) -> str:
    rows = [[name, number(one["allotted"]), number(one["taken"])] for name, one in run.data["sections"].items()]
    return _table(["part", "seconds allotted", "seconds taken"], rows)


def figures(run: StepRun | None) -> list[tuple[str, str, str]]:
    """Figure, bar, what was measured."""
    return [*_op_figures(run), *_step_figures(run)]


def _op_figures(run: StepRun | None) -> list[tuple[str, str, str]]:
    def figure(case: Case) -> str:
        known = [] if run is None else run.entries
        entry = next((one for one in known if (one["op"], one["case"]) == (case.op, case.name)), None)
        if entry is None or not timed(entry):
            return NOT_MEASURED
        shown = ", ".join(f"{name} {number(1e6 * seconds(entry, name))} µs" for name in timed(entry))
        met = meets_bar(entry)
        return shown if met is None else f"{shown}; {verdict(met)}"

    rows = []
    for case in cases(dry_run=False):
        bar = "" if case.bar is None else f"≤ {1e6 * case.bar:.0f} µs"
        rows.append((f"`{case.op}`, {case.name}", bar, figure(case)))
    chosen = {} if run is None else run.data["preference"]
    shown = ", ".join(f"{op}: {one['backend']}" for op, one in chosen.items())
    return [*rows, ("which of our backends is the faster", "", shown or NOT_MEASURED)]


def _step_figures(run: StepRun | None) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []

    def judged(found: tuple[float, float, float] | None, met: Callable[[float], bool]) -> str:
        return NOT_MEASURED if found is None else f"{_shown(found)}; {verdict(met(found[1]))}"

    for batch in FULL.batches:
        entry = None if run is None else run.steps(batch)
        for setting, bar in STEP_BARS.items():
            found = None if run is None or entry is None else times_plain(run, entry, *setting)
            what = f"time per committed token, {setting_name(*setting)}, batch {batch}: times plain decoding's"
            rows.append((what, f"≤ {bar:.2f}", judged(found, partial(operator.ge, bar))))
        for setting in SETTINGS:
            found = None if run is None or entry is None else times_generate(entry, run.side(*setting))
            what = f"tokens/s, {setting_name(*setting)}, batch {batch}: times `{PLAIN}`'s"
            rows.append((what, f"≥ {GENERATE_BAR:.0f}", judged(found, lambda value: value >= GENERATE_BAR)))
    for setting in SETTINGS:
        rows.append((f"tokens/s of steps, {setting_name(*setting)}, by batch", "", _tokens_by_batch(run, setting)))
    for batch in FULL.batches:
        rows.append((f"peak memory, batch {batch}", "", _memory_figure(run, batch)))
        rows.append((f"shares of a step, {setting_name(3, 1)}, batch {batch}", "", _phase_figure(run, batch)))
        rows.append((f"engines, {setting_name(3, 1)}, batch {batch}", "", _engine_figure(run, batch)))
    rows.append(("warm-up of a graph", "", _warm_up_figure(run)))
    return rows


def _tokens_by_batch(run: StepRun | None, setting: tuple[int, int]) -> str:
    known = [] if run is None else sorted(run.data["steps"], key=lambda entry: int(entry["batch"]))
    found = [
        f"{entry['batch']}: {number(step_tokens(entry, run.side(*setting)))}"
        for entry in known
        if run is not None and run.side(*setting) in timed(entry)
    ]
    return ", ".join(found) or NOT_MEASURED


def _of_batch(run: StepRun | None, kind: str, batch: int) -> list[Entry]:
    return [] if run is None else [entry for entry in run.data[kind] if entry["batch"] == batch]


def _memory_figure(run: StepRun | None, batch: int) -> str:
    found = [
        f"{name}: {number(peak(side) / GIGA)} GB"
        for entry in _of_batch(run, "memory", batch)
        for name, side in entry["sides"].items()
        if side["status"] == "measured"
    ]
    return "; ".join(found) or NOT_MEASURED


def _phase_figure(run: StepRun | None, batch: int) -> str:
    for entry in _of_batch(run, "phases", batch):
        record = entry["settings"].get(setting_name(3, 1), {"status": ""})
        if record["status"] == "timed":
            return ", ".join(f"{phase} {number(share)} %" for phase, share in shares(record["seconds"]).items())
    return NOT_MEASURED


def _engine_figure(run: StepRun | None, batch: int) -> str:
    found = [
        f"{entry['sides'][name]['engine']}: {number(1e3 * statistics.median(step_seconds(entry, name)))} ms a step"
        for entry in _of_batch(run, "engines", batch)
        for name in timed(entry)
        if (entry["sides"][name]["width"], entry["sides"][name]["depth"]) == (3, 1)
    ]
    return ", ".join(found) or NOT_MEASURED


def _warm_up_figure(run: StepRun | None) -> str:
    found = [
        side["warm_up"]
        for entry in ([] if run is None else run.data["steps"])
        for side in entry["sides"].values()
        if "warm_up" in side
    ]
    return f"{spread(found)} s" if found else NOT_MEASURED


def results_part(runs: list[StepRun]) -> str:
    """The results page's part on the decoding step, made from the runs that are kept, the newest first."""
    parts = [
        "## The decoding step, and its other ops",
        f"From the `*{StepRun.suffix}` files. A Qwen2 of 7.6 billion random weights in bf16, prompts of {FULL.prompt} "
        "tokens; all sides in turns, each checked first. Plain decoding is the same engine with K=1, L=1; steps are "
        "replays of a CUDA graph. The ops run in CUDA graphs, cold or warm in the L2 as said. The bars are the "
        "project's goals.",
        f"```console\n{COMMAND} step   # measures every figure below; at most 10 minutes\n```",
    ]
    sections: list[StepRun | None] = [*runs] if runs else [None]
    for run in sections:
        if run is None:
            parts.append("No GPU has run this yet.")
        else:
            parts += [f"### {run.data['device']['name']}, {run.data['date']}", describe(run)]
        parts.append(_table(["figure", "bar", "measured"], [list(row) for row in figures(run)]))
        if run is not None:
            parts.append(f"![Tokens per second, and where a step's time goes]({run.stem}.svg)")
            parts.append(f"All figures: [{run.stem}.md]({run.stem}.md), raw samples beside it.")
    return "\n\n".join(parts) + "\n"


COLORS = ("#8a8a8a", "#1f5fa8", "#c46a1a", "#4a8a3c")


def draw(run: StepRun, path: Path) -> None:
    """Tokens per second and a step's time against the batch; the phases' shares."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams.update({
        "svg.hashsalt": "lbr_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "legend.frameon": False, "svg.fonttype": "none",
    })  # fmt: skip
    figure, (tokens, times, parts) = plt.subplots(1, 3, figsize=(12, 3.6))
    known = sorted(run.data["steps"], key=lambda entry: int(entry["batch"]))
    names = [*(run.side(*setting) for setting in SETTINGS), PLAIN]
    for name, color, marker in zip(names, COLORS, "os^x", strict=True):
        here = [entry for entry in known if name in timed(entry)]
        batches = [entry["batch"] for entry in here]
        style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1, "label": name}
        tokens.plot(batches, [step_tokens(entry, name) for entry in here], **style)
        times.plot(batches, [1e3 * statistics.median(step_seconds(entry, name)) for entry in here], **style)
    tokens.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens per second, of steps")
    times.set(xscale="log", xlabel="batch", ylabel="milliseconds a step", ylim=(0, None))
    for axis in (tokens, times):
        ticks = [entry["batch"] for entry in known]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    if known:
        tokens.legend(loc="lower right", fontsize=7)
    bars = [
        (f"{name}\nbatch {entry['batch']}", shares(record["seconds"]))
        for entry in run.data["phases"]
        for name, record in entry["settings"].items()
        if record["status"] == "timed"
    ]
    left = [0.0] * len(bars)
    for phase, color in zip(("forward", "sample", "route", "commit"), COLORS, strict=True):
        widths = [share.get(phase, 0.0) for _, share in bars]
        parts.barh([label for label, _ in bars], widths, left=left, color=color, label=phase, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    parts.set(xlabel="% of a step, engine static")
    if bars:
        parts.invert_yaxis()
        parts.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=7)
    title = f"the decoding step, {run.data['dtype']}, {run.data['device']['name']}"
    figure.suptitle(f"DRY RUN: {title}" if run.data["dry_run"] else title, y=1.05)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
