"""Plain GRPO against LBR-GRPO, from the same start and seeds, on the two tasks: runs, JSON, figures.

    python python/grpo/study.py run WORK              everything, two processes of one thread each
    python python/grpo/study.py tune WORK             the learning rates of PLANS, on a seed that `run` does not use
    python python/grpo/study.py plot FILE.json ...    the figures of bench/results again

Per task a JSON file goes to bench/results, with every curve, the settings, versions and the machine, and an SVG file
beside it. WORK keeps models, checkpoints and logs; a study that was stopped goes on where it was.

The tables of bench/results/grpo.md are made from the JSON; its words are not.

Both arms are grpo.py: the same start, questions of the same seed, rollouts and updates; width 1 is plain GRPO.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import grpo
import judge
import numpy as np
import start
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lbr_kernels.evaluation.demo import CHECKPOINT
from lbr_kernels.evaluation.machine import machine
from lbr_kernels.evaluation.statistics import pass_at_k

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "bench" / "results"
SEEDS = (1, 2, 3)
TUNING_SEED = 100
KS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    width: int
    depth: int
    model_lr: float
    router_lr: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A task's runs: its start, how long, and its arms."""

    task: str
    updates: int
    arms: tuple[Arm, ...]
    start: str | None = None  # None: made by start.py
    options: dict[str, Any] = field(default_factory=dict)  # of grpo.py
    judged: dict[str, Any] = field(default_factory=dict)  # options of judge.py


PLANS = {
    "arithmetic": Plan(
        "arithmetic",
        updates=100,
        arms=(Arm("GRPO", 1, 1, 3e-4), Arm("LBR-GRPO, K=3 L=1", 3, 1, 3e-4, 2e-3)),
        options={"questions": 8, "eval_every": 20, "eval_questions": 32, "eval_samples": 4},
        judged={"questions": 48, "samples": 32},
    ),
    "reachability": Plan(
        "reachability",
        updates=24,
        arms=(Arm("GRPO", 1, 1, 1e-4), Arm("LBR-GRPO, K=3 L=1", 3, 1, 1e-4, 2e-3)),
        start=str(CHECKPOINT),
        options={"questions": 8, "questions_at_once": 1, "eval_every": 8, "eval_questions": 24, "eval_samples": 4},
        judged={"questions": 32, "samples": 16},
    ),
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console()


def one_run(plan: Plan, arm: Arm, seed: int, start: Path, out: Path, told: Path) -> None:
    """Train and judge, or what is left of it; what the programs say goes to a file."""
    with told.open("a", encoding="utf-8") as file, redirect_stderr(file):
        grpo.main(
            task=plan.task, start=start, out=out, width=arm.width, depth=arm.depth, seed=seed, updates=plan.updates,
            model_lr=arm.model_lr, router_lr=arm.router_lr, resume=True, **plan.options,
        )  # fmt: skip
        if plan.judged and not (out / "judged.json").exists():
            last = out / f"checkpoint-{plan.updates:06d}"
            judge.main(plan.task, last, out / "judged.json", width=arm.width, depth=arm.depth, **plan.judged)


def start_of(plan: Plan, work: Path) -> Path:
    """The directory of the model that all runs of a task begin with, judged as it is."""
    made = Path(plan.start) if plan.start is not None else work / f"{plan.task}-start"
    if not made.exists():
        start.main(plan.task, made)
    if plan.judged and not (work / f"{plan.task}-start.json").exists():
        judge.main(plan.task, made, work / f"{plan.task}-start.json", **plan.judged)
    return made


def in_turns(jobs: int, function: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """All calls, so many processes at a time, with a bar."""
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        bar = progress.add_task("runs", total=len(calls))
        for done in as_completed([pool.submit(function, *call) for call in calls]):
            done.result()
            progress.advance(bar)


def read_log(path: Path) -> list[dict[str, Any]]:
    """A run's records, the one before the first update in front."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@app.command()
def run(
    work: Annotated[Path, typer.Argument(help="Directory for models, checkpoints and logs.", file_okay=False)],
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PLANS),
    jobs: Annotated[int, typer.Option(help="Processes at a time, one thread each.", min=1)] = 2,
    results: Annotated[Path, typer.Option(help="Where JSON and figures go.", file_okay=False)] = RESULTS,
) -> None:
    """Train all arms with all seeds, judge, write JSON and figures."""
    work.mkdir(parents=True, exist_ok=True)
    plans = [PLANS[name] for name in tasks.split(",")]
    starts = {plan.task: start_of(plan, work) for plan in plans}
    # A seed's arms side by side: should the machine be slowed down, then for both.
    calls = [
        (plan, arm, seed, starts[plan.task], out, out.with_suffix(".txt"))
        for seed in SEEDS
        for plan in plans
        for index, arm in enumerate(plan.arms)
        for out in [work / f"{plan.task}-{index}-{seed}"]
    ]
    in_turns(jobs, one_run, calls)
    for plan in plans:
        found = {
            "date": datetime.date.today().isoformat(),
            "command": f"python python/grpo/study.py run WORK --tasks {tasks} --jobs {jobs}",
            "machine": {**machine(), "threads": 1},  # of every process
            "plan": {**asdict(plan), "start": "the shipped checkpoint" if plan.start else f"start.py {plan.task}"},
            "before": json.loads((work / f"{plan.task}-start.json").read_text(encoding="utf-8")),
            "runs": [
                {
                    "arm": arm.name,
                    "seed": seed,
                    "settings": _without_paths(json.loads((out / "settings.json").read_text(encoding="utf-8"))),
                    "curve": read_log(out / "log.jsonl"),
                    "after": json.loads((out / "judged.json").read_text(encoding="utf-8")),
                }
                for index, arm in enumerate(plan.arms)
                for seed in SEEDS
                for out in [work / f"{plan.task}-{index}-{seed}"]
            ],
        }
        path = results / f"{found['date']}-grpo-{plan.task}.json"
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        draw(path)
        console.print(report(path), highlight=False, soft_wrap=True)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "start"}


@app.command()
def tune(
    work: Annotated[Path, typer.Argument(file_okay=False)],
    task: Annotated[str, typer.Option()],
    rates: Annotated[str, typer.Option(help="The model's learning rates, comma-separated.")] = "3e-4,1e-3",
    updates: Annotated[int, typer.Option(min=1)] = 40,
    jobs: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Mean training reward of the last quarter of a short run, per arm and learning rate; the same effort for all."""
    work.mkdir(parents=True, exist_ok=True)
    plan = replace(PLANS[task], updates=updates, judged={}, options={**PLANS[task].options, "eval_every": updates})
    begin = start_of(plan, work)
    grid = [
        (index, replace(arm, model_lr=float(rate))) for index, arm in enumerate(plan.arms) for rate in rates.split(",")
    ]
    outs = [work / f"tune-{task}-{index}-{arm.model_lr}" for index, arm in grid]
    calls = [
        (plan, arm, TUNING_SEED, begin, out, out.with_suffix(".txt")) for out, (_, arm) in zip(outs, grid, strict=True)
    ]
    in_turns(jobs, one_run, calls)
    for out, (_, arm) in zip(outs, grid, strict=True):
        rewards = [record["reward"] for record in read_log(out / "log.jsonl")[1:]]
        quarter = len(rewards) // 4
        console.print(
            f"{arm.name}, model {arm.model_lr}: first quarter {np.mean(rewards[:quarter]):.3f}, "
            f"last {np.mean(rewards[-quarter:]):.3f}"
        )


class Curves:
    """The runs of one arm, seeds along the first axis."""

    def __init__(self, name: str, runs: list[dict[str, Any]]) -> None:
        self.name = name
        self.runs = [run for run in runs if run["arm"] == name]

    def training(self, key: str) -> NDArray[np.float64]:
        """``[seeds, updates]``."""
        return np.array([[record[key] for record in run["curve"][1:]] for run in self.runs], dtype=np.float64)

    def looks(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Updates, and ``[seeds, looks]`` of a held-out figure; NaN where there is none."""
        held = [[r for r in run["curve"] if r["held_out"] is not None] for run in self.runs]
        updates = np.array([record["update"] for record in held[0]], dtype=np.float64)
        return updates, np.array([[r["held_out"].get(key, np.nan) for r in one] for one in held], dtype=np.float64)

    def at_looks(self, key: str) -> NDArray[np.float64]:
        """``[seeds, looks]`` of a running total, 0 at the start."""
        return np.array([
            [record.get(key, 0) for record in run["curve"] if record["held_out"] is not None] for run in self.runs
        ], dtype=np.float64)  # fmt: skip


def pass_curve(judged: dict[str, Any], way: str) -> list[float]:
    """Pass@k for every k of ``KS``, the mean over questions."""
    right, samples = judged[way]["right"], judged["samples"]
    return [float(np.mean([pass_at_k(c, samples, k) for c in right])) for k in KS if k <= samples]


def draw(path: Path) -> None:
    """The figures of one task's JSON, beside it; they depend on it alone, byte for byte."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams.update({
        "svg.hashsalt": "lbr_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "legend.frameon": False, "svg.fonttype": "none",
    })  # fmt: skip
    data = json.loads(path.read_text(encoding="utf-8"))
    arms = [Curves(name, data["runs"]) for name in dict.fromkeys(run["arm"] for run in data["runs"])]
    colors = dict(zip([arm.name for arm in arms], ("#c46a1a", "#1f5fa8", "#2e8b57"), strict=False))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.2))

    def line(axis: Any, x: Any, y: NDArray[np.float64], name: str, **style: Any) -> None:
        axis.plot(x, y.mean(axis=0), color=colors[name], **{"linewidth": 1.4, "label": name, **style})
        axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=colors[name], alpha=0.15, linewidth=0)

    for arm in arms:
        updates, reward = arm.looks("reward")
        line(axes[0, 0], updates, reward, arm.name)
        line(axes[0, 1], arm.at_looks("nodes").mean(axis=0) / 1e6, reward, arm.name)
        line(axes[0, 2], arm.at_looks("seconds").mean(axis=0), reward, arm.name)
        line(axes[0, 3], arm.at_looks("cpu_seconds").mean(axis=0), reward, arm.name)
        smooth = np.array([np.convolve(one, np.ones(5) / 5, mode="valid") for one in arm.training("reward")])
        line(axes[1, 0], np.arange(smooth.shape[1]) + 5, smooth, arm.name)
        line(axes[1, 1], updates, arm.looks("node_entropy")[1], arm.name)
        for key, style in (("router_entropy", "-"), ("router_entropy_contested", "--")):
            values = arm.looks(key)[1]
            if not np.isnan(values).any():
                line(axes[1, 2], updates, values, arm.name, linestyle=style)
        way = "router" if "router" in arm.runs[0]["after"] else "plain"
        after = np.array([pass_curve(run["after"], way) for run in arm.runs])
        line(axes[1, 3], KS[: after.shape[1]], after, arm.name)
        if way == "router":
            uniform = np.array([pass_curve(run["after"], "uniform router") for run in arm.runs])
            line(axes[1, 3], KS[: uniform.shape[1]], uniform, arm.name, linestyle=":", label="_")
    before = pass_curve(data["before"], "plain")
    axes[1, 3].plot(KS[: len(before)], before, color="black", linewidth=1, label="start")
    labels = (
        ("held-out reward", "updates"), ("held-out reward", "million nodes forwarded"),
        ("held-out reward", "seconds, wall clock"), ("held-out reward", "seconds of CPU time"),
        ("training reward, mean of 5", "updates"), ("entropy of the model, nats", "updates"),
        ("entropy of the router, nats\n(dashed: where candidates differ)", "updates"),
        ("Pass@k, held out\n(dotted: trained model, uniform router)", "k"),
    )  # fmt: skip
    for axis, (title, x) in zip(axes.flat, labels, strict=True):
        axis.set(title=title, xlabel=x)
    axes[1, 3].set_xscale("log", base=2)
    axes[1, 2].ticklabel_format(useOffset=False)
    low, high = axes[1, 2].get_ylim()
    axes[1, 2].set_ylim(min(low, 0.9 * high), high)  # what stays where it began shall look so
    axes[0, 0].legend(loc="best")
    axes[1, 3].legend(loc="lower right")
    seeds = len(arms[0].runs)
    figure.suptitle(f"{data['plan']['task']}: mean of {seeds} seeds, lowest to highest shaded")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def report(path: Path) -> str:
    """A task's Pass@k as a Markdown table, which goes into grpo.md between the task's marks if that lies beside."""
    data = json.loads(path.read_text(encoding="utf-8"))
    task, before = data["plan"]["task"], data["before"]
    ks = [k for k in KS if k <= before["samples"]]
    rows = [("start", [pass_curve(before, "plain")])]
    for arm in dict.fromkeys(run["arm"] for run in data["runs"]):
        runs = [run for run in data["runs"] if run["arm"] == arm]
        for way, name in (("plain", arm), ("router", arm), ("uniform router", "… decoded with a uniform router")):
            if way in runs[0]["after"]:
                rows.append((name, [pass_curve(run["after"], way) for run in runs]))
    lines = [f"| {task} | {' | '.join(f'Pass@{k}' for k in ks)} |", "|---" * (len(ks) + 1) + "|"]
    for name, curves in rows:
        cells = [
            f"{np.mean(column):.3f}" + (f" ({min(column):.3f} to {max(column):.3f})" if len(column) > 1 else "")
            for column in zip(*curves, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table, page = "\n".join(lines), path.with_name("grpo.md")
    if page.exists():
        begin, end = f"<!-- {task} -->\n", f"\n<!-- /{task} -->"
        text = page.read_text(encoding="utf-8")
        first, last = text.index(begin) + len(begin), text.index(end)
        page.write_text(text[:first] + table + text[last:], encoding="utf-8")
    return table


@app.command()
def plot(paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Figures and tables again, from JSON."""
    for path in paths:
        draw(path)
        console.print(report(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
