"""Soft Thinking (Zhang et al., arXiv 2505.15778): the next input is the mean of the likely tokens' embeddings.

Contract
--------
At each thinking step the next input is the sum over the n most likely tokens v of p(v) times the embedding of v, with p
the filtered distribution, renormalised over them: nothing is drawn. Cold Stop ends thinking when the model has been
sure of itself for long: its entropy has stayed below a threshold for so many steps. Top-n 1 reads and commits p's
argmax: greedy decoding, but for ``typical_p``, which may remove the most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lbr_kernels import ops
from lbr_kernels.baselines.continuous import Step, ThinkingGenerateOutput, checked_end, decode, require_mixtures
from lbr_kernels.decoding.arguments import Caller, GenerateArguments, Request, require_type, whole_number
from lbr_kernels.decoding.prompts import draw_seed, row_streams
from lbr_kernels.decoding.sampling import ChildSampler, builtin_filters

PAPER_FILTERS: dict[str, float] = {"temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.001}
"""The paper's filters, as arguments of :func:`soft_thinking`."""

_NAME = "soft_thinking"
# Filters that remove tokens; what the model is sure of is seen before them.
_TRUNCATING = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def soft_thinking(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    top_n: int = 10,
    end_of_thinking: int | None = None,
    cold_stop_entropy: float = 0.01,
    cold_stop_steps: int = 256,
    generator: torch.Generator | None = None,
    streams: Sequence[int] | Tensor | None = None,
    **kwargs: Any,
) -> Tensor | ThinkingGenerateOutput:
    """Decode with Soft Thinking (arXiv 2505.15778); a drop-in for ``model.generate``.

    The committed token of a thinking step is the most likely one, ties to the lowest id. It is what the text shows and
    what logits processors, stopping criteria and streamers see. Where it is ``end_of_thinking`` it is read alone, and
    what follows is decoded plainly; where it ends the text, the row has ended.

    Thinking is deterministic. ``do_sample`` says how the text after it is decoded: by sampling from the filtered
    distribution, or by its argmax, ties to the lowest id; there, nothing being drawn, ``num_return_sequences`` is 1.
    ``temperature``, ``top_k``, ``top_p``, ``min_p`` and all that shapes the distribution of ``model.generate`` with
    ``do_sample=True`` shapes thinking either way, with the values that ``model.generate`` would take: from the call,
    from ``generation_config``, from the model's own, and its default of ``top_k=50``. The paper's values are
    temperature 0.6, top-k 30, top-p 0.95 and min-p 0.001: ``soft_thinking(..., **PAPER_FILTERS)``.

    Args:
        model: any decoder-only transformers model that passes :func:`lbr_kernels.check_model` and reads embeddings as
            it reads ids.
        inputs: prompt ids ``[B, P]``, left- or right-padded (or ``input_ids=``, ``inputs_embeds=``). A row thinks from
            its prompt's end on.
        top_n: the most tokens that are mixed (the paper: 10), of those that the filters leave.
        end_of_thinking: id of the token that ends thinking; None: all of the text is thinking, without Cold Stop.
        cold_stop_entropy: Cold Stop's threshold in nats (the paper: 0.01); 0 is off. The entropy is that of the
            distribution before tokens are filtered out: behind the temperature and logits processors, before top-k,
            top-p, min-p and their like.
        cold_stop_steps: how many steps in a row the entropy is below it, until the last of them commits
            ``end_of_thinking`` in the place of its mixture (the paper: 256).
        generator: source of the call's 64-bit seed, for the text after thinking; torch's default one if None. Draws
            are keyed by that seed, the row's stream and the step: a row's text does not depend on the batch around it.
        streams: one integer per returned row; ``0 .. rows - 1`` by default.
        **kwargs: as for ``model.generate``.

    Returns:
        ids ``[rows, length]`` with the prompts in front; with ``return_dict_in_generate`` a
        :class:`ThinkingGenerateOutput`.

    Raises:
        ValueError: an argument out of its range, a setting that cannot be honoured, a model that cannot be decoded
            this way (:class:`lbr_kernels.UnsupportedModelError`).
        TypeError: an unknown keyword argument.
        RuntimeError: NaN logits, or a distribution from which every token was filtered out.
    """
    require_type(_NAME, "generator", generator, torch.Generator)
    top_n = whole_number(_NAME, "top_n", top_n, least=1)
    cold_stop_steps = whole_number(_NAME, "cold_stop_steps", cold_stop_steps, least=1)
    threshold: Any = cold_stop_entropy
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= float(threshold) < math.inf:
        raise ValueError(f"{_NAME}: cold_stop_entropy is {cold_stop_entropy!r}, expected a finite number >= 0")
    arguments = GenerateArguments(Caller(_NAME, "Soft Thinking", soft_thinking), model, inputs, kwargs)
    end = checked_end(arguments, end_of_thinking)
    require_mixtures(arguments.model, caller=_NAME)
    do_sample = bool(arguments.setting("do_sample"))
    sequences = arguments.setting("num_return_sequences")
    if not do_sample and sequences is not None and sequences > 1:  # as model.generate, which is told to sample below
        raise ValueError(
            f"{_NAME}: num_return_sequences is {sequences}, expected 1 where do_sample is not True: "
            "without draws all of a prompt's sequences are equal"
        )
    # model.generate applies the filters that shape thinking only where it is told to sample.
    arguments.kwargs["do_sample"] = True

    def run(request: Request) -> Tensor | ThinkingGenerateOutput:
        rows = row_streams(_NAME, streams, len(request.input_ids), request.input_ids.device)
        cold_stop = None
        if end is not None and cold_stop_entropy > 0:
            cold_stop = _ColdStop(end, cold_stop_entropy, cold_stop_steps, len(rows), rows.device)
        processors = request.processors
        if cold_stop is not None and (request.keeps_scores or builtin_filters(processors) is None):
            processors = cold_stop.watching(processors)
        sampler = ChildSampler(
            processors, width=top_n, candidate_min_p=0.0, keep_scores=request.keeps_scores, backend=None
        )
        seed = draw_seed(generator) if do_sample else None
        return decode(
            request, mixer=_Likely(top_n, cold_stop), sampler=sampler, end_of_thinking=end, seed=seed, streams=rows
        )

    return arguments.generate(run)


class _ColdStop:
    """Counts, per row, the steps in a row at which the model was sure of itself."""

    def __init__(self, end: int, threshold: float, steps: int, rows: int, device: torch.device) -> None:
        self.end, self.threshold, self.steps = end, threshold, steps
        self._sure = torch.zeros(rows, dtype=torch.int64, device=device)
        self._watch: _Watch | None = None

    def watching(self, processors: LogitsProcessorList) -> LogitsProcessorList:
        """The processors, with one among them that sees what the first filter is given, once per step."""
        self._watch = _Watch()
        first = next((i for i, p in enumerate(processors) if isinstance(p, _TRUNCATING)), len(processors))
        return LogitsProcessorList([*processors[:first], self._watch, *processors[first:]])

    def stops(self, step: Step) -> Tensor:
        """Which rows' thinking ends at this step, bool ``[B]``."""
        if self._watch is not None:
            assert self._watch.entropy is not None
            entropy = self._watch.entropy
        else:
            entropy = _entropy(step.logits.float() / step.filters.get("temperature", 1.0))[step.row_of.clamp(min=0)]
        self._sure = torch.where(step.thinking & (entropy < self.threshold), self._sure + 1, 0)
        return self._sure >= self.steps


class _Watch(LogitsProcessor):
    """Changes nothing, and keeps the entropy of what it sees."""

    def __init__(self) -> None:
        self.entropy: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.entropy = _entropy(scores)
        return scores


def _entropy(logits: Tensor) -> Tensor:
    """In nats, ``[...]`` for logits ``[..., V]``; tokens of probability zero add nothing."""
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)


class _Likely:
    """The n most likely tokens, by their probabilities; behind thinking one token, drawn or the most likely."""

    def __init__(self, top_n: int, cold_stop: _ColdStop | None) -> None:
        self.slots, self.cold_stop = top_n, cold_stop

    def mix(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        rows, thinking = step.processed_row_of, step.thinking[:, None]
        # Without draws the first of the most likely tokens is the text's too.
        likely = rows if step.uniforms is None else torch.where(step.thinking, rows, -1)
        tokens, log_probs = ops.top_children(step.processed, self.slots, row_index=likely, **step.filters)
        weights = torch.where(tokens >= 0, log_probs.exp(), 0)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        if step.uniforms is not None:
            drawn, drawn_log_probs = ops.sample_children(
                step.processed, step.uniforms[:, :1].contiguous(),
                row_index=torch.where(step.thinking, -1, rows), **step.filters,
            )  # fmt: skip
            tokens = torch.where(thinking, tokens, torch.cat([drawn, tokens[:, 1:]], dim=1))
            log_probs = torch.where(thinking, log_probs, torch.cat([drawn_log_probs, log_probs[:, 1:]], dim=1))
        if self.cold_stop is not None:
            stops = self.cold_stop.stops(step)[:, None]
            inserted = torch.full_like(tokens, -1)
            inserted[:, 0] = self.cold_stop.end
            tokens, log_probs = torch.where(stops, inserted, tokens), torch.where(stops, 0, log_probs)
        return tokens, weights, log_probs
