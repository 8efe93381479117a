"""One step of decoding at fixed shapes: sample, forward, route, commit; nothing is read on the host.

Contract
--------
:meth:`FixedStep.run` does what one turn of ``TreeDecoder``'s loop does, on the full tree, for a batch of rows that all
keep their places: a row that has ended grows nothing, moves nothing, and is seen by nobody. All state is in tensors
that stay where they are, so the step can be captured in a CUDA graph and replayed; what changes from call to call
(texts' lengths, end tokens, filters, random numbers, the router's weights) are their values. Its outcome is in
``record``, which the next run overwrites.

The host keeps count of the steps, for two things that need not happen in each of them: new random numbers
(:meth:`draw`), and room in layers with a sliding window (``TreeCache.committed``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import ModelAdapter, Select
from lbr_kernels.decoding.attention import TreeForward
from lbr_kernels.decoding.cache import TreeCache
from lbr_kernels.decoding.routing import Routing
from lbr_kernels.decoding.sampling import DRAWN_TOGETHER, FILTERS, Draws
from lbr_kernels.decoding.tracing import named_range
from lbr_kernels.decoding.tree import full_tree_masks, survivor_slots
from lbr_kernels.ops.tree_shape import layer_offset, num_slots


@dataclass(frozen=True)
class StepRecord:
    """What a step has done, in two tensors, so that it travels to the host in two copies.

    ``numbers`` int64 ``[B, K^L + 3]``: the tokens of the new layer (-1: no node), the choice (-1: the row had ended),
    the committed token, and whether the row goes on. ``log_probs`` fp32 ``[B, K^L + 1]``: of the tokens, and of the
    choice.
    """

    numbers: Tensor
    log_probs: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.numbers[:, :-3]

    @property
    def choice(self) -> Tensor:
        return self.numbers[:, -3]

    @property
    def committed(self) -> Tensor:
        return self.numbers[:, -2]

    @property
    def goes_on(self) -> Tensor:
        return self.numbers[:, -1] != 0

    @property
    def token_log_probs(self) -> Tensor:
        return self.log_probs[:, :-1]

    @property
    def router_log_probs(self) -> Tensor:
        return self.log_probs[:, -1]


class FixedStep:
    """The state of a batch of rows, and the step that advances it.

    Args:
        cache: of fixed capacity, for these rows.
        rows, width, depth: B, and the tree's K and L.
        routing: the router's shape; :meth:`begin` brings every call's weights.
        draw_children, draw_choice: whether children are drawn or the most likely tokens, and likewise the choice.
        num_eos: how many end tokens there are.
        last_position: the model's, if it has one.
        device: where all of it is.
    """

    def __init__(
        self,
        cache: TreeCache,
        *,
        rows: int,
        width: int,
        depth: int,
        routing: Routing,
        draw_children: bool,
        draw_choice: bool,
        num_eos: int,
        last_position: int | None,
        device: torch.device,
    ) -> None:
        self.cache, self.rows, self.width, self.depth, self.routing = cache, rows, width, depth, routing
        self.draw_children, self.draw_choice = draw_children, draw_choice
        self.last_position, self.device = last_position, device
        self.phase: Callable[[str], AbstractContextManager[None]] = named_range
        # There during a call: what is kept between calls must not keep the model.
        self.adapter: ModelAdapter | None = None
        self.num_slots = num_slots(width, depth)
        self._masks = full_tree_masks(width, depth, device)
        self._survivors = survivor_slots(width, depth, device)
        winners = torch.arange(width, device=device)[:, None]
        self._sources = torch.cat([winners, self._survivors], dim=1).to(torch.int32)
        self._row_numbers = torch.arange(rows * width ** (depth - 1), device=device)

        # A number in the place of a tensor would be written anew in every step.
        self._none = torch.full((), -1, device=device)
        self._nothing, self._zero = (torch.zeros((), dtype=t, device=device) for t in (torch.int32, torch.float32))
        self._nodes = torch.tensor([width**layer for layer in range(depth + 1)], dtype=torch.int32, device=device)
        self._moves = torch.full((), self._sources.shape[1], dtype=torch.int32, device=device)

        leaves = width**depth
        # What a call brings.
        self.limit, self.pad_token_id = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.eos_token_ids = torch.zeros(num_eos, dtype=torch.int64, device=device)
        off = torch.tensor([*FILTERS.values()], dtype=torch.float64, device=device)
        self.filters = off.repeat(len(self._row_numbers), 1)
        self.child_draws = torch.zeros((DRAWN_TOGETHER, rows, leaves), dtype=torch.float64, device=device)
        self.choice_draws = torch.zeros((DRAWN_TOGETHER, rows), dtype=torch.float64, device=device)
        # What a step leaves to the next one.
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # what every active row has committed
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.next_positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.full((rows, self.num_slots), -1, device=device)  # -1: no node
        self.hidden: Tensor | None = None  # [B, slots, D]
        self.logits: Tensor | None = None  # [B * K^(L-1), V] of the frontier
        self.record = StepRecord(
            torch.zeros((rows, leaves + 3), dtype=torch.int64, device=device),
            torch.zeros((rows, leaves + 1), dtype=torch.float32, device=device),
        )

    def begin(
        self,
        root_logits: Tensor,
        next_positions: Tensor,
        *,
        routing: Routing,
        filters: dict[str, float],
        limit: int,
        eos_token_ids: Tensor,
        pad_token_id: int,
        draws: Draws | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Take up a call whose prompts are in the cache, and grow the first L - 1 layers.

        Args:
            root_logits: ``[B, V]`` behind the prompts.
            next_positions: int64 ``[B]``, where each row's next token stands.
            routing: has the call's router.
            filters: ``ops.sample_children``'s by name; those that are missing are off.
            limit: the most tokens that a row commits.
            eos_token_ids: int64 ``[num_eos]``.
            pad_token_id: committed where a row has ended.
            draws: the random numbers, needed where something is drawn.

        Returns:
            Tokens ``[B, K^l]`` and their log-probabilities for each of those layers.
        """
        if routing.weights is not None:
            assert self.routing.weights is not None
            self.routing.weights.data.copy_(routing.weights.data)
        self.filters.copy_(torch.tensor([filters.get(name, off) for name, off in FILTERS.items()], dtype=torch.float64))
        self.limit.fill_(limit)
        self.pad_token_id.fill_(pad_token_id)
        self.eos_token_ids.copy_(eos_token_ids)
        self.step.zero_()
        self.active.fill_(True)
        self.next_positions.copy_(next_positions)
        self.tokens.fill_(-1)
        layers, logits = [], root_logits
        for layer in range(1, self.depth):
            uniforms = None if draws is None else draws.at(0)[:, self._slots(layer)]
            layers.append(self._children(layer, logits, uniforms))
            logits = self._forward(layer, self._every_node(layer))
        assert self.logits is not None
        self.logits.copy_(logits)
        return layers

    def draw(self, draws: Draws, first_step: int) -> None:
        """Put the random numbers of ``DRAWN_TOGETHER`` steps, from ``first_step`` on, in their places."""
        block = draws.block(first_step).transpose(0, 1)
        self.child_draws.copy_(block[..., self._slots(self.depth)])
        self.choice_draws.copy_(block[..., -1])

    def run(self) -> None:
        """One step: grow the tree's last layer, route, commit; then the head reads what the next layer grows from."""
        assert self.logits is not None
        now = self.step % DRAWN_TOGETHER
        with self.phase("sample"):
            uniforms = self.child_draws.index_select(0, now)[0] if self.draw_children else None
            tokens, log_probs = self._children(self.depth, self.logits, uniforms)

        def select(states: Tensor) -> Tensor:
            hidden = self._keep(self.depth, states)
            with self.phase("route"):
                uniforms = self.choice_draws.index_select(0, now)[0] if self.draw_choice else None
                router_log_probs, choice = self.routing.choose(hidden, self.tokens >= 0, self.active, uniforms)
            with self.phase("commit"):
                token, frontier = self._commit(hidden, choice)
                goes_on = self._goes_on(choice, token)
                self.active.copy_(goes_on)
                chosen = torch.where(
                    choice >= 0, router_log_probs.gather(1, choice.clamp(min=0)[:, None])[:, 0], self._zero
                )
                numbers = [tokens, choice[:, None], token[:, None], goes_on[:, None].long()]
                torch.cat(numbers, dim=1, out=self.record.numbers)
                torch.cat([log_probs, chosen[:, None]], dim=1, out=self.record.log_probs)
            return frontier

        with self.phase("forward"):
            self.logits.copy_(self._forward(self.depth, select))

    def measure(self) -> None:
        """Find out what hidden states and logits look like, by a forward whose outcome nobody needs."""
        every_node = self._every_node(self.depth)
        self.logits = self._forward(self.depth, lambda states: every_node(states)[:, : len(self._row_numbers)]).clone()

    def _slots(self, layer: int) -> slice:
        return slice(layer_offset(self.width, layer), layer_offset(self.width, layer + 1))

    def _children(self, layer: int, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Grow ``layer`` from the logits ``[B * K^(layer - 1), V]`` of the one before; returns its tokens ``[B, K^l]``
        and their log-probabilities.
        """
        frontier = self.rows * self.width ** (layer - 1)
        index = torch.where(self._expands(layer - 1).flatten(), self._row_numbers[:frontier], self._none)
        temperature, top_k, top_p, min_p = self.filters[:frontier].unbind(1)
        options: dict[str, Any] = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "row_index": index,
            "backend": self.routing.backend,
        }  # fmt: skip
        if uniforms is None:
            tokens, log_probs = ops.top_children(logits, self.width, **options)
        else:
            tokens, log_probs = ops.sample_children(logits, uniforms.reshape(frontier, self.width), **options)
        tokens, log_probs = tokens.view(self.rows, -1), log_probs.view(self.rows, -1)
        self.tokens[:, self._slots(layer)] = tokens
        return tokens, log_probs

    def _expands(self, layer: int) -> Tensor:
        """Which slots of a layer get children now, bool ``[B, K^layer]``; layer 0 is the root."""
        allowed = self.active & (self.step + layer < self.limit)
        if self.last_position is not None:
            allowed = allowed & (self.next_positions + layer <= self.last_position)
        if layer == 0:
            return allowed[:, None]
        tokens = self.tokens[:, self._slots(layer)]
        return (tokens >= 0) & ~self._is_eos(tokens) & allowed[:, None]

    def _is_eos(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self.eos_token_ids).any(-1)

    def _forward(self, layer: int, select: Select) -> Tensor:
        """Forward a layer's slots; returns logits ``[rows that were selected, V]``. A slot without a node is forwarded
        as token 0 and seen by nobody.
        """
        assert self.adapter is not None
        slots = self._slots(layer)
        nodes = slots.stop - slots.start
        positions = self.next_positions + layer - 1
        if self.last_position is not None:
            # Rows that have ended may stand behind it.
            positions = positions.clamp(max=self.last_position)
        self.cache.set_base(slots.start)
        forward = TreeForward(
            self.cache,
            self._masks[:, : slots.stop, : (slots.stop + 63) // 64],
            torch.where(self.active, self._nodes[layer], self._nothing),
            self.routing.backend,
        )
        tokens = self.tokens[:, slots].clamp(min=0)
        _, logits = self.adapter.forward_tree(tokens, positions[:, None].expand(-1, nodes), forward, select)
        return logits[0]

    def _every_node(self, layer: int) -> Select:
        """The head reads all of a layer."""

        def select(states: Tensor) -> Tensor:
            self._keep(layer, states)
            return states.reshape(1, -1, states.shape[2])

        return select

    def _keep(self, layer: int, states: Tensor) -> Tensor:
        """Put a layer's hidden states ``[B, K^l, D]`` where they belong; returns the whole tree's."""
        if self.hidden is None:
            self.hidden = states.new_zeros((self.rows, self.num_slots, states.shape[2]))
        self.hidden[:, self._slots(layer)] = states
        return self.hidden

    def _commit(self, hidden: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Commit, prune, shift.

        Returns the committed tokens ``[B]``, and what the head reads, ``[1, B * K^(L-1), D]``.
        """
        # A row that met a bad value has no choice either; it ends here, and its flag says why.
        chosen, winner = choice >= 0, choice.clamp(min=0)
        sources = self._sources.index_select(0, winner)
        num_moves = torch.where(chosen, self._moves, self._nothing)
        self.cache.commit(sources, num_moves, backend=self.routing.backend)
        token = torch.where(chosen, self.tokens.gather(1, winner[:, None])[:, 0], self.pad_token_id)
        survivors = self._survivors.index_select(0, winner)
        kept, width = survivors.shape[1], hidden.shape[2]
        if kept == 0:
            frontier = hidden.gather(1, winner[:, None, None].expand(-1, 1, width))
        else:
            self.tokens[:, :kept] = torch.where(chosen[:, None], self.tokens.gather(1, survivors), self._none)
            hidden[:, :kept] = hidden.gather(1, survivors[..., None].expand(-1, -1, width))
            frontier = hidden[:, self._slots(self.depth - 1)]
        self.step += 1
        self.next_positions += 1
        return token, frontier.reshape(1, -1, width)

    def _goes_on(self, choice: Tensor, token: Tensor) -> Tensor:
        """Which rows have not ended with this commit, bool ``[B]``."""
        goes_on = (choice >= 0) & ~self._is_eos(token) & (self.step < self.limit)
        # A row whose next candidates do not exist, or may not be grown, cannot go on either.
        if self.depth > 1:
            return goes_on & (self.tokens[:, : self.width] >= 0).any(1)
        return goes_on if self.last_position is None else goes_on & (self.next_positions <= self.last_position)
