"""The kernels: tensors in, tensors out; nothing here knows transformers.

Every op has a plain PyTorch reference (``<op>_ref``) that defines it, one schema ``torch.ops.lbr_kernels.<op>``, and a
``backend`` argument (see :func:`backends`).
"""

from __future__ import annotations

import torch

from lbr_kernels.ops._backends import BACKENDS, unavailable
from lbr_kernels.ops._flags import raise_if_flagged
from lbr_kernels.ops._registry import OPS
from lbr_kernels.ops.commit import commit_, commit_ref_
from lbr_kernels.ops.draws import keyed_uniforms
from lbr_kernels.ops.linear import linear, linear_ref
from lbr_kernels.ops.packed_tree_attention import packed_tree_attention, packed_tree_attention_ref
from lbr_kernels.ops.route import RouterWeights, route, route_ref
from lbr_kernels.ops.sample_children import sample_children, sample_children_ref, top_children, top_children_ref
from lbr_kernels.ops.tree_attention import tree_attention, tree_attention_ref

__all__ = [
    "RouterWeights",
    "backends",
    "commit_",
    "commit_ref_",
    "keyed_uniforms",
    "linear",
    "linear_ref",
    "packed_tree_attention",
    "packed_tree_attention_ref",
    "raise_if_flagged",
    "route",
    "route_ref",
    "sample_children",
    "sample_children_ref",
    "top_children",
    "top_children_ref",
    "tree_attention",
    "tree_attention_ref",
]


def backends(device: str | torch.device = "cpu") -> dict[str, dict[str, str | None]]:
    """For every op and backend, why it cannot run for tensors on ``device``; None where it can.

    Where an argument requires a gradient, only the reference runs, but for ``packed_tree_attention``.
    """
    return {op: {name: unavailable(name, op, torch.device(device)) for name in BACKENDS} for op in OPS}
