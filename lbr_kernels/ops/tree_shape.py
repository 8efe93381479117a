"""Arithmetic of the full K-ary tree: where a node stands and which nodes form a path.

Contract
--------
A full tree of width K and depth L has ``K + K**2 + ... + K**L`` slots, numbered from 0 in level order: layer 1 first,
and within a layer the children of the first parent first. The root, the committed prefix, has no slot. Everything
here depends on K and L alone; which slots hold a node that exists is said by a boolean mask beside the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_offset(width: int, layer: int) -> int:
    """The first slot of ``layer`` (1-based); ``layer_offset(K, L + 1)`` is the number of slots of a depth-L tree."""
    return sum(width**level for level in range(1, layer))


def num_slots(width: int, depth: int) -> int:
    """The number of slots, ``sum(width**l for l in 1..depth)``."""
    return layer_offset(width, depth + 1)


def path_slots(width: int, depth: int, device: torch.device | None = None) -> Tensor:
    """The slots along every root-to-leaf path, int64 ``[width, width**(depth-1), depth]``: candidate, path, layer."""
    leaves = torch.arange(width**depth, device=device)
    layers = [layer_offset(width, layer) + leaves // width ** (depth - layer) for layer in range(1, depth + 1)]
    return torch.stack(layers, dim=-1).view(width, -1, depth)


def path_masks(valid: Tensor, width: int, depth: int) -> tuple[Tensor, Tensor]:
    """Which paths of a tree with missing nodes exist, and which nodes are on them.

    A node without children ends its path early. In the full tree ``width**(depth - l)`` leaf slots lie below such a
    node at layer l; they stand for one path, which is kept at the first of them.

    Args:
        valid: bool ``[B, num_slots]``, whether a node exists. A node that exists has an existing parent, and the
            children of a parent fill its slots from the first on.
        width, depth: the tree's K and L.

    Returns:
        ``on_path`` bool ``[B, width, M, depth]`` with ``M = width**(depth-1)``, and ``exists`` bool ``[B, width, M]``.
    """
    slots = path_slots(width, depth, valid.device)
    on_path = valid[:, slots]
    # A leaf slot stands for its path if every step below the last node that exists is the first child.
    first_child = slots[:, :, 1:] == width + width * slots[:, :, :-1]
    exists = on_path[..., 0] & (on_path[..., 1:] | first_child).all(dim=-1)
    return on_path, exists
