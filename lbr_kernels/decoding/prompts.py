"""Prompts as ``model.generate`` prepared them: read once, with where their texts end and what a call returns of them.

Contract
--------
``align`` brings padding to the left, ``read_prompts`` runs the model on each distinct prompt once, however many
sequences it shall have, and leaves keys and values in a cache whose layers a :class:`TreeCache` can take over.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.arguments import Request, alignment, reorder
from lbr_kernels.decoding.cache import CACHE_NAME, TreeCache
from lbr_kernels.decoding.loop import DecodingStats, Limits

# What a model's forward may be given: the loops know how to carry these on.
_MODEL_INPUTS = {"attention_mask", "inputs_embeds", "logits_to_keep", CACHE_NAME, "position_ids", "use_cache"}


@dataclass
class Prompts:
    """The prompts of a call, read; R rows, of which ``repeats`` at a time share a prompt.

    Attributes:
        input_ids: int64 ``[R, P]``, padding on the left.
        shown: int64 ``[R, P]``, as the caller gave them.
        embeds: ``[R, P, D]`` if the prompts were given as embeddings.
        repeats: rows per prompt.
        lens: int64 ``[R / repeats]``, real tokens per prompt.
        logits: ``[R / repeats, V]`` behind each prompt.
        row_of: int64 ``[R]``, which prompt is a row's.
        next_positions: int64 ``[R]``, the position of each row's next token.
        limits: where texts end.
        prefilled: keys and values.
        columns: how many tokens, padding included, the cache holds.
        past: the caller's own cache.
    """

    input_ids: Tensor
    shown: Tensor
    embeds: Tensor | None
    repeats: int
    lens: Tensor
    logits: Tensor
    row_of: Tensor
    next_positions: Tensor
    limits: Limits
    prefilled: Cache
    columns: int
    past: Cache | None

    @property
    def row_lens(self) -> Tensor:
        """Real tokens of each row's prompt, int64 ``[R]``."""
        return self.lens.repeat_interleave(self.repeats)

    @property
    def mask(self) -> Tensor:
        """Which of a row's ids (or embeddings) are real, bool ``[R, P]``."""
        columns = self.input_ids.shape[1] if self.embeds is None else self.embeds.shape[1]
        return torch.arange(columns, device=self.lens.device) >= columns - self.row_lens[:, None]

    @property
    def may_release(self) -> bool:
        """Whether the prefilled cache is nobody else's."""
        return not getattr(self.prefilled, "_is_user_defined", False)

    def with_text(self, sequences: Tensor) -> Tensor:
        """``sequences [R, P + new]`` with the prompts as they were given."""
        return torch.cat([self.shown, sequences[:, self.shown.shape[1] :]], dim=1)

    def returned_cache(
        self, cache: TreeCache, num_forwarded: Tensor, num_steps: int, *, wants_dict: bool
    ) -> DynamicCache | None:
        """The cache as ``model.generate`` leaves it: everything but the last token; in the caller's object, if any.

        ``num_forwarded [R]`` says how many tokens behind its prompt a row has in ``cache``; ``num_steps`` is what the
        longest text has committed.
        """
        wanted = wants_dict or getattr(self.past, "_is_user_defined", False)
        if self.shown is not self.input_ids or not wanted:
            return None
        lens = self.row_lens
        returned = self.past if isinstance(self.past, DynamicCache) else DynamicCache()
        returned.layers = list(
            cache.to_dynamic_layers(lens + num_forwarded, self.columns - lens, self.columns + num_steps - 1)
        )
        return returned


def require_known_inputs(request: Request) -> None:
    """Raise ``ValueError`` for inputs of the model's forward that no loop carries on."""
    caller, given = request.caller, {name for name, value in request.model_kwargs.items() if value is not None}
    if unknown := sorted(given - _MODEL_INPUTS):
        raise ValueError(
            f"{caller.name}: model input {unknown[0]!r} cannot be used with {caller.method}, "
            f"accepted are {sorted(_MODEL_INPUTS)}"
        )
    positions = request.model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(
            f"{caller.name}: position_ids has shape {list(positions.shape)}, expected [B, P]; "
            f"positions of several axes cannot be used with {caller.method}"
        )


def read_prompts(request: Request, adapter: ModelAdapter, stats: DecodingStats) -> Prompts:
    """Align and prefill; the latter writes to a cache that may be the caller's, so all is checked before."""
    caller, input_ids, model_kwargs = request.caller.name, request.input_ids, request.model_kwargs
    rows, device = len(input_ids), input_ids.device
    shown = input_ids
    if (order := alignment(model_kwargs.get("attention_mask"))) is not None:
        input_ids = reorder(caller, input_ids, order)
        model_kwargs = {name: reorder(caller, value, order) for name, value in model_kwargs.items()}
    elif request.shown_prompt is not None:
        shown = request.shown_prompt.repeat_interleave(rows // len(request.shown_prompt), dim=0)

    # Return sequences of one prompt share its prefill, unless they come with a cache of their own.
    past = model_kwargs.get(CACHE_NAME)
    if past is not None:
        _require_dynamic(request, past)
    continues = past is not None and past.get_seq_length() > 0
    repeats = 1 if continues else request.config.num_return_sequences or 1
    prompt_ids = input_ids[::repeats]
    prompt_kwargs = {
        name: value[::repeats] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for name, value in model_kwargs.items()
    }
    mask = prompt_kwargs.get("attention_mask")
    next_positions = _last_positions(prompt_ids, prompt_kwargs).to(device).repeat_interleave(repeats) + 1
    limits = _limits(request, adapter, input_ids.shape[1], next_positions)
    with stats.phase("prefill"):
        logits, prefilled = adapter.prefill(prompt_ids, request.config, prompt_kwargs)
        _require_dynamic(request, prefilled)  # the model's own, where there was none
        columns = prefilled.get_seq_length()
        stats.model_calls += 1
        lens = torch.full((len(prompt_ids),), columns) if mask is None else mask.ne(0).sum(dim=1)
        lens = lens.to(device)
    row_of = torch.arange(rows, device=device) // repeats
    return Prompts(
        input_ids, shown, model_kwargs.get("inputs_embeds"), repeats, lens, logits, row_of, next_positions, limits,
        prefilled, columns, past,
    )  # fmt: skip


def row_streams(caller: str, streams: Sequence[int] | Tensor | None, rows: int, device: torch.device) -> Tensor:
    """The rows' random streams, int64 ``[rows]``; raises ``ValueError`` unless there is one integer for each."""
    if streams is None:
        return torch.arange(rows, device=device)
    try:
        streams = torch.as_tensor(streams, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{caller}: streams is {streams!r}, expected {rows} integers: one per row") from None
    if streams.is_floating_point() or streams.is_complex() or streams.dtype == torch.bool:
        raise ValueError(f"{caller}: streams has dtype {streams.dtype}, expected integers")
    streams = streams.to(torch.int64)
    if streams.shape != (rows,):
        raise ValueError(f"{caller}: streams has shape {list(streams.shape)}, expected [{rows}]: one per row")
    return streams


def draw_seed(generator: torch.Generator | None) -> int:
    """The 64-bit seed of a call, from its generator or torch's default one."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=device))


def _require_dynamic(request: Request, cache: Cache) -> None:
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{request.caller.name}: {CACHE_NAME} is a {type(cache).__name__}, which {request.caller.method} "
            "cannot honour; expected a DynamicCache"
        )


def _last_positions(prompt_ids: Tensor, prompt_kwargs: dict[str, Any]) -> Tensor:
    """The position of each prompt's last token, int64 ``[B]``, as it is known before the prompts are read."""
    rows = len(prompt_ids)
    positions: Tensor | None = prompt_kwargs.get("position_ids")
    mask: Tensor | None = prompt_kwargs.get("attention_mask")
    if positions is not None:
        return positions[:, -1].expand(rows)
    if mask is not None:
        return mask.ne(0).sum(dim=1) - 1
    embeds, past = prompt_kwargs.get("inputs_embeds"), prompt_kwargs.get(CACHE_NAME)
    # Embeddings come with those of what the cache holds, ids without.
    columns = embeds.shape[1] if embeds is not None else prompt_ids.shape[1] + (past.get_seq_length() if past else 0)
    return torch.full((rows,), columns - 1)


def _limits(request: Request, adapter: ModelAdapter, prompt_width: int, next_positions: Tensor) -> Limits:
    caller, config, criteria = request.caller.name, request.config, request.criteria
    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    device = next_positions.device
    # A caller's own criteria of these kinds have taken the place of those that the config asks for.
    max_length = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [config.max_length])
    if ends := [c.eos_token_id.view(-1) for c in criteria if type(c) is EosTokenCriteria]:
        eos = torch.cat([end.to(device) for end in ends])
    last = adapter.last_position
    if last is not None and int(next_positions.max()) > last:
        raise ValueError(
            f"{caller}: a prompt ends at position {int(next_positions.max()) - 1}, "
            f"expected less than the model's last position, {last}"
        )
    max_new_tokens = max_length - prompt_width
    if last is not None and int(next_positions.max()) + max_new_tokens - 1 > last:
        warnings.warn(
            f"{caller}: {max_new_tokens} new tokens go past the model's last position, {last}; texts end there",
            stacklevel=2,
        )
    return Limits(
        max_new_tokens=max_new_tokens,
        eos_token_ids=torch.empty(0, dtype=torch.int64, device=device) if eos is None else eos.view(-1).to(device),
        last_position=last,
        pad_token_id=0 if pad is None else int(pad),
    )
