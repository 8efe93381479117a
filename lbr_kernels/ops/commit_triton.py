# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201 -- a kernel's arguments are pointers and numbers; the launch says which
"""commit_ in Triton: one launch moves the survivors of all caches, in place, and advances the lengths.

Contract
--------
The op is the one of ``commit.py``, for tensors on a CUDA device; shapes, dtypes and strides are checked by the caller.
Nothing is read on the host that lives on the device, and all that describes the caches travels by value, so a call can
be captured in a graph. A row with a value that cannot be (see ``commit_ref_``) stays as it was, length included, and
``flag``, where given, gets bit 4 of ``_flags``.

How it goes
-----------
Bits are copied, in the widest units that fit all caches, so one compiled kernel serves all dtypes of a size. A program
owns a column: one row, one cache, one head, one piece of the head size; it reads and writes nothing else of the caches.
It walks its moves upwards, some at a time: all loads of a batch, a barrier, all stores. That cannot go wrong: sources
ascend strictly from 0 on, so ``sources[i] >= i``, and a later batch reads only slots above all that earlier ones wrote;
what a batch writes it, and those before it, have read by the barrier. Columns do not touch, caches being apart.

Every program reads its row's length, so that may change only after the last of them has: whoever arrives last of a
row's programs advances it. Their counters are the stream's own and are left at zero.

The caches are a tuple of pointers, an argument each: compiled kernels differ by the number of caches, and by the number
of their layouts (heads, head size, strides), by which the caches are ordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops._triton_support import Launch, arrive, counters, stride

MOST_UNITS = 512  # that a program has under way
WIDEST_PIECE = 128  # units of one slot

_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_NO_CACHE = 1 << 62  # slots where there is no cache to lie in


@triton.jit(
    do_not_specialize=[
        "caches", "prefix_lens", "sources", "num_moves", "row_advance", "flag", "counters",
        "first_columns", "first_caches", "heads", "pieces", "units", "row_strides", "head_strides", "slot_strides",
        "prefix_stride", "sources_stride", "advance", "M", "slots", "columns",
    ]
)  # fmt: skip
def commit_kernel(
    caches,  # tuple of pointers to units, in the order of their layouts
    prefix_lens,
    sources,
    num_moves,  # or None
    row_advance,  # or None
    flag,  # or None
    counters,  # per row: how many of its programs are done
    first_columns,  # tuples, one element per layout: the first of its columns and of its caches
    first_caches,
    heads,
    pieces,  # of a head size
    units,  # of a head size
    row_strides,  # in units
    head_strides,
    slot_strides,
    prefix_stride,
    sources_stride,
    advance,
    M,
    slots,  # of the shortest cache
    columns,  # of a row, at least 1
    PIECE: tl.constexpr,
    MOVES: tl.constexpr,  # in a batch
    CHECKED: tl.constexpr,  # sources that are looked at at a time
    UNIT: tl.constexpr,  # bytes
    ALIGNED: tl.constexpr,  # units: what all addresses and strides are multiples of
):
    """One column of one row."""
    pid = tl.program_id(0)
    b = pid // columns
    column = pid % columns
    prefix_lens += b.to(tl.int64) * prefix_stride
    sources += b.to(tl.int64) * sources_stride
    length = tl.load(prefix_lens)
    moves = M
    if num_moves is not None:
        moves = tl.load(num_moves + b)
    if moves == 0:
        return
    step = advance
    if row_advance is not None:
        step = tl.load(row_advance + b)

    bad = (moves < 0) | (moves > M) | (length < 0) | (step < 0) | (step > moves)
    wrong = tl.zeros([CHECKED], tl.int32)
    for first in range(0, tl.where(bad, 0, moves), CHECKED):
        move = first + tl.arange(0, CHECKED)
        there = move < moves
        source = tl.load(sources + move, mask=there, other=0)
        before = tl.load(sources + move - 1, mask=there & (move > 0), other=-1)
        outside = source.to(tl.int64) + length >= slots
        wrong = wrong | (there & ((source <= before) | outside)).to(tl.int32)
    if bad | (tl.max(wrong, 0) != 0):
        if flag is not None:
            tl.atomic_or(flag, 4, mask=column == 0)
        return

    base = caches[0]
    layout_column = tl.zeros_like(column)
    cache = tl.zeros_like(column)
    layout_heads = tl.zeros_like(column)
    layout_pieces = tl.zeros_like(column)
    layout_units = tl.zeros_like(column)
    row_stride = tl.zeros_like(column).to(tl.int64)
    head_stride = tl.zeros_like(column).to(tl.int64)
    slot_stride = tl.zeros_like(column).to(tl.int64)
    for i in tl.static_range(len(heads)):
        here = column >= first_columns[i]
        layout_column = tl.where(here, first_columns[i], layout_column)
        cache = tl.where(here, first_caches[i], cache)
        layout_heads = tl.where(here, heads[i], layout_heads)
        layout_pieces = tl.where(here, pieces[i], layout_pieces)
        layout_units = tl.where(here, units[i], layout_units)
        row_stride = tl.where(here, row_strides[i], row_stride)
        head_stride = tl.where(here, head_strides[i], head_stride)
        slot_stride = tl.where(here, slot_strides[i], slot_stride)
    in_layout = column - layout_column
    piece = in_layout % layout_pieces
    head = in_layout // layout_pieces % layout_heads
    cache += in_layout // layout_pieces // layout_heads
    for i in tl.static_range(len(caches)):
        base = tl.where(cache == i, caches[i], base)

    row_stride = tl.multiple_of(row_stride, ALIGNED)
    head_stride = tl.multiple_of(head_stride, ALIGNED)
    slot_stride = tl.multiple_of(slot_stride, ALIGNED)
    base = tl.multiple_of(base, ALIGNED * UNIT)
    tree = base + b.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + length.to(tl.int64) * slot_stride
    unit = piece * PIECE + tl.arange(0, PIECE)
    for first in tl.range(0, moves, MOVES, num_stages=1):
        move = first + tl.arange(0, MOVES)
        source = tl.load(sources + move, mask=move < moves, other=0)
        changes = ((move < moves) & (source != move))[:, None] & (unit < layout_units)[None, :]
        bits = tl.load(tree + source.to(tl.int64)[:, None] * slot_stride + unit[None, :], mask=changes, other=0)
        tl.debug_barrier()
        tl.store(tree + move.to(tl.int64)[:, None] * slot_stride + unit[None, :], bits, mask=changes)

    if arrive(counters + b, columns):
        tl.store(prefix_lens, length + step)


def commit_triton(
    caches: Sequence[Tensor],
    prefix_lens: Tensor,
    sources: Tensor,
    *,
    num_moves: Tensor | None = None,
    advance: int = 1,
    row_advance: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """Move and advance, as :func:`lbr_kernels.ops.commit_` defines it.

    Args:
        flag: int32 ``[1]``; 4 is or-ed into it where a row's values cannot be.
    """
    (B,) = prefix_lens.shape
    if B == 0:
        return
    call = launch(
        caches, prefix_lens, sources, counters(prefix_lens.device, B), num_moves=num_moves, advance=advance,
        row_advance=row_advance, flag=flag,
    )  # fmt: skip
    call.run(prefix_lens.device)


def launch(
    caches: Sequence[Tensor],
    prefix_lens: Tensor,
    sources: Tensor,
    counters: Tensor,
    *,
    num_moves: Tensor | None = None,
    advance: int = 1,
    row_advance: Tensor | None = None,
    flag: Tensor | None = None,
) -> Launch:
    """What the kernel is called with. Tensors may be on the meta device, for compilation ahead of time."""
    (B,), M = prefix_lens.shape, sources.shape[1]
    slots = min((cache.shape[2] for cache in caches), default=_NO_CACHE)
    grain = 16  # bytes that every address, stride and size is a multiple of
    by_layout: dict[tuple[int, ...], list[Tensor]] = {}
    for cache in caches:
        if cache.numel() == 0:
            continue
        size = cache.element_size()
        row, head, slot = (stride(cache, axis) * size for axis in range(3))
        width = cache.shape[3] * size
        grain = math.gcd(grain, cache.data_ptr(), row, head, slot, width)
        by_layout.setdefault((cache.shape[1], width, row, head, slot), []).append(cache)
    unit = min(grain, 8)
    # Without caches, a column of nothing is left to advance the lengths.
    layouts = list(by_layout.items()) or [((1, 0, 0, 0, 0), [prefix_lens])]
    widest = max(layout[1] for layout, _ in layouts) // unit
    piece = min(triton.next_power_of_2(max(widest, 1)), WIDEST_PIECE)
    fields: dict[str, list[int]] = {
        name: []
        for name in (
            "first_columns", "first_caches", "heads", "pieces", "units", "row_strides", "head_strides", "slot_strides",
        )
    }  # fmt: skip
    columns = 0
    pointers: list[Any] = []
    for (heads, width, *strides), members in layouts:
        units = width // unit
        pieces = max(-(-units // piece), 1)
        values = (columns, len(pointers), heads, pieces, units, *(step // unit for step in strides))
        for field, value in zip(fields.values(), values, strict=True):
            field.append(value)
        pointers += [triton.reinterpret(cache, _UNITS[unit]) for cache in members]
        columns += len(members) * heads * pieces
    arguments: dict[str, Any] = {
        "caches": tuple(pointers),
        "prefix_lens": prefix_lens,
        "sources": sources,
        "num_moves": num_moves,
        "row_advance": row_advance,
        "flag": flag,
        "counters": counters,
        **{name: tuple(values) for name, values in fields.items()},
        "prefix_stride": stride(prefix_lens, 0),
        "sources_stride": stride(sources, 0),
        # What is larger than any number of moves is as bad as any other.
        "advance": min(max(advance, -1), (1 << 31) - 1),
        "M": M,
        "slots": slots,
        "columns": columns,
        "PIECE": piece,
        "MOVES": max(min(MOST_UNITS // piece, triton.next_power_of_2(max(M, 1))), 1),
        "CHECKED": min(triton.next_power_of_2(max(M, 1)), 128),
        "UNIT": unit,
        "ALIGNED": max(grain // unit, 1),
    }
    return Launch(commit_kernel, B * columns, arguments, {"num_warps": 1, "enable_fp_fusion": True})
