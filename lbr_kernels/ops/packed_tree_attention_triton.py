# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202 -- a kernel's arguments are pointers and numbers; the launch says which
"""packed_tree_attention in Triton, forward and backward: blocks of keys in an order in which most can be left out.

Contract
--------
The op is the one of ``packed_tree_attention.py``, for tensors on a CUDA device, head and value sizes from 1 to 256;
arguments are checked by the caller. Nothing is read on the host that lives on the device, so calls can be captured. No
two programs write the same number and sums have one order: results are deterministic. A row of the batch with a value
that cannot be (see ``packed_tree_order_triton.py``) gets NaN everywhere, and ``flag``, where given, bit 128.

One compiled kernel serves one combination of: dtype; head size and value size; which of ``sinks``, ``alibi_slopes``,
``window`` and ``softcap`` are there; and whether tensors and each of their strides are multiples of 16. Batch, heads,
ratio of heads, nodes and lengths of lists are plain arguments.

How it goes
-----------
``packed_tree_order_triton.py`` orders the keys and lists, for every block, the blocks that it has to visit. A program
of the forward pass, or of the gradient of the queries, has a block of queries of one head, and visits blocks of keys:
first those that are seen whole, then those with masks. A program of the gradient of keys and values has a block of
ordered keys of one key head, and visits the blocks of queries of all its query heads. Rows of keys are fetched through
the order; a row lies in one piece. Late queries and early keys have the most to visit, so they come first.

Where there are few key heads the query heads of one are dealt to several programs, whose parts are added up afterwards.
Scores, and a state of the softmax, are those of ``_triton_softmax.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops._triton_softmax import LN2, LOG2E, absorb, adjusted, multiply, with_sink
from lbr_kernels.ops._triton_support import Launch, capability_of, interpreting, multiprocessors_of, stride
from lbr_kernels.ops.packed_tree_order_triton import Lists, Order, as_window, lists, order

MAX_HEAD_SIZE = 256
PROGRAMS = 8  # for each multiprocessor, below which the heads of a group are dealt to several


@triton.jit
def _tile(x, row, row_stride, column, there, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    # Rows of a matrix, zero where they are not there; 64-bit offsets.
    at = x + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & (column < SIZE)[None, :], other=0.0)
    if SIZE == BLOCK:
        return tl.load(at)
    return tl.load(at, mask=(column < SIZE)[None, :], other=0.0)


@triton.jit
def _keys_of(rows, ends, lists, width, i, count, column, CUT: tl.constexpr):
    # Which keys are the block that is visited as the i-th, and their ends. Found one block ahead: Triton would spend
    # a stage of its pipeline on fetching the rows from which the addresses of keys and values are made.
    place = tl.load(lists + (width - 1 - i if CUT else i), mask=i < count, other=0) + column
    row = tl.load(rows + place)
    return row, tl.load(ends + place) if CUT else row


@triton.jit
def _times(a, b, sums, UPCAST: tl.constexpr):
    # sums + a @ b, `a` rounded to what `b` is.
    if UPCAST:
        return tl.dot(a, b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, sums, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "positions", "sinks", "alibi_slopes", "rows", "ends", "counts", "lists", "list_counts", "lse",
        "position_stride", "B", "Hq", "group", "T", "space", "per_row", "blocks", "width", "window",
    ]
)  # fmt: skip
def forward_kernel(
    query,
    keys,
    values,
    positions,  # or None
    sinks,  # or None
    alibi_slopes,  # or None
    rows,
    ends,
    counts,
    lists,
    list_counts,
    out,  # [B, T, Hq, VALUE_SIZE], dense
    lse,  # [B, Hq, T], dense
    query_row_stride,
    query_head_stride,
    query_node_stride,
    key_row_stride,
    key_head_stride,
    key_node_stride,
    value_row_stride,
    value_head_stride,
    value_node_stride,
    position_stride,
    B,
    Hq,
    group,
    T,
    space,
    per_row,
    blocks,
    width,
    window,
    inner,  # >= 0: what a product is multiplied by: to a score in units of ln 2, or with a soft-cap to tanh's argument
    outer,  # soft-cap, in units of ln 2
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CUT_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,  # in the interpreter, whose dot and rounding of bf16 are wrong
):
    """A block of queries of one head."""
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    pid = tl.program_id(0)
    head = pid % Hq
    b = pid // Hq % B
    block = blocks - 1 - pid // Hq // B
    plan = b * per_row
    owner = plan * blocks + block
    b = b.to(tl.int64)
    in_head = tl.arange(0, BLOCK_HEAD)
    in_value = tl.arange(0, BLOCK_VALUE)
    column = tl.arange(0, BLOCK_KEYS)
    node = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    exists = node < T

    query += b * query_row_stride + head.to(tl.int64) * query_head_stride
    keys += b * key_row_stride + (head // group).to(tl.int64) * key_head_stride
    values += b * value_row_stride + (head // group).to(tl.int64) * value_head_stride
    rows += tl.cast(plan, tl.int64) * 2 * space
    ends += tl.cast(plan, tl.int64) * 2 * space
    lists += tl.cast(owner, tl.int64) * width
    q = _tile(query, node, query_node_stride, in_head, exists, HEAD_SIZE, BLOCK_HEAD, True)
    position = node
    if HAS_WINDOW or HAS_ALIBI:
        positions += b * position_stride
        position = tl.load(positions + node, mask=exists, other=0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head) * LOG2E

    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    sums = tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], tl.float32)
    for CUT in tl.static_range(2):
        count = tl.load(list_counts + owner * 2 + CUT)
        next_row, end = _keys_of(rows, ends, lists, width, 0, count, column, CUT)
        for i in tl.range(0, count, num_stages=CUT_STAGES if CUT else None):
            if CUT:
                row, end = _keys_of(rows, ends, lists, width, i, count, column, CUT)
            else:
                row = next_row
                next_row, end = _keys_of(rows, ends, lists, width, i + 1, count, column, CUT)
            there = end > 0
            k = _tile(keys, row, key_node_stride, in_head, there, HEAD_SIZE, BLOCK_HEAD, CUT)
            products = multiply(q, k, UPCAST)
            key_position = row
            if HAS_ALIBI or (HAS_WINDOW and CUT):
                key_position = tl.load(positions + row)
            if CUT or HAS_ALIBI or HAS_SOFTCAP:
                offset = key_position[None, :] - position[:, None]
                scores = adjusted(products, offset, slope, inner, outer, HAS_ALIBI, HAS_SOFTCAP)[0]
                if CUT:
                    visible = (row[None, :] <= node[:, None]) & (node[:, None] < end[None, :])
                    if HAS_WINDOW:
                        visible = visible & (-offset < window)
                    scores = tl.where(visible, scores, float("-inf"))
                v = _tile(values, row, value_node_stride, in_value, there, VALUE_SIZE, BLOCK_VALUE, CUT)
                top, total, sums = absorb(scores, 1.0, v, top, total, sums, UPCAST)
            else:
                v = _tile(values, row, value_node_stride, in_value, there, VALUE_SIZE, BLOCK_VALUE, CUT)
                top, total, sums = absorb(products, inner, v, top, total, sums, UPCAST)

    if sinks is not None:
        sink = tl.zeros([BLOCK_QUERIES], tl.float32) + tl.load(sinks + head) * LOG2E
        top, total, keep = with_sink(top, total, sink)
        sums *= keep[:, None]
    bad = tl.load(counts + plan * 4 + 2) != 0
    empty = total == 0.0
    result = sums * (1.0 / tl.where(empty, 1.0, total))[:, None]
    result = tl.where(bad, float("nan"), result)
    at = out + ((b * T + node) * Hq + head)[:, None] * VALUE_SIZE + in_value[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=exists[:, None] & (in_value < VALUE_SIZE)[None, :])
    log_sum = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + (b * Hq + head) * T + node, tl.where(bad, float("nan"), log_sum), mask=exists)


@triton.jit(
    do_not_specialize=[
        "positions", "alibi_slopes", "rows", "ends", "counts", "lists", "list_counts", "lse", "delta", "heights",
        "lse_row_stride", "lse_head_stride",
        "position_stride", "B", "Hq", "group", "T", "space", "per_row", "blocks", "width", "window",
    ]
)  # fmt: skip
def query_gradient_kernel(
    query,
    keys,
    values,
    grad,
    out,
    lse,
    positions,  # or None
    alibi_slopes,  # or None
    rows,
    ends,
    counts,
    lists,
    list_counts,
    query_grad,  # [B, T, Hq, HEAD_SIZE], dense
    delta,  # [B, Hq, T], dense: gradient times output; 0 for a query that sees nothing
    heights,  # [B, Hq, T], dense: lse in units of ln 2; inf for a query that sees nothing
    query_row_stride,
    query_head_stride,
    query_node_stride,
    key_row_stride,
    key_head_stride,
    key_node_stride,
    value_row_stride,
    value_head_stride,
    value_node_stride,
    grad_row_stride,
    grad_head_stride,
    grad_node_stride,
    out_row_stride,
    out_head_stride,
    out_node_stride,
    lse_row_stride,
    lse_head_stride,
    position_stride,
    B,
    Hq,
    group,
    T,
    space,
    per_row,
    blocks,
    width,
    window,
    inner,
    outer,
    scale,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CUT_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A block of queries of one head; it also leaves ``delta`` and ``heights`` for the gradient of keys and values."""
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    pid = tl.program_id(0)
    head = pid % Hq
    b = pid // Hq % B
    block = blocks - 1 - pid // Hq // B
    plan = b * per_row
    owner = plan * blocks + block
    b = b.to(tl.int64)
    in_head = tl.arange(0, BLOCK_HEAD)
    in_value = tl.arange(0, BLOCK_VALUE)
    column = tl.arange(0, BLOCK_KEYS)
    node = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    exists = node < T

    query += b * query_row_stride + head.to(tl.int64) * query_head_stride
    grad += b * grad_row_stride + head.to(tl.int64) * grad_head_stride
    out += b * out_row_stride + head.to(tl.int64) * out_head_stride
    keys += b * key_row_stride + (head // group).to(tl.int64) * key_head_stride
    values += b * value_row_stride + (head // group).to(tl.int64) * value_head_stride
    rows += tl.cast(plan, tl.int64) * 2 * space
    ends += tl.cast(plan, tl.int64) * 2 * space
    lists += tl.cast(owner, tl.int64) * width
    g = _tile(grad, node, grad_node_stride, in_value, exists, VALUE_SIZE, BLOCK_VALUE, True)
    o = _tile(out, node, out_node_stride, in_value, exists, VALUE_SIZE, BLOCK_VALUE, True)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    q = _tile(query, node, query_node_stride, in_head, exists, HEAD_SIZE, BLOCK_HEAD, True)
    log_sum = tl.load(lse + b * lse_row_stride + head * lse_head_stride + node, mask=exists, other=0.0) * LOG2E
    position = node
    if HAS_WINDOW or HAS_ALIBI:
        positions += b * position_stride
        position = tl.load(positions + node, mask=exists, other=0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head) * LOG2E

    sums = tl.zeros([BLOCK_QUERIES, BLOCK_HEAD], tl.float32)
    sees = tl.zeros([BLOCK_QUERIES], tl.int32) + (tl.load(list_counts + owner * 2) > 0).to(tl.int32)
    for CUT in tl.static_range(2):
        count = tl.load(list_counts + owner * 2 + CUT)
        next_row, end = _keys_of(rows, ends, lists, width, 0, count, column, CUT)
        for i in tl.range(0, count, num_stages=CUT_STAGES if CUT else None):
            if CUT:
                row, end = _keys_of(rows, ends, lists, width, i, count, column, CUT)
            else:
                row = next_row
                next_row, end = _keys_of(rows, ends, lists, width, i + 1, count, column, CUT)
            there = end > 0
            k = _tile(keys, row, key_node_stride, in_head, there, HEAD_SIZE, BLOCK_HEAD, CUT)
            v = _tile(values, row, value_node_stride, in_value, there, VALUE_SIZE, BLOCK_VALUE, CUT)
            key_position = row
            if HAS_ALIBI or (HAS_WINDOW and CUT):
                key_position = tl.load(positions + row)
            offset = key_position[None, :] - position[:, None]
            products = multiply(q, k, UPCAST)
            scores, slant = adjusted(products, offset, slope, inner, outer, HAS_ALIBI, HAS_SOFTCAP)
            weights = tl.exp2(scores - log_sum[:, None])
            change = weights * (multiply(g, v, UPCAST) - d[:, None])
            if HAS_SOFTCAP:
                change *= slant
            if CUT:
                visible = (row[None, :] <= node[:, None]) & (node[:, None] < end[None, :])
                if HAS_WINDOW:
                    visible = visible & (-offset < window)
                change = tl.where(visible, change, 0.0)
                sees = sees | tl.max(visible.to(tl.int32), 1)
            sums = _times(change, k, sums, UPCAST)

    at = (b * Hq + head) * T + node
    tl.store(heights + at, tl.where(sees != 0, log_sum, float("inf")), mask=exists)
    tl.store(delta + at, tl.where(sees != 0, d, 0.0), mask=exists)
    bad = tl.load(counts + plan * 4 + 2) != 0
    result = tl.where(bad, float("nan"), sums * scale)
    at = query_grad + ((b * T + node) * Hq + head)[:, None] * HEAD_SIZE + in_head[None, :]
    tl.store(at, result.to(query_grad.dtype.element_ty), mask=exists[:, None] & (in_head < HEAD_SIZE)[None, :])


@triton.jit(
    do_not_specialize=[
        "positions", "alibi_slopes", "rows", "ends", "counts", "lists", "list_counts", "delta", "heights",
        "position_stride", "B", "Hk", "group", "T", "space", "per_row", "blocks", "width", "window", "parts",
    ]
)  # fmt: skip
def key_value_gradient_kernel(
    query,
    keys,
    values,
    grad,
    delta,
    heights,
    positions,  # or None
    alibi_slopes,  # or None
    rows,
    ends,
    counts,
    lists,
    list_counts,
    key_grad,  # [parts, B, T, Hk, HEAD_SIZE], dense; zeros
    value_grad,  # [parts, B, T, Hk, VALUE_SIZE], dense; zeros
    query_row_stride,
    query_head_stride,
    query_node_stride,
    key_row_stride,
    key_head_stride,
    key_node_stride,
    value_row_stride,
    value_head_stride,
    value_node_stride,
    grad_row_stride,
    grad_head_stride,
    grad_node_stride,
    position_stride,
    B,
    Hk,
    group,
    T,
    space,
    per_row,
    blocks,
    width,
    window,
    parts,  # of a group
    inner,
    outer,
    scale,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CUT_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A block of ordered keys of one key head, for some of its query heads. Tiles are [keys, queries]."""
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    pid = tl.program_id(0)
    part = pid % parts
    head = pid // parts % Hk
    b = pid // parts // Hk % B
    block = pid // parts // Hk // B
    plan = b * per_row
    owner = plan * blocks + block
    long_blocks = (tl.load(counts + plan * 4) + BLOCK_KEYS - 1) // BLOCK_KEYS
    short_blocks = (tl.load(counts + plan * 4 + 1) + BLOCK_KEYS - 1) // BLOCK_KEYS
    bad = tl.load(counts + plan * 4 + 2) != 0
    if block >= long_blocks + short_blocks:
        return
    first = tl.where(block < long_blocks, block * BLOCK_KEYS, space + (block - long_blocks) * BLOCK_KEYS)
    b = b.to(tl.int64)
    in_head = tl.arange(0, BLOCK_HEAD)
    in_value = tl.arange(0, BLOCK_VALUE)
    column = tl.arange(0, BLOCK_QUERIES)

    place = tl.cast(plan, tl.int64) * 2 * space + first + tl.arange(0, BLOCK_KEYS)
    row = tl.load(rows + place)
    end = tl.load(ends + place)
    there = end > 0
    lists += tl.cast(owner, tl.int64) * width
    query += b * query_row_stride
    grad += b * grad_row_stride
    delta += b * Hk * group * T
    heights += b * Hk * group * T
    keys += b * key_row_stride + head.to(tl.int64) * key_head_stride
    values += b * value_row_stride + head.to(tl.int64) * value_head_stride
    k = _tile(keys, row, key_node_stride, in_head, there, HEAD_SIZE, BLOCK_HEAD, True)
    v = _tile(values, row, value_node_stride, in_value, there, VALUE_SIZE, BLOCK_VALUE, True)
    key_position = row
    if HAS_WINDOW or HAS_ALIBI:
        positions += b * position_stride
        key_position = tl.load(positions + row)

    key_sums = tl.zeros([BLOCK_KEYS, BLOCK_HEAD], tl.float32)
    value_sums = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for CUT in tl.static_range(2):
        count = tl.load(list_counts + owner * 2 + CUT)
        for i in tl.range(0, count * (group // parts), num_stages=CUT_STAGES if CUT else None):
            q_head = tl.cast(head * group + part * (group // parts) + i // count, tl.int64)
            j = i % count
            node = tl.load(lists + (width - 1 - j if CUT else j)) * BLOCK_QUERIES + column
            position = node
            if HAS_ALIBI or (HAS_WINDOW and CUT):
                position = tl.load(positions + node, mask=node < T, other=0)
            offset = key_position[:, None] - position[None, :]
            # A query that sees nothing may hold NaN, which a weight of 0 would not silence.
            height = tl.load(heights + q_head * T + node, mask=node < T, other=float("inf"))
            d = tl.load(delta + q_head * T + node, mask=node < T, other=0.0)
            sees = height != float("inf")
            q = _tile(
                query + q_head * query_head_stride, node, query_node_stride, in_head, sees, HEAD_SIZE, BLOCK_HEAD, CUT
            )
            g = _tile(
                grad + q_head * grad_head_stride, node, grad_node_stride, in_value, sees, VALUE_SIZE, BLOCK_VALUE, CUT
            )
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(alibi_slopes + q_head) * LOG2E
            products = multiply(k, q, UPCAST)
            scores, slant = adjusted(products, offset, slope, inner, outer, HAS_ALIBI, HAS_SOFTCAP)
            weights = tl.exp2(scores - height[None, :])
            if CUT:
                visible = (row[:, None] <= node[None, :]) & (node[None, :] < end[:, None])
                if HAS_WINDOW:
                    visible = visible & (-offset < window)
                weights = tl.where(visible, weights, 0.0)
            value_sums = _times(weights, g, value_sums, UPCAST)
            change = weights * (multiply(v, g, UPCAST) - d[None, :])
            if HAS_SOFTCAP:
                change *= slant
            key_sums = _times(change, q, key_sums, UPCAST)

    key_sums = tl.where(bad, float("nan"), key_sums * scale)
    value_sums = tl.where(bad, float("nan"), value_sums)
    at = ((part * B + b) * T + row) * Hk + head
    key_at = key_grad + at[:, None] * HEAD_SIZE + in_head[None, :]
    value_at = value_grad + at[:, None] * VALUE_SIZE + in_value[None, :]
    tl.store(key_at, key_sums.to(key_grad.dtype.element_ty), mask=there[:, None] & (in_head < HEAD_SIZE)[None, :])
    tl.store(
        value_at, value_sums.to(value_grad.dtype.element_ty), mask=there[:, None] & (in_value < VALUE_SIZE)[None, :]
    )


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's tile, and what runs it."""

    queries: int
    keys: int
    warps: int
    stages: int  # depth of the pipeline that fetches what is visited
    cut_stages: int = 2  # the same where there are masks, which take registers

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; fusing is said aloud, since later versions of Triton may no longer do so."""
        registers = min(65536 // (32 * self.warps) // 8 * 8, 255)
        return {
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers, "enable_fp_fusion": True,
        }  # fmt: skip


def block_sizes(kernel: str, width: int, dtype: torch.dtype, capability: int, *, adjusted: bool) -> Blocks:
    """Block sizes of ``"forward"``, ``"query_gradient"`` or ``"key_value_gradient"``, chosen so that nothing spills.

    ``width`` is the larger of head size and value size; ``capability`` is the GPU's, 80, 90 and so on: before 90 the
    operands of a product pass through registers. ``adjusted``: scores are more than scaled products.
    ``bench/triton_resources.py`` shows what they cost. What does spill: gradients in fp32 over head size 128, adjusted.
    """
    wide = 64 if width <= 64 else 128 if width <= 128 else 256
    if dtype == torch.float32:
        return _BLOCKS_FP32[kernel, wide]
    table = _BLOCKS_BEFORE_90 if capability < 90 else _BLOCKS_ADJUSTED if adjusted else _BLOCKS
    return table.get((kernel, wide), _BLOCKS[kernel, wide])


_BLOCKS = {
    ("forward", 64): Blocks(128, 64, warps=8, stages=3),
    ("forward", 128): Blocks(128, 64, warps=8, stages=3),
    ("forward", 256): Blocks(64, 32, warps=8, stages=2),
    ("query_gradient", 64): Blocks(128, 64, warps=8, stages=3),
    ("query_gradient", 128): Blocks(128, 64, warps=8, stages=2),
    ("query_gradient", 256): Blocks(64, 32, warps=8, stages=2),
    ("key_value_gradient", 64): Blocks(64, 128, warps=8, stages=3),
    ("key_value_gradient", 128): Blocks(64, 64, warps=8, stages=2),
    ("key_value_gradient", 256): Blocks(32, 32, warps=8, stages=1),
}
_BLOCKS_ADJUSTED = {
    ("query_gradient", 256): Blocks(32, 32, warps=8, stages=2),
    ("query_gradient", 64): Blocks(128, 32, warps=8, stages=2),
    ("query_gradient", 128): Blocks(128, 32, warps=8, stages=2),
    ("key_value_gradient", 64): Blocks(32, 64, warps=8, stages=2),
    ("key_value_gradient", 128): Blocks(32, 64, warps=8, stages=2),
}
_BLOCKS_BEFORE_90 = {
    ("forward", 64): Blocks(64, 64, warps=4, stages=3),
    ("query_gradient", 64): Blocks(64, 32, warps=4, stages=2),
    ("key_value_gradient", 64): Blocks(32, 64, warps=8, stages=2),
    ("forward", 128): Blocks(128, 32, warps=8, stages=3),
    ("query_gradient", 128): Blocks(64, 32, warps=8, stages=2),
    ("key_value_gradient", 128): Blocks(32, 64, warps=8, stages=2),
}
# Products of fp32 are not for the tensor cores, so all operands pass through registers.
_BLOCKS_FP32 = {
    ("forward", 64): Blocks(32, 32, warps=8, stages=2),
    ("forward", 128): Blocks(16, 32, warps=8, stages=2),
    ("forward", 256): Blocks(16, 16, warps=8, stages=1),
    ("query_gradient", 64): Blocks(32, 32, warps=8, stages=1),
    ("query_gradient", 128): Blocks(16, 32, warps=8, stages=1),
    ("query_gradient", 256): Blocks(16, 16, warps=8, stages=1),
    ("key_value_gradient", 64): Blocks(32, 32, warps=8, stages=1),
    ("key_value_gradient", 128): Blocks(16, 16, warps=8, stages=1),
    ("key_value_gradient", 256): Blocks(16, 16, warps=8, stages=1),
}


def choose_parts(programs: int, group: int, multiprocessors: int) -> int:
    """Among how many programs the query heads of a key head are dealt: the fewest that give all something to do."""
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    return next((parts for parts in divisors if programs * parts >= PROGRAMS * multiprocessors), group)


@dataclass(frozen=True)
class Call:
    """Launches in their order, and where the results are."""

    launches: dict[str, Launch]
    results: tuple[Tensor, ...]

    def run(self, device: torch.device) -> tuple[Tensor, ...]:
        """Start them on the current stream of ``device``."""
        for launch in self.launches.values():
            launch.run(device)
        return self.results


def packed_tree_attention_triton(
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
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as :func:`lbr_kernels.ops.packed_tree_attention` defines them.

    Shapes, dtypes and devices are the caller's to check. 128 is or-ed into ``flag``, int32 ``[1]``, where a value of
    ``subtree_end`` or ``cu_seqlens`` is out of range.

    Raises:
        RuntimeError: a head size or value size is larger than 256.
    """
    _check_sizes(query, value)
    B, Hq, T, _ = query.shape
    if B * Hq * T == 0:
        empty = query.new_empty(B, T, Hq, value.shape[3])
        return empty.transpose(1, 2), query.new_empty(B, Hq, T, dtype=torch.float32)
    call = forward(
        query, key, value, subtree_end, cu_seqlens, positions, sinks, alibi_slopes, scale, window, softcap, flag=flag,
        capability=capability_of(query.device),
    )  # fmt: skip
    out, lse = call.run(query.device)
    return out.to(query.dtype).transpose(1, 2), lse


def packed_tree_attention_backward_triton(
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
    *,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``lse`` are what the forward gave, sink included."""
    _check_sizes(query, value)
    B, Hq, T, _ = query.shape
    if B * Hq * T == 0:
        queries, keys, values = (t.new_zeros(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value))
        return queries, keys, values
    call = backward(
        grad, query, key, value, out, lse, subtree_end, cu_seqlens, positions, alibi_slopes, scale, window, softcap,
        flag=flag, capability=capability_of(query.device), multiprocessors=multiprocessors_of(query.device),
    )  # fmt: skip
    query_grad, key_grad, value_grad = call.run(query.device)
    # Parts are added up in fp32, in their order.
    key_grad, value_grad = (g[0] if len(g) == 1 else g.sum(0) for g in (key_grad, value_grad))
    queries, keys, values = (g.to(query.dtype).transpose(1, 2) for g in (query_grad, key_grad, value_grad))
    return queries, keys, values


def _check_sizes(query: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > MAX_HEAD_SIZE:
            raise RuntimeError(
                f"packed_tree_attention: {name} has head size {tensor.shape[3]}, expected at most {MAX_HEAD_SIZE} for "
                "backend 'triton'; the nearest accepted backend is 'reference'"
            )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor | None,
    positions: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    *,
    flag: Tensor | None,
    capability: int,
) -> Call:
    """The launches of a forward pass; results are ``[B, T, Hq, Dv]`` and ``[B, Hq, T]``.

    Tensors may be on the meta device, for compilation ahead of time.
    """
    B, Hq, T, D = query.shape
    Dv = value.shape[3]
    is_adjusted = _adjusted(alibi_slopes, window, softcap)
    sizes = block_sizes("forward", max(D, Dv), query.dtype, capability, adjusted=is_adjusted)
    keys = order(subtree_end, cu_seqlens, positions, window, flag)
    visited = lists(keys, sizes.queries, sizes.keys, by_query=True)
    out = query.new_empty(B, T, Hq, Dv, dtype=_stored(query.dtype))
    lse = query.new_empty(B, Hq, T, dtype=torch.float32)
    scale = D**-0.5 if scale is None else scale
    if scale < 0:
        # So that the largest product is the largest score; in the kernel it would move the query into registers.
        query, scale = -query, -scale
    arguments = {
        **_shared(query, key, value, positions, alibi_slopes, keys, visited, sizes, scale, window, softcap),
        "sinks": sinks,
        "out": out,
        "lse": lse,
        "Hq": Hq,
    }
    main = Launch(forward_kernel, visited.owners * B * Hq, arguments, sizes.options)
    return Call(_in_order(keys, [("lists", visited)]) | {"forward": main}, (out, lse))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    cu_seqlens: Tensor | None,
    positions: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    *,
    flag: Tensor | None,
    capability: int,
    multiprocessors: int,
) -> Call:
    """The launches of a backward pass; results are ``[B, T, Hq, D]``, and ``[parts, B, T, Hk, D or Dv]`` for keys."""
    B, Hq, T, D = query.shape
    Hk, Dv = value.shape[1], value.shape[3]
    scale = D**-0.5 if scale is None else scale
    is_adjusted = _adjusted(alibi_slopes, window, softcap)
    keys = order(subtree_end, cu_seqlens, positions, window, flag)
    delta, heights = (query.new_empty(B, Hq, T, dtype=torch.float32) for _ in range(2))

    sizes = block_sizes("query_gradient", max(D, Dv), query.dtype, capability, adjusted=is_adjusted)
    by_query = lists(keys, sizes.queries, sizes.keys, by_query=True)
    query_grad = query.new_empty(B, T, Hq, D, dtype=_stored(query.dtype))
    given = {"grad": grad, "delta": delta, "heights": heights, "scale": scale, **_strides("grad", grad)}
    arguments = {
        **_shared(query, key, value, positions, alibi_slopes, keys, by_query, sizes, scale, window, softcap),
        **given,
        **_strides("out", out),
        "out": out,
        "lse": lse,
        "lse_row_stride": stride(lse, 0),
        "lse_head_stride": stride(lse, 1),
        "query_grad": query_grad,
        "Hq": Hq,
    }
    of_queries = Launch(query_gradient_kernel, by_query.owners * B * Hq, arguments, sizes.options)

    sizes = block_sizes("key_value_gradient", max(D, Dv), query.dtype, capability, adjusted=is_adjusted)
    by_key = lists(keys, sizes.queries, sizes.keys, by_query=False)
    parts = choose_parts(by_key.owners * B * Hk, Hq // Hk, multiprocessors)
    stored = _stored(query.dtype) if parts == 1 else torch.float32
    key_grad = query.new_zeros(parts, B, T, Hk, D, dtype=stored)
    value_grad = query.new_zeros(parts, B, T, Hk, Dv, dtype=stored)
    arguments = {
        **_shared(query, key, value, positions, alibi_slopes, keys, by_key, sizes, scale, window, softcap),
        **given,
        "key_grad": key_grad,
        "value_grad": value_grad,
        "Hk": Hk,
        "parts": parts,
    }
    of_keys = Launch(key_value_gradient_kernel, by_key.owners * B * Hk * parts, arguments, sizes.options)
    before = _in_order(keys, [("lists by query", by_query), ("lists by key", by_key)])
    mains = {"query_gradient": of_queries, "key_value_gradient": of_keys}
    return Call(before | mains, (query_grad, key_grad, value_grad))


def _adjusted(alibi_slopes: Tensor | None, window: int | None, softcap: float | None) -> bool:
    """Whether scores are more than scaled products, or looked at together with positions."""
    return alibi_slopes is not None or window is not None or softcap is not None


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The interpreter cannot round to bf16."""
    return torch.float32 if interpreting() else dtype


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{step}_stride": stride(tensor, i) for i, step in enumerate(("row", "head", "node"))}


def _in_order(keys: Order, listed: Iterable[tuple[str, Lists]]) -> dict[str, Launch]:
    launches = {"order": keys.launch}
    for name, one in listed:
        launches |= {f"blocks of {name}": one.launches[0], name: one.launches[1]}
    return launches


def _shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    alibi_slopes: Tensor | None,
    keys: Order,
    visited: Lists,
    sizes: Blocks,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """The arguments that all three have."""
    B, Hq, T, D = query.shape
    Hk, Dv = value.shape[1], value.shape[3]
    has_positions = window is not None or alibi_slopes is not None
    return {
        "query": query,
        "keys": key,
        "values": value,
        "positions": positions if has_positions else None,
        "alibi_slopes": alibi_slopes,
        "rows": keys.rows,
        "ends": keys.ends,
        "counts": keys.counts,
        "lists": visited.blocks,
        "list_counts": visited.counts,
        **_strides("query", query),
        **_strides("key", key),
        **_strides("value", value),
        "position_stride": stride(positions, 0) if has_positions and positions is not None else 0,
        "B": B,
        "group": Hq // Hk,
        "T": T,
        "space": keys.space,
        "per_row": keys.per_row,
        "blocks": visited.owners,
        "width": visited.width,
        "window": as_window(window),
        "inner": scale * math.log2(math.e) if softcap is None else scale / softcap,
        "outer": 0.0 if softcap is None else softcap * math.log2(math.e),
        "HEAD_SIZE": D,
        "VALUE_SIZE": Dv,
        "BLOCK_QUERIES": sizes.queries,
        "BLOCK_KEYS": sizes.keys,
        "BLOCK_HEAD": max(triton.next_power_of_2(D), 16),
        "BLOCK_VALUE": max(triton.next_power_of_2(Dv), 16),
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "CUT_STAGES": sizes.cut_stages,
        "UPCAST": interpreting() and query.dtype == torch.bfloat16,
    }
