"""Token trees in one forward with gradients, on the library's own kernel.

A training batch is a forest: a graph's text is a trunk, every question about it a branch, and the candidates that
decoding would forward are twigs on its answer. :meth:`Forest.hidden` lays the trees out in pre-order and runs the
model once, with ``ops.packed_tree_attention`` in the place of its attention, as ``trajectory_log_probs`` does. What
grows on it afterwards can be read behind what was kept of that forward (:meth:`Reading.twigs`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from lbr_kernels.decoding.attention import LayerExtras, configs_of, tree_forward
from lbr_kernels.training.forward import PackedForward


@dataclass(frozen=True)
class Forest:
    """B trees of N nodes each, parents before their children.

    ``tokens`` int64 ``[B, N]``; ``parents`` int64 ``[B, N]``, the slot of each node's parent in its row, -1 for roots.
    """

    tokens: Tensor
    parents: Tensor

    def grow(self, parents: Tensor, tokens: Tensor) -> tuple[Forest, Tensor]:
        """With ``tokens [B, M]`` as children of the slots ``parents [B, M]``; and the new nodes' slots ``[B, M]``."""
        known, new = self.tokens.shape[1], tokens.shape[1]
        slots = torch.arange(known, known + new, device=tokens.device).expand_as(tokens)
        grown = replace(self, tokens=torch.cat([self.tokens, tokens], 1), parents=torch.cat([self.parents, parents], 1))
        return grown, slots

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each node stands in its row's pre-order, where its subtree ends there, its depth: int64 ``[B, N]``."""
        parents = self.parents.cpu().numpy()
        rows, (batch, nodes) = np.arange(len(parents)), parents.shape
        size = np.ones((batch, nodes + 1), np.int64)  # the last column stands above the roots
        depth = np.full((batch, nodes + 1), -1)
        start = np.zeros((batch, nodes), np.int64)
        free = np.zeros((batch, nodes + 1), np.int64)  # where a node's next child goes
        for node in range(nodes - 1, -1, -1):
            size[rows, parents[:, node]] += size[:, node]
        for node in range(nodes):
            above = parents[:, node]
            depth[:, node] = depth[rows, above] + 1
            start[:, node] = free[rows, above]
            free[rows, above] += size[:, node]
            free[:, node] = start[:, node] + 1
        found = (start, start + size[:, :-1], depth[:, :-1])
        first, end, levels = (torch.from_numpy(array).to(self.parents.device) for array in found)
        return first, end, levels

    def hidden(self, model: PreTrainedModel, embeds: Tensor | None = None) -> Tensor:
        """What the output head receives at every node, ``[B, N, hidden_size]``; of ``embeds``, if given, that many."""
        return self.read(model, embeds).hidden

    def read(self, model: PreTrainedModel, embeds: Tensor | None = None) -> Reading:
        """One forward of the model over all nodes."""
        start, end, depth = self.layout
        batch, nodes = self.tokens.shape
        there = (start + torch.arange(batch, device=start.device)[:, None] * nodes).flatten()

        def in_order(values: Tensor) -> Tensor:
            """``[B, N, ...]`` in the order of the layout, ``[1, B * N, ...]``."""
            flat = values.flatten(0, 1)
            return torch.empty_like(flat).index_copy(0, there, flat)[None]

        forward = _Kept(
            subtree_end=in_order(end).to(torch.int32),
            cu_seqlens=torch.arange(0, (batch + 1) * nodes, nodes, dtype=torch.int32, device=start.device),
            positions=in_order(depth).to(torch.int32),
            windows=[None] * model.config.num_hidden_layers,
            backend=None,
        )
        given = {"input_ids": in_order(self.tokens)} if embeds is None else {"inputs_embeds": in_order(embeds)}
        with tree_forward(forward, configs_of(model)):
            output = model.base_model(**given, position_ids=in_order(depth), use_cache=False)
        hidden: Tensor = output.last_hidden_state[0][there].view(batch, nodes, -1)
        caches = [[part.unflatten(2, (batch, nodes))[0].transpose(0, 1) for part in layer] for layer in forward.kept]
        return Reading(self, hidden, caches)


@dataclass(frozen=True)
class Reading:
    """What a model made of a forest: ``hidden [B, N, D]`` by slot, and every layer's keys and values.

    ``caches`` hold two tensors ``[B, heads, N, size]`` per layer, in the order of the forest's layout.
    """

    forest: Forest
    hidden: Tensor
    caches: list[list[Tensor]]

    def twigs(self, model: PreTrainedModel, parents: Tensor, tokens: Tensor) -> Tensor:
        """The states ``[B, M, D]`` of nodes that :meth:`Forest.grow` would add, without reading the forest again.

        ``parents [B, M]`` are slots of the forest or, from N on, of earlier ones of these.
        """
        start, end, depth = self.forest.layout
        batch, nodes = start.shape
        anchors = parents  # the forest's own node above each
        among = torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
        below = torch.ones_like(parents)
        while bool((inside := anchors >= nodes).any()):
            place = (anchors - nodes).clamp(min=0)
            among |= nn.functional.one_hot(place, among.shape[-1]).bool() & inside.unsqueeze(-1)
            below += inside
            anchors = torch.where(inside, parents.gather(1, place), anchors)
        at_anchor = start.gather(1, anchors).unsqueeze(-1)
        first = torch.arange(nodes, device=start.device)
        end_there = torch.empty_like(end).scatter(1, start, end).unsqueeze(1)
        seen = torch.cat([(first <= at_anchor) & (at_anchor < end_there), among], dim=-1).unsqueeze(1)
        with tree_forward(_Beside(self.caches, seen), configs_of(model)):
            output = model.base_model(input_ids=tokens, position_ids=depth.gather(1, anchors) + below, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states


@dataclass
class _Kept(PackedForward):
    """A forward over packed trees that keeps what every layer attended to."""

    kept: list[list[Tensor]] = field(default_factory=list)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, extras: LayerExtras) -> Tensor:
        self.kept.append([key, value])
        return super().attend(module, query, key, value, extras)


@dataclass
class _Beside:
    """A forward of nodes that attend to kept keys and to each other, where ``seen [B, 1, M, N + M]`` says so."""

    caches: list[list[Tensor]]
    seen: Tensor
    backend: str | None = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, extras: LayerExtras) -> Tensor:
        keys, values = self.caches[cast(int, module.layer_idx)]
        return scaled_dot_product_attention(
            query, torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), self.seen, scale=extras.scale,
            enable_gqa=True,
        )  # fmt: skip
