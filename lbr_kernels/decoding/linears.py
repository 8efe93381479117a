"""Matrix products of a forward of the tree: a model's linear layers use ``ops.linear`` while it lasts.

Contract
--------
A tree has few nodes, and the framework's matrix products are slow for few rows on a CPU (``bench/bench_linear.py``
measures both). Inside :func:`few_row_linears` the plain ``nn.Linear`` layers that it is given run ``ops.linear`` for
the tree's nodes. Everything else keeps its own product: other kinds of layers, quantised weights, layers whose
``forward`` somebody has replaced, autocast, many rows, and any forward that is not the tree's. The layers are left as
they were found.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lbr_kernels import ops
from lbr_kernels.decoding.attention import current_tree_forward

MOST_ROWS = 64
"""Up to here ``ops.linear`` was measured to be faster, or in bf16 near it; beyond, the framework has rows enough."""

_FAST = ("cpu-avx2", "cpu-avx512", "cpu-avx512-bf16")
_users: dict[nn.Linear, int] = {}  # forwards that a layer's replacement serves now
_lock = threading.Lock()


def few_row_layers(model: nn.Module, backend: str | None) -> list[nn.Linear]:
    """The layers of ``model`` that ``ops.linear`` can serve, none where it would not be faster."""
    if backend not in (None, "cpu", *_FAST):
        return []
    with _lock:  # layers that serve another thread now are as plain as they will be again
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _is_plain(layer)]
    # Asked last, as it may compile the kernels.
    if not layers or all(ops.backends("cpu")["linear"][name] is not None for name in _FAST):
        return []
    return layers


def _is_plain(layer: nn.Linear) -> bool:
    weight, bias = layer.weight, layer.bias
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.stride(-1) == 1
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype == weight.dtype))
        and ("forward" not in layer.__dict__ or layer in _users)
    )


@contextmanager
def few_row_linears(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Inside the block ``layers`` use ``ops.linear`` for a tree's nodes; the last one to leave puts back what was."""
    taken: list[nn.Linear] = []
    try:
        with _lock:
            for layer in layers:
                users = _users.get(layer, 0)
                if users == 0 and "forward" in layer.__dict__:
                    continue  # somebody has replaced it since
                _users[layer] = users + 1
                taken.append(layer)
                layer.__dict__["forward"] = partial(_forward, layer)
        yield
    finally:
        with _lock:
            for layer in taken:
                _users[layer] -= 1
                if _users[layer] <= 0:
                    del _users[layer]
                    layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use
    forward = current_tree_forward()
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    if (
        forward is None
        or input.numel() > MOST_ROWS * input.shape[-1]
        or input.dtype != weight.dtype
        or input.stride(-1) != 1
        or torch.is_autocast_enabled("cpu")
    ):
        return nn.functional.linear(input, weight, bias)
    return ops.linear(input, weight, bias, backend=forward.backend)
