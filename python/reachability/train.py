"""Train the demo's model and routers: graph reachability, decoded with Local Branch Routing.

    python python/reachability/train.py --seed 0

One CPU thread; the shipped checkpoint took 34 minutes on one core of an AMD EPYC. Writes the checkpoint that the
package ships (model, tokenizer, ``router-depth1``, ``router-depth2``, all weights in fp16), then reads it back and
prints its accuracy on unseen graphs.

The recipe. A small Qwen3 learns to look up edges on random walks, then to answer questions over 1, 1-2 and 1-3 hops.
From the last stage on the routers learn beside it: at positions of a gold answer the candidates are drawn from the
model as decoding draws them, K independent draws at temperature 1, illegal and duplicate ones among them, and for
depth 2 K children of each; a router is asked for a candidate that leads to the reachable target (where several do,
they share the credit; where all or none do, there is nothing to learn). The routers' gradient reaches the model; its
language-model loss goes on unchanged to the end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from packs import Pack, training_pack
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from token_tree import TokenTree, decode, draw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from lbr_kernels.evaluation.digits import CONTINUES
from lbr_kernels.evaluation.reachability import (
    EOS,
    PAD,
    SPECIAL_TOKENS,
    Problem,
    ReachabilityOptions,
    check_answer,
    evaluation_problems,
    prompt_ids,
    token_strings,
)
from lbr_kernels.ops.tree_shape import num_slots
from lbr_kernels.router import Router

OPTIONS = ReachabilityOptions()
CHECKPOINT = Path(__file__).parents[2] / "lbr_kernels" / "evaluation" / "checkpoints" / "reachability"

WIDTHS, DEPTHS = (2, 3), (1, 2)
MODEL_LR, ROUTER_LR = 3e-3, 2e-3
GRAPHS = 16  # per step
TREES = 12  # per graph and step, for the routers
REDRAWS = 4  # sets of candidates drawn at every position, from which the trees are taken


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: what the packs hold, for how many steps."""

    steps: int
    options: ReachabilityOptions
    hops: tuple[int, ...]
    pairs: int
    walks: int
    routers: bool = False


def curriculum(last_steps: int) -> list[Stage]:
    """All stages; the last one, in which the routers learn, has ``last_steps`` steps."""
    return [
        Stage(150, ReachabilityOptions(layers=2, num_edges=7), hops=(1,), pairs=0, walks=16),
        Stage(150, OPTIONS, hops=(1,), pairs=0, walks=16),
        Stage(150, OPTIONS, hops=(1,), pairs=4, walks=8),
        Stage(350, OPTIONS, hops=(1, 2), pairs=4, walks=8),
        Stage(last_steps, OPTIONS, hops=(1, 2, 3), pairs=4, walks=0, routers=True),
    ]


def build_model() -> PreTrainedModel:
    """A Qwen3 of 0.8 M parameters whose first layer starts with heads that look back 1, 2, 3 and 4 tokens.

    A model this small finds such heads by itself only after thousands of steps, and nothing can be looked up without
    them. They are set through the biases of queries and keys: a constant key on the fastest rotary planes, and a query
    that is the same, turned back by the head's distance.
    """
    config = Qwen3Config(
        vocab_size=OPTIONS.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    # SDPA's backward is the slower one on a CPU.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    attention, planes, strength = model.base_model.layers[0].self_attn, 5, 3.0
    frequencies = model.base_model.rotary_emb.inv_freq[:planes]
    with torch.no_grad():
        query = attention.q_proj.bias.view(config.num_attention_heads, 2, -1)[:, :, :planes]
        key = attention.k_proj.bias.view(config.num_attention_heads, 2, -1)[:, :, :planes]
        for head in range(config.num_attention_heads):
            angle = (head + 1) * frequencies
            query[head] = strength * torch.stack([angle.cos(), -angle.sin()])
            key[head, 0] = strength
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the task's vocabulary: ``12`` becomes ``1`` and ``##2``, and decodes to ``12`` again."""
    ids = {token: index for index, token in enumerate(token_strings(OPTIONS))}
    tokenizer = Tokenizer(models.WordPiece(ids, continuing_subword_prefix=CONTINUES))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[EOS],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def language_model_loss(tree: TokenTree, pack: Pack) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy on the answers, and their logits ``[B, S, vocabulary]``."""
    logits = tree.logits(pack.answers - 1)
    return cross_entropy(logits.flatten(0, 1), pack.targets.flatten(), ignore_index=PAD), logits


def router_losses(
    tree: TokenTree, pack: Pack, logits: Tensor, routers: dict[int, Router]
) -> dict[tuple[int, int], Tensor]:
    """Negative log-probability of routing right, per ``(width, depth)``, on candidates as decoding draws them.

    Grows lookahead trees of the largest width and depth at ``TREES`` positions per graph where some candidates are
    right and some are wrong. Children are independent draws, so the first K of each node form a tree of width K.
    """
    width, depth = max(WIDTHS), max(DEPTHS)
    batch = len(pack.tokens)
    candidates = draw(logits.detach(), REDRAWS * width, None).view(batch, -1, width)
    right = pack.right.repeat_interleave(REDRAWS, dim=1).gather(2, candidates)
    mixed = right.any(dim=-1) & ~right.all(dim=-1) & pack.right.any(dim=-1).repeat_interleave(REDRAWS, dim=1)
    picked = (mixed + torch.rand(mixed.shape)).topk(TREES, dim=1).indices
    right = right.gather(1, picked.unsqueeze(-1).expand(-1, -1, width)).flatten(0, 1)
    candidates = candidates.gather(1, picked.unsqueeze(-1).expand(-1, -1, width))

    roots = (pack.answers - 1).gather(1, picked // REDRAWS)
    layers = [tree.grow(roots.repeat_interleave(width, dim=1), candidates.flatten(1))]
    exists = [torch.ones_like(layers[0], dtype=torch.bool)]
    for _ in range(1, depth):
        children = draw(tree.logits(layers[-1]).detach(), width, None)
        alive = exists[-1] & (tree.tokens.gather(1, layers[-1]) != EOS)
        layers.append(tree.grow(layers[-1].repeat_interleave(width, dim=1), children.flatten(1)))
        exists.append(alive.repeat_interleave(width, dim=1))

    losses = {}
    for k in WIDTHS:
        hidden, valid = [], []
        for level, (slots, alive) in enumerate(zip(layers, exists, strict=True), start=1):
            grid, first = (batch * TREES, *[width] * level), (slice(None), *[slice(k)] * level)
            hidden.append(tree.hidden_at(slots).view(*grid, -1)[first].flatten(1, level))
            valid.append(alive.view(grid)[first].flatten(1))
        undecided = right[:, :k].any(dim=1) & ~right[:, :k].all(dim=1)
        for d, router in routers.items():
            slots_of = slice(num_slots(k, d))
            with torch.autocast("cpu", enabled=False):
                log_probs = router(torch.cat(hidden, 1)[:, slots_of], k, valid=torch.cat(valid, 1)[:, slots_of])
            log_right = log_probs.masked_fill(~right[:, :k], -torch.inf)[undecided].logsumexp(dim=1)
            losses[k, d] = -log_right.sum() / max(len(log_right), 1)
    return losses


def train(
    model: PreTrainedModel, routers: dict[int, Router], stages: Sequence[Stage], rng: np.random.Generator, weight: float
) -> Iterator[str]:
    """The loop; yields a line about every step. ``weight`` multiplies the routers' loss."""
    total = sum(stage.steps for stage in stages)
    blocks = [p for p in model.base_model.layers.parameters() if p.ndim == 2]
    in_blocks = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    choosers = [p for router in routers.values() for p in router.parameters()]
    optimizers = (
        torch.optim.Muon(blocks, lr=MODEL_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=MODEL_LR, betas=(0.9, 0.98)),
        torch.optim.AdamW(choosers, lr=ROUTER_LR, betas=(0.9, 0.98)),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50, 2 * (1 - step / total)))
        for optimizer in optimizers
    ]
    for stage in stages:
        for _ in range(stage.steps):
            pack = training_pack(
                stage.options, stage.hops, graphs=GRAPHS, pairs=stage.pairs, walks=stage.walks, rng=rng
            )
            with torch.autocast("cpu", torch.bfloat16):
                tree = TokenTree(model, pack.tokens, pack.positions, pack.visible)
                loss, logits = language_model_loss(tree, pack)
                report = f"lm {loss.item():.3f}"
                if stage.routers:
                    losses = router_losses(tree, pack, logits, routers)
                    loss = loss + weight * torch.stack(list(losses.values())).mean()
                    report += "".join(f"  K{k} L{d} {value.item():.3f}" for (k, d), value in losses.items())
            loss.backward()
            nn.utils.clip_grad_norm_([*blocks, *others], 1.0)
            nn.utils.clip_grad_norm_(choosers, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            yield report


def save(model: PreTrainedModel, routers: dict[int, Router], directory: Path) -> None:
    """Write model, tokenizer and routers, the weights in fp16; the configuration says that they are read as fp32."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.generation_config.do_sample = True
    model.save_pretrained(directory, state_dict=half)
    build_tokenizer().save_pretrained(directory)
    for depth, router in routers.items():
        copy.deepcopy(router).half().save_pretrained(directory / f"router-depth{depth}")


def evaluate(directory: Path, problems: Sequence[Problem], seed: int) -> Table:
    """Accuracy of the checkpoint in ``directory``: plain decoding, a uniform router, and LBR."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = torch.tensor([prompt_ids(problem, OPTIONS) for problem in problems])
    hops = sorted({problem.hops for problem in problems})
    table = Table("decoding", "accuracy", *(f"{count} hops" for count in hops), "legal")

    def row(name: str, *, width: int = 1, depth: int = 1, router: Router | None = None, greedy: bool = False) -> None:
        decoder = partial(decode, model, max_new_tokens=OPTIONS.max_answer_length, end=EOS, greedy=greedy)
        generator = torch.Generator().manual_seed(seed)
        answers: list[list[int]] = []
        for part in prompts.split(250):
            answers += decoder(part, width=width, depth=depth, router=router, generator=generator).tolist()
        verdicts = [check_answer(p, answer, OPTIONS) for p, answer in zip(problems, answers, strict=True)]
        parts = [[v.correct for p, v in zip(problems, verdicts, strict=True) if p.hops == count] for count in hops]
        shares = [[v.correct for v in verdicts], *parts, [v.legal for v in verdicts]]
        table.add_row(name, *(f"{np.mean(share):.3f}" for share in shares))

    row("plain, sampled")
    row("plain, greedy", greedy=True)
    row("K=3 L=1, uniform router", width=3)
    for depth in DEPTHS:
        router = Router.from_pretrained(directory / f"router-depth{depth}")
        for width in WIDTHS:
            row(f"K={width} L={depth}", width=width, depth=depth, router=router)
    return table


def main(
    seed: Annotated[int, typer.Option(help="Seed of everything random in training.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the last stage, in which the routers learn.", min=1)] = 3000,
    router_weight: Annotated[float, typer.Option(help="Weight of the routers' loss; 0 for a control.", min=0.0)] = 1.0,
    problems: Annotated[int, typer.Option(help="Unseen problems in the table, an even number.", min=2)] = 1200,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.", file_okay=False)] = CHECKPOINT,
) -> None:
    """Train the model and the routers of `lbr-kernels demo` and print their accuracy on unseen graphs."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = build_model()
    routers = {depth: Router.for_model(model, depth=depth, dim=64, num_heads=4) for depth in DEPTHS}
    stages = curriculum(steps)
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(stage.steps for stage in stages))
        for step, report in enumerate(train(model, routers, stages, np.random.default_rng(seed), router_weight)):
            progress.update(task, advance=1, description=report)
            if step % 100 == 0:
                progress.console.print(f"{step:5d}  {report}")
    console.print(f"trained in {(time.perf_counter() - started) / 60:.1f} minutes")
    save(model, routers, out)
    console.print(evaluate(out, evaluation_problems(OPTIONS, problems, hops=(1, 2, 3), seed=seed), seed))


if __name__ == "__main__":
    typer.run(main)
