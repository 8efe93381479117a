"""packed_tree_attention: every node of a packed tree attends to its ancestors and itself; forward and backward.

Contract
--------
A tree lies in DFS pre-order, so that the subtree of node k is the run ``[k, subtree_end[k])`` and "q sees k" is
``k <= q < subtree_end[k]``: one integer per key is the whole mask. The prompt and the committed tokens are a chain with
short side branches; several rollouts behind one prompt are one tree; with ``cu_seqlens`` several trees lie one behind
the other, and indices count from the start of each. A key with ``subtree_end[k] <= k`` is seen by nobody and never
read; a query that sees nothing returns zero. Sums run in fp32. Forward and backward are deterministic.

Since the runs nest, what the queries ``[s, e)`` can see is the ancestors of node s and the nodes from s to e: kernels
read no more than that, however long the pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbr_kernels.ops import _registry
from lbr_kernels.ops._checks import Axis, Checker, has_values, number

OP = "packed_tree_attention"


def packed_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within packed trees, for training (paper, Eq. 1 in one pass).

    Args:
        query: ``[B, Hq, T, D]``, fp32, fp16 or bf16. Any strides, last axis contiguous.
        key: ``[B, Hk, T, D]``, Hq a multiple of Hk; query head h reads key head ``h // (Hq // Hk)``.
        value: ``[B, Hk, T, Dv]``.
        subtree_end: int32 ``[1 or B, T]``, one past the last node of a node's subtree, at most the length of its pack.
        cu_seqlens: int32 ``[N + 1]``, where each of N packs starts, ``0 ... T``; then B is 1.
        positions: int32 ``[1 or B, T]``, for ``window`` and ``alibi_slopes``; by default the number of a node's
            ancestors.
        scale: multiplies query . key; ``D ** -0.5`` by default.
        window: a key is visible if ``query position - key position < window``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: fp32 ``[Hq]``, one more score per head that has no value; it has a gradient too.
        alibi_slopes: fp32 ``[Hq]``, ``slope * (key position - query position)`` is added to the scores.
        return_lse: also return the log-sum-exp of the scores, sink included; it has no gradient.
        backend: see ``ops.backends()``. The gradient of a kernel is a kernel; only ``"reference"`` can be
            differentiated twice.

    Returns:
        ``[B, Hq, T, Dv]`` in the query's dtype, a view of ``[B, T, Hq, Dv]``; with ``return_lse`` also fp32
        ``[B, Hq, T]``, -inf for a query that sees nothing.

    Raises:
        RuntimeError: a shape, dtype, device, stride or (on the CPU) value is not as above.
    """
    if positions is None and (window is not None or alibi_slopes is not None):
        check_arguments(query, key, value, subtree_end, cu_seqlens, None, sinks)
        if query.device.type == "cpu":
            check_values(Checker(OP), subtree_end, cu_seqlens)
        positions = node_positions(subtree_end, cu_seqlens)
    out, lse = _registry.call(
        OP, backend, query, query, key, value, subtree_end, cu_seqlens, positions, sinks, alibi_slopes, scale, window,
        softcap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def node_positions(subtree_end: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The number of ancestors of every node, int32 of ``subtree_end``'s shape: positions that start at 0."""
    first, _ = _bounds(subtree_end, cu_seqlens)
    node = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    end = torch.maximum(first + subtree_end, node)  # a node that nobody sees is nobody's ancestor
    opened = torch.where(end > node, 1, 0).cumsum(1)
    closed = torch.zeros_like(opened).new_zeros(end.shape[0], end.shape[1] + 1)
    closed = closed.scatter_add_(1, end.long(), torch.where(end > node, 1, 0)).cumsum(1)[:, :-1]
    return (opened - closed - torch.where(end > node, 1, 0)).to(torch.int32)


def _bounds(subtree_end: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first index of every node's pack and of the one behind it, int64 ``[1, T]``."""
    T, device = subtree_end.shape[1], subtree_end.device
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, T], device=device)
    pack = torch.bucketize(torch.arange(T, device=device), cu_seqlens[1:].long(), right=True)
    starts = cu_seqlens.long()
    last = len(starts) - 2
    return starts[pack.clamp(max=last)][None], starts[(pack + 1).clamp(max=last + 1)][None]


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    *,
    op: str = OP,
) -> None:
    """All that is refused but for values of tensors; in C++ that is csrc/packed_tree_attention.h."""
    check = Checker(op)
    device = query.device
    check.shape("query", query, (Axis("B"), Axis("Hq"), Axis("T"), Axis("D")))
    check.floating("query", query)
    check.last_contiguous("query", query)
    B, Hq, T, D = query.shape
    check.device("key", key, device)
    check.shape("key", key, (Axis("B", B), Axis("Hk"), Axis("T", T), Axis("D", D)))
    check.dtype("key", key, query.dtype)
    check.last_contiguous("key", key)
    Hk = key.shape[1]
    check.device("value", value, device)
    check.shape("value", value, (Axis("B", B), Axis("Hk", Hk), Axis("T", T), Axis("Dv")))
    check.dtype("value", value, query.dtype)
    check.last_contiguous("value", value)
    check(Hk > 0 and Hq % Hk == 0, f"query has {Hq} heads, expected a multiple of key's {Hk}")
    check(D > 0, f"query has head size {D}, expected at least 1")
    check.side_input("subtree_end", subtree_end, torch.int32, (Axis("B", B, or_one=True), Axis("T", T)), device)
    check.side_input("cu_seqlens", cu_seqlens, torch.int32, (Axis("N + 1"),), device)
    if cu_seqlens is not None:
        check(B == 1, f"query has {B} rows, expected 1 with cu_seqlens")
        check(cu_seqlens.shape[0] >= 1, "cu_seqlens is empty, expected at least [0]")
    check.side_input("positions", positions, torch.int32, (Axis("B", B, or_one=True), Axis("T", T)), device)
    check.side_input("sinks", sinks, torch.float32, (Axis("Hq", Hq),), device)
    check.side_input("alibi_slopes", alibi_slopes, torch.float32, (Axis("Hq", Hq),), device)
    check(window is None or window >= 1, f"window is {window}, expected an integer >= 1")
    check(softcap is None or softcap > 0, f"softcap is {number(softcap or 0.0)}, expected a number > 0")
    check(
        positions is not None or (window is None and alibi_slopes is None),
        "positions is None, expected them where there is a window or alibi_slopes",
    )


def check_backward_arguments(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    *args: Any,
    op: str = f"{OP}_backward",
    **kwargs: Any,
) -> None:
    """The same for the gradient's op, which also takes what the forward gave and a gradient of its shape."""
    check_arguments(query, key, value, subtree_end, *args, op=op, **kwargs)
    check = Checker(op)
    B, Hq, T, _ = query.shape
    axes = (Axis("B", B), Axis("Hq", Hq), Axis("T", T))
    for name, tensor in (("grad", grad), ("out", out)):
        check.device(name, tensor, query.device)
        check.shape(name, tensor, (*axes, Axis("Dv", value.shape[3])))
        check.dtype(name, tensor, query.dtype)
        if tensor.numel():  # an empty one is contiguous in torch's eyes, whatever its strides
            check.last_contiguous(name, tensor)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    check.side_input("lse", lse, lse_dtype, axes, query.device)


def check_values(check: Checker, subtree_end: Tensor, cu_seqlens: Tensor | None) -> None:
    """The packs lie one behind the other, and no subtree leaves its own."""
    T = subtree_end.shape[1]
    if cu_seqlens is not None and has_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        ascending = all(a <= b for a, b in itertools.pairwise(bounds))
        check(
            bounds[0] == 0 and bounds[-1] == T and ascending,
            f"cu_seqlens is {bounds}, expected an ascending list from 0 to T = {T}",
        )
    if has_values(subtree_end):
        first, behind = _bounds(subtree_end, cu_seqlens)
        bad = ((subtree_end < 0) | (subtree_end > behind - first)).nonzero()
        if len(bad):
            b, k = bad[0].tolist()
            length = int((behind - first)[0, k])
            check(False, f"subtree_end[{b}, {k}] is {int(subtree_end[b, k])}, expected 0 <= end <= its pack's {length}")


@_registry.reference(OP, fake=lambda *args, **kwargs: _fake_forward(*args, **kwargs))
def packed_tree_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: fp32 inside, fp64 for fp64 inputs."""
    check_arguments(query, key, value, subtree_end, cu_seqlens, positions, sinks, alibi_slopes, scale, window, softcap)
    check_values(Checker(OP), subtree_end, cu_seqlens)
    group = query.shape[1] // key.shape[1]
    seen = _visible(subtree_end, cu_seqlens, positions, window)
    queries, keys, values = _read(seen, query, key, value)
    scores, _ = _scores(seen, queries, keys, positions, alibi_slopes, scale, softcap, group)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    largest = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:3], 1)
    largest = largest.masked_fill(largest.isinf(), 0)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + largest).squeeze(-1)
    out = (weights[..., : keys.shape[2]] / total.masked_fill(total == 0, 1)) @ values.repeat_interleave(group, dim=1)
    return _interleaved(out.to(query.dtype)), lse.detach()


def _visible(subtree_end: Tensor, cu_seqlens: Tensor | None, positions: Tensor | None, window: int | None) -> Tensor:
    """Whether a query sees a key, bool ``[1 or B, query, key]``."""
    first, _ = _bounds(subtree_end, cu_seqlens)  # [1, T]
    node = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    end = first + subtree_end  # [1 or B, T]
    visible = (node <= node[:, None]) & (node[:, None] < end[:, None, :])
    if window is not None:
        assert positions is not None
        visible = visible & (-_offsets(positions) < window)
    return visible


def _offsets(positions: Tensor) -> Tensor:
    """Key position - query position, int64 ``[1 or B, query, key]``: any window can be compared with it."""
    return positions[:, None, :].long() - positions[:, :, None].long()


def _read(visible: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values in the dtype of the sums, with zeros for what may hold anything, NaN included.

    These are keys that nobody sees, and queries that see nothing.
    """
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    sees, seen = visible.any(2)[:, None, :, None], visible.any(1)[:, None, :, None]
    return [torch.where(used, tensor, 0).to(dtype) for used, tensor in zip((sees, seen, seen), tensors, strict=True)]


def _scores(
    visible: Tensor,
    queries: Tensor,
    keys: Tensor,
    positions: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    group: int,
) -> tuple[Tensor, Tensor | float]:
    """Scores ``[B, Hq, query, key]``, -inf where nothing is seen, and their derivative by query . key."""
    scale = queries.shape[3] ** -0.5 if scale is None else scale
    scores = queries @ keys.repeat_interleave(group, dim=1).mT * scale
    slope: Tensor | float = scale
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, scale * (1 - bent * bent)
    if alibi_slopes is not None:
        assert positions is not None
        scores = scores + alibi_slopes[:, None, None].to(scores.dtype) * _offsets(positions)[:, None]
    return scores.masked_fill(~visible[:, None], -torch.inf), slope


def _interleaved(tensor: Tensor) -> Tensor:
    """The same ``[B, H, T, D]``, as a view of ``[B, T, H, D]``."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    check_arguments(query, key, value, *args, **kwargs)
    B, Hq, T, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(B, T, Hq, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(B, Hq, T, dtype=dtype)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward_arguments(grad, query, key, value, *args, **kwargs)

    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)

    return like(query), like(key), like(value)


@_registry.reference(f"{OP}_backward", fake=_fake_backward)
def packed_tree_attention_backward_ref(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``lse`` are what the forward gave, and serve the kernels."""
    check_backward_arguments(
        grad, query, key, value, out, lse, subtree_end, cu_seqlens, positions, sinks, alibi_slopes, scale, window,
        softcap,
    )  # fmt: skip
    check_values(Checker(f"{OP}_backward"), subtree_end, cu_seqlens)
    group = query.shape[1] // key.shape[1]
    visible = _visible(subtree_end, cu_seqlens, positions, window)
    queries, keys, values = _read(visible, query, key, value)
    scores, slope = _scores(visible, queries, keys, positions, alibi_slopes, scale, softcap, group)
    lse = torch.where(lse.isinf(), 0, lse)[..., None]
    weights = (scores - lse).exp()
    sees = visible.any(2)[:, None, :, None]
    grads, outs = (torch.where(sees, tensor, 0).to(queries.dtype) for tensor in (grad, out))
    change = grads @ values.repeat_interleave(group, dim=1).mT - (grads * outs).sum(-1, keepdim=True)
    score_grad = torch.where(visible[:, None], weights * change * slope, 0)
    query_grad = score_grad @ keys.repeat_interleave(group, dim=1)
    key_grad = (score_grad.mT @ queries).unflatten(1, (-1, group)).sum(2)
    value_grad = (weights.mT @ grads).unflatten(1, (-1, group)).sum(2)
    return (
        _interleaved(query_grad.to(query.dtype)),
        _interleaved(key_grad.to(key.dtype)),
        _interleaved(value_grad.to(value.dtype)),
    )


def register_gradient(op: str, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Make ``torch.ops.lbr_kernels.<op>`` differentiable; ``backward`` takes what the reference's takes."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None) -> None:
        query, key, value, subtree_end, cu_seqlens, positions, sinks, alibi_slopes, *ctx.settings = inputs
        out, lse = output
        ctx.keywords = keyword_only_inputs or {}
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, key, value, out, lse, subtree_end, cu_seqlens, positions, sinks, alibi_slopes)

    def gradient(ctx: Any, grad: Tensor, lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *rest = ctx.saved_tensors
        sinks = rest[3]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (grad, query, key, value)):
            raise RuntimeError(
                f"{OP}: the gradient of a kernel has none; backend 'reference' can be differentiated twice"
            )
        if grad.numel() == 0:
            grad = torch.empty_like(out)  # an empty tensor stays as it is under contiguous()
        elif grad.shape[-1] > 1 and grad.stride(-1) != 1:
            grad = grad.contiguous()
        grads = backward(grad, query, key, value, out, lse, *rest, *ctx.settings, **ctx.keywords)
        sinks_grad = None
        if sinks is not None and ctx.needs_input_grad[6]:
            # The sink's weight times what a value of zero would have changed.
            weight = torch.where(lse == -torch.inf, 0, (sinks[:, None] - lse).exp())
            sinks_grad = -(weight * (grad * out).sum(-1, dtype=lse.dtype)).sum((0, 2)).to(sinks.dtype)
        return (*grads, None, None, None, sinks_grad, None, None, None, None)

    torch.library.register_autograd(f"lbr_kernels::{op}", gradient, setup_context=setup, lib=_registry.LIBRARY)


register_gradient(OP, lambda *args, **kwargs: torch.ops.lbr_kernels.packed_tree_attention_backward(*args, **kwargs))
