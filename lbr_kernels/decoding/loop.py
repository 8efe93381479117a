"""The decoding loop: grow, route, prune, shift (paper, section 3 and appendix A.1).

Departures from the paper, none of which changes the distribution: the output head runs after routing, on the surviving
frontier alone; with ``trie`` each distinct path is forwarded once; a node that ends the text, or whose child would pass
the length limit or the model's last position, is forwarded and not expanded; after the last commit nothing is grown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.attention import TreeForward
from lbr_kernels.decoding.cache import TreeCache
from lbr_kernels.decoding.routing import Routing
from lbr_kernels.decoding.sampling import ChildSampler, Draws, Frontier
from lbr_kernels.decoding.tracing import named_range
from lbr_kernels.decoding.tree import Growth, LookaheadTree


@dataclass
class DecodingStats:
    """What a decoding call cost.

    ``forwarded_nodes`` counts the tree's nodes that went through the model (neither the prompt nor padding), and
    ``model_calls`` its forwards, the prompt's included. ``engine`` says how the steps were run, and ``engine_reason``
    why not as a CUDA graph (None where they were). ``seconds`` has the phases prefill, forward (layers and head),
    route, commit and sample, as the host sees them; a graph's steps are one phase, step, and making it is another,
    warm-up.
    """

    committed_tokens: int = 0
    forwarded_nodes: int = 0
    model_calls: int = 0
    engine: str = "eager"
    engine_reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def nodes_per_token(self) -> float:
        """Forwarded nodes per committed token."""
        return self.forwarded_nodes / max(self.committed_tokens, 1)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a phase; time of phases within it is theirs alone."""
        start, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            with named_range(name):
                yield
        finally:
            within = sum(self.seconds.values()) - inner
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start - within


@dataclass(frozen=True)
class Limits:
    """Where texts end."""

    max_new_tokens: int
    eos_token_ids: Tensor  # int64 [any number]
    last_position: int | None
    pad_token_id: int


@dataclass(frozen=True)
class HeadRows:
    """What the head is given, ``states [1, U, D]``, for which slots, and which row each of these reads."""

    expands: Tensor
    states: Tensor
    row_of: Tensor


@dataclass(frozen=True)
class StepView:
    """One decision, for whoever looks on: the complete tree and what the router made of it.

    The tensors are copies, made only where someone looks on; what a row that has ended says is of no meaning.

    Attributes:
        step: tokens committed before this decision, by every row that goes on.
        tokens: int64 ``[B, slots]`` in level order (``ops.tree_shape``), -1 where there is no node.
        router_log_probs: fp32 ``[B, K]``.
        choice: int64 ``[B]``, -1 for rows that have ended.
        log_probs: fp32 ``[B, slots]``, under which each node was drawn, filters included; 0 where there is no node.
        hidden: the model's dtype ``[B, slots, D]``, what the router read: the head's inputs.
        node_of: int64 ``[B, slots]``, which cache slot behind the committed text holds a node; with ``trie`` equal
            paths share one.
        moves: int32 ``[B, M]``: after the decision cache slot i behind the text of then receives that of
            ``moves[b, i]``, -1: none. The first is the committed token's, which joins the text.
    """

    step: int
    tokens: Tensor
    router_log_probs: Tensor
    choice: Tensor
    log_probs: Tensor
    hidden: Tensor
    node_of: Tensor
    moves: Tensor


class TreeDecoder:
    """Decodes one batch of rows. All state is in the attributes below; :meth:`run` is the loop.

    Args:
        adapter: the model.
        cache: the prompts' keys and values, one row per text.
        sequences: int64 ``[B, P]``, the prompts' ids.
        next_positions: int64 ``[B]``, the position of each row's next token.
        tree, routing, sampler: the parts, made for these rows.
        draws: the random numbers, needed where something is drawn.
        draw_children, draw_choice: whether children are drawn or the most likely tokens, and likewise the choice.
        limits, criteria: where texts end.
        streamer: gets every committed token.
        on_step: is given every decision; None where nobody looks on, which spares the copies.
        stats: is added to.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        cache: TreeCache,
        sequences: Tensor,
        next_positions: Tensor,
        *,
        tree: LookaheadTree,
        routing: Routing,
        sampler: ChildSampler,
        draws: Draws | None,
        draw_children: bool,
        draw_choice: bool,
        limits: Limits,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        on_step: Callable[[StepView], None] | None,
        stats: DecodingStats,
    ) -> None:
        rows, device = len(sequences), sequences.device
        self.adapter, self.cache, self.tree, self.routing, self.sampler = adapter, cache, tree, routing, sampler
        self.draws, self.draw_children, self.draw_choice = draws, draw_children, draw_choice
        self.limits, self.criteria = limits, criteria
        self.streamer, self.on_step, self.stats = streamer, on_step, stats
        self.sequences, self.next_positions = sequences, next_positions
        self.step = 0  # committed tokens of every row that is still active
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.any_active = self.all_active = True
        self._done = torch.zeros_like(self.active)  # rows for which the criteria have said so, at any step
        self.hidden: Tensor | None = None  # [B, slots, D] of the tree
        self._slot_log_probs = torch.zeros((rows, tree.num_slots), device=device)  # kept up where someone looks on
        self._view: StepView | None = None
        self.num_committed = torch.zeros(rows, dtype=torch.int64, device=device)
        self._forwarded = torch.zeros((), dtype=torch.int64, device=device)
        # The trajectory: a layer of nodes per forward, a choice per step.
        self.node_tokens: list[Tensor] = []
        self.node_log_probs: list[Tensor] = []
        self.choices: list[Tensor] = []
        self.router_log_probs: list[Tensor] = []
        # Raw and processed logits [B, F, V] of the layers that were expanded, the root's first; kept on request.
        self._layer_logits: list[tuple[Tensor, Tensor]] = []
        self.raw_logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def run(self, root_logits: Tensor, row_of: Tensor) -> None:
        """The loop.

        Args:
            root_logits: ``[prompts, V]`` behind the prompts.
            row_of: int64 ``[B]``, which of them belongs to a row.
        """
        frontier = Frontier(self._expands(0), root_logits, row_of, self.tree.paths(0))
        for layer in range(1, self.tree.depth):
            frontier = self._grow(layer, frontier)
        while self.any_active:
            frontier = self._grow(self.tree.depth, frontier)
            if self.on_step is not None and self._view is not None:
                self.on_step(self._view)
        self.stats.committed_tokens += int(self.num_committed.sum())
        self.stats.forwarded_nodes += int(self._forwarded)

    def _grow(self, layer: int, frontier: Frontier) -> Frontier:
        """Draw the frontier's children, forward them as ``layer``, and return the next frontier.

        Once the tree is complete, that includes routing, pruning and shifting: all of it happens between the last
        layer of the model and its head.
        """
        with self.stats.phase("sample"):
            uniforms = self._uniforms(self.tree.layer(layer)) if self.draw_children else None
            tokens, log_probs = self._children(frontier, uniforms)
            self.node_tokens.append(tokens)
            self.node_log_probs.append(log_probs)
            if self.on_step is not None:
                self._slot_log_probs[:, self.tree.layer(layer)] = log_probs
            growth = self.tree.grow(layer, tokens)
        complete = layer == self.tree.depth
        next_layer = layer - 1 if complete else layer
        found: list[HeadRows] = []

        def select(states: Tensor) -> Tensor:
            self._remember(layer, growth, states)
            root = self._decide() if complete else None
            found.append(self._head_rows(next_layer, root))
            return found[0].states

        if len(frontier.row_of) == 0:
            # Nothing was left to grow: what is decided now stands in the tree already, and nothing grows after it.
            if complete:
                self._decide()
            return Frontier(self._expands(next_layer), frontier.logits, frontier.row_of, self.tree.paths(next_layer))
        with self.stats.phase("forward"):
            num_nodes = growth.num_nodes
            if num_nodes is None and not self.all_active:
                num_nodes = torch.where(self.active, growth.tokens.shape[1], 0).to(torch.int32)
            self.cache.set_base(growth.base)
            positions = self.next_positions + layer - 1
            if self.limits.last_position is not None:
                # Rows that have ended may stand behind it; what they forward is seen by nobody.
                positions = positions.clamp(max=self.limits.last_position)
            positions = positions[:, None].expand(growth.tokens.shape)
            forward = TreeForward(self.cache, growth.ancestors, num_nodes, self.routing.backend)
            _, logits = self.adapter.forward_tree(growth.tokens, positions, forward, select)
            self.stats.model_calls += 1
        return Frontier(found[0].expands, logits[0], found[0].row_of, self.tree.paths(next_layer))

    def _children(self, frontier: Frontier, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, log_probs, raw, scores = self.sampler.children(frontier, self.sequences, uniforms)
        if self.sampler.keep_scores and raw is not None and scores is not None:
            self._layer_logits.append((raw, scores))
        return tokens, log_probs

    def _uniforms(self, slots: slice | int) -> Tensor:
        assert self.draws is not None
        return self.draws.at(self.step)[:, slots].contiguous()

    def _expands(self, layer: int) -> Tensor:
        """Which slots of a layer get children now, bool ``[B, K^layer]``; layer 0 is the root."""
        allowed = self.active & (self.step + layer < self.limits.max_new_tokens)
        if self.limits.last_position is not None:
            allowed = allowed & (self.next_positions + layer <= self.limits.last_position)
        if layer == 0:
            return allowed[:, None]
        slots = self.tree.layer(layer)
        ends = torch.isin(self.tree.tokens[:, slots], self.limits.eos_token_ids)
        return self.tree.valid[:, slots] & ~ends & allowed[:, None]

    def _remember(self, layer: int, growth: Growth, states: Tensor) -> None:
        """Keep the nodes' hidden states ``[B, N, D]`` by slot."""
        rows, _, dim = states.shape
        if self.hidden is None:
            self.hidden = states.new_zeros((rows, self.tree.num_slots, dim))
        index = growth.query_of[..., None].expand(-1, -1, dim)
        self.hidden[:, self.tree.layer(layer)] = states.gather(1, index)
        exist = self.tree.valid[:, self.tree.layer(layer)] if growth.num_nodes is None else growth.num_nodes
        self._forwarded += exist.sum()

    def _decide(self) -> Tensor:
        """Route, commit, prune, shift. Returns the hidden states ``[B, 1, D]`` of the new roots."""
        assert self.hidden is not None
        tree = self.tree
        with self.stats.phase("route"):
            uniforms = self._uniforms(tree.num_slots) if self.draw_choice else None
            log_probs, choice = self.routing.choose(self.hidden, tree.valid, self.active, uniforms)
            winner = choice.clamp(min=0)[:, None]
            self.choices.append(choice)
            self.router_log_probs.append(torch.where(self.active, log_probs.gather(1, winner)[:, 0], 0))
            seen = None
            if self.on_step is not None:
                # What the commit overwrites is copied now; what moves is known after it.
                seen = partial(
                    StepView, self.step, tree.tokens.clone(), log_probs, choice, self._slot_log_probs.clone(),
                    self.hidden.clone(), tree.node_of.clone(),
                )  # fmt: skip
        with self.stats.phase("commit"):
            token = torch.where(self.active, tree.tokens.gather(1, winner)[:, 0], self.limits.pad_token_id)
            root = self.hidden.gather(1, winner[..., None].expand(-1, -1, self.hidden.shape[2]))
            sources, num_moves = tree.commit(choice, all_active=self.all_active)
            if seen is not None:
                self._view = seen(_moves(sources, num_moves))
            self.cache.commit(sources, num_moves, backend=self.routing.backend)
            self.cache.committed(all_rows=self.all_active)
            kept = tree.num_slots - tree.width**tree.depth
            if kept:
                self.hidden[:, :kept] = tree.shift(self.hidden, choice)
                if self.on_step is not None:
                    self._slot_log_probs[:, :kept] = tree.shift(self._slot_log_probs, choice)
            self._shift_logits(choice)
            self.num_committed += self.active
            self.step += 1
            self.next_positions = self.next_positions + 1
            self.sequences = torch.cat([self.sequences, token[:, None]], dim=1)
            self._end_rows()
            if self.streamer is not None:
                self.streamer.put(token.cpu())
        return root

    def _end_rows(self) -> None:
        """Find the rows that have ended with this commit."""
        self._done |= self.criteria(self.sequences, tuple(self.scores) if self.sampler.keep_scores else None)
        done = self._done
        if len(self.limits.eos_token_ids) == 0 and not bool(done.all()):
            # As model.generate: without an end token rows go on until each of them has been done at some step.
            done = torch.zeros_like(done)
        # A row whose next candidates may not be grown (last position) cannot go on either.
        stuck = ~(self._expands(0)[:, 0] if self.tree.depth == 1 else self.tree.valid[:, : self.tree.width].any(1))
        self.active = self.active & ~done & ~stuck
        self.any_active, self.all_active = bool(self.active.any()), bool(self.active.all())

    def _head_rows(self, layer: int, root: Tensor | None) -> HeadRows:
        """The hidden states that the head is wanted for: distinct nodes of ``layer`` that expand, or the new roots."""
        assert self.hidden is not None
        expands = self._expands(layer)
        if layer == 0:
            assert root is not None
            states = root[expands]
        else:
            states = self.hidden[:, self.tree.layer(layer)][expands]
        row_of = torch.arange(len(states), device=states.device)
        if self.tree.trie and layer > 0 and len(states):
            # Slots of one node have equal hidden states: the head sees one of them.
            rows = torch.arange(len(expands), device=states.device)[:, None]
            nodes = (rows * self.tree.num_slots + self.tree.node_of[:, self.tree.layer(layer)])[expands]
            distinct, group = nodes.unique(return_inverse=True)
            first = torch.full_like(distinct, len(nodes)).scatter_reduce_(0, group, row_of, "amin")
            states, row_of = states[first], group
        if not len(states):
            # Nothing grows any more; a head that is given no rows at all is not to be relied on.
            states = self.hidden[:1, 0]
        return HeadRows(expands, states[None], row_of)

    def _shift_logits(self, choice: Tensor) -> None:
        if not self._layer_logits:
            return
        raw, scores = self._layer_logits.pop(0)
        self.raw_logits.append(raw[:, 0])
        self.scores.append(scores[:, 0])
        rows = torch.arange(len(choice), device=choice.device)
        below = choice.clamp(min=0)
        self._layer_logits = [
            (a.unflatten(1, (self.tree.width, -1))[rows, below], b.unflatten(1, (self.tree.width, -1))[rows, below])
            for a, b in self._layer_logits
        ]


def _moves(sources: Tensor, num_moves: Tensor | None) -> Tensor:
    """What ``ops.commit_`` is asked for, with -1 behind each row's last move."""
    if num_moves is None:
        return sources
    return sources.where(torch.arange(sources.shape[1], device=sources.device) < num_moves[:, None], -1)
