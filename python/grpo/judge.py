"""Pass@k of a run's last checkpoint, or of a model alone, on held-out questions.

    python python/grpo/judge.py arithmetic start start.json
    python python/grpo/judge.py arithmetic run/checkpoint-000100 run.json --width 3

Writes, per way of decoding, how many of every question's answers are right. A model with a router is decoded with its
router, and with a uniform one in its place, which samples from the model itself: what the router is worth is the
difference between the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rollout import answer
from tasks import TASKS
from transformers import AutoModelForCausalLM

from lbr_kernels import Router
from lbr_kernels.options import one_of

PART = 16  # questions that are decoded together


def main(
    task: Annotated[str, typer.Argument(parser=one_of(TASKS), metavar="|".join(TASKS))],
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of grpo.py, or a model.", exists=True)],
    out: Annotated[Path, typer.Argument(help="The JSON file.", dir_okay=False)],
    width: Annotated[int, typer.Option(min=1)] = 1,
    depth: Annotated[int, typer.Option(min=1)] = 1,
    questions: Annotated[int, typer.Option(min=1)] = 64,
    samples: Annotated[int, typer.Option(help="Answers per question.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of the questions and of the answers.")] = 2000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Count the right answers to held-out questions."""
    torch.set_num_threads(threads)
    trained = (checkpoint / "model").is_dir()
    source = checkpoint / "model" if trained else checkpoint
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    routers: dict[str, Router | None] = {"plain" if width == 1 else "uniform router": None}
    if (checkpoint / "router").is_dir():
        routers["router"] = Router.from_pretrained(checkpoint / "router").eval()
    asked = TASKS[task].held_out(questions, np.random.default_rng(seed))
    found: dict[str, Any] = {"questions": questions, "samples": samples, "seed": seed}
    for name, router in routers.items():
        generator, right, nodes, tokens = torch.Generator().manual_seed(seed), [], 0, 0
        for first in range(0, questions, PART):
            part = asked[first : first + PART]
            rollout = answer(
                model, router, TASKS[task], part, samples=samples, width=width, depth=depth, generator=generator
            )
            right += rollout.rewards.view(len(part), samples).sum(dim=1).int().tolist()
            nodes += rollout.nodes
            tokens += int(rollout.trajectory.num_committed.sum())
        found[name] = {"right": right, "nodes": nodes, "tokens": tokens}
    out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
