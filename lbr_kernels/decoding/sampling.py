"""Children of frontier nodes: from logits to tokens, through whatever shapes the distribution.

Contract
--------
What ``model.generate`` would apply to the next token of a text, it applies here to the next token of every frontier
node: each logits processor sees that node's own ids, and rows in the order of the batch. When the processors are only
temperature, top-k, top-p and min-p in transformers' order, one op does it all; else they run first, and the op draws
from what they leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lbr_kernels import ops
from lbr_kernels.ops.draws import keyed_uniforms

# In the order in which transformers applies them, with the attribute that holds the value.
_WARPERS = (
    (TemperatureLogitsWarper, "temperature"),
    (TopKLogitsWarper, "top_k"),
    (TopPLogitsWarper, "top_p"),
    (MinPLogitsWarper, "min_p"),
)
DRAWN_TOGETHER = 64
"""Steps whose random numbers are made together."""


FILTERS = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
"""The arguments of ``ops.sample_children`` that filter, in their order, and the values that ask for nothing."""


def builtin_filters(processors: LogitsProcessorList) -> dict[str, Any] | None:
    """The processors as arguments of ``ops.sample_children``, or None if they are more than that."""
    filters = {}
    order = -1
    for processor in processors:
        position = next((i for i, (kind, _) in enumerate(_WARPERS) if type(processor) is kind), -1)
        keeps_more = getattr(processor, "min_tokens_to_keep", 1) != 1
        if position <= order or keeps_more or getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            return None
        order = position
        name = _WARPERS[position][1]
        filters[name] = getattr(processor, name)
    return filters


class Draws:
    """The uniform numbers of one call: ``ops.keyed_uniforms`` for every slot of the tree and, last, the router."""

    def __init__(self, seed: int, streams: Tensor, num_slots: int) -> None:
        self._seed = seed
        self._streams = streams[:, None, None]
        self._slots = torch.arange(num_slots + 1, device=streams.device)
        self._first_step = -DRAWN_TOGETHER
        self._block: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """fp64 ``[rows, slots + 1]`` for a row's ``step`` committed tokens."""
        if self._block is None or not self._first_step <= step < self._first_step + DRAWN_TOGETHER:
            self._first_step = step - step % DRAWN_TOGETHER
            self._block = self.block(self._first_step)
        return self._block[:, step - self._first_step]

    def block(self, first_step: int) -> Tensor:
        """The same for the steps from ``first_step`` on, fp64 ``[rows, DRAWN_TOGETHER, slots + 1]``."""
        steps = torch.arange(first_step, first_step + DRAWN_TOGETHER, device=self._slots.device)
        return keyed_uniforms(self._seed, self._streams, steps[:, None], self._slots)


@dataclass(frozen=True)
class Frontier:
    """The nodes of one layer that get children.

    Attributes:
        expands: bool ``[B, F]`` over the layer's slots; E of them are set.
        logits: ``[U, V]``, one row for each distinct node.
        row_of: int64 ``[E]``, the logits row of every slot that expands, in order.
        paths: int64 ``[B, F, depth]``, tokens from the root to the slot.
    """

    expands: Tensor
    logits: Tensor
    row_of: Tensor
    paths: Tensor


class ChildSampler:
    """Draws or picks the children of frontier nodes; see the module's contract."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        *,
        width: int,
        candidate_min_p: float,
        keep_scores: bool,
        backend: str | None,
    ) -> None:
        self.processors, self.width, self.backend = processors, width, backend
        self.candidate_min_p, self.keep_scores = candidate_min_p, keep_scores
        filters = None if keep_scores else builtin_filters(processors)
        self.runs_processors = filters is None and len(processors) > 0
        self.filters: dict[str, Any] = filters or {}

    @property
    def deterministic_filters(self) -> dict[str, Any]:
        """The filters where nothing is drawn: the floor of the candidates is one of them."""
        return {**self.filters, "min_p": max(self.candidate_min_p, self.filters.get("min_p", 0.0))}

    def describe(self) -> dict[str, Any]:
        """The filters by name, for a trajectory's settings."""
        known = builtin_filters(self.processors)
        if known is not None:
            return known
        return {"processors": [type(processor).__name__ for processor in self.processors]}

    def children(
        self, frontier: Frontier, sequences: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The children of every slot that expands.

        Args:
            frontier: nodes and their logits.
            sequences: int64 ``[B, length]``, ids of prompts and committed tokens.
            uniforms: fp64 ``[B, F * K]``; None picks the most likely tokens.

        Returns:
            tokens ``[B, F * K]`` (-1 where there is no child) and fp32 log-probabilities (0 there); with
            ``keep_scores`` also raw and processed logits, fp32 ``[B, F, V]``, if anything expands.
        """
        rows, width = frontier.expands.shape
        logits, row_of, raw, scores = self.processed(frontier, sequences)
        if len(row_of) == 0:
            tokens = torch.empty((0, self.width), dtype=torch.int64, device=sequences.device)
            log_probs = torch.empty((0, self.width), dtype=torch.float32, device=sequences.device)
        elif uniforms is not None:
            drawn = uniforms.view(rows, width, self.width)[frontier.expands]
            tokens, log_probs = ops.sample_children(
                logits, drawn, row_index=row_of, backend=self.backend, **self.filters
            )
        else:
            tokens, log_probs = ops.top_children(
                logits, self.width, row_index=row_of, backend=self.backend, **self.deterministic_filters
            )
        all_tokens = tokens.new_full((rows, width, self.width), -1)
        all_log_probs = log_probs.new_zeros((rows, width, self.width))
        all_tokens[frontier.expands] = tokens
        all_log_probs[frontier.expands] = log_probs
        return all_tokens.flatten(1), all_log_probs.flatten(1), raw, scores

    def processed(self, frontier: Frontier, sequences: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the ops draw from, once processors have run that are more than ``self.filters``.

        Returns:
            Logits ``[U, V]`` and, int64 ``[E]``, the row of them that every slot which expands draws from; with
            ``keep_scores`` (or processors that run) also raw and processed logits, fp32 ``[B, F, V]``, if anything
            expands.
        """
        rows, width = frontier.expands.shape
        logits, row_of = frontier.logits, frontier.row_of
        if len(row_of) == 0 or not (self.runs_processors or self.keep_scores):
            return logits, row_of, None, None
        raw = logits.new_zeros((rows, width, logits.shape[-1]), dtype=torch.float32)
        raw[frontier.expands] = logits[row_of].float()
        scores = self._process(raw, sequences, frontier)
        return scores[frontier.expands], torch.arange(len(row_of), device=row_of.device), raw, scores

    def _process(self, logits: Tensor, sequences: Tensor, frontier: Frontier) -> Tensor:
        """Run the processors once per slot of the layer, each time on all rows of the batch."""
        processed = torch.empty_like(logits)
        for slot in range(logits.shape[1]):
            ids = torch.cat([sequences, frontier.paths[:, slot].clamp(min=0)], dim=1)
            processed[:, slot] = self.processors(ids, logits[:, slot].clone())
        return processed
