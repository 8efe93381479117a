"""Packing: a batch of trajectories as trees in DFS order, each distinct path once.

Contract
--------
All that a row grew is one tree: the prompt and the committed tokens are its trunk, and at every step the subtrees that
were not chosen hang beside it. In pre-order, the committed child last, the subtree of a node is a run of nodes, which
is all the mask that ``ops.packed_tree_attention`` needs. Siblings that drew the same token are one node here, as they
have the same hidden state; :attr:`PackedTrees.node_index` says where each grown node went. Rows with one prompt can
share it, as so many trunks behind it.

Plain tensors on the CPU; nothing here knows a model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lbr_kernels.decoding.trajectory import TreeTrajectory
from lbr_kernels.ops.tree_shape import layer_offset, num_slots


@dataclass(frozen=True)
class PackedTrees:
    """N nodes in P packs, one pack behind the other. "Packed index" counts from the first node of the first pack.

    Attributes:
        tokens: int64 ``[N]``; 0 for prompts that were given as embeddings.
        positions: int64 ``[N]``, 0 for a prompt's first token.
        subtree_end: int32 ``[N]``, counted from the start of a node's pack.
        cu_seqlens: int32 ``[P + 1]``.
        parents: int64 ``[N]``, packed indices, -1 for a prompt's first token.
        prompts: int64 ``[P]``, a row of the trajectory that has this pack's prompt.
        node_index: int64 ``[rows, nodes]``, the packed index of every grown node, -1 where there is none.
        slot_index: int64 ``[rows, steps, slots]``, the packed index of the nodes that the router saw, -1 likewise.
    """

    tokens: Tensor
    positions: Tensor
    subtree_end: Tensor
    cu_seqlens: Tensor
    parents: Tensor
    prompts: Tensor
    node_index: Tensor
    slot_index: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> PackedTrees:
        """The same on another device."""
        return PackedTrees(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def pack(trajectory: TreeTrajectory, *, share_prompts: bool = True) -> PackedTrees:
    """Lay out a trajectory's rows.

    Args:
        trajectory: on any device.
        share_prompts: rows with equal prompts are one tree; of prompts given as embeddings none are shared.
    """
    trajectory = trajectory.to("cpu")
    grown = _GrownTrees(trajectory)
    order, counts = grown.order()
    rows, nodes = grown.tokens.shape
    prompt_lens = trajectory.prompt_mask.sum(1)
    groups = _groups(trajectory, share_prompts)

    # Where each row's own nodes start, and the pack that they are in.
    pack_of, start_of = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    bounds = [0]
    for number, group in enumerate(groups):
        offset = bounds[-1] + int(prompt_lens[group[0]])
        for row in group:
            pack_of[row], start_of[row] = number, offset
            offset += int(counts[row])
        bounds.append(offset)
    cu_seqlens = torch.tensor(bounds)
    base_of = cu_seqlens[pack_of]

    total = bounds[-1]
    tokens = torch.zeros(total, dtype=torch.int64)
    positions = torch.empty(total, dtype=torch.int64)
    ends = torch.empty(total, dtype=torch.int64)
    parents = torch.empty(total, dtype=torch.int64)
    for number, group in enumerate(groups):
        first, length = bounds[number], int(prompt_lens[group[0]])
        prompt = slice(first, first + length)
        if trajectory.prompt_embeds is None:
            tokens[prompt] = trajectory.prompt_ids[group[0]][trajectory.prompt_mask[group[0]]]
        positions[prompt] = torch.arange(length)
        parents[prompt] = torch.arange(first - 1, first + length - 1)
        parents[first : first + 1] = -1
        ends[prompt] = bounds[number + 1] - first

    # From a row's place in its own order to its packed index.
    kept = grown.canonical & grown.exists
    index = torch.where(kept, start_of[:, None] + order, -1)
    at = index[kept]
    tokens[at] = grown.tokens[kept]
    positions[at] = (prompt_lens[:, None] + grown.depths)[kept]
    sizes = torch.where(grown.trunk_depth > 0, counts[:, None] - order, grown.subtree_sizes())
    ends[at] = (index + sizes - base_of[:, None])[kept]
    prompts = torch.tensor([group[0] for group in groups], dtype=torch.int64)
    root = (base_of + prompt_lens - 1)[:, None].expand(rows, nodes)
    parents[at] = torch.where(grown.parents >= 0, _take(index, grown.parents), root)[kept]

    node_index = torch.where(grown.exists, _take(index, grown.canonical_of), -1)
    slots = grown.slots.flatten(1)
    slot_index = torch.where(slots >= 0, _take(node_index, slots), -1).view(grown.slots.shape)
    return PackedTrees(
        tokens, positions, ends.to(torch.int32), cu_seqlens.to(torch.int32), parents, prompts, node_index, slot_index
    )


def _groups(trajectory: TreeTrajectory, share: bool) -> list[list[int]]:
    """Rows that share a prompt, in order of appearance."""
    rows = len(trajectory)
    if not share or trajectory.prompt_embeds is not None:
        return [[row] for row in range(rows)]
    groups: dict[bytes, list[int]] = {}
    for row in range(rows):
        prompt = trajectory.prompt_ids[row][trajectory.prompt_mask[row]]
        groups.setdefault(prompt.numpy().tobytes(), []).append(row)
    return list(groups.values())


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[row, index[row, ...]]``; anything where the index is negative."""
    return values.gather(1, index.clamp(min=0))


class _GrownTrees:
    """The rows' nodes as the trajectory lists them, with parents; a *node id* is a place on its node axis.

    Attributes, all ``[rows, nodes]`` but for ``slots``:
        tokens, exists: the trajectory's.
        depths: 0 for a first candidate of the first step.
        slots: ``[rows, steps, slots]``, node ids of the trees at every decision, -1 where there is none.
        canonical_of: the node id that stands for all nodes with the same path; ``canonical`` are these.
        parents: canonical node id of the parent, -1 for the end of the prompt.
        trunk_depth: t + 1 for the canonical node that was committed at step t, else 0.
    """

    def __init__(self, trajectory: TreeTrajectory) -> None:
        settings = trajectory.settings
        self.width, self.depth = settings.width, settings.depth
        K, L = self.width, self.depth
        self.tokens = trajectory.node_tokens
        self.exists = self.tokens >= 0
        rows, nodes = self.tokens.shape
        steps, warm = trajectory.num_steps, num_slots(K, L - 1)
        happened = torch.arange(steps) < trajectory.num_committed[:, None]
        choices = trajectory.choices.clamp(min=0)

        self.depths = torch.empty(nodes, dtype=torch.int64)
        for layer in range(1, L):
            self.depths[layer_offset(K, layer) : layer_offset(K, layer + 1)] = layer - 1
        self.depths[warm:] = (torch.arange(steps) + L - 1).repeat_interleave(K**L)
        self.depths = self.depths.expand(rows, nodes)

        # The layers of every step's tree, the deepest first: what a step does not grow, the step before had.
        deepest = warm + torch.arange(steps * K**L).view(1, steps, -1).expand(rows, -1, -1)
        layers = [deepest]
        for layer in range(L - 1, 0, -1):
            count = K**layer
            before = choices[:, :-1, None] * count + torch.arange(count)
            first = layer_offset(K, layer) + torch.arange(count)
            layers.append(torch.cat([first.expand(rows, min(steps, 1), -1), layers[-1][:, :-1].gather(2, before)], 1))
        layers.reverse()
        slots = torch.cat(layers, dim=2)
        there = happened[..., None] & _take(self.exists, slots.flatten(1)).view(slots.shape)
        self.slots = torch.where(there, slots, -1)

        committed = layers[0].gather(2, choices[..., None])[..., 0]  # node ids
        parents = torch.full((rows, nodes), -1)
        for layer in range(2, L):
            place = torch.arange(layer_offset(K, layer), layer_offset(K, layer + 1))
            parents[:, place] = (place - K) // K
        if L == 1:
            above = torch.cat([torch.full((rows, min(steps, 1)), -1), committed[:, :-1]], 1)[..., None]
        else:
            above = layers[-2]
        parents[:, warm:] = above.repeat_interleave(K, dim=2).flatten(1)

        self.canonical_of = self._canonical(layers, warm)
        self.canonical = self.canonical_of == torch.arange(nodes)
        self.parents = torch.where(parents >= 0, _take(self.canonical_of, parents), -1)
        self.trunk_depth = torch.zeros((rows, nodes), dtype=torch.int64)
        chosen = _take(self.canonical_of, committed)[happened]
        row, step = happened.nonzero().unbind(1)
        self.trunk_depth[row, chosen] = step + 1

    def _canonical(self, layers: list[Tensor], warm: int) -> Tensor:
        """Of the nodes that one step grew, the first with the same path; of nodes that do not exist, themselves."""
        rows, nodes = self.tokens.shape
        canonical = torch.arange(nodes).repeat(rows, 1)
        vocabulary = int(self.tokens.max()) + 1 if self.tokens.numel() else 1
        rank: Tensor | None = None
        for layer, ids in enumerate(layers, start=1):
            tokens = _take(self.tokens, ids.flatten(1)).view(ids.shape)
            place = torch.arange(ids.shape[2])
            above = torch.zeros_like(ids) if rank is None else rank.repeat_interleave(self.width, dim=2)
            # A key of its own for what does not exist, which comes before all others.
            key = torch.where(tokens >= 0, above * vocabulary + tokens, -1 - place)
            rank = _first_equal(key)
            if layer < self.depth:
                start = layer_offset(self.width, layer)
                canonical[:, start : start + ids.shape[2]] = start + rank[:, 0]
            else:
                canonical[:, warm:] = ids.gather(2, rank).flatten(1)
        return canonical

    @functools.cached_property
    def ancestors(self) -> tuple[list[Tensor], Tensor]:
        """A node, its parent, ... as far as the trunk; and how many of them stand beside the trunk."""
        up, count = [torch.arange(self.tokens.shape[1]).expand_as(self.tokens)], torch.zeros_like(self.tokens)
        for _ in range(self.depth):
            beside = (up[-1] >= 0) & (_take(self.trunk_depth, up[-1]) == 0)
            count += beside
            up.append(torch.where(beside, _take(self.parents, up[-1]), up[-1]))
        return up, count

    def order(self) -> tuple[Tensor, Tensor]:
        """Each canonical node's place in its row's pre-order ``[rows, nodes]``, and the rows' counts ``[rows]``."""
        up, beside = self.ancestors
        trunk = up[-1]  # the node of the trunk that a node hangs from; -1: the prompt
        attached = torch.where(trunk >= 0, _take(self.trunk_depth, trunk), 0)
        is_trunk = self.trunk_depth > 0
        # A node of the trunk is the last child of the one before it.
        keys = [torch.where(is_trunk, 2 * self.trunk_depth - 1, 2 * attached)]
        stack = torch.stack(up, dim=-1)
        for level in range(1, self.depth + 1):
            at = (beside - level).clamp(min=0)
            keys.append(torch.where(beside >= level, stack.gather(2, at[..., None])[..., 0], -1))
        dropped = ~(self.canonical & self.exists)
        sort = np.lexsort([key.numpy() for key in reversed([dropped.long(), *keys])], axis=-1)
        order = torch.empty_like(self.tokens)
        order.scatter_(1, torch.from_numpy(sort), torch.arange(order.shape[1]).expand_as(order))
        return order, (~dropped).sum(1)

    def subtree_sizes(self) -> Tensor:
        """How many canonical nodes a node beside the trunk has below it, itself included."""
        up, beside = self.ancestors
        counted = self.canonical & self.exists
        sizes = torch.zeros_like(self.tokens)
        for level, ancestor in enumerate(up[:-1]):
            sizes.scatter_add_(1, ancestor.clamp(min=0), (counted & (beside > level)).long())
        return sizes


def _first_equal(keys: Tensor) -> Tensor:
    """For every element of the last axis, the first place that holds the same number."""
    ordered, place = keys.sort(dim=-1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    run = torch.where(new, torch.arange(keys.shape[-1]), 0).cummax(dim=-1).values
    return torch.empty_like(place).scatter_(-1, place, place.gather(-1, run))
