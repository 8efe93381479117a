"""``generate``: Local Branch Routing in the place of ``model.generate``."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.generic import TransformersKwargs

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import ModelAdapter, require_supported, unwrapped
from lbr_kernels.decoding.cache import CACHE_NAME, TreeCache
from lbr_kernels.decoding.config import LBRConfig
from lbr_kernels.decoding.engine import engine_obstacle, take_step
from lbr_kernels.decoding.loop import DecodingStats, Limits, StepView, TreeDecoder
from lbr_kernels.decoding.replay import FixedDecoder
from lbr_kernels.decoding.routing import RouterLike, Routing
from lbr_kernels.decoding.sampling import ChildSampler, Draws
from lbr_kernels.decoding.trajectory import DecodingSettings, TreeTrajectory, fingerprint
from lbr_kernels.decoding.tree import LookaheadTree
from lbr_kernels.ops.tree_shape import num_slots

# Settings of model.generate that a tree cannot honour, each with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "assistant_model": (None,),
    "cache_implementation": (None, "dynamic", "dynamic_full", "hybrid"),
    "compile_config": (None,),
    "constraints": (None,),
    "custom_generate": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "low_memory": (None, False),
    "negative_prompt_attention_mask": (None,),
    "negative_prompt_ids": (None,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "penalty_alpha": (None, 0),
    "prompt_lookup_num_tokens": (None,),
    "synced_gpus": (None, False),
    "token_healing": (None, False),
    "use_cache": (None, True),
}
# What a model's forward may be given: the loop knows how to carry these on.
_MODEL_INPUTS = {"attention_mask", "inputs_embeds", "logits_to_keep", CACHE_NAME, "position_ids", "use_cache"}

_LEFT_PADDED_CACHE = f"generate: {CACHE_NAME} needs an attention_mask whose padding is on the left"


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
    for name, value, kind in (("config", config, LBRConfig), ("generator", generator, torch.Generator)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"generate: {name} is a {type(value).__name__}, expected a {kind.__name__} or None")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"generate: on_step is a {type(on_step).__name__}, expected a callable or None")
    settings = _merge(
        config, width=width, depth=depth, router_temperature=router_temperature, router_do_sample=router_do_sample,
        candidate_min_p=candidate_min_p, trie=trie, engine=engine, backend=backend,
    )  # fmt: skip
    if "past_key_values" in kwargs and CACHE_NAME not in kwargs:
        kwargs[CACHE_NAME] = kwargs.pop("past_key_values")  # the old name is good everywhere
    wrapped: Any = model.module if isinstance(model, DistributedDataParallel) else model
    model = unwrapped(model)
    _check_keywords(model, kwargs)
    _check_settings(model, kwargs)
    _check_prompts(inputs, kwargs)
    require_supported(model)
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "generate: the model is in training mode with gradient checkpointing, which allows no cache; "
            "call model.eval() or model.gradient_checkpointing_disable() first"
        )
    # Bound here because model.generate keeps these from a decoding method that is not its own.
    streamer, tokenizer = kwargs.get("streamer"), kwargs.pop("tokenizer", None)
    inputs, shown_prompt = _left_align_arguments(inputs, kwargs)

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | LBRGenerateOutput:
        call = _Call(model, settings, router, generator, streams, streamer, on_step, shown_prompt)
        return call.run(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    with _stop_strings(model, kwargs, tokenizer):
        return cast("Tensor | LBRGenerateOutput", wrapped.generate(inputs, custom_generate=decode, **kwargs))


@dataclass
class _Call:
    """One call, once ``model.generate`` has prepared its inputs."""

    model: PreTrainedModel
    config: LBRConfig
    router: RouterLike | None
    generator: torch.Generator | None
    streams: Sequence[int] | Tensor | None
    streamer: Any
    on_step: Callable[[StepView], None] | None
    shown_prompt: Tensor | None  # [B, P] as the caller gave it, where that was not left-padded

    def run(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> Tensor | LBRGenerateOutput:
        """Read the prompts, decode, and put together what ``model.generate`` would return."""
        given = {name for name, value in model_kwargs.items() if value is not None}
        if unknown := sorted(given - _MODEL_INPUTS):
            raise ValueError(
                f"generate: model input {unknown[0]!r} cannot be used with a tree, accepted are {sorted(_MODEL_INPUTS)}"
            )
        positions = model_kwargs.get("position_ids")
        if positions is not None and positions.dim() != 2:
            raise ValueError(
                f"generate: position_ids has shape {list(positions.shape)}, expected [B, P]; "
                "positions of several axes cannot be used with a tree"
            )
        config, device, rows = self.config, input_ids.device, len(input_ids)
        adapter, stats = ModelAdapter(self.model, backend=config.backend), DecodingStats()
        # What can be refused is refused here: reading the prompts writes to a cache that is the caller's.
        routing = Routing(
            self.router, width=config.width, depth=config.depth, hidden_size=adapter.hidden_size,
            temperature=config.router_temperature, device=device, backend=config.backend,
        )  # fmt: skip
        do_sample = bool(generation_config.do_sample)
        draw_choice = config.draws_choice(do_sample)
        wants_dict = bool(generation_config.return_dict_in_generate)
        keep_scores = wants_dict and bool(generation_config.output_scores or generation_config.output_logits)
        sampler = ChildSampler(
            processors, width=config.width, candidate_min_p=config.candidate_min_p, keep_scores=keep_scores,
            backend=config.backend,
        )  # fmt: skip
        stats.engine_reason = engine_obstacle(
            self.model, config, routing=routing, processors=processors, criteria=criteria, keep_scores=keep_scores,
            looks_on=self.on_step is not None,
        )  # fmt: skip
        streams = self._row_streams(rows, device)
        shown = input_ids
        if (order := _alignment(model_kwargs.get("attention_mask"))) is not None:
            input_ids = _reorder(input_ids, order)
            model_kwargs = {name: _reorder(value, order) for name, value in model_kwargs.items()}
        elif self.shown_prompt is not None:
            shown = self.shown_prompt.repeat_interleave(rows // len(self.shown_prompt), dim=0)

        # Return sequences of one prompt share its prefill, unless they come with a cache of their own.
        past = model_kwargs.get(CACHE_NAME)
        continues = past is not None and past.get_seq_length() > 0
        repeats = 1 if continues else generation_config.num_return_sequences or 1
        prompt_ids = input_ids[::repeats]
        prompt_kwargs = {
            name: value[::repeats] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in model_kwargs.items()
        }
        with stats.phase("prefill"):
            root_logits, prefilled = adapter.prefill(prompt_ids, generation_config, prompt_kwargs)
            prompt_columns = prefilled.get_seq_length()
            stats.model_calls += 1
            lens = _prompt_lens(prompt_kwargs.get("attention_mask"), prefilled, len(prompt_ids)).to(device)
            next_positions = _last_positions(prompt_kwargs, lens).to(device).repeat_interleave(repeats) + 1
            limits = _limits(adapter, generation_config, criteria, input_ids.shape[1], next_positions)

        tree_nodes = num_slots(config.width, config.depth)
        seed = _draw_seed(self.generator) if do_sample or draw_choice else None
        draws = None if seed is None else Draws(seed, streams, tree_nodes)
        row_of = torch.arange(rows, device=device) // repeats
        release = not getattr(prefilled, "_is_user_defined", False)
        decoder: FixedDecoder | TreeDecoder
        with ExitStack() as stack:
            fixed = None
            if stats.engine_reason is None:
                fixed = take_step(
                    "generate", self.model, config, adapter, prefilled, stats, stack, rows=rows, width=config.width,
                    depth=config.depth, length=int(lens.max()) + limits.max_new_tokens, draw_children=do_sample,
                    draw_choice=draw_choice, num_eos=len(limits.eos_token_ids), routing=routing,
                )  # fmt: skip
                if fixed is None:
                    warnings.warn(f"generate: decoding without a CUDA graph: {stats.engine_reason}", stacklevel=2)
            if fixed is not None:
                with stats.phase("prefill"):
                    fixed.step.cache.refill(prefilled, lens, repeats=repeats, release=release)
                decoder = FixedDecoder(
                    fixed, input_ids, draws=draws, limits=limits, streamer=self.streamer, stats=stats
                )
                filters = sampler.filters if do_sample else sampler.deterministic_filters
                decoder.run(root_logits[row_of], next_positions, routing=routing, filters=filters)
            else:
                with stats.phase("prefill"):
                    cache = TreeCache.from_prefill(
                        prefilled, lens, repeats=repeats, tree_nodes=tree_nodes,
                        max_new_tokens=limits.max_new_tokens, release=release,
                    )  # fmt: skip
                tree = LookaheadTree(
                    rows, config.width, config.depth, device=device,
                    trie=device.type == "cpu" if config.trie is None else config.trie,
                )  # fmt: skip
                decoder = TreeDecoder(
                    adapter, cache, input_ids, next_positions,
                    tree=tree, routing=routing, sampler=sampler, draws=draws,
                    draw_children=do_sample, draw_choice=draw_choice,
                    limits=limits, criteria=criteria, streamer=self.streamer, on_step=self.on_step, stats=stats,
                )  # fmt: skip
                decoder.run(root_logits, row_of)
            ops.raise_if_flagged(device)
            if self.streamer is not None:
                self.streamer.end()
            returned_cache = None
            if shown is input_ids and (wants_dict or getattr(past, "_is_user_defined", False)):
                returned_cache = _returned_cache(decoder, past, lens.repeat_interleave(repeats), prompt_columns)
        sequences = torch.cat([shown, decoder.sequences[:, shown.shape[1] :]], dim=1)
        if not wants_dict:
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
            model_fingerprint=fingerprint(self.model),
            router_fingerprint=fingerprint(routing.module),
        )
        embeds = model_kwargs.get("inputs_embeds")
        columns = input_ids.shape[1] if embeds is None else embeds.shape[1]
        real = torch.arange(columns, device=device) >= columns - lens[:, None]
        trajectory = TreeTrajectory(
            prompt_ids=input_ids,
            prompt_mask=real.repeat_interleave(repeats, dim=0),
            node_tokens=torch.cat(decoder.node_tokens, dim=1),
            node_log_probs=torch.cat(decoder.node_log_probs, dim=1),
            choices=torch.stack(decoder.choices, dim=1),
            router_log_probs=torch.stack(decoder.router_log_probs, dim=1),
            num_committed=decoder.num_committed,
            streams=streams,
            settings=settings,
            prompt_embeds=embeds,
        )
        return LBRGenerateOutput(
            sequences=cast(torch.LongTensor, sequences),
            scores=tuple(decoder.scores) if generation_config.output_scores else None,
            logits=tuple(decoder.raw_logits) if generation_config.output_logits else None,
            trajectory=trajectory,
            stats=stats,
            **{CACHE_NAME: returned_cache},
        )

    def _row_streams(self, rows: int, device: torch.device) -> Tensor:
        if self.streams is None:
            return torch.arange(rows, device=device)
        streams = torch.as_tensor(self.streams, device=device)
        if streams.is_floating_point() or streams.is_complex() or streams.dtype == torch.bool:
            raise ValueError(f"generate: streams has dtype {streams.dtype}, expected integers")
        streams = streams.to(torch.int64)
        if streams.shape != (rows,):
            raise ValueError(f"generate: streams has shape {list(streams.shape)}, expected [{rows}]: one per row")
        return streams


def _returned_cache(
    decoder: FixedDecoder | TreeDecoder, past: Cache | None, prompt_lens: Tensor, prompt_columns: int
) -> DynamicCache:
    """The cache as ``model.generate`` leaves it: everything but the last token; in the caller's object, if any."""
    lens = prompt_lens + decoder.num_committed
    cache = past if isinstance(past, DynamicCache) else DynamicCache()
    cache.layers = list(
        decoder.cache.to_dynamic_layers(lens, prompt_columns - prompt_lens, prompt_columns + len(decoder.choices) - 1)
    )
    return cache


def _merge(config: LBRConfig | None, **given: Any) -> LBRConfig:
    """``config`` (or the defaults) with the arguments that were given; both at once must not disagree."""
    arguments = {name: value for name, value in given.items() if value is not None}
    if config is None:
        return LBRConfig(**arguments)
    for name, value in arguments.items():
        if value != getattr(config, name):
            raise ValueError(f"generate: {name} is {value!r} and config says {getattr(config, name)!r}; give one")
    return config


def _check_keywords(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse what neither ``model.generate`` nor the model's forward knows, with the nearest name."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"tokenizer"}
    for function in (model.generate, model.forward, model.prepare_inputs_for_generation, generate):
        known |= set(inspect.signature(function).parameters)
    known |= set(TransformersKwargs.__optional_keys__)
    for name in kwargs:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise TypeError(f"generate: unknown argument {name!r}{hint}")


def _check_settings(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse settings that a tree cannot honour, wherever they come from."""
    sources = (kwargs.get("generation_config"), model.generation_config)
    for name, accepted in _UNSUPPORTED.items():
        value = kwargs.get(name)
        for source in sources:
            if value is None:
                value = getattr(source, name, None)
        if not any(value is x or (x is not None and value == x) for x in accepted):
            options = " or ".join(repr(x) for x in accepted)
            bulky = isinstance(value, torch.nn.Module | Tensor)
            shown = f"a {type(value).__name__}" if bulky else repr(value)
            raise ValueError(f"generate: {name} is {shown}, which a tree cannot honour; expected {options}")
    sequences = kwargs.get("num_return_sequences")
    if sequences is not None and (not isinstance(sequences, int) or sequences < 1):
        raise ValueError(f"generate: num_return_sequences is {sequences!r}, expected an integer >= 1")


def _check_prompts(inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse what is no batch of prompts, prompts without tokens, and a mask for other prompts."""
    mask: Any = kwargs.get("attention_mask")
    ids: Any = inputs if inputs is not None else kwargs.get("input_ids")
    embeds = kwargs.get("inputs_embeds")
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"generate: input_ids is a {type(ids).__name__}, expected an integer tensor [B, P]")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            f"generate: input_ids has shape {list(ids.shape)} and dtype {ids.dtype}, expected integers [B, P]"
        )
    if len(ids) == 0 or (ids.shape[1] == 0 and embeds is None):
        raise ValueError(f"generate: input_ids has shape {list(ids.shape)}, expected at least one row and one token")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or embeds is not None:
        return
    # With a cache the mask also covers what it holds.
    fits = mask.shape[1] == ids.shape[1] or (mask.shape[1] > ids.shape[1] and kwargs.get(CACHE_NAME) is not None)
    if len(mask) != len(ids) or not fits:
        raise ValueError(
            f"generate: attention_mask has shape {list(mask.shape)}, expected the prompts' {list(ids.shape)}"
        )


@contextmanager
def _stop_strings(model: PreTrainedModel, kwargs: dict[str, Any], tokenizer: Any) -> Iterator[None]:
    """Turn stop strings into a criterion: ``model.generate`` would look for the tokenizer that it has dropped."""
    config = kwargs.get("generation_config")
    default = model.generation_config.stop_strings
    strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None) or default
    if strings is None:
        yield
        return
    if tokenizer is None:
        raise ValueError("generate: stop_strings need the model's tokenizer, pass tokenizer=...")
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
    if config is not None:
        kwargs["generation_config"] = config = GenerationConfig.from_dict(config.to_dict())
        config.stop_strings = None
    model.generation_config.stop_strings = None
    try:
        yield
    finally:
        model.generation_config.stop_strings = default


def _left_align_arguments(inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Move padding to the left in the caller's arguments, before ``model.generate`` warns about it.

    Returns the new ``inputs`` and, if anything moved, the ids as they were.
    """
    order = _alignment(kwargs.get("attention_mask"))
    if order is None:
        return inputs, None
    if kwargs.get(CACHE_NAME) is not None:
        raise ValueError(_LEFT_PADDED_CACHE)
    shown = inputs if inputs is not None else kwargs.get("input_ids")
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
        if name in kwargs:
            kwargs[name] = _reorder(kwargs[name], order)
    return _reorder(inputs, order), shown


def _alignment(mask: Tensor | None) -> Tensor | None:
    """The order of columns ``[B, P]`` that brings a 2-D mask's padding to the left; None if it is there already."""
    if mask is None or mask.dim() != 2 or bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return None
    return mask.ne(0).to(torch.int8).argsort(dim=1, stable=True)


def _reorder(value: Any, order: Tensor) -> Any:
    """A tensor ``[B, P, ...]`` with its columns in a new order; anything else as it is."""
    if isinstance(value, Cache) and getattr(value, "_is_user_defined", False):
        raise ValueError(_LEFT_PADDED_CACHE)
    if not isinstance(value, Tensor) or value.shape[:2] != order.shape:
        return value
    index = order.view(*order.shape, *[1] * (value.dim() - 2)).expand(value.shape)
    return value.gather(1, index)


def _prompt_lens(mask: Tensor | None, prefilled: Cache, rows: int) -> Tensor:
    if not isinstance(prefilled, DynamicCache):
        raise ValueError(
            f"generate: {CACHE_NAME} is a {type(prefilled).__name__}, which a tree cannot honour; "
            "expected a DynamicCache"
        )
    if mask is not None:
        return mask.ne(0).sum(dim=1)
    return torch.full((rows,), prefilled.get_seq_length())


def _last_positions(model_kwargs: dict[str, Any], lens: Tensor) -> Tensor:
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return lens - 1
    last: Tensor = positions[:, -1].expand(len(lens))
    return last


def _limits(
    adapter: ModelAdapter,
    generation_config: GenerationConfig,
    criteria: StoppingCriteriaList,
    prompt_width: int,
    next_positions: Tensor,
) -> Limits:
    eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    device = next_positions.device
    # A caller's own criteria of these kinds have taken the place of those that the config asks for.
    max_length = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [generation_config.max_length])
    if ends := [c.eos_token_id.view(-1) for c in criteria if type(c) is EosTokenCriteria]:
        eos = torch.cat([end.to(device) for end in ends])
    last = adapter.last_position
    if last is not None and int(next_positions.max()) > last:
        raise ValueError(
            f"generate: a prompt ends at position {int(next_positions.max()) - 1}, "
            f"expected less than the model's last position, {last}"
        )
    max_new_tokens = max_length - prompt_width
    if last is not None and int(next_positions.max()) + max_new_tokens - 1 > last:
        warnings.warn(
            f"generate: {max_new_tokens} new tokens go past the model's last position, {last}; texts end there",
            stacklevel=2,
        )
    return Limits(
        max_new_tokens=max_new_tokens,
        eos_token_ids=torch.empty(0, dtype=torch.int64, device=device) if eos is None else eos.view(-1).to(device),
        last_position=last,
        pad_token_id=0 if pad is None else int(pad),
    )


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=device))
