"""The rolling lookahead tree: which slots hold a node, which nodes are forwarded, and what survives a commit.

Contract
--------
The tree of row b has the slots of the full K-ary tree of depth L (``ops.tree_shape``). Every slot that exists holds a
drawn token; duplicates are kept (paper, section 3). What is forwarded and cached are *nodes*: with ``trie`` one node
for each distinct path of a row, else one per slot. ``node_of`` maps slots to nodes. Nodes are numbered in the order in
which they were forwarded, which is level order, so survivors of a commit ascend.

All state is tensors on one device with rows first; the only numbers that the host reads are how many nodes are
forwarded next and how many survive, and without ``trie`` these are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbr_kernels.ops.tree_shape import layer_offset, num_slots, path_slots


@dataclass(frozen=True)
class Growth:
    """One layer's forward: N query nodes per row, of which ``num_nodes`` are real.

    Attributes:
        base: index of the first new node in the tree.
        tokens: int64 ``[B, N]``.
        num_nodes: int32 ``[B]``, or None if all N are real in every row.
        ancestors: int64 ``[1 or B, base + N, words]``, the mask of ``ops.tree_attention``.
        query_of: int64 ``[B, K^l]``, the query that holds a slot of the layer.
    """

    base: int
    tokens: Tensor
    num_nodes: Tensor | None
    ancestors: Tensor
    query_of: Tensor


class LookaheadTree:
    """The trees of a batch of rows."""

    def __init__(self, rows: int, width: int, depth: int, *, trie: bool, device: torch.device) -> None:
        self.width, self.depth, self.trie = width, depth, trie
        self.num_slots = num_slots(width, depth)
        self.tokens = torch.full((rows, self.num_slots), -1, device=device)
        self.valid = torch.zeros((rows, self.num_slots), dtype=torch.bool, device=device)
        self.node_of = torch.zeros((rows, self.num_slots), dtype=torch.int64, device=device)
        # Parent of every node, -1 for a child of the prefix; wide enough for a tree without duplicates.
        self.parent = torch.full((rows, self.num_slots), -1, device=device)
        self.num_nodes = 0
        self._survivors = survivor_slots(width, depth, device)
        self._paths = [
            path_slots(width, layer, device).flatten(0, 1)
            if layer
            else torch.empty((1, 0), dtype=torch.int64, device=device)
            for layer in range(depth)
        ]

    def layer(self, layer: int) -> slice:
        """The slots of a layer, 1-based."""
        return slice(layer_offset(self.width, layer), layer_offset(self.width, layer + 1))

    def grow(self, layer: int, tokens: Tensor) -> Growth:
        """Put drawn tokens ``[B, K^layer]`` (-1: no child) into a layer and say what has to be forwarded."""
        slots = self.layer(layer)
        rows, count = tokens.shape
        self.tokens[:, slots] = tokens
        exists = tokens >= 0
        self.valid[:, slots] = exists
        index = torch.arange(count, device=tokens.device)
        if layer == 1:
            parents = torch.full_like(tokens, -1)
        else:
            parents = self.node_of[:, self.layer(layer - 1)][:, index // self.width]
        if self.trie:
            query_of, queries, num_nodes = self._distinct(tokens, parents, exists)
        else:
            query_of, queries, num_nodes = index.expand(rows, count), index.expand(rows, count), None

        base = self.num_nodes
        self.num_nodes = base + queries.shape[1]
        self.node_of[:, slots] = base + query_of
        self.parent[:, base : self.num_nodes] = parents.gather(1, queries)
        # What is not real is forwarded as token 0 and seen by nobody.
        query_tokens = tokens.gather(1, queries).clamp(min=0)
        return Growth(base, query_tokens, num_nodes, self._ancestors(), query_of)

    def _distinct(self, tokens: Tensor, parents: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots that share a parent node and a token share a query, numbered by their first slot."""
        rows, count = tokens.shape
        index = torch.arange(count, device=tokens.device).expand(rows, count)
        # Slots without a node sort last, each on its own.
        key = torch.where(exists, (parents + 1) << 32 | tokens, (1 << 62) + index)
        ordered, order = key.sort(dim=1, stable=True)
        starts = torch.ones_like(exists)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        group_start = torch.where(starts, index, 0).cummax(dim=1).values
        first_slot = torch.empty_like(order).scatter_(1, order, order.gather(1, group_start))
        is_first = (first_slot == index) & exists
        rank = is_first.cumsum(dim=1) - 1
        num_nodes = is_first.sum(dim=1)
        most = max(int(num_nodes.max()), 1)
        queries = torch.where(is_first, index, count).sort(dim=1).values[:, :most].clamp(max=count - 1)
        query_of = torch.where(exists, rank.gather(1, first_slot), 0)
        return query_of, queries, num_nodes.to(torch.int32)

    def _ancestors(self) -> Tensor:
        """Mask words ``[1 or B, nodes, words]`` of all nodes so far: each sees itself and its chain of parents."""
        nodes = self.num_nodes
        index = torch.arange(nodes, device=self.parent.device)
        own = torch.zeros((nodes, (nodes + 63) // 64), dtype=torch.int64, device=self.parent.device)
        own[index, index // 64] = torch.ones_like(index) << (index % 64)
        if self.depth == 1:
            return own[None]
        parent = self.parent[:, :nodes] if self.trie else self.parent[:1, :nodes]
        mask, ancestor = own.expand(len(parent), -1, -1), parent
        for _ in range(self.depth - 1):
            known = ancestor >= 0
            mask = mask | torch.where(known[..., None], own[ancestor.clamp(min=0)], 0)
            ancestor = torch.where(known, parent.gather(1, ancestor.clamp(min=0)), -1)
        return mask

    def paths(self, layer: int) -> Tensor:
        """Tokens from the root to the slots of a layer that can have children (0: the root to layer L - 1).

        int64 ``[B, K^layer, layer]``; -1 where there is no node.
        """
        return self.tokens[:, self._paths[layer]]

    def commit(self, choice: Tensor, *, all_active: bool) -> tuple[Tensor, Tensor | None]:
        """Commit candidate ``choice[b]`` (-1: the row has ended; its tree is emptied), prune, and shift.

        Args:
            choice: int64 ``[B]``.
            all_active: whether no choice is -1, as the caller knows without asking the device.

        Returns:
            ``sources`` int32 ``[B, M]`` and ``num_moves`` int32 ``[B]`` (None: all M) for ``ops.commit_``: the winner
            and its descendants.

        Raises:
            ValueError: a choice is not in -1 .. K - 1, or no node stands in its place (checked on CPUs).
        """
        if choice.device.type == "cpu":
            self._check(choice)
        active = choice >= 0
        winner = choice.clamp(min=0)
        survivors = self._survivors[winner]
        kept = survivors.shape[1]
        moved_nodes = self.node_of.gather(1, survivors)
        winner_node = self.node_of.gather(1, winner[:, None])
        alive = self.valid.gather(1, survivors) & active[:, None]

        if self.trie:
            used = torch.zeros_like(self.valid).scatter_(1, winner_node, active[:, None])
            used.scatter_(1, torch.where(alive, moved_nodes, winner_node), active[:, None].expand(-1, kept))
        else:
            # Every slot moves, whether or not it holds a node: the same number in every row.
            used = torch.zeros_like(self.valid).scatter_(1, torch.cat([winner_node, moved_nodes], dim=1), True)
        used[:, self.num_nodes :] = False
        rank = used.cumsum(dim=1)
        num_moves = rank[:, -1]
        index = torch.arange(self.num_slots, device=choice.device)
        most = max(int(num_moves.max()), 1) if self.trie else kept + 1
        sources = torch.where(used, index, self.num_slots).sort(dim=1).values[:, :most]

        # The winner, the first to move, joins the prefix; the others become nodes 0, 1, ... of the next tree.
        new_node = (rank - 2).clamp(min=0)
        new_parent = torch.where(used.gather(1, self.parent.clamp(min=0)), self.parent, -1)
        new_parent = new_node.gather(1, new_parent.clamp(min=0)).where(
            (new_parent >= 0) & (new_parent != winner_node), -1
        )
        self.num_nodes = most - 1
        self.parent[:, : self.num_nodes] = new_parent.gather(1, sources[:, 1:].clamp(max=self.num_slots - 1))
        moved_tokens = self.tokens.gather(1, survivors)
        self.node_of[:, :kept] = new_node.gather(1, moved_nodes)
        self.tokens[:, :kept] = torch.where(alive, moved_tokens, -1)
        self.valid[:, :kept] = alive
        self.tokens[:, kept:] = -1
        self.valid[:, kept:] = False
        if self.trie or not all_active:
            return sources.to(torch.int32), torch.where(active, num_moves, 0).to(torch.int32)
        return sources.to(torch.int32), None

    def _check(self, choice: Tensor) -> None:
        for row, chosen in enumerate(choice.tolist()):
            if not -1 <= chosen < self.width:
                raise ValueError(f"commit: choice[{row}] is {chosen}, expected -1 to {self.width - 1}")
            if chosen >= 0 and not self.valid[row, chosen]:
                raise ValueError(f"commit: choice[{row}] is {chosen}, where the tree holds no candidate")

    def shift(self, states: Tensor, choice: Tensor) -> Tensor:
        """Per-slot states ``[B, slots, ...]`` of the tree before a commit, as those of layers 1..L-1 after it."""
        survivors = self._survivors[choice.clamp(min=0)]
        index = survivors.view(*survivors.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
        return states.gather(1, index)


def survivor_slots(width: int, depth: int, device: torch.device) -> Tensor:
    """int64 ``[K, slots of layers 1..L-1]``: the slot that moves to each slot when candidate k is committed."""
    rows = []
    for candidate in range(width):
        slots: list[int] = []
        for layer in range(1, depth):
            # Layer l + 1 of the old tree below the candidate becomes layer l.
            first = layer_offset(width, layer + 1) + candidate * width**layer
            slots += range(first, first + width**layer)
        rows.append(slots)
    return torch.tensor(rows, dtype=torch.int64, device=device).view(width, -1)


def full_tree_masks(width: int, depth: int, device: torch.device) -> Tensor:
    """The masks of ``ops.tree_attention`` for a full tree, int64 ``[1, slots, words]``."""
    slots = num_slots(width, depth)
    masks: list[int] = []
    for slot in range(slots):
        parent = (slot - width) // width
        masks.append(1 << slot | (masks[parent] if slot >= width else 0))
    words = [[mask >> 64 * word & 2**64 - 1 for word in range((slots + 63) // 64)] for mask in masks]
    signed = [[word - 2**64 if word >> 63 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int64, device=device)[None]
