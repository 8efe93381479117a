"""One forward of a model over packed trees, with gradients: the hidden states, and the head as a function of them.

Contract
--------
:func:`forward_packed` calls the model as it was handed over, whatever wraps it (DDP, FSDP, PEFT, ``torch.compile``,
autocast, gradient checkpointing), once; attention goes through ``decoding.attention``. The head sees one row in that
call. What it gives for other rows is computed by the model's own forward, in which the states stand in the place of the
body's result: soft-caps and scales behind the head are the model's code. The model is left as it was found.

Whether a model's attention can be packed is found out once per model by :func:`packing_obstacle`; a model that cannot
has :func:`forward_paths`, which gives the same from one row per path.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import (
    check_length,
    relative_error,
    rounding_tolerance,
    shell_of,
    structural_reason,
    unwrapped,
)
from lbr_kernels.decoding.attention import LayerExtras, configs_of, own_attention_name, tree_forward
from lbr_kernels.decoding.cache import layer_window
from lbr_kernels.training.memory import out_of_memory
from lbr_kernels.training.packing import PackedTrees

Head = Callable[[Tensor], Tensor]
"""From rows of :attr:`PackedStates.body` ``[n, D]`` to their logits ``[n, V]``."""


@dataclass(frozen=True)
class PackedStates:
    """What a forward over N nodes gave.

    ``hidden [N, D]`` is what the output head receives, ``body [N, D']`` what ``head`` takes; the same for most models.
    """

    hidden: Tensor
    body: Tensor
    head: Head


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers: DDP, DeepSpeed, ``torch.compile``, PEFT."""
    adapters = [config for module in model.modules() for config in getattr(module, "peft_config", {}).values()]
    if any(config.is_prompt_learning for config in adapters):
        raise ValueError("trajectory_log_probs: model has learned prompts (PEFT), which trees cannot begin with")
    found = unwrapped(model, caller="trajectory_log_probs")
    if found.get_output_embeddings() is None:
        raise ValueError(f"trajectory_log_probs: {type(found).__name__} has no output head (get_output_embeddings)")
    return found


@dataclass
class PackedForward:
    """What the layers of one forward over packed trees share; see ``decoding.attention.AttendedForward``."""

    subtree_end: Tensor  # int32 [1, N]
    cu_seqlens: Tensor
    positions: Tensor  # int32 [1, N]
    windows: list[int | None]
    backend: str | None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, extras: LayerExtras) -> Tensor:
        """One layer's attention, all in the dtype that autocast or the least precise of the three asks for."""
        if extras.dropout:
            raise ValueError(
                f"trajectory_log_probs: the model trains with attention dropout {extras.dropout:g}, expected 0: under "
                "it a trajectory has no likelihood"
            )
        window = extras.window
        layer = getattr(module, "layer_idx", None)
        if window is None and layer is not None and layer < len(self.windows):
            window = self.windows[layer]  # some models say so in their masks alone
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
        else:
            dtype = min((query.dtype, key.dtype, value.dtype), key=lambda dtype: torch.finfo(dtype).bits)
        device = query.device  # layers may be spread over several
        out = ops.packed_tree_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), self.subtree_end.to(device),
            cu_seqlens=self.cu_seqlens.to(device), positions=None if window is None else self.positions.to(device),
            scale=extras.scale, window=window, softcap=extras.softcap, sinks=extras.sinks, backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out


def forward_packed(
    model: nn.Module, packed: PackedTrees, *, prompt_embeds: Tensor | None, backend: str | None
) -> PackedStates:
    """Run ``model`` once over all nodes of ``packed``, which are on its device.

    ``prompt_embeds [n, D]`` take the place of the prompts' tokens, in the order of the packs, where they are given.
    """
    inner = inner_model(model)
    forward = PackedForward(
        packed.subtree_end[None], packed.cu_seqlens, packed.positions[None].to(torch.int32), _windows(inner), backend
    )
    configs = configs_of(inner)

    def in_trees() -> AbstractContextManager[None]:
        return tree_forward(forward, configs)

    inputs = packed_inputs(inner, packed, prompt_embeds)
    with in_trees(), _recomputed(inner, in_trees):
        seen = _call(model, inner, inputs, position_ids=packed.positions[None])
    return replace(seen, hidden=seen.hidden[0], body=seen.body[0])


def forward_paths(
    model: nn.Module, packed: PackedTrees, *, prompt_embeds: Tensor | None, rows_each: int = 64
) -> PackedStates:
    """The same from plain forwards, a row of the batch for every leaf; for models that hold no tree.

    What stands behind the end of a path is seen by nobody, and needs no mask.
    """
    inner = inner_model(model)
    paths, lengths = _paths(packed)
    device = packed.tokens.device
    # Where each node is read: on the first path that leads through it.
    rows = torch.arange(len(paths), device=device)[:, None].expand(paths.shape)
    row_of = torch.full((len(packed),), len(paths), device=device)
    row_of.scatter_reduce_(0, paths[paths >= 0], rows[paths >= 0], "amin")
    inputs = packed_inputs(inner, packed, prompt_embeds)
    seen: list[PackedStates] = []
    for part, length in zip(paths.split(rows_each), lengths.split(rows_each), strict=True):
        part = part[:, : int(length.max())]
        index = part.clamp(min=0)
        seen.append(
            _call(
                model, inner, {name: value[0][index] for name, value in inputs.items()},
                position_ids=torch.arange(index.shape[1], device=device).expand(index.shape),
            )
        )  # fmt: skip
    hidden = _read([part.hidden for part in seen], row_of, packed.positions)
    return PackedStates(hidden, _read([part.body for part in seen], row_of, packed.positions), seen[-1].head)


def _read(parts: list[Tensor], row_of: Tensor, positions: Tensor) -> Tensor:
    """The states of all nodes, from the paths' ``[rows, length, D]``."""
    longest = max(part.shape[1] for part in parts)
    padded = [nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    return torch.cat(padded)[row_of, positions]


def _paths(packed: PackedTrees) -> tuple[Tensor, Tensor]:
    """Packed indices along every root-to-leaf path ``[leaves, longest]``, -1 behind its end; and the lengths."""
    N, device = len(packed), packed.tokens.device
    has_child = torch.zeros(N, dtype=torch.bool, device=device)
    has_child[packed.parents[packed.parents >= 0]] = True
    node = (~has_child).nonzero()[:, 0]
    lengths = packed.positions[node] + 1
    paths = torch.full((len(node), int(lengths.max())), -1, device=device)
    rows = torch.arange(len(node), device=device)
    while bool((node >= 0).any()):
        live = node >= 0
        paths[rows[live], packed.positions[node[live]]] = node[live]
        node = torch.where(live, packed.parents[node.clamp(min=0)], -1)
    return paths, lengths


def packed_inputs(inner: PreTrainedModel, packed: PackedTrees, prompt_embeds: Tensor | None) -> dict[str, Tensor]:
    """``input_ids`` or, with ``prompt_embeds``, ``inputs_embeds``: ``[1, N, ...]``."""
    if prompt_embeds is None:
        return {"input_ids": packed.tokens[None]}
    embeds = inner.get_input_embeddings()(packed.tokens)
    drawn = torch.zeros(len(packed), dtype=torch.bool, device=embeds.device)
    drawn[packed.node_index[packed.node_index >= 0]] = True
    return {"inputs_embeds": embeds.masked_scatter(~drawn[:, None], prompt_embeds.to(embeds))[None]}


def _call(model: nn.Module, inner: PreTrainedModel, inputs: dict[str, Tensor], **more: Tensor) -> PackedStates:
    """Call the model, the head seeing the first row only, and keep what came out of its body and into its head.

    States have the rows of the call in front, ``[B, n, D]``.
    """
    head: nn.Module = inner.get_output_embeddings()
    into_head: list[Tensor] = []
    out_of: dict[str, list[Any]] = {name: [] for name in _bodies(inner)}

    caller = threading.get_ident()  # a forward of the same model by another thread is not this one

    def before_head(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != caller:
            return None
        into_head.append(args[0])
        return (args[0][:1, :1], *args[1:])

    def after(seen: list[Any], _: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == caller:
            seen.append(output)

    handles = [head.register_forward_pre_hook(before_head)]
    try:
        for name, seen in out_of.items():
            handles.append(inner.get_submodule(name).register_forward_hook(functools.partial(after, seen)))
        logits = model(**inputs, **more, **_arguments(inner)).logits
    finally:
        for handle in handles:
            handle.remove()
    # The outermost module that the model's forward calls.
    body = next((name for name, seen in out_of.items() if len(seen) == 1), None)
    if len(into_head) != 1 or body is None:
        raise ValueError(
            f"trajectory_log_probs: {type(inner).__name__} calls its output head {len(into_head)} times per forward "
            f"and its body {' or '.join(str(len(seen)) for seen in out_of.values())} times, expected once each"
        )
    output = out_of[body][0]
    function = functools.partial(_logits, inner, body, type(output))
    _check_head(inner, function, output.last_hidden_state, logits)
    return PackedStates(into_head[0], output.last_hidden_state, function)


def _arguments(inner: PreTrainedModel) -> dict[str, Any]:
    arguments: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
        arguments["logits_to_keep"] = 0
    return arguments


def _bodies(inner: PreTrainedModel) -> list[str]:
    """Names of the modules that may be what the head stands behind, the outermost first."""
    candidates = (inner.base_model, inner.get_decoder())
    names = [name for name, module in inner.named_modules() if any(module is candidate for candidate in candidates)]
    return sorted((name for name in names if name), key=len)


class _Result(nn.Module):
    """In the place of a model's body: what the body gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the arguments are."""
        return self.output


def _logits(inner: PreTrainedModel, body: str, output_type: type, states: Tensor) -> Tensor:
    """``[n, V]`` for the body's ``[n, D]``, by the model's own forward.

    It runs on a shell of the model with another body, so that nobody who uses the model meanwhile sees a change.
    """
    *outer, name = body.split(".")
    part: nn.Module = _Result(output_type(last_hidden_state=states[None]))
    while outer:
        part = shell_of(inner.get_submodule(".".join(outer)), **{name: part})
        name = outer.pop()
    tokens = torch.zeros((1, len(states)), dtype=torch.int64, device=states.device)
    logits: Tensor = type(inner).forward(shell_of(inner, **{name: part}), input_ids=tokens, **_arguments(inner)).logits
    return logits[0]


_checked_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _check_head(inner: PreTrainedModel, head: Head, states: Tensor, logits: Tensor) -> None:
    """Once per model: the head as a function gives what the model's forward gave."""
    if inner in _checked_heads:
        return
    with torch.no_grad():
        again = head(states[0, :1].detach())
        error = relative_error(again, logits[0])
    if not error <= 1e-2:  # another function is off by more than what rounding to bf16 makes of one
        raise ValueError(
            f"trajectory_log_probs: the logits of {type(inner).__name__} are not a function of its body's result "
            f"(relative error {error:.1e})"
        )
    _checked_heads[inner] = True


@contextmanager
def _recomputed(inner: PreTrainedModel, in_trees: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Layers whose forward is run again in the backward pass find the same attention then."""

    def wrap(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def inside(*args: Any, **kwargs: Any) -> Any:
                with in_trees():
                    return function(*args, **kwargs)

            return checkpoint(inside, *args, **kwargs)

        return run

    # transformers' layers, and torch's CheckpointWrapper, which FSDP is used with.
    names = ("_gradient_checkpointing_func", "checkpoint_fn")
    found = [
        (module, name, module.__dict__[name])
        for module in inner.modules()
        for name in names
        if callable(module.__dict__.get(name))
    ]
    try:
        for module, name, function in found:
            module.__dict__[name] = wrap(function)
        yield
    finally:
        for module, name, function in found:
            module.__dict__[name] = function


def _windows(inner: PreTrainedModel) -> list[int | None]:
    text_config = inner.config.get_text_config(decoder=True)
    return [layer_window(layer) for layer in DynamicCache(config=text_config).layers]


# By what the outcome depends on; an obstacle is kept too, since it is said once.
_obstacles: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], str | None]] = WeakKeyDictionary()


def packing_obstacle(inner: PreTrainedModel) -> str | None:
    """Why packed trees are not exact on a model, None if they are: structure, then a small tree against its paths."""
    key = (inner.dtype, inner.device, *(own_attention_name(config) for config in configs_of(inner)))
    known = _obstacles.setdefault(inner, {})
    if key not in known:
        training = [module for module in inner.modules() if module.training]
        try:
            known[key] = _find_obstacle(inner.eval())
        finally:
            for module in training:
                module.training = True
    return known[key]


@torch.no_grad()
def _find_obstacle(inner: PreTrainedModel) -> str | None:
    inner = shell_of(inner)  # without the autocast that accelerate puts around a model's forward
    if (reason := structural_reason(inner)) is not None:
        return reason
    try:
        with torch.autocast(inner.device.type, enabled=False):
            packed = _small_tree(inner)
            allowed = rounding_tolerance(inner, packed.tokens[None, : check_length(inner)])
            in_trees = forward_packed(inner, packed, prompt_embeds=None, backend=None).hidden
            error = relative_error(in_trees, forward_paths(inner, packed, prompt_embeds=None).hidden)
    except Exception as error_:  # a model's own code can fail in any way, and each is a reason
        if out_of_memory(error_):
            raise  # which is not the model's doing
        return f"a forward over packed trees failed ({type(error_).__name__}: {error_})"
    if not error <= allowed:
        return f"packed trees differ from plain forwards: relative error {error:.1e}, where {allowed:.1e} is rounding"
    return None


def _small_tree(inner: PreTrainedModel) -> PackedTrees:
    """A prompt longer than the model's windows, where that is affordable, with branches beside and behind its trunk."""
    length = check_length(inner)
    # Two packs: [prompt, (a, b), c, (d), e] and [prompt's first half, f].
    sizes = (length + 5, length // 2 + 1)
    ends = torch.tensor([*[sizes[0]] * length, length + 2, length + 2, sizes[0], length + 4, sizes[0]])
    parents = torch.tensor([*range(-1, length - 1), length - 1, length, length - 1, length + 2, length + 2])
    ends = torch.cat([ends, torch.full((sizes[1],), sizes[1])])
    parents = torch.cat([parents, torch.tensor([-1, *range(sizes[0], sum(sizes) - 1)])])
    positions = torch.zeros_like(parents)
    for node, parent in enumerate(parents.tolist()):
        positions[node] = positions[parent] + 1 if parent >= 0 else 0
    vocabulary = inner.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (sum(sizes),), generator=torch.Generator().manual_seed(0))
    nothing = torch.empty((0, 0), dtype=torch.int64)
    return PackedTrees(
        tokens, positions, ends.to(torch.int32), torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32), parents,
        torch.zeros(2, dtype=torch.int64), nothing, nothing,
    ).to(inner.device)  # fmt: skip
