"""Make the start of the arithmetic study: a small model that is right now and then.

    python python/grpo/start.py arithmetic OUT --seed 0

A Qwen3 learns the answers of fresh training problems by next-token cross-entropy, on one CPU thread, for as many steps
as leave it partly right. The model and nothing else is written to OUT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from lbr_kernels.evaluation.arithmetic import (
    EOS,
    PAD,
    ArithmeticOptions,
    answer_ids,
    prompt_ids,
    random_problem,
)

SIZES = {"arithmetic": ArithmeticOptions(), "bits": ArithmeticOptions(terms=3, radix=2, digits=1)}
BATCH, LR = 256, 3e-3


def build_model(options: ArithmeticOptions, dim: int, layers: int) -> PreTrainedModel:
    """An untrained Qwen3 over the task's vocabulary."""
    config = Qwen3Config(
        vocab_size=options.vocab_size,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=dim // 4,
        tie_word_embeddings=True,
        max_position_embeddings=options.prompt_length + options.answer_length + 8,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def main(
    task: Annotated[str, typer.Argument(help="arithmetic or bits.")],
    out: Annotated[Path, typer.Argument(help="Directory of the model.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    dim: Annotated[int, typer.Option(help="Hidden size, a multiple of 8.", min=8)] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Train a small model on an arithmetic task by next-token cross-entropy and save it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, options = np.random.default_rng(seed), SIZES[task]
    model = build_model(options, dim, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=steps)
        for step in range(steps):
            problems = [random_problem(options, split="train", rng=rng) for _ in range(BATCH)]
            texts = [prompt_ids(p, options) + answer_ids(p.totals(), options) for p in problems]
            tokens = torch.tensor(texts)
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (step + 1) / 50)
            logits = model(tokens[:, :-1], logits_to_keep=options.answer_length).logits
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, -options.answer_length :].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f}")
    model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
