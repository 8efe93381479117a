"""The attention plug-in: how a transformers model comes to use ``ops.tree_attention``.

Contract
--------
Under the name :data:`IMPLEMENTATION` transformers' attention interface finds :func:`tree_attention_forward`. What it
needs beside query and keys (the cache with its prefix lengths, the tree's masks) reaches it through a context
variable that is set around a forward of the tree. A forward without it, from another thread, say, gets transformers'
SDPA attention with its usual masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lbr_kernels import ops
from lbr_kernels.decoding.cache import TreeCache

IMPLEMENTATION = "lbr_tree_attention"


@dataclass
class TreeForward:
    """What the layers of one forward of the tree share; ``windows`` collects the windows that layers ask for."""

    cache: TreeCache
    ancestors: Tensor
    num_nodes: Tensor | None
    backend: str | None
    windows: list[int | None] = field(default_factory=list)


_current: ContextVar[TreeForward | None] = ContextVar("lbr_kernels_tree_forward", default=None)


@contextmanager
def tree_forward(forward: TreeForward) -> Iterator[None]:
    """Attention inside the block is the tree's."""
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' interface: query ``[B, Hq, N, D]`` to output ``[B, N, Hq, Dv]``.

    ``key`` and ``value`` are what ``TreeCache`` returned: whole buffers, prefix and tree. Other arguments than those
    named here change no result, or the model does not pass ``check_model``.
    """
    forward = _current.get()
    if forward is None:
        extras = {
            "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias
        } | kwargs  # fmt: skip
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **extras)
        return output, None
    if position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} adds a position bias, which tree attention does not do")
    if sliding_window is None:
        # Some models say so in their masks alone, which go by the same configuration as the cache.
        sliding_window = forward.cache.layer_window(getattr(module, "layer_idx", None))
    forward.windows.append(sliding_window)
    device = query.device
    out = ops.tree_attention(
        query, key, value, forward.cache.prefix_lens_for(key), forward.ancestors.to(device),
        num_nodes=None if forward.num_nodes is None else forward.num_nodes.to(device),
        scale=scaling, window=sliding_window, softcap=softcap,
        sinks=None if s_aux is None else s_aux.float(), backend=forward.backend,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _current.get() is None else None


AttentionInterface.register(IMPLEMENTATION, tree_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """All of the model's attention goes by ``name`` inside the block; its configs are put back after it."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def prefill_implementation(model: PreTrainedModel) -> str | None:
    """What the prompt is read with: flash-attn where it serves, else None for the model's own choice.

    flash-attn takes the place of transformers' default (SDPA) on CUDA, in half precision, for models that support it;
    an implementation that the user has chosen stays.
    """
    from transformers.utils import is_flash_attn_2_available

    serves = (
        model.device.type == "cuda"
        and model.dtype in (torch.float16, torch.bfloat16)
        and getattr(model, "_supports_flash_attn", False)
        and model.config._attn_implementation == "sdpa"
    )
    return "flash_attention_2" if serves and is_flash_attn_2_available() else None
