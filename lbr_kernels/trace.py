"""One decode as a page that is stepped through: what is recorded of every decision, and the file that shows it.

Contract
--------
:class:`Trace` is given every :class:`StepView` of a decoding call (``generate(on_step=trace)``) and keeps row 0 of it.
:meth:`Trace.document` makes plain data of that, and :func:`write_page` one HTML file that holds the data, its style and
its script and asks for nothing else. Evidence is what the router had to go on, the hidden states, in three readings:

* the tokens that the model itself finds likeliest behind a node, read from the node's state by the model's own head,
  before temperature and filters;
* how alike the candidates' states are, as cosines, once the mean state of the trace is taken away (states of one model
  share a large part that says nothing);
* where each state lies in the plane of the two principal components of all states of the trace.

A page is bounded: ``MOST_SLOTS`` slots per tree, ``MOST_STEPS`` decisions, ``NEXT_TOKENS`` tokens behind a node, and
the last ``PROMPT_CHARACTERS`` of the prompt. Neither logits nor states are in it.

The document
------------
``nodes``: one entry per forwarded node: ``token`` (text), ``id``, ``log_prob`` (under which it was drawn), ``born``
(step), ``next`` (triples of text, probability and id), ``at`` (x and y in -1 .. 1).

``steps``: ``slots`` (index of a node, or null, per slot in level order), ``router`` (log-probabilities of the
candidates, null where there is none), ``choice``, ``alike`` (cosines ``[K][K]``, null likewise), ``cells`` (the node
that each cache slot behind the text holds, or null), ``moves`` (of ``StepView``), and the committed text as ``keep``
characters of the one before and ``add``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from lbr_kernels.decoding.adapter import ModelAdapter, unwrapped
from lbr_kernels.decoding.loop import StepView
from lbr_kernels.decoding.trajectory import DecodingSettings
from lbr_kernels.files import write_whole
from lbr_kernels.ops.tree_shape import num_slots

MOST_SLOTS, MOST_STEPS, NEXT_TOKENS, PROMPT_CHARACTERS = 64, 256, 5, 4000

TEMPLATE = Path(__file__).with_suffix(".html")
_PLACE = "{{document}}"
_READ_TOGETHER = 64  # nodes whose logits are held at a time
_PROMPT_TOKENS = 3  # of the prompt's end that are named in the picture of the cache

Decode = Callable[[list[int]], str]


def check_size(width: int, depth: int, max_new_tokens: int) -> None:
    """Raise ``ValueError`` where a tree or a text is larger than a page shows."""
    # A tree has a slot per layer at least: what is deeper is not counted, which could take forever.
    if depth > MOST_SLOTS or (slots := num_slots(width, depth)) > MOST_SLOTS:
        held = f"{depth} layers" if depth > MOST_SLOTS else f"{slots} slots"
        raise ValueError(
            f"trace: width is {width} and depth {depth}, which makes a tree of {held}; "
            f"expected at most {MOST_SLOTS} slots"
        )
    if max_new_tokens > MOST_STEPS:
        raise ValueError(f"trace: max_new_tokens is {max_new_tokens}, expected at most {MOST_STEPS}")


class Trace:
    """Keeps the first row of a decoding call: ``generate(..., on_step=trace)``.

    Args:
        model: the model that decodes.
        decode: token ids to text.
        prompt: the prompt's ids.
        width, depth: the tree's K and L.
        max_new_tokens: how many decisions there may be.

    Raises:
        ValueError: the tree or the text is larger than a page shows; later, a decision is not the next one of a text
            with such a tree.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Decode,
        prompt: Sequence[int],
        *,
        width: int,
        depth: int,
        max_new_tokens: int,
    ) -> None:
        check_size(width, depth, max_new_tokens)
        self.model, self.decode, self.prompt = model, decode, list(prompt)
        self.width, self.depth, self.max_new_tokens = width, depth, max_new_tokens
        self._nodes: list[dict[str, Any]] = []
        self._states: list[Tensor] = []  # of the nodes, [D] each
        self._steps: list[dict[str, Any]] = []
        self._cells: dict[int, int] = {}  # the nodes that stand in the cache, by slot behind the text
        self._committed: list[int] = []

    def __call__(self, view: StepView) -> None:
        choice = int(view.choice[0])
        if choice < 0:
            return
        self._check(view)
        tokens, cell_of = view.tokens[0].tolist(), view.node_of[0].tolist()
        log_probs, router = view.log_probs[0].tolist(), view.router_log_probs[0].tolist()
        states = view.hidden[0].float().cpu()
        slots: list[int | None] = []
        for slot, token in enumerate(tokens):
            if token >= 0 and cell_of[slot] not in self._cells:
                self._cells[cell_of[slot]] = len(self._nodes)
                self._nodes.append(
                    {"token": self.decode([token]), "id": token, "log_prob": log_probs[slot], "born": view.step}
                )
                self._states.append(states[slot])
            slots.append(self._cells[cell_of[slot]] if token >= 0 else None)
        before = self.decode(self._committed)
        self._committed.append(tokens[choice])
        after = self.decode(self._committed)
        keep = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        moves = [source for source in view.moves[0].tolist() if source >= 0]
        self._steps.append({
            "slots": slots,
            # A router that is a function may exclude a candidate, by -inf.
            "router": [
                value if node is not None and math.isfinite(value) else None
                for node, value in zip(slots, router, strict=False)
            ],
            "choice": choice,
            "cells": [self._cells.get(cell) for cell in range(max(self._cells) + 1)],
            "moves": moves,
            "keep": keep,
            "add": after[keep:],
        })  # fmt: skip
        # The winner, the first to move, joins the text; the others stand behind it in their order.
        self._cells = {cell: self._cells[source] for cell, source in enumerate(moves[1:]) if source in self._cells}

    def _check(self, view: StepView) -> None:
        """Refuse a decision that this trace was not made for: the page would name it wrongly, or have no end."""
        width, slots, count = view.router_log_probs.shape[1], view.tokens.shape[1], len(self._steps)
        expected = num_slots(self.width, self.depth)
        if width != self.width or slots != expected:
            raise ValueError(
                f"trace: the tree has width {width} and {slots} slots, expected width {self.width} and {expected} slots"
            )
        if view.step != count:
            raise ValueError(f"trace: step is {view.step}, expected {count}: a trace holds one text, from its start")
        if count >= self.max_new_tokens:
            raise ValueError(f"trace: step is {count}, expected less than max_new_tokens, {self.max_new_tokens}")

    def document(
        self, prompt: str, *, facts: Sequence[tuple[str, str]], routed: bool, settings: DecodingSettings, note: str = ""
    ) -> dict[str, Any]:
        """What the page shows (see the module's contract); call it once decoding has ended.

        Args:
            prompt: the prompt's text.
            facts: names and values, shown as they are.
            routed: whether there was a router.
            settings: of the call's trajectory; the page says whether tokens and choices were drawn or the likeliest.
            note: a line about the outcome.

        Raises:
            ValueError: there was no decision.
        """
        if not self._steps:
            raise ValueError("trace: no step is recorded, expected generate(..., on_step=trace) before document()")
        states = torch.stack(self._states)
        centred = states - states.mean(dim=0)
        places, shares = principal_plane(centred)
        directions = normalize(centred, dim=-1)
        nodes = [
            {**node, "next": following, "at": [round(x, 4) for x in place]}
            for node, following, place in zip(self._nodes, self._following(states), places.tolist(), strict=True)
        ]
        steps = [{**step, "alike": self._alike(directions, step["slots"])} for step in self._steps]
        return {
            "width": self.width,
            "depth": self.depth,
            "prompt": ("… " if len(prompt) > PROMPT_CHARACTERS else "") + prompt[-PROMPT_CHARACTERS:],
            "prompt_tokens": len(self.prompt),
            "prompt_end": [self.decode([token]) for token in self.prompt[-_PROMPT_TOKENS:]],
            "facts": [list(pair) for pair in facts],
            "routed": routed,
            "draws": {"tokens": settings.mode == "sampled", "choice": settings.router_do_sample},
            "note": note,
            "shares": [round(share, 4) for share in shares],
            "nodes": nodes,
            "steps": steps,
        }

    @torch.no_grad()
    def _following(self, states: Tensor) -> list[list[tuple[str, float, int]]]:
        """The likeliest tokens behind every node, with the model's own probabilities."""
        model = unwrapped(self.model, caller="trace")
        adapter = ModelAdapter(model)
        found: list[list[tuple[str, float, int]]] = []
        for part in states.split(_READ_TOGETHER):
            logits = adapter.logits_of(part.to(model.device, model.dtype)).float()
            top = logits.softmax(dim=-1).topk(min(NEXT_TOKENS, logits.shape[-1]))
            for probabilities, ids in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                pairs = zip(ids, probabilities, strict=True)
                found.append([(self.decode([token]), round(share, 6), token) for token, share in pairs])
        return found

    def _alike(self, directions: Tensor, slots: list[int | None]) -> list[list[float | None]]:
        """Cosines between the candidates' states."""
        candidates = slots[: self.width]
        theirs = directions[[node or 0 for node in candidates]]  # where there is no node, any
        return [
            [
                None if one is None or other is None else round(cosine, 3)
                for other, cosine in zip(candidates, row, strict=True)
            ]
            for one, row in zip(candidates, (theirs @ theirs.T).tolist(), strict=True)
        ]


def principal_plane(centred: Tensor) -> tuple[Tensor, list[float]]:
    """Where states ``[N, D]`` of mean zero lie in the plane of their two principal components.

    Returns fp32 ``[N, 2]``, both axes on one scale that reaches 1, and the share of the variance that each explains.
    Which way an axis points is settled by its farthest state.
    """
    count, dim = centred.shape
    centred = centred.double()
    # The smaller of the two products has the same eigenvalues.
    by_state = count <= dim
    values, vectors = torch.linalg.eigh(centred @ centred.T if by_state else centred.T @ centred)
    values, vectors = values.clamp(min=0).flip(0)[:2], vectors.flip(1)[:, :2]
    places = torch.zeros((count, 2), dtype=torch.float64)
    places[:, : len(values)] = vectors * values.sqrt() if by_state else centred @ vectors
    farthest = places.gather(0, places.abs().argmax(dim=0, keepdim=True))
    places = torch.where(farthest < 0, -places, places) / farthest.abs().max().clamp(min=1e-30)
    total = float(centred.square().sum())
    shares = [float(value) / total if total else 0.0 for value in values]
    return places.float(), [*shares, 0.0][:2]


def page(document: dict[str, Any]) -> str:
    """The whole HTML file. Nothing in the document can leave the place where it stands as data."""
    data = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # JSON's own escapes, for the characters with which a tag, a comment or an entity begins or ends.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, data, 1)


def write_page(path: Path, document: dict[str, Any]) -> None:
    """Write the page, whole or not at all; raises ``OSError`` as ``write_whole`` does."""
    write_whole(path, page(document))
