"""The attention plug-in: how a transformers model comes to use the tree ops.

Contract
--------
Under the name :data:`IMPLEMENTATION` transformers' attention interface finds :func:`attention_forward`, and the model's
configs say that name for the time of a forward of a tree. What it needs beside query and keys (in decoding the cache
with its prefix lengths and the tree's masks, in training the packed trees) is an :class:`AttendedForward`, which
reaches it through a context variable of the calling thread. Any other forward in that time, of another thread or of a
callback, gets the attention and the masks that the model was loaded with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lbr_kernels import ops
from lbr_kernels.decoding.cache import TreeCache

IMPLEMENTATION = "lbr_tree_attention"


@dataclass(frozen=True)
class LayerExtras:
    """What a layer asks of its attention beside the usual."""

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float


class AttendedForward(Protocol):
    """A forward of the model in which every layer's attention is one of the tree ops, on ``backend``."""

    backend: str | None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, extras: LayerExtras) -> Tensor:
        """The attention of one layer: ``[B, H, N, D]`` in, ``[B, Hq, N, Dv]`` out."""


@dataclass
class TreeForward:
    """What the layers of one forward of the tree share; ``windows`` collects the windows that layers ask for.

    ``key`` and ``value`` are what ``TreeCache`` returned: whole buffers, prefix and tree.
    """

    cache: TreeCache
    ancestors: Tensor
    num_nodes: Tensor | None
    backend: str | None
    windows: list[int | None] = field(default_factory=list)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, extras: LayerExtras) -> Tensor:
        """See :class:`AttendedForward`."""
        window = extras.window
        if window is None:
            # Some models say so in their masks alone, which go by the same configuration as the cache.
            window = self.cache.layer_window(getattr(module, "layer_idx", None))
        self.windows.append(window)
        device = query.device
        out = ops.tree_attention(
            query, key, value, self.cache.prefix_lens_for(key), self.ancestors.to(device),
            num_nodes=None if self.num_nodes is None else self.num_nodes.to(device),
            scale=extras.scale, window=window, softcap=extras.softcap, sinks=extras.sinks, backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out


_current: ContextVar[AttendedForward | None] = ContextVar("lbr_kernels_tree_forward", default=None)


def current_tree_forward() -> AttendedForward | None:
    """The forward of a tree that the calling thread is in; None in any other forward."""
    return _current.get()


@contextmanager
def tree_forward(forward: AttendedForward, configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """A forward inside the block is the tree's, for the model whose configs these are."""
    with attention_implementation(configs, IMPLEMENTATION), _in_context(forward):
        yield


@contextmanager
def plain_forwards() -> Iterator[None]:
    """Within a forward of the tree: what is called inside the block may use the model as if there were none."""
    with _in_context(None):
        yield


@contextmanager
def _in_context(forward: AttendedForward | None) -> Iterator[None]:
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' interface: query ``[B, Hq, N, D]`` to output ``[B, N, Hq, Dv]``.

    Other arguments than those named here change no result, or the model does not pass ``check_model``.
    """
    forward = _current.get()
    if forward is None:
        extras = {
            "dropout": dropout or None, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux,
            "position_bias": position_bias,
        } | kwargs  # fmt: skip
        extras = {name: value for name, value in extras.items() if value is not None}
        output, _ = _own_attention(module)(module, query, key, value, attention_mask, scaling=scaling, **extras)
        return output, None
    if position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} adds a position bias, which tree attention does not do")
    sinks = None if s_aux is None else s_aux.float()
    out = forward.attend(module, query, key, value, LayerExtras(scaling, sliding_window, softcap, sinks, dropout))
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Tensor | None:
    if _current.get() is not None:
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[own_attention_name(config)](*args, config=config, **kwargs)
    return mask


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


@dataclass
class _Renamed:
    """A config that says another attention for now. Holding it here keeps its id its own."""

    config: PreTrainedConfig
    found: str | None
    name: str
    users: int = 0


_renamed: dict[int, _Renamed] = {}
_changed = threading.Condition()


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that the model's modules hold, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def attention_implementation(configs: Sequence[PreTrainedConfig], name: str, *, wait: bool = True) -> Iterator[None]:
    """The configs say ``name`` inside the block, for all threads; the last one to leave puts back what was found.

    While one says another name for somebody else, this waits, or with ``wait=False`` does nothing.
    """
    taken: list[_Renamed] = []
    try:
        with _changed:
            while any(id(config) in _renamed and _renamed[id(config)].name != name for config in configs):
                if not wait:
                    break
                _changed.wait()
            else:
                for config in configs:
                    new = _Renamed(config, config._attn_implementation_internal, name)
                    entry = _renamed.setdefault(id(config), new)
                    taken.append(entry)
                    entry.users += 1
                    config._attn_implementation_internal = name
        yield
    finally:
        with _changed:
            for entry in taken:
                entry.users -= 1
                if entry.users <= 0:
                    entry.config._attn_implementation_internal = entry.found
                    del _renamed[id(entry.config)]
            _changed.notify_all()


def own_attention_name(config: PreTrainedConfig) -> str | None:
    """The attention that the model was loaded with."""
    entry = _renamed.get(id(config))
    name: str | None = config._attn_implementation if entry is None else entry.found
    return name


def _own_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What an attention module would call, were there no tree."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    eager = next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)
    assert isinstance(module.config, PreTrainedConfig)
    function: Callable[..., tuple[Tensor, Tensor | None]] | None
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own_attention_name(module.config), eager)
    if function is None:
        raise RuntimeError(f"{type(module).__name__} has no eager attention beside it, which its config asks for")
    return function


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
