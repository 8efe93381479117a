"""``generate``: Local Branch Routing in the place of ``model.generate``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.arguments import Caller, GenerateArguments, Request, require_type
from lbr_kernels.decoding.cache import CACHE_NAME, TreeCache
from lbr_kernels.decoding.config import LBRConfig
from lbr_kernels.decoding.engine import engine_obstacle, take_step
from lbr_kernels.decoding.loop import DecodingStats, StepView, TreeDecoder
from lbr_kernels.decoding.prompts import draw_seed, read_prompts, require_known_inputs, row_streams
from lbr_kernels.decoding.replay import FixedDecoder
from lbr_kernels.decoding.routing import RouterLike, Routing
from lbr_kernels.decoding.sampling import ChildSampler, Draws
from lbr_kernels.decoding.trajectory import DecodingSettings, TreeTrajectory, fingerprint
from lbr_kernels.decoding.tree import LookaheadTree
from lbr_kernels.ops.tree_shape import num_slots


@dataclass
class LBRGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``model.generate`` returns with ``return_dict_in_generate``, and two fields more.

    ``scores`` and ``logits`` belong to the committed tokens. ``trajectory`` holds every grown node and every choice,
    ``stats`` what the call cost. ``past_key_values`` (``cache`` from
    transformers 5.24 on) is None for prompts that were padded on the right.
    """

    trajectory: TreeTrajectory | None = None
    stats: DecodingStats | None = None


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    width: int | None = None,
    depth: int | None = None,
    router: RouterLike | None = None,
    router_temperature: float | None = None,
    router_do_sample: bool | None = None,
    candidate_min_p: float | None = None,
    trie: bool | None = None,
    engine: Literal["eager", "static", "graph"] | None = None,
    backend: str | None = None,
    config: LBRConfig | None = None,
    generator: torch.Generator | None = None,
    streams: Sequence[int] | Tensor | None = None,
    on_step: Callable[[StepView], None] | None = None,
    **kwargs: Any,
) -> Tensor | LBRGenerateOutput:
    """Decode with a rolling lookahead tree (paper, section 3); a drop-in for ``model.generate``.

    At every step the tree behind the committed text holds K candidates for the next token and L - 1 layers of their
    continuations, all forwarded in one pass; the router reads their hidden states and picks the candidate that is
    committed. Everything that ``model.generate`` takes means the same here, and preparation is its own.

    Args:
        model: any decoder-only transformers model that passes :func:`lbr_kernels.check_model`.
        inputs: prompt ids ``[B, P]``, left- or right-padded (or ``input_ids=``, ``inputs_embeds=``).
        width, depth, router_temperature, router_do_sample, candidate_min_p, trie, engine, backend: see
            :class:`LBRConfig`, which ``config`` gives as one object; width 3 and depth 1 by default.
        router: a :class:`lbr_kernels.Router`, a directory or Hub id of one, a function of ``(hidden, valid)`` to
            scores ``[B, K]``, or None: uniform, which samples from the model itself.
        generator: source of the call's 64-bit seed; torch's default one if None. Every draw is keyed by that seed,
            the row's stream, the step and the slot: a row's text does not depend on the batch around it.
        streams: one integer per returned row; ``0 .. rows - 1`` by default.
        on_step: is called with a :class:`StepView` after every decision.
        **kwargs: as for ``model.generate``. With ``do_sample=False`` candidates are the most likely tokens, ties to
            the lowest id, and the choice is the argmax.

    Returns:
        ids ``[rows, length]`` with the prompts in front; with ``return_dict_in_generate`` an
        :class:`LBRGenerateOutput`.

    Raises:
        ValueError: a setting that a tree cannot honour, an argument out of its range, a router made for another
            hidden size or depth, a model that cannot be decoded with a tree (:class:`UnsupportedModelError`).
        TypeError: an unknown keyword argument.
        RuntimeError: NaN logits, or a distribution from which every token was filtered out.
    """
    require_type("generate", "config", config, LBRConfig)
    require_type("generate", "generator", generator, torch.Generator)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"generate: on_step is a {type(on_step).__name__}, expected a callable or None")
    settings = _merge(
        config, width=width, depth=depth, router_temperature=router_temperature, router_do_sample=router_do_sample,
        candidate_min_p=candidate_min_p, trie=trie, engine=engine, backend=backend,
    )  # fmt: skip
    arguments = GenerateArguments(Caller("generate", "a tree", generate), model, inputs, kwargs)
    return arguments.generate(_Call(settings, router, generator, streams, on_step).run)


@dataclass
class _Call:
    """One call, once ``model.generate`` has prepared its inputs."""

    config: LBRConfig
    router: RouterLike | None
    generator: torch.Generator | None
    streams: Sequence[int] | Tensor | None
    on_step: Callable[[StepView], None] | None

    def run(self, request: Request) -> Tensor | LBRGenerateOutput:
        """Read the prompts, decode, and put together what ``model.generate`` would return."""
        require_known_inputs(request)
        model, generation_config, processors = request.model, request.config, request.processors
        config, device, rows = self.config, request.input_ids.device, len(request.input_ids)
        adapter, stats = ModelAdapter(model, backend=config.backend), DecodingStats()
        # What can be refused is refused here: reading the prompts writes to a cache that is the caller's.
        routing = Routing(
            self.router, width=config.width, depth=config.depth, hidden_size=adapter.hidden_size,
            temperature=config.router_temperature, device=device, backend=config.backend,
        )  # fmt: skip
        do_sample = bool(generation_config.do_sample)
        draw_choice = config.draws_choice(do_sample)
        sampler = ChildSampler(
            processors, width=config.width, candidate_min_p=config.candidate_min_p, keep_scores=request.keeps_scores,
            backend=config.backend,
        )  # fmt: skip
        stats.engine_reason = engine_obstacle(
            model, config, routing=routing, processors=processors, criteria=request.criteria,
            keep_scores=request.keeps_scores, looks_on=self.on_step is not None,
        )  # fmt: skip
        streams = row_streams("generate", self.streams, rows, device)
        prompts = read_prompts(request, adapter, stats)
        input_ids, limits, lens, repeats = prompts.input_ids, prompts.limits, prompts.lens, prompts.repeats

        tree_nodes = num_slots(config.width, config.depth)
        seed = draw_seed(self.generator) if do_sample or draw_choice else None
        draws = None if seed is None else Draws(seed, streams, tree_nodes)
        decoder: FixedDecoder | TreeDecoder
        with ExitStack() as stack:
            fixed = None
            if stats.engine_reason is None:
                fixed = take_step(
                    "generate", model, config, adapter, prompts.prefilled, stats, stack, rows=rows, width=config.width,
                    depth=config.depth, length=int(lens.max()) + limits.max_new_tokens, draw_children=do_sample,
                    draw_choice=draw_choice, num_eos=len(limits.eos_token_ids), routing=routing,
                )  # fmt: skip
                if fixed is None:
                    warnings.warn(f"generate: decoding without a CUDA graph: {stats.engine_reason}", stacklevel=2)
            if fixed is not None:
                with stats.phase("prefill"):
                    fixed.step.cache.refill(prompts.prefilled, lens, repeats=repeats, release=prompts.may_release)
                decoder = FixedDecoder(
                    fixed, input_ids, draws=draws, limits=limits, streamer=request.streamer, stats=stats
                )
                filters = sampler.filters if do_sample else sampler.deterministic_filters
                decoder.run(prompts.logits[prompts.row_of], prompts.next_positions, routing=routing, filters=filters)
            else:
                with stats.phase("prefill"):
                    cache = TreeCache.from_prefill(
                        prompts.prefilled, lens, repeats=repeats, tree_nodes=tree_nodes,
                        max_new_tokens=limits.max_new_tokens, release=prompts.may_release,
                    )  # fmt: skip
                tree = LookaheadTree(
                    rows, config.width, config.depth, device=device,
                    trie=device.type == "cpu" if config.trie is None else config.trie,
                )  # fmt: skip
                decoder = TreeDecoder(
                    adapter, cache, input_ids, prompts.next_positions,
                    tree=tree, routing=routing, sampler=sampler, draws=draws,
                    draw_children=do_sample, draw_choice=draw_choice,
                    limits=limits, criteria=request.criteria, streamer=request.streamer, on_step=self.on_step,
                    stats=stats,
                )  # fmt: skip
                decoder.run(prompts.logits, prompts.row_of)
            ops.raise_if_flagged(device)
            if request.streamer is not None:
                request.streamer.end()
            returned_cache = prompts.returned_cache(
                decoder.cache, decoder.num_committed, len(decoder.choices), wants_dict=request.wants_dict
            )
        sequences = prompts.with_text(decoder.sequences)
        if not request.wants_dict:
            return sequences

        settings = DecodingSettings(
            width=config.width,
            depth=config.depth,
            mode="sampled" if do_sample else "deterministic",
            filters=sampler.describe(),
            router_temperature=config.router_temperature,
            router_do_sample=draw_choice,
            eos_token_ids=limits.eos_token_ids.tolist(),
            seed=seed,
            model_fingerprint=fingerprint(model),
            router_fingerprint=fingerprint(routing.module),
        )
        trajectory = TreeTrajectory(
            prompt_ids=input_ids,
            prompt_mask=prompts.mask,
            node_tokens=torch.cat(decoder.node_tokens, dim=1),
            node_log_probs=torch.cat(decoder.node_log_probs, dim=1),
            choices=torch.stack(decoder.choices, dim=1),
            router_log_probs=torch.stack(decoder.router_log_probs, dim=1),
            num_committed=decoder.num_committed,
            streams=streams,
            settings=settings,
            prompt_embeds=prompts.embeds,
        )
        return LBRGenerateOutput(
            sequences=cast(torch.LongTensor, sequences),
            scores=tuple(decoder.scores) if generation_config.output_scores else None,
            logits=tuple(decoder.raw_logits) if generation_config.output_logits else None,
            trajectory=trajectory,
            stats=stats,
            **{CACHE_NAME: returned_cache},
        )


def _merge(config: LBRConfig | None, **given: Any) -> LBRConfig:
    """``config`` (or the defaults) with the arguments that were given; both at once must not disagree."""
    arguments = {name: value for name, value in given.items() if value is not None}
    if config is None:
        return LBRConfig(**arguments)
    for name, value in arguments.items():
        if value != getattr(config, name):
            raise ValueError(f"generate: {name} is {value!r} and config says {getattr(config, name)!r}; give one")
    return config
