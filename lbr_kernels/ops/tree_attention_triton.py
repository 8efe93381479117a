# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202 -- a kernel's arguments are pointers and numbers; the launch says which
"""tree_attention in Triton: one launch, the prefix split over programs, the parts merged by whoever finishes last.

Contract
--------
The op is the one of ``tree_attention.py``, for tensors on a CUDA device, head and value sizes from 1 to 256; arguments
are checked by the caller. Nothing is read on the host that lives on the device, so a call can be captured in a graph:
the grid comes from shapes and the device's number of multiprocessors, and every program finds its share of the keys
from its row's actual length. Results are deterministic, but the number of splits, and with it the order of the sums,
depends on the whole batch's shape. A row whose ``prefix_lens`` or ``num_nodes`` is out of range is not read: its output
and log-sum-exp are NaN, and ``flag``, where given, gets a bit of ``_flags``.

One compiled kernel serves one combination of: dtype; head size and value size; block sizes (:func:`block_sizes`: the
rows of a tile come in three sizes); which of ``num_nodes``, ``depths``, ``sinks``, ``alibi_slopes``, ``window``,
``softcap`` and ``flag`` are there; and whether query and caches, and each of their strides, are multiples of 16, which
is what makes loads wide. Batch, heads, ratio of heads, nodes, slots, splits and lengths are plain arguments.

How it goes
-----------
A tile's rows are the (query node, head of the group) pairs of one key head, node by node, so that keys and values are
read once for all of them, whatever the ratio. Its keys are the slots from the first that a window lets in to the tree's
last one, in blocks, and a block may hold the end of the prefix as well as nodes. Blocks that every row sees whole take
the short loop; the others, those with nodes and those that a window cuts, take the loop that looks at masks. Scores are
in units of ln 2, as in ``csrc/cpu/online_softmax.h``; a state is (top, total, sums): the largest score so far, the sum
of 2^(score - top), and of 2^(score - top) * value; the empty state is (-inf, 0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops._triton_softmax import LN2, LOG2E, absorb, adjusted, multiply, rescale, with_sink
from lbr_kernels.ops._triton_support import Launch, arrive, interpreting, multiprocessors_of, stride

MAX_HEAD_SIZE = 256
MAX_SPLITS = 128
# A split costs its part of the merge, so it should have some blocks to read.
MIN_BLOCKS_PER_SPLIT = 2

_MIN_BLOCKS_PER_SPLIT = tl.constexpr(MIN_BLOCKS_PER_SPLIT)


@triton.jit
def _count_bits(word):
    # Of a uint64; adds neighbours, then pairs, and so on.
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    word += word >> 8
    word += word >> 16
    word += word >> 32
    return (word & 127).to(tl.int32)


@triton.jit
def _depth(depths, mask_words, mask_stride, node, exists, T, WORDS: tl.constexpr):
    # Depths of a block of nodes: given, or the number of bits of a node's mask row, those from T on left out. Without a
    # loop over words: Triton would not pipeline the loop over keys in a kernel that has one.
    if depths is not None:
        return tl.load(depths + node, mask=exists, other=1)
    word = tl.arange(0, WORDS)
    inside = exists[:, None] & (word * 64 < T)[None, :]
    words = tl.load(mask_words + node.to(tl.int64)[:, None] * mask_stride + word[None, :], mask=inside, other=0)
    unused = tl.minimum(tl.maximum((word + 1) * 64 - T, 0), 63).to(tl.uint64)
    return tl.sum(_count_bits(words.to(tl.uint64, bitcast=True) << unused[None, :]), 1)


@triton.jit
def _bits_from(row_words, first, exists, W):
    # 32 bits of every row's mask from bit `first` on, which may be negative; bits outside the words are 0. As a block,
    # because the interpreter cannot combine a block's mask with a scalar's.
    first = first + tl.zeros_like(exists.to(tl.int32))
    word = first >> 6
    shift = (first & 63).to(tl.uint64)
    low = tl.load(row_words + word, mask=exists & (word >= 0) & (word < W), other=0).to(tl.uint64, bitcast=True)
    high = tl.load(row_words + word + 1, mask=exists & (word >= -1) & (word + 1 < W), other=0)
    # A shift by 64 is undefined, so two.
    bits = (low >> shift) | ((high.to(tl.uint64, bitcast=True) << 1) << (63 - shift))
    return (bits & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _bit(bits, column):
    return ((bits >> column.to(tl.uint32)) & 1) != 0


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _store_sums(out, index, columns, stored, exists, bad, sums, total, VALUE_SIZE: tl.constexpr):
    # Rows past num_nodes took part in the dot products, with whatever came of it; they return zero.
    result = sums * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    result = tl.where(exists[:, None], result, tl.where(bad, float("nan"), 0.0))
    tl.store(
        out + index[:, None] * VALUE_SIZE + columns[None, :],
        result.to(out.dtype.element_ty),
        mask=stored[:, None] & (columns < VALUE_SIZE)[None, :],
    )


@triton.jit
def _store_lse(lse, index, stored, exists, bad, top, total):
    empty = total == 0.0
    log_sum = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + index, tl.where(exists, log_sum, tl.where(bad, float("nan"), float("-inf"))), mask=stored)


@triton.jit(
    do_not_specialize=[
        "prefix_lens", "ancestors", "num_nodes", "depths", "sinks", "alibi_slopes", "flag", "lse", "counters",
        "mask_row_stride", "mask_node_stride", "depth_stride",
        "Hk", "group", "N", "S", "T", "tiles", "splits", "window",
    ]
)  # fmt: skip
def tree_attention_kernel(
    query,
    keys,
    values,
    prefix_lens,
    ancestors,
    num_nodes,  # or None
    depths,  # or None
    sinks,  # or None
    alibi_slopes,  # or None
    flag,  # or None
    out,  # [B, Hk * group, N, VALUE_SIZE], dense
    lse,  # [B, Hk * group, N], dense
    parts,  # per tile and split: sums [BLOCK_ROWS, VALUE_SIZE], then top and total [BLOCK_ROWS]
    counters,  # per tile: how many of its splits are done
    query_row_stride,
    query_head_stride,
    query_node_stride,
    key_row_stride,
    key_head_stride,
    key_slot_stride,
    value_row_stride,
    value_head_stride,
    value_slot_stride,
    mask_row_stride,
    mask_node_stride,
    depth_stride,
    Hk,
    group,
    N,
    S,
    T,
    tiles,
    splits,
    window,
    inner,  # >= 0: what a product is multiplied by: to a score in units of ln 2, or with a soft-cap to tanh's argument
    outer,  # soft-cap, in units of ln 2
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CUT_KEYS: tl.constexpr,  # keys of a block that needs masks, at most 32
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    MERGE_COLUMNS: tl.constexpr,  # of the values, that are merged at a time
    WORDS: tl.constexpr,  # of a mask row, rounded up to a power of two; 1 where nobody counts bits
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,  # in the interpreter, whose dot and rounding of bf16 are wrong
):
    """One split of one tile of one key head of one row."""
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    HAS_POSITIONS: tl.constexpr = HAS_WINDOW or HAS_ALIBI
    # Tiles are neighbours, so that they find each other's keys and values in the cache.
    pid = tl.program_id(0)
    tile = pid % tiles
    split = pid // tiles % splits
    head = pid // tiles // splits % Hk
    b = pid // tiles // splits // Hk

    length = tl.load(prefix_lens + b)
    real = N
    bad_length = (length < 0) | (length > S - T)
    bad = bad_length
    if num_nodes is not None:
        real = tl.load(num_nodes + b)
        bad = bad | (real < 0) | (real > N)
    if bad:
        length = 0
        real = 0
    b = b.to(tl.int64)

    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node = row // group
    exists = row < real * group
    mask_words = ancestors + b * mask_row_stride
    if depths is not None:
        depths += b * depth_stride

    # Blocks of this tile's keys, numbered from slot 0 on: from `lo` to `hi`, of which those in [whole_lo, whole_hi) are
    # seen whole by every row.
    lo = 0
    whole_lo = 0
    position = row
    if HAS_POSITIONS:
        position = length - 1 + _depth(depths, mask_words, mask_node_stride, T - N + node, exists, T, WORDS)
    if HAS_WINDOW:
        earliest = tl.min(tl.where(exists, position, 2147483647), 0)
        latest = tl.max(tl.where(exists, position, -2147483648), 0)
        lo = tl.minimum(tl.maximum(earliest - window + 1, 0), length) // BLOCK_KEYS
        whole_lo = (tl.maximum(latest - window + 1, 0) + BLOCK_KEYS - 1) // BLOCK_KEYS
    whole_hi = length // BLOCK_KEYS
    blocks = (length + T + BLOCK_KEYS - 1) // BLOCK_KEYS - lo
    if tile * BLOCK_ROWS >= real * group:
        blocks = 0
    # Splits are used as far as there is work for them. An empty tile is the first split's, too.
    used = tl.minimum(splits, tl.maximum(blocks // _MIN_BLOCKS_PER_SPLIT, 1))
    if split >= used:
        return
    share = blocks // used
    rest = blocks % used
    lo += split * share + tl.minimum(split, rest)
    hi = lo + share + (split < rest).to(tl.int32)
    whole_lo = tl.minimum(tl.maximum(whole_lo, lo), hi)
    whole_hi = tl.maximum(tl.minimum(whole_hi, hi), whole_lo)

    # 64-bit offsets: a cache can have more than 2^31 elements.
    in_head = tl.arange(0, BLOCK_HEAD)
    in_value = tl.arange(0, BLOCK_VALUE)
    column = tl.arange(0, BLOCK_KEYS)
    q_head = head * group + row % group
    query_at = query + b * query_row_stride + q_head.to(tl.int64) * query_head_stride
    query_at += node.to(tl.int64) * query_node_stride
    q = tl.load(query_at[:, None] + in_head[None, :], mask=exists[:, None] & (in_head < HEAD_SIZE)[None, :], other=0.0)
    keys += b * key_row_stride + head.to(tl.int64) * key_head_stride
    values += b * value_row_stride + head.to(tl.int64) * value_head_stride
    keys_at = keys + column.to(tl.int64)[:, None] * key_slot_stride + in_head[None, :]
    values_at = values + column.to(tl.int64)[:, None] * value_slot_stride + in_value[None, :]
    slope = tl.zeros([BLOCK_ROWS], tl.float32)
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + q_head, mask=exists, other=0.0) * LOG2E

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)

    for block in range(whole_lo, whole_hi):
        first = tl.cast(block, tl.int64) * BLOCK_KEYS
        if HEAD_SIZE == BLOCK_HEAD:
            k = tl.load(keys_at + first * key_slot_stride)
        else:
            k = tl.load(keys_at + first * key_slot_stride, mask=(in_head < HEAD_SIZE)[None, :], other=0.0)
        if VALUE_SIZE == BLOCK_VALUE:
            v = tl.load(values_at + first * value_slot_stride)
        else:
            v = tl.load(values_at + first * value_slot_stride, mask=(in_value < VALUE_SIZE)[None, :], other=0.0)
        products = multiply(q, k, UPCAST)
        if HAS_ALIBI or HAS_SOFTCAP:
            offset = (block * BLOCK_KEYS + column)[None, :] - position[:, None]
            scores = adjusted(products, offset, slope[:, None], inner, outer, HAS_ALIBI, HAS_SOFTCAP)[0]
            top, total, sums = absorb(scores, 1.0, v, top, total, sums, UPCAST)
        else:
            top, total, sums = absorb(products, inner, v, top, total, sums, UPCAST)

    # What is left of [lo, hi): before the whole blocks where a window cuts, and after them. In smaller blocks, since
    # masks take registers.
    cut_column = tl.arange(0, CUT_KEYS)
    cut_keys_at = keys + cut_column.to(tl.int64)[:, None] * key_slot_stride + in_head[None, :]
    cut_values_at = values + cut_column.to(tl.int64)[:, None] * value_slot_stride + in_value[None, :]
    cut_before = (whole_lo - lo) * (BLOCK_KEYS // CUT_KEYS)
    last_cut = tl.minimum(hi * BLOCK_KEYS, length + T) - whole_hi * BLOCK_KEYS
    cut_after = tl.maximum((last_cut + CUT_KEYS - 1) // CUT_KEYS, 0)
    for i in tl.range(0, cut_before + cut_after, num_stages=1):
        first_slot = lo * BLOCK_KEYS + i * CUT_KEYS
        if i >= cut_before:
            first_slot += (whole_hi - whole_lo) * BLOCK_KEYS
        slot = first_slot + cut_column
        tree_node = slot - length
        in_tree = (tree_node >= 0) & (tree_node < T)
        # 32 mask bits of every row, from the block's first slot on.
        bits = _bits_from(
            mask_words + (T - N + node).to(tl.int64) * mask_node_stride,
            first_slot - length,
            exists,
            (T + 63) // 64,
        )
        # What no row of the tile sees may hold NaN, which a weight of 0 would not silence.
        any_row = tl.reduce(bits, 0, _either) + tl.zeros([CUT_KEYS], tl.uint32)
        in_prefix = slot < length
        seen = in_prefix | (in_tree & _bit(any_row, cut_column))
        first = tl.cast(first_slot, tl.int64)
        k = tl.load(
            cut_keys_at + first * key_slot_stride, mask=seen[:, None] & (in_head < HEAD_SIZE)[None, :], other=0.0
        )
        products = multiply(q, k, UPCAST)
        visible = exists[:, None] & (in_prefix[None, :] | (in_tree[None, :] & _bit(bits[:, None], cut_column[None, :])))
        offset = tl.zeros([BLOCK_ROWS, CUT_KEYS], tl.int32)
        if HAS_POSITIONS:
            key_depth = _depth(depths, mask_words, mask_node_stride, tree_node, in_tree, T, WORDS)
            key_position = tl.where(in_tree, length - 1 + key_depth, slot)
            offset = key_position[None, :] - position[:, None]
        if HAS_WINDOW:
            visible = visible & (-offset < window)
        scores = adjusted(products, offset, slope[:, None], inner, outer, HAS_ALIBI, HAS_SOFTCAP)[0]
        scores = tl.where(visible, scores, float("-inf"))
        if HAS_WINDOW:
            # From the scores, whose layout this takes; `visible` would be computed in a second one.
            seen = tl.max((scores != float("-inf")).to(tl.int32), 0) != 0
        v = tl.load(
            cut_values_at + first * value_slot_stride, mask=seen[:, None] & (in_value < VALUE_SIZE)[None, :], other=0.0
        )
        top, total, sums = absorb(scores, 1.0, v, top, total, sums, UPCAST)

    sink = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + q_head, mask=exists, other=float("-inf")) * LOG2E
    index = (b * Hk * group + q_head) * N + node
    stored = row < N * group
    if used == 1:
        top, total, keep = with_sink(top, total, sink)
        _store_sums(out, index, in_value, stored, exists, bad, sums * keep[:, None], total, VALUE_SIZE)
        _store_lse(lse, index, stored, exists, bad, top, total)
        if flag is not None:
            tl.atomic_or(flag, tl.where(bad_length, 1, 2), mask=bad)
    else:
        # Everyone leaves a part, and who comes last puts them together, in their order whoever that is.
        tile_index = pid // tiles // splits * tiles.to(tl.int64) + tile
        size = BLOCK_ROWS * (VALUE_SIZE + 2)
        parts += tile_index * splits * size
        in_part = tl.arange(0, BLOCK_ROWS)
        tops_at = parts + BLOCK_ROWS * VALUE_SIZE + in_part
        mine = split * size
        tl.store(
            parts + mine + in_part[:, None] * VALUE_SIZE + in_value[None, :],
            sums,
            mask=exists[:, None] & (in_value < VALUE_SIZE)[None, :],
        )
        tl.store(tops_at + mine, top, mask=exists)
        tl.store(tops_at + mine + BLOCK_ROWS, total, mask=exists)
        if arrive(counters + tile_index, used):
            # Some columns at a time, so that several parts are under way in few registers. Loads are past the level-1
            # cache (.cg), and nothing here is read twice.
            for piece in tl.static_range(BLOCK_VALUE // MERGE_COLUMNS):
                columns = piece * MERGE_COLUMNS + tl.arange(0, MERGE_COLUMNS)
                sums_at = parts + in_part[:, None] * VALUE_SIZE + columns[None, :]
                there = exists[:, None] & (columns < VALUE_SIZE)[None, :]
                all_top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
                all_total = tl.zeros([BLOCK_ROWS], tl.float32)
                all_sums = tl.zeros([BLOCK_ROWS, MERGE_COLUMNS], tl.float32)
                for other in tl.range(0, used, loop_unroll_factor=4):
                    its = other * size
                    its_top = tl.load(tops_at + its, mask=exists, other=float("-inf"), cache_modifier=".cg")
                    its_total = tl.load(tops_at + its + BLOCK_ROWS, mask=exists, other=0.0, cache_modifier=".cg")
                    its_sums = tl.load(sums_at + its, mask=there, other=0.0, cache_modifier=".cg")
                    new_top = tl.maximum(all_top, its_top)
                    keep = rescale(all_top, new_top)
                    add = rescale(its_top, new_top)
                    all_total = all_total * keep + its_total * add
                    all_sums = all_sums * keep[:, None] + its_sums * add[:, None]
                    all_top = new_top
                all_top, all_total, keep = with_sink(all_top, all_total, sink)
                all_sums = all_sums * keep[:, None]
                _store_sums(out, index, columns, stored, exists, bad, all_sums, all_total, VALUE_SIZE)
                if piece == 0:
                    _store_lse(lse, index, stored, exists, bad, all_top, all_total)


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's tile, and what runs it."""

    rows: int
    keys: int
    cut_keys: int  # of a block that needs masks, at most 32
    warps: int
    stages: int  # depth of the pipeline that fetches keys and values
    resident: int  # programs on a multiprocessor at a time, as far as registers go

    @property
    def registers(self) -> int:
        """The most that a thread may have; left to itself, the assembler spills for the sake of more warps."""
        return min(65536 // (32 * self.warps * self.resident) // 8 * 8, 255)


def block_sizes(rows: int, head_size: int, value_size: int, dtype: torch.dtype, *, adjusted: bool) -> Blocks:
    """Block sizes for so many rows (nodes times heads in a group), chosen so that kernels do not spill.

    ``bench/triton_resources.py`` shows what they cost, and what the installed Triton makes of them. ``adjusted``:
    scores are more than scaled products.
    """
    width = triton.next_power_of_2(max(head_size, value_size))
    tile = min(max(triton.next_power_of_2(rows), 16), 64)
    if dtype == torch.float32:
        # Products of fp32 are not for the tensor cores, so all operands pass through registers.
        if width > 128:
            return Blocks(16, 16, 16, warps=8, stages=1, resident=1)
        return Blocks(16, 32, 16, warps=8, stages=2, resident=1)
    resident = 3 if tile == 16 and not adjusted else 2
    if width > 128:
        return Blocks(min(tile, 32), 32, 16, warps=4, stages=3, resident=resident)
    if width > 64 and tile == 64 and adjusted:
        return Blocks(tile, 64, 32, warps=8, stages=3, resident=1)
    return Blocks(tile, 64, 32, warps=4, stages=3, resident=resident)


def choose_splits(tiles: int, slots: int, block_keys: int, programs: int) -> int:
    """Into how many parts the keys of each of ``tiles`` tiles are split, on a device that runs ``programs`` at a time.

    The fewest that fill the device's last wave nearly as well as any number does.
    """
    most = min(slots // (block_keys * MIN_BLOCKS_PER_SPLIT), MAX_SPLITS)
    # More than two waves' worth of programs can only cost.
    most = max(min(most, 2 * programs // tiles), 1)
    efficiency = [tiles * n / (programs * -(-tiles * n // programs)) for n in range(1, most + 1)]
    return next(n for n, e in enumerate(efficiency, 1) if e >= 0.85 * max(efficiency))


def tree_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_lens: Tensor,
    ancestors: Tensor,
    **features: Any,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as :func:`lbr_kernels.ops.tree_attention` defines them.

    Shapes, dtypes and devices are the caller's to check.

    Args:
        features: the op's keyword arguments; and ``flag``, int32 ``[1]``: where a row's ``prefix_lens`` is out of range
            1 is or-ed into it, for ``num_nodes`` 2.

    Raises:
        RuntimeError: a head size or value size is larger than 256.
    """
    for name, tensor in (("query", query), ("value_cache", value_cache)):
        if tensor.shape[3] > MAX_HEAD_SIZE:
            raise RuntimeError(
                f"tree_attention: {name} has head size {tensor.shape[3]}, expected at most {MAX_HEAD_SIZE} for backend "
                "'triton'; the nearest accepted backend is 'reference'"
            )
    B, Hq, N, _ = query.shape
    out = query.new_empty(B, Hq, N, value_cache.shape[3])
    lse = query.new_empty(B, Hq, N, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    # The interpreter cannot round to bf16.
    target = out.float() if interpreting() else out
    call = launch(
        query, key_cache, value_cache, prefix_lens, ancestors, target, lse, **features,
        multiprocessors=multiprocessors_of(query.device),
    )  # fmt: skip
    call.run(query.device)
    return (out.copy_(target) if target is not out else out), lse


def launch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_lens: Tensor,
    ancestors: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    num_nodes: Tensor | None = None,
    scale: float | None = None,
    depths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    flag: Tensor | None = None,
    multiprocessors: int,
) -> Launch:
    """What the kernel is called with; memory for the parts of a split is allocated here.

    Tensors may be on the meta device, for compilation ahead of time.
    """
    B, Hq, N, D = query.shape
    _, Hk, S, Dv = value_cache.shape
    T = ancestors.shape[1]
    positions = window is not None or alibi_slopes is not None
    blocks = block_sizes(Hq // Hk * N, D, Dv, query.dtype, adjusted=positions or softcap is not None)
    tiles = -(-Hq // Hk * N // blocks.rows)
    all_tiles = B * Hk * tiles
    splits = choose_splits(all_tiles, S, blocks.keys, multiprocessors * blocks.resident)
    # Fresh memory in every call, which is what makes calls on several streams, and captured ones, independent.
    # The counters have to start at 0, which costs a node in a graph.
    parts = lse.new_empty(all_tiles * splits * blocks.rows * (Dv + 2) if splits > 1 else 0)
    counters = prefix_lens.new_zeros(all_tiles if splits > 1 else 0)
    scale = D**-0.5 if scale is None else scale
    if scale < 0:
        # So that the largest product is the largest score; in the kernel it would move the query into registers.
        query, scale = -query, -scale
    arguments: dict[str, Any] = {
        "query": query,
        "keys": key_cache,
        "values": value_cache,
        "prefix_lens": prefix_lens,
        "ancestors": ancestors,
        "num_nodes": num_nodes,
        "depths": depths if positions else None,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "flag": flag,
        "out": out,
        "lse": lse,
        "parts": parts,
        "counters": counters,
        "mask_row_stride": stride(ancestors, 0),
        "mask_node_stride": stride(ancestors, 1),
        "depth_stride": 0 if depths is None else stride(depths, 0),
        "Hk": Hk,
        "group": Hq // Hk,
        "N": N,
        "S": S,
        "T": T,
        "tiles": tiles,
        "splits": splits,
        # A larger one is none either, and would not fit into 32 bits.
        "window": min(window or 0, 1 << 30),
        "inner": scale * math.log2(math.e) if softcap is None else scale / softcap,
        "outer": 0.0 if softcap is None else softcap * math.log2(math.e),
        "HEAD_SIZE": D,
        "VALUE_SIZE": Dv,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_KEYS": blocks.keys,
        "CUT_KEYS": blocks.cut_keys,
        "BLOCK_HEAD": max(triton.next_power_of_2(D), 16),
        "BLOCK_VALUE": max(triton.next_power_of_2(Dv), 16),
        "MERGE_COLUMNS": min(max(triton.next_power_of_2(Dv), 16), 2048 // blocks.rows),
        "WORDS": triton.next_power_of_2(-(-T // 64)) if positions and depths is None else 1,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "UPCAST": interpreting() and query.dtype == torch.bfloat16,
    }
    for name, tensor, axis in (("query", query, "node"), ("key", key_cache, "slot"), ("value", value_cache, "slot")):
        for i, step in enumerate(("row", "head", axis)):
            arguments[f"{name}_{step}_stride"] = stride(tensor, i)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "maxnreg": blocks.registers}
    options["enable_fp_fusion"] = True  # later versions of Triton may no longer do so unasked
    return Launch(tree_attention_kernel, all_tiles * splits, arguments, options)
