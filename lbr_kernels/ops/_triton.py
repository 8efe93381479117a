"""The Triton kernels as torch ops ``torch.ops.lbr_kernels.<op>_triton``, registered when they are first asked for.

Their schemas are the references', without the argument that chooses an instruction set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbr_kernels.ops import _flags, _registry, tree_attention_triton


@functools.cache
def register() -> None:
    """Define the ops. Imports Triton."""
    kernels: dict[str, Callable[..., Any]] = {"tree_attention": tree_attention_triton.tree_attention_triton}
    for op, kernel in kernels.items():
        name = f"{op}_triton"
        _registry.LIBRARY.define(name + _registry.SCHEMAS[op], tags=torch.Tag.pt2_compliant_tag)
        _registry.LIBRARY.impl(name, _with_flags(kernel), "CUDA")
        if tree_attention_triton.interpreting():
            _registry.LIBRARY.impl(name, _with_flags(kernel), "CPU")
        torch.library.register_fake(f"lbr_kernels::{name}", _registry.FAKES[op], lib=_registry.LIBRARY)


def _with_flags(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(lead: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kernel(lead, *args, **kwargs, flag=_flags.word(lead.device))

    return run
