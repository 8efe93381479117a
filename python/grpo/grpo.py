"""GRPO with Local Branch Routing in one screen: decode, judge, one step on the likelihood of whole trajectories.

    python python/grpo/start.py arithmetic start --seed 0
    python python/grpo/grpo.py arithmetic start run --width 3 --seed 0
    python python/grpo/grpo.py arithmetic start run --width 3 --seed 0 --resume

Width 1 has no router and is plain GRPO, by the same lines. One line of JSON per update goes to ``run/log.jsonl``. The
process may be killed at any moment; ``--resume`` goes on from the last checkpoint as if nothing had happened.

Departures from the paper (section 5):
- A model of 0.1 to 0.8 M parameters on a task with a checker, one process, fp32, 16 questions x 8 rollouts an update
  in the place of 128 x 8; learning rates to match, which the paper's (1e-6, 1e-4) would not move.
- What the paper leaves open is as `lbr_kernels.training.loss` has it by default: advantages (r - mean) / (std + 1e-6)
  over a group, ratios clipped at 0.2 (they are 1 here: one update per rollout), no KL, no entropy bonus.
- AdamW with weight decay 0.01; the norm of the gradient is clipped to 1 for model and router separately, so that
  neither shortens the other's step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from checkpoint import State, checkpoints
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rollout import answer, entropies
from tasks import TASKS
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from lbr_kernels import Router
from lbr_kernels.files import write_whole
from lbr_kernels.options import one_of
from lbr_kernels.training import grpo_loss

HELD_OUT_SEED = 1000


@dataclass(frozen=True)
class Settings:
    """All that a run depends on."""

    task: str
    start: str
    width: int
    depth: int
    seed: int
    updates: int
    questions: int
    group: int
    questions_at_once: int
    model_lr: float
    router_lr: float
    router_dim: int
    eval_every: int
    eval_questions: int
    eval_samples: int


def begin(s: Settings) -> State:
    """A run before its first update."""
    model = AutoModelForCausalLM.from_pretrained(s.start, dtype=torch.float32).eval()
    torch.manual_seed(s.seed)  # of the router's parameters, and of nothing else
    router = Router.for_model(model, depth=s.depth, dim=s.router_dim) if s.width > 1 else None
    groups = [{"params": list(model.parameters()), "lr": s.model_lr}]
    if router is not None:
        groups.append({"params": list(router.parameters()), "lr": s.router_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    return State(model, router, optimizer, np.random.default_rng(s.seed), torch.Generator().manual_seed(s.seed))


def train(state: State, s: Settings) -> Iterator[dict[str, Any]]:
    """The loop; yields what is known after every update."""
    task, tree = TASKS[s.task], {"width": s.width, "depth": s.depth}
    while state.update < s.updates:
        wall, cpu = time.perf_counter(), time.process_time()
        questions = task.training(s.questions, state.questions_rng)
        rollout = answer(state.model, state.router, task, questions, samples=s.group, generator=state.generator, **tree)
        state.optimizer.zero_grad()
        positions = int(rollout.trajectory.num_committed.sum())  # the mean is over all of them, whatever the parts
        rows = s.group * s.questions_at_once
        for part, rewards in zip(rollout.trajectory.split(rows), rollout.rewards.split(rows), strict=True):
            result = grpo_loss(state.model, state.router, part, rewards, group_size=s.group, normaliser=positions)
            result.loss.backward()
            state.nodes += int(result.metrics["forwarded_nodes"])
        norms = [clip_grad_norm_(group["params"], 1.0).item() for group in state.optimizer.param_groups]
        state.optimizer.step()
        state.update += 1
        state.nodes += rollout.nodes
        state.seconds += time.perf_counter() - wall
        state.cpu_seconds += time.process_time() - cpu
        yield {
            "update": state.update, "reward": rollout.rewards.mean().item(), "gradient_norms": norms,
            "nodes": state.nodes, "seconds": state.seconds, "cpu_seconds": state.cpu_seconds,
            "held_out": held_out(state, s) if state.update % s.eval_every == 0 else None,
        }  # fmt: skip


def held_out(state: State, s: Settings) -> dict[str, float]:
    """Reward and entropies on questions that are the same in all runs; nothing of the run depends on them."""
    task = TASKS[s.task]
    questions = task.held_out(s.eval_questions, np.random.default_rng(HELD_OUT_SEED))
    rollout = answer(
        state.model, state.router, task, questions, samples=s.eval_samples, width=s.width, depth=s.depth,
        generator=torch.Generator().manual_seed(HELD_OUT_SEED),
    )  # fmt: skip
    return {"reward": rollout.rewards.mean().item(), **entropies(state.model, state.router, rollout.trajectory)}


def main(
    task: Annotated[str, typer.Argument(parser=one_of(TASKS), metavar="|".join(TASKS))],
    start: Annotated[Path, typer.Argument(help="Directory of the model to begin with.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Argument(help="Directory of log and checkpoint.", file_okay=False)],
    width: Annotated[int, typer.Option(help="K; 1 is plain GRPO.", min=1)] = 3,
    depth: Annotated[int, typer.Option(help="L.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of questions, draws and the router's parameters.")] = 0,
    updates: Annotated[int, typer.Option(min=1)] = 100,
    questions: Annotated[int, typer.Option(help="Per update.", min=1)] = 16,
    group: Annotated[int, typer.Option(help="Rollouts per question.", min=2)] = 8,
    questions_at_once: Annotated[int, typer.Option(help="In one forward and backward pass.", min=1)] = 2,
    model_lr: Annotated[float, typer.Option(min=0)] = 1e-4,
    router_lr: Annotated[float, typer.Option(min=0)] = 1e-3,
    router_dim: Annotated[int, typer.Option(help="The router's own width.", min=4)] = 64,
    eval_every: Annotated[int, typer.Option(help="Updates between looks at held-out questions.", min=1)] = 10,
    eval_questions: Annotated[int, typer.Option(min=1)] = 32,
    eval_samples: Annotated[int, typer.Option(help="Answers per held-out question.", min=1)] = 4,
    checkpoint_every: Annotated[int, typer.Option(help="Updates between checkpoints.", min=1)] = 10,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a model, and a router unless the width is 1, on a task with a checker."""
    torch.set_num_threads(threads)
    settings = Settings(
        task, str(start), width, depth, seed, updates, questions, group, questions_at_once, model_lr, router_lr,
        router_dim, eval_every, eval_questions, eval_samples,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    log, described, found = out / "log.jsonl", out / "settings.json", checkpoints(out)
    state = begin(settings)
    if resume and found:
        if (known := json.loads(described.read_text(encoding="utf-8"))) != asdict(settings):
            raise typer.BadParameter(f"{out} is a run with other settings: {known}")
        state.load(found[-1])
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[: state.update + 1]
    elif log.exists() and not resume:
        raise typer.BadParameter(f"{out} holds a run already: --resume goes on with it")
    else:
        write_whole(described, json.dumps(asdict(settings), indent=2) + "\n")
        kept = [json.dumps({"update": 0, "held_out": held_out(state, settings)}) + "\n"]
    write_whole(log, "".join(kept))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        log.open("a", buffering=1, encoding="utf-8") as file,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("", total=updates, completed=state.update)
        for record in train(state, settings):
            file.write(json.dumps(record) + "\n")
            if state.update % checkpoint_every == 0 or state.update == updates:
                state.save(out)
            progress.update(bar, completed=state.update, description=f"reward {record['reward']:.3f}")


if __name__ == "__main__":
    typer.run(main)
