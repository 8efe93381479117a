"""Thinking in mixtures of tokens: the loop that Multiplex Thinking and Soft Thinking share.

Contract
--------
A row thinks from its prompt on. At each step a :class:`Mixer` names up to n tokens and their weights; the first of them
is committed: it is what the text, logits processors, stopping criteria and streamers see, and a committed end of text
ends the row. What the model reads next is the mixture, the weighted sum of the tokens' input embeddings, one position
of the text. A committed end-of-thinking token is read alone, and from there on every step has one token: plain
decoding. Without an end-of-thinking token all of the text is thinking.

Steps run through the tree cache, as a tree of one node: the same kernels, and the same cost per forwarded token, as
those of ``lbr_kernels.generate``. The last committed tokens are not forwarded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import (
    ModelAdapter,
    UnsupportedModelError,
    at_rest,
    relative_error,
    rounded_once_more,
    rounding_tolerance,
)
from lbr_kernels.decoding.arguments import GenerateArguments, Request, whole_number
from lbr_kernels.decoding.attention import TreeForward
from lbr_kernels.decoding.cache import CACHE_NAME, TreeCache
from lbr_kernels.decoding.loop import DecodingStats
from lbr_kernels.decoding.prompts import Prompts, read_prompts, require_known_inputs
from lbr_kernels.decoding.sampling import ChildSampler, Draws, Frontier


@dataclass(frozen=True)
class Mixtures:
    """What every step of every row was made of; a plain step is a mixture of one token.

    Attributes:
        tokens: int64 ``[rows, steps, n]``, the committed token first; -1 where there is none, and after a row's end.
        weights: fp32 ``[rows, steps, n]``, what of each token the next input holds. They sum to 1. Where a token was
            read alone it is the first and has weight 1.
        log_probs: fp32 ``[rows, steps, n]``, under the filtered distribution; 0 where there is no token, and for a
            token that was inserted (Cold Stop).
    """

    tokens: Tensor
    weights: Tensor
    log_probs: Tensor

    @property
    def num_committed(self) -> Tensor:
        """Committed tokens of each row, int64 ``[rows]``."""
        return (self.tokens[..., 0] >= 0).sum(dim=1)

    @property
    def log_prob(self) -> Tensor:
        """The sum over a row's tokens, fp32 ``[rows]``; where all were drawn, the likelihood of what was drawn."""
        return self.log_probs.sum(dim=(1, 2))


@dataclass
class ThinkingGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``model.generate`` returns with ``return_dict_in_generate``, and three fields more.

    ``num_thinking``, int64 ``[rows]``, counts the tokens that were committed while a row thought, the end-of-thinking
    token among them: what follows in ``sequences`` is the answer. ``mixtures`` holds what each step was made of, and
    ``stats`` what the call cost: one forwarded node per committed token, but for the last of a batch's longest texts.
    """

    mixtures: Mixtures | None = None
    num_thinking: Tensor | None = None
    stats: DecodingStats | None = None


@dataclass(frozen=True)
class Step:
    """What a mixer is given at a step of B rows.

    Attributes:
        logits: ``[U, V]`` as the model gave them.
        processed: ``[U', V]``, after processors that are more than ``filters``.
        row_of: int64 ``[B]``, each row's own row of ``logits``, -1 for rows that have ended.
        processed_row_of: the same for ``processed``.
        filters: arguments of ``ops.sample_children``.
        thinking: bool ``[B]``; rows that have ended do not think.
        uniforms: fp64 ``[B, n]`` in [0, 1), or None where nothing is drawn.
    """

    logits: Tensor
    processed: Tensor
    row_of: Tensor
    processed_row_of: Tensor
    filters: dict[str, Any]
    thinking: Tensor
    uniforms: Tensor | None


class Mixer(Protocol):
    """Makes the mixtures of a method."""

    slots: int

    def mix(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 (-1 where none), weights and log-probabilities fp32, each ``[B, slots]``.

        Of rows that do not think the first slot is read alone.
        """
        ...


class ContinuousDecoder:
    """Decodes one batch of rows. All state is in the attributes below; :meth:`run` is the loop.

    Args:
        request, prompts: what ``model.generate`` has prepared, read.
        adapter: the model.
        cache: the prompts' keys and values, one row per text, with room for one node.
        sampler: logits processors and filters.
        mixer: the method.
        draws: the random numbers, where something is drawn.
        end_of_thinking: the token that ends thinking, if any does.
        stats: is added to.
    """

    def __init__(
        self,
        request: Request,
        prompts: Prompts,
        adapter: ModelAdapter,
        cache: TreeCache,
        *,
        sampler: ChildSampler,
        mixer: Mixer,
        draws: Draws | None,
        end_of_thinking: int | None,
        stats: DecodingStats,
    ) -> None:
        rows, device = prompts.input_ids.shape[0], prompts.input_ids.device
        self.adapter, self.cache, self.sampler, self.mixer, self.draws = adapter, cache, sampler, mixer, draws
        self.criteria, self.streamer, self.limits, self.stats = (
            request.criteria,
            request.streamer,
            prompts.limits,
            stats,
        )
        self.end_of_thinking = end_of_thinking
        self.embed: nn.Module = request.model.get_input_embeddings()
        self.sequences, self.next_positions = prompts.input_ids, prompts.next_positions
        self.step = 0  # committed tokens of every row that is still active
        self.active = self._may_go_on()
        self.thinking = torch.ones(rows, dtype=torch.bool, device=device)
        self._done = torch.zeros_like(self.thinking)  # rows for which the criteria have said so, at any step
        self.num_committed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.num_thinking = torch.zeros_like(self.num_committed)
        self.scores: list[Tensor] = []
        self.raw_logits: list[Tensor] = []
        self.num_forwarded = torch.zeros_like(self.num_committed)
        self._mixtures: list[tuple[Tensor, Tensor, Tensor]] = []
        # A tree of one node, which sees the text and itself.
        self._ancestors = torch.ones((1, 1, 1), dtype=torch.int64, device=device)
        self._sources = torch.zeros((rows, 1), dtype=torch.int32, device=device)
        self._path = torch.empty((rows, 1, 0), dtype=torch.int64, device=device)

    def run(self, logits: Tensor, row_of: Tensor) -> Mixtures:
        """The loop.

        Args:
            logits: ``[prompts, V]`` behind the prompts.
            row_of: int64 ``[B]``, which of them belongs to a row.
        """
        active = self.active
        while bool(active.any()):
            with self.stats.phase("sample"):
                tokens, weights = self._choose(logits, row_of[active])
            with self.stats.phase("commit"):
                self._commit(torch.where(active, tokens[:, 0], self.limits.pad_token_id))
            if bool(self.active.any()):
                with self.stats.phase("forward"):
                    logits = self._forward(tokens, weights, active)
                row_of = self.active.cumsum(0) - 1
            active = self.active
        self.stats.committed_tokens += int(self.num_committed.sum())
        self.stats.forwarded_nodes += int(self.num_forwarded.sum())
        columns = [torch.stack(column, dim=1) for column in zip(*self._mixtures, strict=True)]
        return Mixtures(*columns)

    def _choose(self, logits: Tensor, row_of: Tensor) -> tuple[Tensor, Tensor]:
        """The step's tokens and weights ``[B, n]``; keeps the mixture."""
        active, thinking = self.active, self.thinking & self.active
        frontier = Frontier(active[:, None], logits, row_of, self._path)
        processed, processed_row_of, raw, scores = self.sampler.processed(frontier, self.sequences)
        if self.sampler.keep_scores and raw is not None and scores is not None:
            self.raw_logits.append(raw[:, 0])
            self.scores.append(scores[:, 0])
        own = torch.full((2, len(active)), -1, device=active.device)
        own[0, active], own[1, active] = row_of, processed_row_of
        uniforms = None if self.draws is None else self.draws.at(self.step)[:, : self.mixer.slots].contiguous()
        step = Step(logits, processed, own[0], own[1], self.sampler.filters, thinking, uniforms)
        tokens, weights, log_probs = self.mixer.mix(step)
        ops.raise_if_flagged(active.device)  # before a token that was not drawn goes anywhere

        self.num_committed += active
        self.num_thinking += thinking
        first = torch.arange(self.mixer.slots, device=active.device) == 0
        exists = (tokens >= 0) & (thinking[:, None] | first) & active[:, None]
        tokens, log_probs = torch.where(exists, tokens, -1), torch.where(exists, log_probs, 0)
        if self.end_of_thinking is not None:
            self.thinking = thinking & (tokens[:, 0] != self.end_of_thinking)
        weights = torch.where(self.thinking[:, None], weights, first.to(weights.dtype))
        weights = torch.where(exists, weights, 0)
        self._mixtures.append((tokens, weights, log_probs))
        return tokens, weights

    def _commit(self, token: Tensor) -> None:
        """Append ``token [B]`` to the texts and find the rows that have ended with it."""
        self.step += 1
        self.sequences = torch.cat([self.sequences, token[:, None]], dim=1)
        self._done |= self.criteria(self.sequences, tuple(self.scores) if self.sampler.keep_scores else None)
        done = self._done
        if len(self.limits.eos_token_ids) == 0 and not bool(done.all()):
            # As model.generate: without an end token rows go on until each of them has been done at some step.
            done = torch.zeros_like(done)
        self.next_positions = self.next_positions + 1
        self.active = self.active & ~done & self._may_go_on()
        if self.streamer is not None:
            self.streamer.put(token.cpu())

    def _may_go_on(self) -> Tensor:
        """Which rows have room for one more token, bool ``[B]``."""
        room = torch.full_like(self.next_positions, self.step < self.limits.max_new_tokens, dtype=torch.bool)
        if self.limits.last_position is not None:
            room &= self.next_positions <= self.limits.last_position
        return room

    def _forward(self, tokens: Tensor, weights: Tensor, forwards: Tensor) -> Tensor:
        """Forward what was committed last, for the rows in ``forwards``; logits ``[U, V]`` of those that go on.

        A row that has just ended is among the former: the cache that is returned holds its whole text, as
        ``model.generate``'s does.
        """
        all_rows = bool(forwards.all())
        num_nodes = None if all_rows else forwards.to(torch.int32)
        if not all_rows:
            # Rows that have ended forward token 0, which nobody sees.
            weights = torch.where(forwards[:, None], weights, (torch.arange(weights.shape[1]) == 0).to(weights))
        positions = self.next_positions - 1
        if self.limits.last_position is not None:
            positions = positions.clamp(max=self.limits.last_position)
        self.cache.set_base(0)
        forward = TreeForward(self.cache, self._ancestors, num_nodes, None)
        _, logits = self.adapter.forward_tree(
            mixed_embeddings(self.embed, tokens, weights)[:, None],
            positions[:, None],
            forward,
            lambda states: states[self.active, 0][None],
        )
        self.cache.commit(self._sources, num_nodes, backend=None)
        self.cache.committed(all_rows=all_rows)
        self.stats.model_calls += 1
        self.num_forwarded += forwards
        return logits[0]


def mixed_embeddings(embed: nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    """The weighted sums ``[B, D]`` of what ``embed`` makes of ``tokens [B, n]``, in its dtype.

    One token of weight 1 gives its embedding, to the bit: the products are summed in fp32, or fp64 for fp64 models.
    """
    embedded: Tensor = embed(tokens.clamp(min=0))
    dtype = torch.promote_types(embedded.dtype, torch.float32)
    return (embedded.to(dtype) * weights[..., None].to(dtype)).sum(dim=1).to(embedded.dtype)


def decode(
    request: Request,
    *,
    mixer: Mixer,
    sampler: ChildSampler,
    end_of_thinking: int | None,
    seed: int | None,
    streams: Tensor,
) -> Tensor | ThinkingGenerateOutput:
    """Read the prompts, decode, and put together what ``model.generate`` would return."""
    require_known_inputs(request)
    adapter, stats = ModelAdapter(request.model), DecodingStats()
    stats.engine_reason = "mixtures of tokens are decoded step by step"
    draws = None if seed is None else Draws(seed, streams, mixer.slots)
    prompts = read_prompts(request, adapter, stats)
    with stats.phase("prefill"):
        cache = TreeCache.from_prefill(
            prompts.prefilled, prompts.lens, repeats=prompts.repeats, tree_nodes=1,
            max_new_tokens=prompts.limits.max_new_tokens, release=prompts.may_release,
        )  # fmt: skip
    decoder = ContinuousDecoder(
        request, prompts, adapter, cache, sampler=sampler, mixer=mixer, draws=draws, end_of_thinking=end_of_thinking,
        stats=stats,
    )  # fmt: skip
    mixtures = decoder.run(prompts.logits, prompts.row_of)
    if request.streamer is not None:
        request.streamer.end()
    returned_cache = prompts.returned_cache(cache, decoder.num_forwarded, decoder.step, wants_dict=request.wants_dict)
    sequences = prompts.with_text(decoder.sequences)
    if not request.wants_dict:
        return sequences
    return ThinkingGenerateOutput(
        sequences=cast(torch.LongTensor, sequences),
        scores=tuple(decoder.scores) if request.config.output_scores else None,
        logits=tuple(decoder.raw_logits) if request.config.output_logits else None,
        mixtures=mixtures,
        num_thinking=decoder.num_thinking,
        stats=stats,
        **{CACHE_NAME: returned_cache},
    )


def checked_end(arguments: GenerateArguments, end_of_thinking: int | None) -> int | None:
    """``end_of_thinking`` as an int; raises ``ValueError`` unless it is a token of the model, or None."""
    if end_of_thinking is None:
        return None
    caller = arguments.caller.name
    token = whole_number(caller, "end_of_thinking", end_of_thinking, least=0)
    vocabulary = ModelAdapter(arguments.model).vocabulary
    if token >= vocabulary:
        raise ValueError(f"{caller}: end_of_thinking is {token}, expected less than the vocabulary, {vocabulary}")
    return token


# What has passed, by what the outcome depends on.
_passed: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()


def require_mixtures(model: PreTrainedModel, *, caller: str) -> None:
    """Raise :class:`UnsupportedModelError` unless the model reads embeddings as it reads ids.

    That is seen once per model, on random tokens: their embeddings, each rounded once more, must give what the ids
    give, within what rounding does to this model. A model that looks for ids behind embeddings fails, and one whose
    layers have embeddings of their own is refused unseen: a mixture has none there.
    """
    key = (model.dtype, model.device)
    passed = _passed.setdefault(model, set())
    if key in passed:
        return
    with at_rest(model) as resting:
        reason = _obstacle(resting)
    if reason is not None:
        raise UnsupportedModelError(f"{caller}: {type(model).__name__} cannot read mixtures of tokens: {reason}")
    passed.add(key)


def _obstacle(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config(decoder=True)
    if per_layer := getattr(config, "hidden_size_per_layer_input", None):
        return f"its layers look each token up in embeddings of their own (hidden_size_per_layer_input is {per_layer})"
    adapter, generator = ModelAdapter(model), torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, 8), generator=generator).to(model.device)
    try:
        want = adapter.head_inputs(ids)
        embedded = rounded_once_more(model.get_input_embeddings()(ids), generator)
        error, allowed = relative_error(adapter.head_inputs(embedded), want), rounding_tolerance(model, ids)
    except Exception as failure:  # a model's own code can fail in any way, and each is a reason
        return f"a forward of embeddings failed ({type(failure).__name__}: {failure})"
    if not error <= allowed:
        return f"embeddings differ from their ids: relative error {error:.1e}, where {allowed:.1e} is rounding"
    return None
