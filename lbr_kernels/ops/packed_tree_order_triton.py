# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201 -- a kernel's arguments are pointers and numbers; the launch says which
"""What the Triton kernels of packed_tree_attention read, found on the device: an order of the keys, lists of blocks.

Contract
--------
"q sees k" is ``k <= q < end[k]``. Ends are counted from the first node of all here and lie inside their own pack, which
makes several packs one forest that needs no further word. Nothing is read on the host, so all of it can be captured.

* The keys in an order (:func:`order_keys_kernel`): those that live long, ``end - k > LONG``, as they come; and, from
  place ``space`` on, those that live shortly, as they come. The committed tokens of a trajectory are every third or
  ninth node, with short side branches between them: as they come, a block of keys would nearly always hold a committed
  one, and nothing could be left out. In this order a block of short lives is seen by the few queries beside it, and a
  trajectory costs what its committed tokens cost. Keys that nobody sees are in no place. Places after the last of a
  kind hold row 0 with end 0.
* What blocks of ``BLOCK_KEYS`` places hold (:func:`describe_blocks_kernel`): first and last key, smallest and largest
  end, and likewise positions where there is a window.
* For every block of queries the blocks of keys that it has to visit, or the other way round
  (:func:`list_blocks_kernel`): those that all see whole from the left of a list's row, those with a mask from its
  right. A list is exact but for what no block can say: its block's smallest key and largest end stand for it.

A value that cannot be (``subtree_end`` outside of its pack, ``cu_seqlens`` that do not ascend from 0 to T) is clamped,
so that nothing out of bounds is ever read; it marks its row of ``counts``, and ``flag`` gets bit 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops._triton_support import Launch, stride

LONG = 128  # nodes that a key has to outlive to count as long-lived
MOST_BLOCK = 128  # places of a block are at most so many, and a power of two
FIELDS = 7  # of a block of keys: place, first, last, smallest end, largest end, smallest and largest position
BAD_VALUE = 128  # of _flags

_NONE_YET = tl.constexpr(2147483647)
_BAD_VALUE = tl.constexpr(BAD_VALUE)
_FIELDS = tl.constexpr(FIELDS)


@triton.jit(do_not_specialize=["cu_seqlens", "flag", "end_stride", "T", "packs", "steps", "space"])
def order_keys_kernel(
    subtree_end,
    cu_seqlens,  # or None
    flag,  # or None
    rows,  # [R, 2 * space]: which key stands in a place; zeros
    ends,  # [R, 2 * space]: one past the last query that sees it; zeros
    counts,  # [R, 4]: long-lived keys, short-lived ones, whether a value is bad
    end_stride,
    T,
    packs,
    steps,  # of a binary search among the packs
    space,
    LONG: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row of ``subtree_end``, from left to right."""
    r = tl.program_id(0)
    column = tl.arange(0, TILE)
    subtree_end += r * end_stride
    rows += tl.cast(r, tl.int64) * 2 * space
    ends += tl.cast(r, tl.int64) * 2 * space
    bad = tl.zeros([TILE], tl.int32)
    if cu_seqlens is not None:
        for first in range(0, packs, TILE):
            i = first + column
            low = tl.load(cu_seqlens + i, mask=i < packs, other=0)
            high = tl.load(cu_seqlens + 1 + i, mask=i < packs, other=0)
            bad |= (low > high).to(tl.int32)
        outside = (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + packs) != T)
        bad |= outside.to(tl.int32)
    longs = 0
    shorts = 0
    for first in range(0, T, TILE):
        k = first + column
        there = k < T
        end = tl.load(subtree_end + k, mask=there, other=0)
        start = tl.zeros([TILE], tl.int32)
        behind = start + T
        if cu_seqlens is not None:
            low = tl.zeros([TILE], tl.int32)
            high = low + packs
            for _ in range(steps):
                # The first pack that ends behind k.
                middle = (low + high) // 2
                searching = low < high
                bound = tl.load(cu_seqlens + 1 + middle, mask=searching, other=0)
                low = tl.where(searching & (bound <= k), middle + 1, low)
                high = tl.where(searching & (bound > k), middle, high)
            start = tl.load(cu_seqlens + low, mask=low < packs, other=0)
            behind = tl.load(cu_seqlens + 1 + low, mask=low < packs, other=0)
            behind = tl.minimum(tl.maximum(behind, 0), T)
            start = tl.minimum(tl.maximum(start, 0), behind)
        bad |= (there & ((end < 0) | (end > behind - start))).to(tl.int32)
        end = start + tl.minimum(tl.maximum(end, 0), behind - start)
        is_long = there & (end - k > LONG)
        is_short = there & (end > k) & (end - k <= LONG)
        place = longs + tl.cumsum(is_long.to(tl.int32), 0) - 1
        tl.store(rows + place, k, mask=is_long)
        tl.store(ends + place, end, mask=is_long)
        place = space + shorts + tl.cumsum(is_short.to(tl.int32), 0) - 1
        tl.store(rows + place, k, mask=is_short)
        tl.store(ends + place, end, mask=is_short)
        longs += tl.sum(is_long.to(tl.int32), 0)
        shorts += tl.sum(is_short.to(tl.int32), 0)
    any_bad = tl.max(bad, 0)
    tl.store(counts + r * 4, longs)
    tl.store(counts + r * 4 + 1, shorts)
    tl.store(counts + r * 4 + 2, any_bad)
    if flag is not None:
        tl.atomic_or(flag, _BAD_VALUE, mask=any_bad != 0)


@triton.jit(do_not_specialize=["positions", "position_stride", "T", "space", "key_blocks", "query_blocks", "tiles"])
def describe_blocks_kernel(
    positions,  # or None
    rows,
    ends,
    counts,
    of_keys,  # [R, FIELDS, key_blocks]
    of_queries,  # [R, 2, query_blocks], with a window only: smallest and largest position
    position_stride,
    T,
    space,
    key_blocks,
    query_blocks,
    tiles,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,  # that a program describes
    HAS_WINDOW: tl.constexpr,
):
    """Some blocks of one row."""
    r = tl.program_id(0) // tiles
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < key_blocks
    rows += tl.cast(r, tl.int64) * 2 * space
    ends += tl.cast(r, tl.int64) * 2 * space
    of_keys += tl.cast(r, tl.int64) * _FIELDS * key_blocks
    long_blocks = (tl.load(counts + r * 4) + BLOCK_KEYS - 1) // BLOCK_KEYS
    place = tl.where(block < long_blocks, block * BLOCK_KEYS, space + (block - long_blocks) * BLOCK_KEYS)
    inside = is_block & (place + BLOCK_KEYS <= 2 * space)
    at = place[:, None] + tl.arange(0, BLOCK_KEYS)[None, :]
    row = tl.load(rows + at, mask=inside[:, None], other=0)
    end = tl.load(ends + at, mask=inside[:, None], other=0)
    is_key = end > 0
    tl.store(of_keys + block, place, mask=is_block)
    tl.store(of_keys + key_blocks + block, tl.min(tl.where(is_key, row, _NONE_YET), 1), mask=is_block)
    tl.store(of_keys + 2 * key_blocks + block, tl.max(row, 1), mask=is_block)
    tl.store(of_keys + 3 * key_blocks + block, tl.min(end, 1), mask=is_block)
    tl.store(of_keys + 4 * key_blocks + block, tl.max(end, 1), mask=is_block)
    if HAS_WINDOW:
        positions += r * position_stride
        position = tl.load(positions + row, mask=is_key, other=0)
        tl.store(of_keys + 5 * key_blocks + block, tl.min(tl.where(is_key, position, _NONE_YET), 1), mask=is_block)
        tl.store(of_keys + 6 * key_blocks + block, tl.max(tl.where(is_key, position, -_NONE_YET), 1), mask=is_block)
        is_block = block < query_blocks
        of_queries += tl.cast(r, tl.int64) * 2 * query_blocks
        node = block[:, None] * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)[None, :]
        position = tl.load(positions + node, mask=node < T, other=0)
        tl.store(of_queries + block, tl.min(tl.where(node < T, position, _NONE_YET), 1), mask=is_block)
        largest = tl.max(tl.where(node < T, position, -_NONE_YET), 1)
        tl.store(of_queries + query_blocks + block, largest, mask=is_block)


@triton.jit(do_not_specialize=["T", "key_blocks", "query_blocks", "window"])
def list_blocks_kernel(
    of_keys,
    of_queries,
    counts,
    lists,  # by query: [R, query_blocks, key_blocks] of places; else [R, key_blocks, query_blocks] of blocks
    list_counts,  # [R, query_blocks or key_blocks, 2]: seen whole, and the others
    T,
    key_blocks,
    query_blocks,
    window,
    BY_QUERY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The list of one block."""
    owners = query_blocks if BY_QUERY else key_blocks
    width = key_blocks if BY_QUERY else query_blocks
    owner = tl.program_id(0) % owners
    r = tl.program_id(0) // owners
    lists += tl.cast(tl.program_id(0), tl.int64) * width
    of_keys += tl.cast(r, tl.int64) * _FIELDS * key_blocks
    of_queries += tl.cast(r, tl.int64) * 2 * query_blocks
    used = (tl.load(counts + r * 4) + BLOCK_KEYS - 1) // BLOCK_KEYS
    used += (tl.load(counts + r * 4 + 1) + BLOCK_KEYS - 1) // BLOCK_KEYS
    scanned = used if BY_QUERY else query_blocks
    if not BY_QUERY:
        scanned = tl.where(owner < used, scanned, 0)
    wholes = 0
    cuts = 0
    for first in range(0, scanned, TILE):
        other = first + tl.arange(0, TILE)
        there = other < scanned
        fixed = tl.zeros([TILE], tl.int32) + owner
        query_block = fixed if BY_QUERY else other
        key_block = other if BY_QUERY else fixed
        start = query_block * BLOCK_QUERIES
        stop = tl.minimum(start + BLOCK_QUERIES, T)
        at = of_keys + key_block
        first_key = tl.load(at + key_blocks, mask=there, other=0)
        last_key = tl.load(at + 2 * key_blocks, mask=there, other=0)
        least_end = tl.load(at + 3 * key_blocks, mask=there, other=0)
        most_end = tl.load(at + 4 * key_blocks, mask=there, other=0)
        touched = there & (first_key < stop) & (most_end > start)
        # A block of queries that is not full always takes the masks.
        whole = (last_key <= start) & (least_end >= stop) & (start + BLOCK_QUERIES <= T)
        if HAS_WINDOW:
            least_key = tl.load(at + 5 * key_blocks, mask=there, other=0)
            most_key = tl.load(at + 6 * key_blocks, mask=there, other=0)
            least_query = tl.load(of_queries + query_block, mask=there, other=0)
            most_query = tl.load(of_queries + query_blocks + query_block, mask=there, other=0)
            touched = touched & (least_query - most_key < window)
            whole = whole & (most_query - least_key < window)
        found = tl.load(at, mask=there, other=0) if BY_QUERY else other
        left = touched & whole
        right = touched & (whole == 0)
        tl.store(lists + wholes + tl.cumsum(left.to(tl.int32), 0) - 1, found, mask=left)
        tl.store(lists + width - cuts - tl.cumsum(right.to(tl.int32), 0), found, mask=right)
        wholes += tl.sum(left.to(tl.int32), 0)
        cuts += tl.sum(right.to(tl.int32), 0)
    tl.store(list_counts + tl.program_id(0) * 2, wholes)
    tl.store(list_counts + tl.program_id(0) * 2 + 1, cuts)


@dataclass(frozen=True)
class Order:
    """The keys in their order, and the launch that finds it."""

    rows: Tensor
    ends: Tensor
    counts: Tensor
    positions: Tensor | None
    T: int
    space: int
    window: int | None
    launch: Launch

    @property
    def per_row(self) -> int:
        """1 where the rows of a batch differ, else 0."""
        return int(len(self.counts) > 1)


@dataclass(frozen=True)
class Lists:
    """What every block has to visit, and the launches that find it, after the order's."""

    blocks: Tensor
    counts: Tensor
    owners: int
    width: int
    launches: tuple[Launch, ...]


def order(
    subtree_end: Tensor, cu_seqlens: Tensor | None, positions: Tensor | None, window: int | None, flag: Tensor | None
) -> Order:
    """Memory for the order of the keys. Tensors may be on the meta device."""
    T = subtree_end.shape[1]
    # Positions decide about blocks where there is a window.
    R = max(len(subtree_end), len(positions) if positions is not None and window is not None else 1)
    space = -(-T // MOST_BLOCK) * MOST_BLOCK
    rows, ends = subtree_end.new_zeros(2, R, 2 * space).unbind()
    counts = subtree_end.new_empty(R, 4)
    packs = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    arguments = {
        "subtree_end": subtree_end,
        "cu_seqlens": cu_seqlens,
        "flag": flag,
        "rows": rows,
        "ends": ends,
        "counts": counts,
        "end_stride": stride(subtree_end, 0),
        "T": T,
        "packs": packs,
        "steps": packs.bit_length(),
        "space": space,
        "LONG": LONG,
        "TILE": min(max(triton.next_power_of_2(T), 16), 2048),
    }
    launch = Launch(order_keys_kernel, R, arguments, {"num_warps": 8})
    return Order(rows, ends, counts, positions, T, space, window, launch)


def lists(keys: Order, block_queries: int, block_keys: int, *, by_query: bool) -> Lists:
    """Memory for the lists of all blocks of queries, else of keys."""
    R, T = len(keys.counts), keys.T
    query_blocks = -(-T // block_queries)
    key_blocks = -(-T // block_keys) + 1  # one of each kind need not be full
    owners, width = (query_blocks, key_blocks) if by_query else (key_blocks, query_blocks)
    has_window = keys.window is not None
    of_keys = keys.counts.new_empty(R, FIELDS, key_blocks)
    of_queries = keys.counts.new_empty(R if has_window else 0, 2, query_blocks)
    blocks = keys.counts.new_empty(R, owners, width)
    counts = keys.counts.new_empty(R, owners, 2)
    described = 2048 // max(block_keys, block_queries)  # blocks, by a program
    tiles = -(-max(key_blocks, query_blocks) // described)
    shared: dict[str, Any] = {
        "of_keys": of_keys,
        "of_queries": of_queries,
        "counts": keys.counts,
        "T": T,
        "key_blocks": key_blocks,
        "query_blocks": query_blocks,
        "HAS_WINDOW": has_window,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_KEYS": block_keys,
    }
    describe = {
        **shared,
        "positions": keys.positions if has_window else None,
        "rows": keys.rows,
        "ends": keys.ends,
        "position_stride": stride(keys.positions, 0) if keys.positions is not None else 0,
        "space": keys.space,
        "tiles": tiles,
        "BLOCKS": described,
    }
    list_them = {
        **shared,
        "lists": blocks,
        "list_counts": counts,
        "window": as_window(keys.window),
        "BY_QUERY": by_query,
        "TILE": min(max(triton.next_power_of_2(width), 16), 512),
    }
    launches = (
        Launch(describe_blocks_kernel, R * tiles, describe, {"num_warps": 4}),
        Launch(list_blocks_kernel, R * owners, list_them, {"num_warps": 4}),
    )
    return Lists(blocks, counts, owners, width, launches)


def as_window(window: int | None) -> int:
    """A larger one is none either, and would not fit into 32 bits."""
    return min(window or 0, 1 << 30)
