# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202 -- a kernel's arguments are pointers and numbers; the launch says which
"""sample_children and top_children in Triton: one launch, a program per row of children.

Contract
--------
The ops are those of ``sample_children.py``, for tensors on a CUDA device; shapes, dtypes and numbers are checked by the
caller. Nothing is read on the host that lives on the device, so a call can be captured in a graph. The tokens are those
of every other backend for the same logits: probabilities are the same integers, by the same operations in fp64, of
which none may be fused (``enable_fp_fusion=False``). A row with a value that cannot be gets tokens -1 and
log-probabilities NaN, and ``flag``, where given, bit 8 (logits) or 16 (a uniform, a filter, an index) of ``_flags``.

How it goes
-----------
A logit's ``key`` is an int32 that orders like it, and equal logits have equal keys.

1. The largest logit; NaN and +inf are found on the way.
2. Where top-k or top-p are on: how many tokens, and how much weight, lie within a few distances of the largest. What is
   near enough to hold all that the filters can leave is listed, in order of ids: mostly some hundred tokens. On the
   list a bisection over keys finds the last one that a filter keeps; of equal logits at the edge of the nucleus those
   with the larger ids are kept. In the worst case, logits that are nearly all equal, the list is the vocabulary.
3. Weights are summed per block, of the list or else of the vocabulary; a draw finds its block among those sums, and its
   token in the block. The most likely tokens are found one after the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops._triton_support import Launch, stride
from lbr_kernels.ops.sample_children import WEIGHT_BITS

LARGEST_BLOCK = 2048  # tokens

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e42feep-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))
_INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(k) for k in range(11, -1, -1)))
_LOG_OF_ONE = tl.constexpr(WEIGHT_BITS * math.log(2))  # of the weight of the most likely token
_ONE = tl.constexpr(2.0**WEIGHT_BITS)
_WEIGHT_EXPONENT = tl.constexpr(WEIGHT_BITS << 52)
_ROUND = tl.constexpr(1.5 * 2.0**52)  # added to a small number it leaves the nearest integer in the low bits
_ROUND_POSITIVE = tl.constexpr(2.0**52)
_ROUND_POSITIVE_BITS = tl.constexpr(0x4330000000000000)
_INFINITE = tl.constexpr(0x7F800000)  # keys of +inf and -inf
_MINUS_INFINITE = tl.constexpr(-0x7F800001)
_LOWEST = tl.constexpr(-(2**31))
_LOWEST_PAIR = tl.constexpr(-(2**63))
_LARGEST_PAIR = tl.constexpr(2**63 - 1)
_LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)

# Distances from the largest logit, over the temperature, at which the list may end. Weights are 0 past the last one.
_NEAR = tl.constexpr(4.0)
_FAR = tl.constexpr(8.0)
_FARTHER = tl.constexpr(16.0)
_WEIGHTLESS = tl.constexpr(32.0)


@triton.jit
def _key_of(logit):
    bits = logit.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(key == -1, 0, key)  # -0 is 0


@triton.jit
def _logit_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight_of(x):
    # round(2^40 e^x) for fp64 x <= 0: exp_fp64 of sample_children.py, operation for operation.
    x = tl.where(x < -64.0, -64.0, x)
    shifted = x * _LOG2E + _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = tl.zeros_like(x) + _INVERSE_FACTORIALS[0]
    for i in tl.static_range(1, 12):
        p = p * r
        p = p + _INVERSE_FACTORIALS[i]
    bits = p.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52) + _WEIGHT_EXPONENT
    rounded = bits.to(tl.float64, bitcast=True) + _ROUND_POSITIVE
    return rounded.to(tl.int64, bitcast=True) - _ROUND_POSITIVE_BITS


@triton.jit
def _exponent_of(logit, peak, temperature):
    return (logit.to(tl.float64) - peak) / temperature


@triton.jit
def _logits_at(logits, first, V, BLOCK: tl.constexpr):
    token = first + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _listed_above(keys, weights, count, key, BLOCK: tl.constexpr):
    # How many of the list's tokens have a larger key, and their weight.
    tokens = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.int64)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        above = tl.load(keys + place, mask=place < count, other=_LOWEST) > key
        tokens += above.to(tl.int32)
        mass += tl.load(weights + place, mask=above, other=0)
    return tl.sum(tokens, 0), tl.sum(mass, 0)


@triton.jit
def _last_key(keys, weights, count, low, high, limit, OF_MASS: tl.constexpr, BLOCK: tl.constexpr):
    # The smallest key in [low, high] above which less than `limit` tokens, or weight, lie; `high` if there is none.
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        tokens, mass = _listed_above(keys, weights, count, middle.to(tl.int32), BLOCK)
        fits = mass.to(tl.float64) < limit if OF_MASS else tokens < limit
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    return low.to(tl.int32)


@triton.jit
def _block_of(
    logits, keys, weights, first, count, peak, temperature, cut, first_tie, least,
    LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Keys, and weights after all filters, of a block of the list or of the vocabulary.
    place = first + tl.arange(0, BLOCK)
    if LISTED:
        key = tl.load(keys + place, mask=place < count, other=_LOWEST)
        weight = tl.load(weights + place, mask=place < count, other=0)
        weight = tl.where((key > cut) | ((key == cut) & (place >= first_tie)), weight, 0)
    else:
        logit = _logits_at(logits, first, count, BLOCK)
        key = _key_of(logit)
        weight = _weight_of(_exponent_of(logit, peak, temperature))
        weight = tl.where(place < count, weight, 0)
    return key, tl.where(weight.to(tl.float64) < least, 0, weight)


@triton.jit
def _store_row(tokens, log_probs, row, K, log_prob, CHUNK: tl.constexpr):
    # A row without tokens.
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        tl.store(tokens + row * K + k, tl.full([CHUNK], -1, tl.int64), mask=k < K)
        tl.store(log_probs + row * K + k, tl.zeros([CHUNK], tl.float32) + log_prob, mask=k < K)


@triton.jit(
    do_not_specialize=[
        "logits", "uniforms", "row_filters", "row_index", "flag", "tokens", "log_probs", "keys", "weights", "ids",
        "logits_stride", "uniforms_stride", "R", "V", "K", "temperature", "top_k", "top_p", "min_p",
    ]
)  # fmt: skip
def sample_children_kernel(
    logits,
    uniforms,  # None: the most likely tokens
    row_filters,  # [R, 4], dense, or None
    row_index,  # or None
    flag,  # or None
    tokens,  # [rows, K], dense
    log_probs,  # [rows, K], dense
    keys,  # [rows, V], dense: the list's; None where there is none
    weights,
    ids,
    logits_stride,
    uniforms_stride,
    R,
    V,
    K,
    temperature: tl.float64,
    top_k,
    top_p: tl.float64,
    min_p: tl.float64,
    LISTED: tl.constexpr,  # top-k or top-p may be on
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of the vocabulary, rounded up to a power of two
    CHUNK: tl.constexpr,  # children that are looked at at a time
):
    """One row of children."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if row_index is not None:
        source = tl.load(row_index + row)
    bad = (source < -1) | (source >= R)
    if uniforms is not None:
        uniforms += row * uniforms_stride
        wrong = tl.zeros([CHUNK], tl.int32)
        for first in range(0, K, CHUNK):
            k = first + tl.arange(0, CHUNK)
            uniform = tl.load(uniforms + k, mask=k < K, other=0.0)
            wrong = wrong | ((uniform >= 0.0) & (uniform < 1.0) == 0).to(tl.int32)
        bad = bad | (tl.max(wrong, 0) != 0)
    # Scalars become fp64 without a detour through fp32, which literals would take in the interpreter.
    zero = tl.full([], 0, tl.float64)
    temperature = zero + temperature
    top_p = zero + top_p
    min_p = zero + min_p
    most = tl.minimum(top_k, V)
    if row_filters is not None:
        there = (source >= 0) & (source < R)
        row_filters += tl.where(there, source, 0) * 4
        temperature = tl.load(row_filters, mask=there, other=1.0)
        its_top_k = tl.load(row_filters + 1, mask=there, other=0.0)
        top_p = tl.load(row_filters + 2, mask=there, other=1.0)
        min_p = tl.load(row_filters + 3, mask=there, other=0.0)
        fine = (temperature > 0.0) & (temperature < float("inf"))
        fine = fine & (its_top_k >= 0.0) & (its_top_k <= 9007199254740992.0)
        fine = fine & (top_p >= 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
        whole = tl.where(fine, its_top_k, 0.0).to(tl.int64)
        bad = bad | (fine == 0) | (whole.to(tl.float64) != tl.where(fine, its_top_k, 0.0))
        most = tl.minimum(whole, V.to(tl.int64)).to(tl.int32)
    if bad | (source == -1):
        _store_row(tokens, log_probs, row, K, tl.where(bad, float("nan"), 0.0), CHUNK)
        if flag is not None:
            tl.atomic_or(flag, 16, mask=bad)
        return

    logits += source * logits_stride
    largest = tl.full([BLOCK], _LOWEST, tl.int32)
    unordered = tl.zeros([BLOCK], tl.int32)
    for first in range(0, V, BLOCK):
        logit = _logits_at(logits, first, V, BLOCK)
        largest = tl.maximum(largest, _key_of(logit))
        unordered = unordered | (logit != logit).to(tl.int32)
    top_key = tl.max(largest, 0)
    if (tl.max(unordered, 0) != 0) | (top_key >= _INFINITE) | (top_key <= _MINUS_INFINITE):
        _store_row(tokens, log_probs, row, K, float("nan"), CHUNK)
        if flag is not None:
            tl.atomic_or(flag, 8)
        return
    peak = _logit_of(top_key).to(tl.float64)
    least = min_p * _ONE

    count = V
    cut = top_key
    first_tie = V * 0
    if LISTED:
        keys += row * V
        weights += row * V
        ids += row * V
        by_count = (most > 0) & (most < V)
        by_mass = top_p < 1.0
        tokens_near = tl.zeros([BLOCK], tl.int32)
        tokens_far = tl.zeros([BLOCK], tl.int32)
        tokens_farther = tl.zeros([BLOCK], tl.int32)
        mass_near = tl.zeros([BLOCK], tl.int64)
        mass_far = tl.zeros([BLOCK], tl.int64)
        mass_farther = tl.zeros([BLOCK], tl.int64)
        mass = tl.zeros([BLOCK], tl.int64)
        for first in range(0, V, BLOCK):
            x = _exponent_of(_logits_at(logits, first, V, BLOCK), peak, temperature)
            weight = _weight_of(x)
            weight = tl.where(first + tl.arange(0, BLOCK) < V, weight, 0)
            tokens_near += (x >= -_NEAR).to(tl.int32)
            tokens_far += (x >= -_FAR).to(tl.int32)
            tokens_farther += (x >= -_FARTHER).to(tl.int32)
            mass_near += tl.where(x >= -_NEAR, weight, 0)
            mass_far += tl.where(x >= -_FAR, weight, 0)
            mass_farther += tl.where(x >= -_FARTHER, weight, 0)
            mass += weight
        limit = top_p * tl.sum(mass, 0).to(tl.float64)
        unknown = (by_count | by_mass) == 0
        near = tl.where(by_count, tl.sum(tokens_near, 0) >= most, tl.sum(mass_near, 0).to(tl.float64) >= limit)
        far = tl.where(by_count, tl.sum(tokens_far, 0) >= most, tl.sum(mass_far, 0).to(tl.float64) >= limit)
        farther = tl.where(by_count, tl.sum(tokens_farther, 0) >= most, tl.sum(mass_farther, 0).to(tl.float64) >= limit)
        reach = tl.where(near, _NEAR, tl.where(far, _FAR, tl.where(farther, _FARTHER, _WEIGHTLESS)))
        reach = tl.where(unknown, _WEIGHTLESS, reach).to(tl.float64)
        # Some more than that, whatever the rounding.
        lowest = peak - reach * temperature - (1e-3 * temperature + 1e-6 * tl.abs(peak))
        lowest = tl.maximum(lowest, -_LARGEST_FLOAT).to(tl.float32)

        count = V * 0
        smallest = tl.full([BLOCK], _INFINITE, tl.int32)
        for first in range(0, V, BLOCK):
            logit = _logits_at(logits, first, V, BLOCK)
            if tl.max(logit, 0) >= lowest:
                key = _key_of(logit)
                weight = _weight_of(_exponent_of(logit, peak, temperature))
                token = first + tl.arange(0, BLOCK)
                listed = (logit >= lowest) & (weight > 0) & (token < V)
                place = count + tl.cumsum(listed.to(tl.int32), 0) - 1
                tl.store(keys + place, key, mask=listed)
                tl.store(weights + place, weight, mask=listed)
                tl.store(ids + place, token, mask=listed)
                smallest = tl.where(listed, tl.minimum(smallest, key), smallest)
                count += tl.sum(listed.to(tl.int32), 0)
        tl.debug_barrier()

        cut = tl.min(smallest, 0)
        if by_count:
            cut = _last_key(keys, weights, count, cut, top_key, most, False, BLOCK)
            _, mass_left = _listed_above(keys, weights, count, cut - 1, BLOCK)
            limit = top_p * mass_left.to(tl.float64)
        if by_mass:
            cut = _last_key(keys, weights, count, cut, top_key, limit, True, BLOCK)
            # Of `ties` tokens with the key at the edge, the first to be taken when so many, at least one, are.
            tokens_above, mass_above = _listed_above(keys, weights, count, cut, BLOCK)
            tokens_kept, _ = _listed_above(keys, weights, count, cut - 1, BLOCK)
            ties = tokens_kept - tokens_above
            weight_of_one = _weight_of(_exponent_of(_logit_of(cut), peak, temperature))
            taken = ties * 0 + 1
            enough = ties
            while taken < enough:
                middle = (taken + enough) >> 1
                fits = (mass_above + middle * weight_of_one).to(tl.float64) < limit
                taken = tl.where(fits, middle + 1, taken)
                enough = tl.where(fits, enough, middle)
            seen = ties * 0
            for first in range(0, count, BLOCK):
                place = first + tl.arange(0, BLOCK)
                tie = tl.load(keys + place, mask=place < count, other=_LOWEST) == cut
                rank = seen + tl.cumsum(tie.to(tl.int32), 0)
                first_tie += tl.sum(tl.where(tie & (rank == ties - taken + 1), place, 0), 0)
                seen += tl.sum(tie.to(tl.int32), 0)

    block = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], tl.int64)
    for i in range((count + BLOCK - 1) // BLOCK):
        _, weight = _block_of(
            logits, keys, weights, i * BLOCK, count, peak, temperature, cut, first_tie, least, LISTED, BLOCK
        )
        sums = tl.where(block == i, tl.sum(weight, 0), sums)
    total = tl.sum(sums, 0)
    log_total = tl.log(total.to(tl.float64)) - _LOG_OF_ONE

    if uniforms is not None:
        ends = tl.cumsum(sums, 0)
        for k in range(K):
            target = (tl.load(uniforms + k) * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(target, total - 1)
            i = tl.sum((ends <= target).to(tl.int32), 0)
            rest = target - tl.sum(tl.where(block < i, sums, 0), 0)
            _, weight = _block_of(
                logits, keys, weights, i * BLOCK, count, peak, temperature, cut, first_tie, least, LISTED, BLOCK
            )
            place = i * BLOCK + tl.sum((tl.cumsum(weight, 0) <= rest).to(tl.int32), 0)
            token = place
            if LISTED:
                token = tl.load(ids + place)
            x = _exponent_of(tl.load(logits + token).to(tl.float32), peak, temperature)
            tl.store(tokens + row * K + k, token.to(tl.int64))
            tl.store(log_probs + row * K + k, (x - log_total).to(tl.float32))
    else:
        # Keys and places in one number each, the next one always below the last; of equal keys the first place wins.
        last = total * 0 + _LARGEST_PAIR
        for k in range(K):
            best = tl.full([BLOCK], _LOWEST_PAIR, tl.int64)
            for i in range((count + BLOCK - 1) // BLOCK):
                key, weight = _block_of(
                    logits, keys, weights, i * BLOCK, count, peak, temperature, cut, first_tie, least, LISTED, BLOCK
                )
                place = i * BLOCK + tl.arange(0, BLOCK)
                pair = (key.to(tl.int64) << 32) + (0x7FFFFFFF - place)
                best = tl.where((weight > 0) & (pair < last), tl.maximum(best, pair), best)
            last = tl.max(best, 0)
            found = last != _LOWEST_PAIR
            token = 0x7FFFFFFF - (last & 0xFFFFFFFF).to(tl.int32)
            if LISTED:
                token = tl.load(ids + token, mask=found, other=0)
            x = _exponent_of(_logit_of((last >> 32).to(tl.int32)), peak, temperature)
            tl.store(tokens + row * K + k, tl.where(found, token, -1).to(tl.int64))
            tl.store(log_probs + row * K + k, tl.where(found, x - log_total, 0.0).to(tl.float32))


def sample_children_triton(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, as :func:`lbr_kernels.ops.sample_children` defines them.

    Args:
        flag: int32 ``[1]``; 8 is or-ed into it for a bad row of logits, 16 for a bad uniform, filter or index.
    """
    return _run(logits, uniforms, uniforms.shape[1], (temperature, top_k, top_p, min_p), row_filters, row_index, flag)


def top_children_triton(
    logits: Tensor,
    width: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for :func:`lbr_kernels.ops.top_children`."""
    return _run(logits, None, width, (temperature, top_k, top_p, min_p), row_filters, row_index, flag)


def _run(
    logits: Tensor,
    uniforms: Tensor | None,
    width: int,
    filters: tuple[float, int, float, float],
    row_filters: Tensor | None,
    row_index: Tensor | None,
    flag: Tensor | None,
) -> tuple[Tensor, Tensor]:
    call = launch(logits, uniforms, width, filters, row_filters=row_filters, row_index=row_index, flag=flag)
    if call.programs > 0:
        call.run(logits.device)
    return call.arguments["tokens"], call.arguments["log_probs"]


def launch(
    logits: Tensor,
    uniforms: Tensor | None,
    width: int,
    filters: tuple[float, int, float, float],
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
    flag: Tensor | None = None,
) -> Launch:
    """What the kernel is called with; results and the memory for lists are allocated here.

    Tensors may be on the meta device, for compilation ahead of time.
    """
    R, V = logits.shape
    rows = R if row_index is None else row_index.shape[0]
    temperature, top_k, top_p, min_p = filters
    listed = row_filters is not None or 0 < top_k < V or top_p < 1
    block = min(max(triton.next_power_of_2(V), 128), LARGEST_BLOCK)
    arguments: dict[str, Any] = {
        "logits": logits,
        "uniforms": uniforms,
        "row_filters": row_filters,
        "row_index": row_index,
        "flag": flag,
        "tokens": logits.new_empty(rows, width, dtype=torch.int64),
        "log_probs": logits.new_empty(rows, width, dtype=torch.float32),
        "keys": logits.new_empty(rows, V, dtype=torch.int32) if listed else None,
        "weights": logits.new_empty(rows, V, dtype=torch.int64) if listed else None,
        "ids": logits.new_empty(rows, V, dtype=torch.int32) if listed else None,
        "logits_stride": stride(logits, 0),
        "uniforms_stride": 0 if uniforms is None else stride(uniforms, 0),
        "R": R,
        "V": V,
        "K": width,
        "temperature": float(temperature),
        "top_k": min(top_k, V),  # which keeps all, as any larger one does
        "top_p": float(top_p),
        "min_p": float(min_p),
        "LISTED": listed,
        "BLOCK": block,
        "BLOCKS": triton.next_power_of_2(-(-V // block)),
        "CHUNK": min(max(triton.next_power_of_2(width), 32), 256),
    }
    # Sums, products and quotients are to be rounded one by one, as on every other backend.
    options = {"num_warps": max(block // 128, 1), "enable_fp_fusion": False}
    return Launch(sample_children_kernel, rows, arguments, options)
