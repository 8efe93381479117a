"""The study's language model, its tokenizer, its sizes, and what is written of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from lbr_kernels.evaluation.digits import CONTINUES
from lbr_kernels.evaluation.reachability import EOS, PAD, SPECIAL_TOKENS, ReachabilityOptions, token_strings
from lbr_kernels.router import Router

DEPTHS = (1, 2)


@dataclass(frozen=True)
class Stage:
    """A part of a curriculum: what the packs hold, for how many steps."""

    steps: int
    options: ReachabilityOptions
    hops: tuple[int, ...]
    pairs: int
    walks: int


@dataclass(frozen=True)
class Preset:
    """A size of the study.

    ``pretraining`` is everybody's; then every method goes through ``curriculum``, whose data depend on the seed alone.
    ``graphs`` per step; ``trees`` per graph and step, for routers that learn on drawn candidates; ``held_out`` problems
    judge ``points`` times along the way, ``problems`` once at the end.
    """

    options: ReachabilityOptions
    dim: int
    layers: int
    heads: int
    router_dim: int
    pretraining: tuple[Stage, ...]
    curriculum: tuple[Stage, ...]
    graphs: int
    trees: int
    points: int
    held_out: int
    problems: int
    probed: int  # training problems, and as many others, whose states the probes see
    rounds: int  # in which all ways of decoding are timed
    lr: float = 3e-3
    router_lr: float = 2e-3


def _preset(
    options: ReachabilityOptions, small: ReachabilityOptions, steps: tuple[int, int, int, int, int], **size: int
) -> Preset:
    """``steps`` of walks on ``small`` graphs, on whole ones, and of questions over 1, 1-2 and 1-3 hops."""
    first, second, *rest = steps
    hops = tuple(tuple(range(1, most + 1)) for most in (1, 2, options.max_hops))
    return Preset(
        options=options,
        pretraining=(Stage(first, small, (1,), 0, 16), Stage(second, options, (1,), 0, 16)),
        curriculum=tuple(
            Stage(count, options, asked, *packed)
            for count, asked, packed in zip(rest, hops, ((4, 8), (4, 8), (6, 0)), strict=True)
        ),
        **size,
    )


QUATERNARY, BINARY = ReachabilityOptions(), ReachabilityOptions(radix=2, digits=4)
PRESETS = {
    "cpu": _preset(
        QUATERNARY, ReachabilityOptions(layers=2, num_edges=7), (300, 300, 250, 500, 1650),
        dim=128, layers=4, heads=4, router_dim=64, graphs=4, trees=10, points=10, held_out=300, problems=600,
        probed=6000, rounds=5,
    ),
    "gpu": _preset(
        BINARY, ReachabilityOptions(layers=2, num_edges=7, radix=2, digits=4), (2000, 2000, 2000, 4000, 20000),
        dim=768, layers=2, heads=8, router_dim=128, graphs=64, trees=16, points=20, held_out=1000, problems=4000,
        probed=10000, rounds=5,
    ),
    "smoke": _preset(
        QUATERNARY, ReachabilityOptions(layers=2, num_edges=7), (3, 3, 2, 2, 4),
        dim=32, layers=2, heads=4, router_dim=16, graphs=2, trees=4, points=2, held_out=12, problems=24,
        probed=60, rounds=1,
    ),
}  # fmt: skip


def build_model(preset: Preset) -> PreTrainedModel:
    """A Qwen3 whose first layer starts with heads that look back 1, 2, 3 and 4 tokens.

    A small model finds such heads by itself only after thousands of steps, and nothing can be looked up without them.
    They are set through the biases of queries and keys: a constant key on the fastest rotary planes, and a query that
    is the same, turned back by the head's distance.
    """
    options = preset.options
    config = Qwen3Config(
        vocab_size=options.vocab_size,
        hidden_size=preset.dim,
        intermediate_size=preset.dim * 11 // 4,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        head_dim=preset.dim // preset.heads,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention, strength = model.base_model.layers[0].self_attn, 3.0
    planes = min(5, preset.dim // preset.heads // 2)
    frequencies = model.base_model.rotary_emb.inv_freq[:planes]
    with torch.no_grad():
        query = attention.q_proj.bias.view(preset.heads, 2, -1)[:, :, :planes]
        key = attention.k_proj.bias.view(preset.heads, 2, -1)[:, :, :planes]
        for head in range(min(preset.heads, 2 * options.digits)):
            angle = (head + 1) * frequencies
            query[head] = strength * torch.stack([angle.cos(), -angle.sin()])
            key[head, 0] = strength
    return model


def build_routers(
    model: PreTrainedModel, preset: Preset, *, depths: tuple[int, ...], independent: bool
) -> nn.ModuleDict:
    """Untrained routers by depth."""
    routers = {
        str(depth): Router.for_model(model, depth=depth, dim=preset.router_dim, num_heads=4, independent=independent)
        for depth in depths
    }
    return nn.ModuleDict(routers)


def build_tokenizer(options: ReachabilityOptions) -> PreTrainedTokenizerFast:
    """WordPiece over the task's vocabulary: ``12`` becomes ``1`` and ``##2``, and decodes to ``12`` again."""
    ids = {token: index for index, token in enumerate(token_strings(options))}
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


def save(model: PreTrainedModel, routers: nn.ModuleDict, directory: Path, options: ReachabilityOptions) -> None:
    """Write model, tokenizer and routers, the weights in fp16; the configuration says that they are read as fp32."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.generation_config.do_sample = True
    model.save_pretrained(directory, state_dict=half)
    build_tokenizer(options).save_pretrained(directory)
    for depth, router in routers.items():
        half_router: Router = copy.deepcopy(cast(Router, router)).half()
        half_router.save_pretrained(directory / f"router-depth{depth}")


def load(directory: Path, device: torch.device) -> tuple[PreTrainedModel, dict[int, Router]]:
    """What :func:`save` wrote, in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.to(device).eval()
    routers = {
        depth: Router.from_pretrained(found).to(device).eval()
        for depth in DEPTHS
        if (found := directory / f"router-depth{depth}").is_dir()
    }
    return model, routers
