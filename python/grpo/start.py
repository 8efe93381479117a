"""Make the start of the arithmetic study: a small model that is right now and then.

    python python/grpo/start.py arithmetic OUT --seed 0

A GPT-2 learns the answers of fresh training problems by next-token cross-entropy, on one CPU thread, until it gives the
right answer with the probability that is asked for. As there is one right answer, that probability is the accuracy of
sampling, and known exactly: no answer has to be drawn. The model and nothing else is written to OUT.

GPT-2 because its positions are learned: the terms of a problem stand in the same places always, and a learned position
says so directly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tasks import ARITHMETIC
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lbr_kernels.evaluation.arithmetic import (
    EOS,
    PAD,
    ArithmeticOptions,
    answer_ids,
    prompt_ids,
    random_problem,
)
from lbr_kernels.options import one_of

BATCH, LR = 64, 3e-3


def build_model(options: ArithmeticOptions, dim: int, layers: int) -> PreTrainedModel:
    """An untrained GPT-2 over the task's vocabulary, without dropout."""
    config = GPT2Config(
        vocab_size=options.vocab_size,
        n_embd=dim,
        n_layer=layers,
        n_head=8,
        n_positions=128,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def main(
    task: Annotated[str, typer.Argument(parser=one_of(ARITHMETIC), metavar="|".join(ARITHMETIC))],
    out: Annotated[Path, typer.Argument(help="Directory of the model.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    accuracy: Annotated[float, typer.Option(help="Of sampling, at which to stop.", min=0, max=1)] = 0.4,
    steps: Annotated[int, typer.Option(help="The most there may be.", min=1)] = 20_000,
    dim: Annotated[int, typer.Option(help="Hidden size, a multiple of 8.", min=8)] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Train a small model on an arithmetic task by next-token cross-entropy and save it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, options = np.random.default_rng(seed), ARITHMETIC[task]
    model = build_model(options, dim, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reached = 0.0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=steps)
        for step in range(steps):
            problems = [random_problem(options, split="train", rng=rng) for _ in range(BATCH)]
            texts = [prompt_ids(p, options) + answer_ids(p.totals(), options) for p in problems]
            tokens = torch.tensor(texts)
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (step + 1) / 50)
            logits = model(tokens[:, :-1], logits_to_keep=options.answer_length).logits
            answers = tokens[:, -options.answer_length :]
            losses = cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
            # The mean over about twenty batches, each drawn for this step: what was never seen.
            reached += 0.05 * ((-losses.detach().sum(dim=1)).exp().mean().item() - reached)
            if reached >= accuracy:
                break
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            progress.update(bar, advance=1, description=f"right with probability {reached:.3f}")
    print(f"right with probability {reached:.3f} after {step} steps")
    model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
