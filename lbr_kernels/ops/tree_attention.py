"""tree_attention: a tree's nodes attend to the committed prefix and to their ancestors.

Contract
--------
Row b sees slots ``[0, prefix_lens[b])`` of its cache and, of the tree's slots ``prefix_lens[b] + j``, those whose bit j
is set in its mask row (a node's own bit included). Slots that nobody sees are never read. The sum over all visible
slots runs in fp32; a processor's bf16 dot products take subnormal numbers for zero. ``window`` is measured in
positions, a node at depth d standing at ``prefix_lens[b] + d - 1``, so siblings share a position and a commit never
changes one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbr_kernels.ops import _preferences, _registry
from lbr_kernels.ops._checks import Axis, Checker, number


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_lens: Tensor,
    ancestors: Tensor,
    *,
    num_nodes: Tensor | None = None,
    scale: float | None = None,
    depths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last N nodes of each row's tree (paper, appendix A.3).

    Args:
        query: ``[B, Hq, N, D]``, fp32, fp16 or bf16; query n is node T - N + n. Any strides, last axis contiguous.
        key_cache: ``[B, Hk, S, D]``, Hq a multiple of Hk; query head h reads key head ``h // (Hq // Hk)``.
        value_cache: ``[B, Hk, S, Dv]``.
        prefix_lens: int32 ``[B]``, committed slots, at most S - T.
        ancestors: int64 ``[1 or B, T, ceil(T/64)]``, bit j of word ``j // 64``: node j is visible. Bits from T on are
            ignored.
        num_nodes: int32 ``[B]``, how many of a row's queries are real; the rest return zero. All by default.
        scale: multiplies query . key; ``D ** -0.5`` by default.
        depths: int32 ``[1 or B, T]``, 1 for a child of the prefix; by default the number of bits in a node's mask row.
        window: a key is visible if ``query position - key position < window``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: fp32 ``[Hq]``, one more score per head that has no value.
        alibi_slopes: fp32 ``[Hq]``, ``slope * (key position - query position)`` is added to the scores.
        return_lse: also return the log-sum-exp of the scores, sink included.
        validate: on a GPU, wait for it and check the values of ``prefix_lens`` and ``num_nodes`` before the call, as is
            always done on the CPU. Else a row whose value is bad returns NaN, and ``ops.raise_if_flagged`` raises.
        backend: see ``ops.backends()``. On a GPU ``"cuda"`` takes fp16 and bf16, head sizes that are multiples of 8 up
            to 256, and caches aligned to 16 bytes; ``"triton"`` any head size up to 256, also fp32.

    Returns:
        ``[B, Hq, N, Dv]`` in the query's dtype; with ``return_lse`` also fp32 ``[B, Hq, N]``, natural logarithm,
        -inf for a query that sees nothing (whose output is zero).

    Raises:
        RuntimeError: a shape, dtype, device, stride or value is not as above.
    """
    if validate and query.device.type != "cpu" and query.dim() == key_cache.dim() == 4 and ancestors.dim() == 3:
        _check_values(Checker("tree_attention"), query, key_cache, prefix_lens, ancestors, num_nodes)
    out, lse = _registry.call(
        "tree_attention", backend, query, query, key_cache, value_cache, prefix_lens, ancestors,
        num_nodes=num_nodes, scale=scale, depths=depths, window=window, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes, prefer=lambda: gpu_backends(query, key_cache, value_cache),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def gpu_backends(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> tuple[str, ...]:
    """The backends that take these tensors on a GPU, the fastest first; all empty where only the reference does."""
    if query.dim() != 4 or key_cache.dim() != 4 or value_cache.dim() != 4 or query.dtype == torch.float64:
        return ()
    head_size = max(query.shape[3], value_cache.shape[3])
    if head_size > 256 or value_cache.shape[3] == 0:
        return ()
    rows = query.shape[2] * query.shape[1] // max(key_cache.shape[1], 1)
    taken = _cuda_takes(query) and _cuda_takes(key_cache) and _cuda_takes(value_cache)
    if taken and head_size > 128:
        taken = _shared_memory(query.device) >= _WIDE_TILES_TAKE
    return tuple(name for name in _preferences.tree_attention(rows, head_size) if name != "cuda" or taken)


def _cuda_takes(tensor: Tensor) -> bool:
    """Whether rows of a tensor can be copied 16 bytes at a time."""
    steps: list[Any] = [step for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    steps += [tensor.shape[3], tensor.storage_offset()]
    aligned = torch.compiler.is_compiling() or tensor.data_ptr() % 16 == 0
    return tensor.dtype in (torch.float16, torch.bfloat16) and aligned and all(step % 8 == 0 for step in steps)


_WIDE_TILES_TAKE = 163 * 1024  # bytes of shared memory at most, for head sizes over 128


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the field
    return int(properties.shared_memory_per_block_optin)


def check_arguments(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_lens: Tensor,
    ancestors: Tensor,
    *,
    num_nodes: Tensor | None = None,
    scale: float | None = None,
    depths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """All that is refused but for values of tensors; in C++ that is csrc/tree_attention.h."""
    check = Checker("tree_attention")
    device = query.device
    check.shape("query", query, (Axis("B"), Axis("Hq"), Axis("N"), Axis("D")))
    check.floating("query", query)
    check.last_contiguous("query", query)
    B, Hq, N, D = query.shape
    check.device("key_cache", key_cache, device)
    check.shape("key_cache", key_cache, (Axis("B", B), Axis("Hk"), Axis("S"), Axis("D", D)))
    check.dtype("key_cache", key_cache, query.dtype)
    check.last_contiguous("key_cache", key_cache)
    _, Hk, S, _ = key_cache.shape
    check.device("value_cache", value_cache, device)
    check.shape("value_cache", value_cache, (Axis("B", B), Axis("Hk", Hk), Axis("S", S), Axis("Dv")))
    check.dtype("value_cache", value_cache, query.dtype)
    check.last_contiguous("value_cache", value_cache)
    check(Hk > 0 and Hq % Hk == 0, f"query has {Hq} heads, expected a multiple of key_cache's {Hk}")
    check(D > 0, f"query has head size {D}, expected at least 1")
    check.side_input("prefix_lens", prefix_lens, torch.int32, (Axis("B", B),), device)
    check.shape("ancestors", ancestors, (Axis("B", B, or_one=True), Axis("T"), Axis("W")))
    T = ancestors.shape[1]
    words = Axis("W", (T + 63) // 64)
    check.side_input("ancestors", ancestors, torch.int64, (Axis("B", B, or_one=True), Axis("T", T), words), device)
    check(N <= T, f"query has {N} nodes, expected at most the tree's {T}")
    check.side_input("num_nodes", num_nodes, torch.int32, (Axis("B", B),), device)
    check.side_input("depths", depths, torch.int32, (Axis("B", B, or_one=True), Axis("T", T)), device)
    check.side_input("sinks", sinks, torch.float32, (Axis("Hq", Hq),), device)
    check.side_input("alibi_slopes", alibi_slopes, torch.float32, (Axis("Hq", Hq),), device)
    check(window is None or window >= 1, f"window is {window}, expected an integer >= 1")
    check(softcap is None or softcap > 0, f"softcap is {number(softcap or 0.0)}, expected a number > 0")


def _check_values(
    check: Checker,
    query: Tensor,
    key_cache: Tensor,
    prefix_lens: Tensor,
    ancestors: Tensor,
    num_nodes: Tensor | None,
) -> None:
    S, T, N = key_cache.shape[2], ancestors.shape[1], query.shape[2]
    check.in_range("prefix_lens", prefix_lens, 0, S - T, f"0 <= length <= S - T = {S - T}")
    check.in_range("num_nodes", num_nodes, 0, N, f"0 <= count <= N = {N}")


@_registry.reference("tree_attention")
def tree_attention_ref(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_lens: Tensor,
    ancestors: Tensor,
    *,
    num_nodes: Tensor | None = None,
    scale: float | None = None,
    depths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: fp32 inside, fp64 for fp64 inputs."""
    check_arguments(
        query, key_cache, value_cache, prefix_lens, ancestors, num_nodes=num_nodes, depths=depths, window=window,
        softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    _check_values(Checker("tree_attention"), query, key_cache, prefix_lens, ancestors, num_nodes)
    device = query.device
    B, Hq, N, D = query.shape
    _, Hk, S, _ = key_cache.shape
    T = ancestors.shape[1]

    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if N == 0:
        return query.new_empty(B, Hq, 0, value_cache.shape[3]), query.new_empty(B, Hq, 0, dtype=dtype)
    node = torch.arange(T, device=device)
    sees_node = (ancestors[:, :, node // 64] >> (node % 64)) & 1 == 1  # [1 or B, T, T]
    depth = (sees_node.sum(-1) if depths is None else depths).expand(B, T).long()
    lens = prefix_lens.long()[:, None]

    # Every slot as either part of the prefix or a node of the tree.
    slot = torch.arange(S, device=device).expand(B, S)
    slot_node = (slot - lens).clamp(0, max(T - 1, 0))
    in_tree = (slot >= lens) & (slot < lens + T)
    visible = sees_node[:, T - N :].expand(B, N, T).gather(2, slot_node[:, None].expand(B, N, S)) & in_tree[:, None]
    visible = visible | (slot < lens)[:, None]
    query_position = lens + depth[:, T - N :] - 1
    key_position = torch.where(in_tree, lens + depth.gather(1, slot_node) - 1, slot)
    offset = key_position[:, None] - query_position[:, :, None]  # [B, N, S]
    if window is not None:
        visible = visible & (-offset < window)
    if num_nodes is not None:
        visible = visible & (torch.arange(N, device=device) < num_nodes[:, None])[:, :, None]

    # What nobody sees may hold anything, NaN included.
    read = visible.any(1)[:, None, :, None]
    keys = torch.where(read, key_cache, 0).to(dtype).repeat_interleave(Hq // Hk, dim=1)
    values = torch.where(read, value_cache, 0).to(dtype).repeat_interleave(Hq // Hk, dim=1)
    scores = query.to(dtype) @ keys.mT * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None].to(dtype) * offset[:, None]
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(B, Hq, N, 1)], dim=-1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])[..., :S]
    if num_nodes is not None:
        real = torch.arange(N, device=device) < num_nodes[:, None]
        weights = torch.where(real[:, None, :, None], weights, 0)
        lse = lse.masked_fill(~real[:, None], -torch.inf)
    return (weights @ values).to(query.dtype), lse.to(dtype)
