"""The paper's synthetic study (section 4, appendix B), its baselines, and what it leaves out.

    python python/reachability/synthetic.py run WORK --preset cpu --seed 0 --seed 1 --seed 2
    python python/reachability/synthetic.py report WORK [--results bench/results]

``run`` trains and judges whatever WORK does not hold yet, several processes at a time, each on one thread (or on the
GPU, where there is one). ``report`` draws the figures and writes the table and the JSON that both come from, and
``demo`` writes the checkpoint that the package ships. Nothing is tuned on test graphs: a checkpoint is chosen by its
accuracy on graphs of the validation split.

Departures from the paper, which gives neither the model's size nor its data's: layered graphs whose problems come in
twins (``lbr_kernels.evaluation.reachability``), a small Qwen3 whose first layer begins with heads that look back,
numbers in base 4 (``gpu``: 2), and what stands in ``arms``.
"""

from __future__ import annotations

import copy
import datetime
import filecmp
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from arms import ARMS, DEPTHS_OF, WIDTHS, Arm, MultiToken, losses, router_quality
from decode import Way, evaluate, lbr, multiplex, plain, soft
from model import DEPTHS, PRESETS, Preset, Stage, build_model, build_routers, load, save
from muon import Muon
from packs import make_pack
from probes import identity_states, probe_accuracy, target_states
from results import draw, write_tables
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from lbr_kernels.baselines import PAPER_FILTERS
from lbr_kernels.evaluation.demo import CHECKPOINT
from lbr_kernels.evaluation.machine import machine
from lbr_kernels.evaluation.reachability import Problem, ReachabilityOptions, Split, evaluation_problems
from lbr_kernels.files import write_whole
from lbr_kernels.options import one_of
from lbr_kernels.router import Router

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(stderr=True)

Work = Annotated[Path, typer.Argument(help="Where runs are kept.", file_okay=False)]
Size = Annotated[
    str, typer.Option("--preset", parser=one_of(PRESETS), metavar="|".join(PRESETS), help="The study's size.")
]
BaseSize = Annotated[
    str | None,
    typer.Option("--preset", parser=one_of(PRESETS), metavar="|".join(PRESETS), help="Of base: cpu if not given."),
]
Trained = Annotated[str, typer.Argument(parser=one_of(ARMS), metavar="|".join(ARMS))]
Seeds = Annotated[list[int] | None, typer.Option("--seed", min=0, help="May be given several times.")]
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
SPLITS: tuple[Split, Split] = ("train", "test")  # what probes are fitted on and judged on
KINDS = ("last", "best")  # checkpoints: the last, and the best on validation graphs


def device() -> torch.device:
    """Where everything runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepare(threads: int = 1) -> None:
    """Few words of transformers' own; one thread, since runs stand side by side."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)


# --- training -------------------------------------------------------------------------------------------------------


def train_stages(
    arm: Arm,
    model: PreTrainedModel,
    ahead: MultiToken,
    routers: nn.ModuleDict,
    preset: Preset,
    stages: tuple[Stage, ...],
    rng: np.random.Generator,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Muon for the matrices of the blocks, AdamW for everything else; the rate falls over the second half."""
    total = sum(stage.steps for stage in stages)
    blocks = [p for p in model.base_model.layers.parameters() if p.ndim == 2]
    in_blocks = {id(p) for p in blocks}
    others = [p for p in (*model.parameters(), *ahead.parameters()) if id(p) not in in_blocks]
    groups: list[tuple[type[torch.optim.Optimizer], list[nn.Parameter], dict[str, Any]]] = [
        (Muon, blocks, {"lr": preset.lr, "weight_decay": 0.01}),
        (torch.optim.AdamW, others, {"lr": preset.lr, "betas": (0.9, 0.98)}),
        (torch.optim.AdamW, list(routers.parameters()), {"lr": preset.router_lr, "betas": (0.9, 0.98)}),
    ]
    optimizers = [kind(parameters, **settings) for kind, parameters, settings in groups if parameters]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50, 2 * (1 - step / total)))
        for optimizer in optimizers
    ]
    done = 0
    for stage in stages:
        for _ in range(stage.steps):
            pack = make_pack(
                stage.options, stage.hops, graphs=preset.graphs, pairs=stage.pairs, walks=stage.walks, rng=rng
            ).to(model.device)
            terms = losses(arm, model, ahead, routers, pack, preset)
            torch.stack(list(terms.values())).sum().backward()
            nn.utils.clip_grad_norm_([*blocks, *others], 1.0)
            if len(routers):
                nn.utils.clip_grad_norm_(routers.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            done += 1
            on_step(done, {name: value.item() for name, value in terms.items()})


def own_way(arm: Arm, routers: dict[int, Router], width: int) -> Way:
    """What a method's accuracy along the way and its best checkpoint are told by."""
    ways = {
        "cot": lambda: plain("greedy", do_sample=False),
        "soft": lambda: soft("soft", oracle=True, top_n=width),
        "oracle": lambda: lbr("oracle", routers[1], width=width, do_sample=False, oracle=True),
        "lbr": lambda: lbr("K=3 L=1", routers[1], width=3),
        "independent": lambda: lbr("K=3 L=1", routers[1], width=3),
    }
    return ways[arm]()


class HeldOut:
    """Judges a model on validation graphs so many times along the way, and keeps the best.

    ``curve`` has a point for each time: the step, minutes of training, losses, accuracy, the routers' quality.
    """

    def __init__(
        self, arm: Arm, model: PreTrainedModel, routers: nn.ModuleDict, preset: Preset, seed: int, label: str
    ) -> None:
        self.arm, self.model, self.routers, self.preset, self.seed, self.label = (
            arm,
            model,
            routers,
            preset,
            seed,
            label,
        )
        hops = preset.curriculum[-1].hops
        self.problems = evaluation_problems(preset.options, preset.held_out, hops=hops, seed=seed, split="validation")
        self.pack = make_pack(
            preset.options, hops, graphs=40, pairs=6, walks=0, rng=np.random.default_rng([seed, 3]),
            split="validation",
        ).to(model.device)  # fmt: skip
        self.total = sum(stage.steps for stage in preset.curriculum)
        self.curve: list[dict[str, float]] = []
        self.best: tuple[float, dict[str, Tensor], dict[str, Tensor]] = (-1.0, {}, {})
        self.began, self.paused = time.perf_counter(), 0.0

    def __call__(self, step: int, terms: dict[str, float]) -> None:
        """After every step."""
        if step * self.preset.points // self.total == (step - 1) * self.preset.points // self.total:
            return
        stopped = time.perf_counter()
        self.model.eval()
        routers = {int(depth): cast(Router, router).eval() for depth, router in self.routers.items()}
        way = own_way(self.arm, routers, self.preset.options.radix)
        with torch.random.fork_rng():  # judging draws nothing from the training's source
            accuracy = evaluate(way, self.model, self.problems, self.preset.options, self.seed).accuracy
            quality = router_quality(self.arm, self.model, self.routers, self.pack, self.preset)
        self.model.train()
        self.routers.train()
        self.paused += time.perf_counter() - stopped
        minutes = (time.perf_counter() - self.began - self.paused) / 60
        self.curve.append({"step": step, "minutes": minutes, "accuracy": accuracy, **terms, **quality})
        console.print(f"{self.label} {step}/{self.total}: {accuracy:.3f} after {minutes:.1f} min", highlight=False)
        if accuracy > self.best[0]:
            self.best = accuracy, copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.routers.state_dict())


def pretrain(model: PreTrainedModel, ahead: MultiToken, preset: Preset, seed: int) -> dict[str, float]:
    """Random walks; the mean of the last losses."""
    told: list[dict[str, float]] = []
    train_stages(
        "cot", model, ahead, nn.ModuleDict(), preset, preset.pretraining, np.random.default_rng([seed, 4]),
        lambda _, terms: told.append(terms),
    )  # fmt: skip
    return {name: float(np.mean([terms[name] for terms in told[-50:]])) for name in told[-1]}


@app.command()
def train(
    work: Work,
    arm: Annotated[str, typer.Argument(parser=one_of(["base", *ARMS]), metavar="|".join(["base", *ARMS]))],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    preset: BaseSize = None,
    judged: Annotated[bool, typer.Option("--judge", help="And judge the method.")] = False,
) -> None:
    """Pre-train the model that all methods start from (base), or train one method from it."""
    _prepare()
    folder, began = work / f"seed-{seed}", time.perf_counter()
    name = preset or "cpu" if arm == "base" else preset_of(folder)
    if preset not in (None, name):
        raise typer.BadParameter(f"{folder} holds runs of {name!r}, not {preset!r}", param_hint="--preset")
    size = PRESETS[name]
    torch.manual_seed(seed)
    model, ahead = build_model(size).to(device()), MultiToken(size.dim).to(device())
    if arm == "base":
        last = pretrain(model, ahead, size, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "ahead": ahead.state_dict()}, folder / "base.pt")
        minutes = (time.perf_counter() - began) / 60
        _write(folder / "base.json", {"preset": name, "commit": commit(), "minutes": minutes, "losses": last})
        return
    start = torch.load(folder / "base.pt", map_location=device())
    model.load_state_dict(start["model"])
    ahead.load_state_dict(start["ahead"])
    method = cast(Arm, arm)
    routers = build_routers(model, size, depths=DEPTHS_OF[method], independent=arm == "independent")
    torch.manual_seed(seed)
    held_out = HeldOut(method, model, routers, size, seed, f"{folder.name} {arm}")
    train_stages(method, model, ahead, routers, size, size.curriculum, np.random.default_rng([seed, 1]), held_out)
    save(model, routers, folder / arm / "last", size.options)
    _, best_model, best_routers = held_out.best
    model.load_state_dict(best_model)
    routers.load_state_dict(best_routers)
    save(model, routers, folder / arm / "best", size.options)
    minutes = held_out.curve[-1]["minutes"]
    _write(folder / f"{arm}.json", {"commit": commit(), "minutes": minutes, "curve": held_out.curve})
    if judged:
        judge(work, arm, seed)


# --- judging --------------------------------------------------------------------------------------------------------


def ways_of(arm: Arm, routers: dict[int, Router], width: int) -> list[Way]:
    """All ways in which a method's model is decoded in the end."""
    votes = [plain(f"majority of {count}", do_sample=True, votes=count) for count in (3, 9)]
    if arm == "cot":
        return [
            plain("sampled", do_sample=True),
            plain("greedy", do_sample=False),
            plain("greedy, oracle", do_sample=False, oracle=True),
            plain("uniform, oracle", do_sample=True, oracle=True, blind=True),
            *votes,
            multiplex("Multiplex Thinking, K=3", width=3),
            soft("Soft Thinking, untrained", oracle=False, top_n=10),
            soft("Soft Thinking, its paper's filters", oracle=False, top_n=10, filters=PAPER_FILTERS),
        ]
    if arm == "soft":
        return [soft("soft, oracle", oracle=True, top_n=width), plain("greedy", do_sample=False)]
    if arm == "oracle":
        return [
            lbr("oracle", routers[1], width=width, do_sample=False, oracle=True),
            plain("greedy", do_sample=False),
            plain("greedy, oracle", do_sample=False, oracle=True),
        ]
    drawn = [lbr(f"K={k} L={depth}", routers[depth], width=k, depth=depth) for depth in DEPTHS for k in WIDTHS]
    alone = [plain("sampled", do_sample=True), plain("greedy", do_sample=False), *votes]
    voting = lbr("K=3 L=2, majority of 3", routers[2], width=3, depth=2, votes=3)
    return [*alone, lbr("K=3 L=1, uniform", None, width=3), *drawn, voting]


@app.command()
def judge(work: Work, arm: Trained, seed: Annotated[int, typer.Option(min=0)] = 0) -> None:
    """Decode unseen graphs with one method's model in every way, and fit the probes."""
    _prepare()
    folder, began = work / f"seed-{seed}", time.perf_counter()
    size = PRESETS[preset_of(folder)]
    if not (folder / arm / "best" / "config.json").exists():
        raise typer.BadParameter(f"{folder} has no {arm}: `synthetic.py train WORK {arm}` makes it", param_hint="WORK")
    problems = evaluation_problems(size.options, size.problems, hops=size.curriculum[-1].hops, seed=seed)
    decoded: dict[str, dict[str, Any]] = {}
    last, best = (folder / arm / kind for kind in KINDS)
    same = all(filecmp.cmp(path, best / path.relative_to(last), shallow=False) for path in last.rglob("*.safetensors"))
    for kind in KINDS[:1] if same else KINDS:
        model, routers = load(folder / arm / kind, device())
        for way in ways_of(cast(Arm, arm), routers, size.options.radix):
            found = evaluate(way, model, problems, size.options, seed)
            decoded.setdefault(way.name, {})[kind] = {
                "accuracy": found.accuracy,
                "legal": sum(found.legal) / len(found.legal),
                "by_hops": found.by_hops(problems),
                "nodes_per_problem": found.nodes / len(problems),
            }
            console.print(f"{folder.name} {arm} {kind}: {way.name}: {found.accuracy:.3f}", highlight=False)
    if same:  # the best was the last
        decoded = {way: dict.fromkeys(KINDS, found["last"]) for way, found in decoded.items()}
    probed = _probes(cast(Arm, arm), folder / arm / "last", size, seed)
    minutes = (time.perf_counter() - began) / 60
    told = {"judging_commit": commit(), "judging_minutes": minutes, "decoded": decoded, "probes": probed}
    _write(folder / f"{arm}-judged.json", told)


def _probes(arm: Arm, checkpoint: Path, size: Preset, seed: int) -> dict[str, float]:
    """Accuracies of the probes of one model: those that are shown."""
    model, _ = load(checkpoint, device())
    found = {}
    if arm in ("cot", "oracle", "lbr"):
        seen, unseen = (target_states(model, size, size.probed, split=split, seed=seed) for split in SPLITS)
        for (number, place), labelled in seen.items():
            for kind, train_set, test_set in zip(("name", "order"), labelled, unseen[number, place], strict=True):
                found[f"target {kind}, branching {number}, {place}"] = probe_accuracy(train_set, test_set)
    if arm in ("cot", "oracle", "soft"):
        nodes, others = (identity_states(model, size, size.probed, arm, split=split, seed=seed) for split in SPLITS)
        for place, train_set in nodes.items():
            found[f"node, {place}"] = probe_accuracy(train_set, others[place])
    return found


@app.command(name="time")
def time_(
    work: Work,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Time all ways of decoding in turns: seconds per problem, on a machine that does nothing else."""
    _prepare(threads)
    folder = work / f"seed-{seed}"
    size = PRESETS[preset_of(folder)]
    problems: list[Problem] = evaluation_problems(
        size.options, min(100, size.problems), hops=size.curriculum[-1].hops, seed=seed, split="validation"
    )
    loaded = {arm: load(folder / arm / "last", device()) for arm in ARMS if (folder / arm / "last").exists()}
    turns = [(arm, way) for arm, (_, routers) in loaded.items() for way in ways_of(arm, routers, size.options.radix)]
    seconds: dict[str, dict[str, list[float]]] = {arm: {} for arm in loaded}
    for number in range(size.rounds + 1):
        first = number * len(turns) // size.rounds  # who begins changes, and who comes behind whom does not matter much
        for arm, way in turns[first:] + turns[:first]:
            took = evaluate(way, loaded[arm][0], problems, size.options, seed).seconds / len(problems)
            if number:  # the first round warms up
                seconds[arm].setdefault(way.name, []).append(took)
    _write(work / "times.json", {"threads": threads, "machine": machine(), "seconds_per_problem": seconds})


# --- all of it ------------------------------------------------------------------------------------------------------


@app.command()
def run(
    work: Work,
    seeds: Seeds = None,
    preset: Size = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
) -> None:
    """Train, judge and time everything that WORK does not hold yet; seed 0 if none is given."""
    seeds = sorted(set(seeds or [0]))
    for path in work.glob("seed-*/base.json"):
        if (found := preset_of(path.parent)) != preset:
            raise typer.BadParameter(f"{path.parent} holds runs of {found!r}, not {preset!r}", param_hint="--preset")

    def call(command: str, *arguments: str, seed: int) -> None:
        subprocess.run([sys.executable, __file__, command, str(work), *arguments, "--seed", str(seed)], check=True)

    def missing(name: str, seed: int) -> bool:
        return not (work / f"seed-{seed}" / f"{name}.json").exists()

    def one(arm: str, seed: int) -> None:
        if missing(arm, seed):
            call("train", arm, "--judge", seed=seed)
        elif missing(f"{arm}-judged", seed):
            call("judge", arm, seed=seed)

    def base(seed: int) -> None:
        if missing("base", seed):
            call("train", "base", "--preset", preset, seed=seed)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(base, seeds))
        # The longest first, so that all processes end at about the same time.
        list(pool.map(lambda task: one(*task), [(arm, seed) for seed in seeds for arm in reversed(ARMS)]))
    if not (work / "times.json").exists():
        call("time", seed=seeds[0])  # alone


@app.command()
def report(
    work: Work,
    results: Annotated[
        Path | None, typer.Option(help="Where JSON and figures go: WORK, if not given.", file_okay=False)
    ] = None,
) -> None:
    """Write the JSON of all runs, draw the figures, and fill in the tables of a page that is beside them."""
    found_folders = (path for path in work.glob("seed-*") if path.name.removeprefix("seed-").isdecimal())
    folders = sorted(found_folders, key=lambda folder: int(folder.name.removeprefix("seed-")))
    names = ["base", *(f"{arm}{part}" for arm in ARMS for part in ("", "-judged"))]
    wanted = [*(folder / f"{name}.json" for folder in folders for name in names), work / "times.json"]
    absent = [str(path.relative_to(work)) for path in wanted if not path.exists()]
    if absent or not folders:
        what = ", ".join(absent[:3]) if folders else "runs"
        raise typer.BadParameter(f"{work} has no {what}; `synthetic.py run` makes what is missing", param_hint="WORK")
    presets = {preset_of(folder) for folder in folders}
    if len(presets) > 1:
        raise typer.BadParameter(f"{work} holds runs of {' and '.join(sorted(presets))}", param_hint="WORK")
    found = {
        folder.name.removeprefix("seed-"): {
            "base": _read(folder / "base.json"),
            "arms": {arm: _read(folder / f"{arm}.json") | _read(folder / f"{arm}-judged.json") for arm in ARMS},
        }
        for folder in folders
    }
    preset = presets.pop()
    seeds = "".join(f" --seed {seed}" for seed in found)
    data = {
        "date": datetime.date.today().isoformat(),
        "command": f"python python/reachability/synthetic.py run WORK --preset {preset}{seeds}",
        "machine": machine(),
        "preset": asdict(PRESETS[preset]),
        "times": _read(work / "times.json"),
        "seeds": found,
    }
    folder = (results or work).resolve()
    if folder == RESULTS and preset == "smoke":
        raise typer.BadParameter(f"{work} holds runs of 'smoke', which say nothing", param_hint="WORK")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be made ({error.strerror})", param_hint="--results") from error
    path = folder / f"{data['date']}-study-{preset}.json"
    write_whole(path, json.dumps(data) + "\n")
    console.print(str(path), highlight=False, soft_wrap=True)
    figures(path)


@app.command()
def figures(path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, resolve_path=True)]) -> None:
    """Draw the figures again, and fill in the tables of study.md beside them, and of README.md for the repository's."""
    try:
        drawn = draw(path)
    except (KeyError, IndexError, AttributeError, StopIteration, TypeError, ValueError) as error:
        raise typer.BadParameter(f"{path} is no JSON of `synthetic.py report` ({error!r})") from error
    pages = [path.with_name("study.md"), *([RESULTS.parents[1] / "README.md"] if path.parent == RESULTS else [])]
    pages = [page for page in pages if page.exists()]
    for page in pages:
        write_tables(path, page)
    for written in (*drawn, *pages):
        console.print(str(written), highlight=False, soft_wrap=True)


@app.command()
def demo(
    work: Work,
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.", file_okay=False)] = CHECKPOINT,
) -> None:
    """Write the checkpoint that the package ships: of all seeds' the best on validation graphs."""
    out = out.resolve()
    if out.exists() and not (out.is_dir() and (out / "config.json").exists()):
        raise typer.BadParameter(f"{out} is there and is no checkpoint", param_hint="--out")
    folders = [path.parent for path in sorted(work.glob("seed-*/base.json"))]
    whole = [
        folder for folder in folders if all((folder / part).exists() for part in ("lbr.json", "lbr/best/config.json"))
    ]
    # Elsewhere any size of the demo's task will do; the package ships the study's.
    presets = {preset_of(folder) for folder in whole}
    other_task = any(PRESETS[name].options != ReachabilityOptions() for name in presets)
    if not whole or other_task or (out == CHECKPOINT.resolve() and presets != {"cpu"}):
        raise typer.BadParameter(f"{work} has no lbr of --preset cpu, the demo's task", param_hint="WORK")
    told = {folder: _read(folder / "lbr.json")["curve"] for folder in whole}
    accuracy = {folder: max(point["accuracy"] for point in curve) for folder, curve in told.items()}
    best = max(accuracy, key=lambda folder: accuracy[folder])
    source = best / "lbr" / "best"
    if out.exists() and (others := {path.name for path in out.iterdir()} - {path.name for path in source.iterdir()}):
        raise typer.BadParameter(f"{out} holds {min(others)}, which is not of a checkpoint", param_hint="--out")
    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    shutil.copytree(source, new)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    console.print(f"{best} with {accuracy[best]:.3f} on validation graphs", highlight=False)


def preset_of(folder: Path) -> str:
    """The size of a seed's runs, which is their base's."""
    path = folder / "base.json"
    if not path.exists():
        raise typer.BadParameter(f"{folder} has no base: `synthetic.py train WORK base` makes it", param_hint="WORK")
    name: str = _read(path)["preset"]
    return name


def commit() -> str | None:
    """Of the code that runs, with a mark where files were changed; None outside a clone."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--match="]
    try:
        return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{path} is no JSON ({error})", param_hint="WORK") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: an interrupted run is not taken for a finished one."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    app()
