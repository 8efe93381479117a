"""The Triton kernels as torch ops ``torch.ops.lbr_kernels.<op>_triton``, registered when they are first asked for.

Their schemas are the references', without the argument that chooses an instruction set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbr_kernels.ops import _flags, _registry
from lbr_kernels.ops._triton_support import interpreting
from lbr_kernels.ops.commit import check_arguments as check_commit
from lbr_kernels.ops.commit_triton import commit_triton
from lbr_kernels.ops.packed_tree_attention import check_arguments as check_packed
from lbr_kernels.ops.packed_tree_attention import check_backward_arguments as check_packed_backward
from lbr_kernels.ops.packed_tree_attention import register_gradient
from lbr_kernels.ops.packed_tree_attention_triton import (
    packed_tree_attention_backward_triton,
    packed_tree_attention_triton,
)
from lbr_kernels.ops.route import check_arguments as check_route
from lbr_kernels.ops.route_triton import route_triton
from lbr_kernels.ops.sample_children import check_sampling_arguments, check_top_arguments
from lbr_kernels.ops.sample_children_triton import sample_children_triton, top_children_triton
from lbr_kernels.ops.tree_attention import check_arguments as check_attention
from lbr_kernels.ops.tree_attention_triton import tree_attention_triton

# By op: the kernel, and what checks its arguments.
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "tree_attention": (tree_attention_triton, check_attention),
    "commit_": (commit_triton, check_commit),
    "sample_children": (sample_children_triton, check_sampling_arguments),
    "top_children": (top_children_triton, check_top_arguments),
    "route": (route_triton, check_route),
    "packed_tree_attention": (packed_tree_attention_triton, check_packed),
    "packed_tree_attention_backward": (packed_tree_attention_backward_triton, check_packed_backward),
}


@functools.cache
def register() -> None:
    """Define the ops. Imports Triton."""
    for op, (kernel, check) in KERNELS.items():
        name = f"{op}_triton"
        _registry.LIBRARY.define(name + _registry.SCHEMAS[op], tags=torch.Tag.pt2_compliant_tag)
        _registry.LIBRARY.impl(name, _checked(kernel, check), "CUDA")
        if interpreting():
            _registry.LIBRARY.impl(name, _checked(kernel, check), "CPU")
        torch.library.register_fake(f"lbr_kernels::{name}", _registry.FAKES[op], lib=_registry.LIBRARY)
    register_gradient("packed_tree_attention_triton", torch.ops.lbr_kernels.packed_tree_attention_backward_triton)


def _checked(kernel: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        return kernel(*args, **kwargs, flag=_flags.word(device))

    return run
