"""Token trees in one forward with gradients, on the library's own kernel.

A training batch is a forest: a graph's text is a trunk, every question about it a branch, and the candidates that
decoding would forward are twigs on its answer. :meth:`Forest.hidden` lays the trees out in pre-order and runs the
model once, with ``ops.packed_tree_attention`` in the place of its attention, as ``trajectory_log_probs`` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbr_kernels.decoding.attention import configs_of, tree_forward
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
        start, end, depth = self.layout
        batch, nodes = self.tokens.shape
        there = (start + torch.arange(batch, device=start.device)[:, None] * nodes).flatten()

        def in_order(values: Tensor) -> Tensor:
            """``[B, N, ...]`` in the order of the layout, ``[1, B * N, ...]``."""
            flat = values.flatten(0, 1)
            return torch.empty_like(flat).index_copy(0, there, flat)[None]

        forward = PackedForward(
            subtree_end=in_order(end).to(torch.int32),
            cu_seqlens=torch.arange(0, (batch + 1) * nodes, nodes, dtype=torch.int32, device=start.device),
            positions=in_order(depth).to(torch.int32),
            windows=[None] * model.config.num_hidden_layers,
            backend=None,
        )
        given = {"input_ids": in_order(self.tokens)} if embeds is None else {"inputs_embeds": in_order(embeds)}
        with tree_forward(forward, configs_of(model)):
            states: Tensor = model.base_model(**given, position_ids=in_order(depth), use_cache=False).last_hidden_state[
                0
            ]
        return states[there].view(batch, nodes, -1)
