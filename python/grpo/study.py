"""Plain GRPO against LBR-GRPO, from the same start and seeds, on the two tasks: runs, JSON, figures.

    python python/grpo/study.py run WORK              everything, two processes of one thread each
    python python/grpo/study.py tune WORK             the learning rates of PLANS, on a seed that `run` does not use
    python python/grpo/study.py plot FILE.json ...    the figures of bench/results again

Per task a JSON file goes to bench/results, with every curve, the settings, versions and the machine, and an SVG file
beside it. WORK keeps models, checkpoints and logs; a study that was stopped goes on where it was.

Both arms are grpo.py: the same start, questions of the same seed, rollouts and updates; width 1 is plain GRPO.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import lbr_kernels
from lbr_kernels.evaluation.demo import CHECKPOINT
from lbr_kernels.evaluation.statistics import pass_at_k

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "bench" / "results"
SEEDS = (0, 1, 2)
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

    def options(self) -> list[str]:
        """For grpo.py."""
        return [
            f"--width={self.width}", f"--depth={self.depth}", f"--model-lr={self.model_lr}",
            f"--router-lr={self.router_lr}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A task's runs: its start, how long, and its arms."""

    task: str
    updates: int
    arms: tuple[Arm, ...]
    start: str | None = None  # None: made by start.py
    eval_every: int = 10
    options: tuple[str, ...] = ()
    judged: tuple[str, ...] = field(default=())


PLANS = {
    "arithmetic": Plan(
        "arithmetic",
        updates=80,
        arms=(Arm("GRPO", 1, 1, 3e-4), Arm("LBR-GRPO, K=3 L=1", 3, 1, 3e-4, 2e-3)),
    ),
    "reachability": Plan(
        "reachability",
        updates=60,
        arms=(Arm("GRPO", 1, 1, 3e-4), Arm("LBR-GRPO, K=3 L=1", 3, 1, 3e-4, 2e-3)),
        start=str(CHECKPOINT),
        options=("--questions=8", "--questions-at-once=1", "--eval-questions=24"),
        judged=("--questions=48", "--samples=16"),
    ),
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console()


def program(name: str, *arguments: str) -> None:
    """Run one of the programs beside this file on one thread; what it says is shown if it fails."""
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def one_run(plan: Plan, arm: Arm, seed: int, start: Path, out: Path) -> None:
    """Train and judge, or what is left of it."""
    program(
        "grpo.py", plan.task, str(start), str(out), f"--seed={seed}", f"--updates={plan.updates}",
        f"--eval-every={plan.eval_every}", *plan.options, *arm.options(), "--resume",
    )  # fmt: skip
    judged = out / "judged.json"
    if not judged.exists():
        last = out / f"checkpoint-{plan.updates:06d}"
        program(
            "judge.py", plan.task, str(last), str(judged), f"--width={arm.width}", f"--depth={arm.depth}", *plan.judged
        )


def start_of(plan: Plan, work: Path) -> Path:
    """The directory of the model that all runs of a task begin with."""
    if plan.start is not None:
        return Path(plan.start)
    start = work / f"{plan.task}-start"
    if not start.exists():
        program("start.py", plan.task, str(start))
    return start


def in_turns(jobs: int, calls: Iterable[Callable[[], None]]) -> None:
    """All calls, so many at a time, with a bar."""
    calls = list(calls)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("runs", total=len(calls))
        for done in [pool.submit(call) for call in calls]:
            done.result()
            progress.advance(bar)


def read_log(path: Path) -> list[dict[str, Any]]:
    """A run's records, the one before the first update in front."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    found = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": found or platform.machine(),
        "cores": os.cpu_count(),
        "threads per process": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lbr_kernels": lbr_kernels.__version__,
    }


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
    calls: list[Callable[[], None]] = []
    for plan in plans:
        start, judged = starts[plan.task], work / f"{plan.task}-start.json"
        if not judged.exists():
            calls.append(_call(program, "judge.py", plan.task, str(start), str(judged), *plan.judged))
        # A seed's arms side by side: should the machine be slowed down, then for both.
        for seed in SEEDS:
            for index, arm in enumerate(plan.arms):
                calls.append(_call(one_run, plan, arm, seed, start, work / f"{plan.task}-{index}-{seed}"))
    in_turns(jobs, calls)
    for plan in plans:
        found = {
            "date": datetime.date.today().isoformat(),
            "command": f"python python/grpo/study.py run WORK --tasks {tasks} --jobs {jobs}",
            "machine": machine(),
            "plan": {**asdict(plan), "start": "the shipped checkpoint" if plan.start else f"start.py {plan.task}"},
            "before": json.loads((work / f"{plan.task}-start.json").read_text()),
            "runs": [
                {
                    "arm": arm.name,
                    "seed": seed,
                    "settings": _without_paths(json.loads((out / "settings.json").read_text())),
                    "curve": read_log(out / "log.jsonl"),
                    "after": json.loads((out / "judged.json").read_text()),
                }
                for index, arm in enumerate(plan.arms)
                for seed in SEEDS
                for out in [work / f"{plan.task}-{index}-{seed}"]
            ],
        }
        path = results / f"{found['date']}-grpo-{plan.task}.json"
        path.write_text(json.dumps(found) + "\n")
        draw(path)
        report(path)


def _call(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "start"}


@app.command()
def tune(
    work: Annotated[Path, typer.Argument(file_okay=False)],
    task: Annotated[str, typer.Option()],
    rates: Annotated[str, typer.Option(help="The model's learning rates, comma-separated.")] = "1e-4,3e-4,1e-3",
    updates: Annotated[int, typer.Option(min=1)] = 40,
    jobs: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Mean training reward of the last quarter of a short run, per arm and learning rate; the same effort for all."""
    work.mkdir(parents=True, exist_ok=True)
    plan = PLANS[task]
    start = start_of(plan, work)
    grid = [(index, arm, rate) for index, arm in enumerate(plan.arms) for rate in map(float, rates.split(","))]
    outs = [work / f"tune-{task}-{index}-{rate}-{updates}" for index, arm, rate in grid]
    in_turns(
        jobs,
        [
            _call(
                program, "grpo.py", task, str(start), str(out), f"--seed={TUNING_SEED}", f"--updates={updates}",
                *plan.options, f"--eval-every={updates + 1}", *arm.options(), f"--model-lr={rate}", "--resume",
            )
            for out, (index, arm, rate) in zip(outs, grid, strict=True)
        ],
    )  # fmt: skip
    for out, (_, arm, rate) in zip(outs, grid, strict=True):
        rewards = [record["reward"] for record in read_log(out / "log.jsonl")[1:]]
        quarter = len(rewards) // 4
        console.print(
            f"{arm.name}, model {rate}: first quarter {np.mean(rewards[:quarter]):.3f}, "
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
    data = json.loads(path.read_text())
    arms = [Curves(name, data["runs"]) for name in dict.fromkeys(run["arm"] for run in data["runs"])]
    colors = dict(zip([arm.name for arm in arms], ("#c46a1a", "#1f5fa8", "#2e8b57"), strict=False))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.2))

    def line(axis: Any, x: Any, y: NDArray[np.float64], name: str, **style: Any) -> None:
        axis.plot(x, y.mean(axis=0), color=colors[name], label=name, **{"linewidth": 1.4, **style})
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
            line(axes[1, 3], KS[: uniform.shape[1]], uniform, arm.name, linestyle=":")
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
    axes[0, 0].legend(loc="lower right")
    axes[1, 3].legend(loc="lower right")
    seeds = len(arms[0].runs)
    figure.suptitle(f"{data['plan']['task']}: mean of {seeds} seeds, lowest to highest shaded")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def report(path: Path) -> None:
    """A task's figures as a Markdown table."""
    data = json.loads(path.read_text())
    arms = list(dict.fromkeys(run["arm"] for run in data["runs"]))
    rows = [("start, plain", [pass_curve(data["before"], "plain")])]
    for arm in arms:
        runs = [run for run in data["runs"] if run["arm"] == arm]
        for way in ("plain", "router", "uniform router"):
            if way in runs[0]["after"]:
                rows.append((f"{arm}, {way}", [pass_curve(run["after"], way) for run in runs]))
    print(f"\n| {data['plan']['task']} | " + " | ".join(f"Pass@{k}" for k in KS) + " |")
    print("|---" * (len(KS) + 1) + "|")
    for name, curves in rows:
        cells = [
            f"{np.mean(column):.3f}" + (f" ({min(column):.3f} to {max(column):.3f})" if len(column) > 1 else "")
            for column in zip(*curves, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


@app.command()
def plot(paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Figures and tables again, from JSON."""
    for path in paths:
        draw(path)
        report(path)


if __name__ == "__main__":
    app()
