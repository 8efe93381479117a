# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 -- a kernel's arguments are tiles and numbers
"""What the attention kernels in Triton share: products, scores, and the state of an online softmax.

Contract
--------
Scores are in units of ln 2, as in ``csrc/cpu/online_softmax.h``. A state is (top, total, sums), per row of a tile: the
largest score so far, the sum of 2^(score - top), and of 2^(score - top) * value; the empty state is (-inf, 0, 0).
``UPCAST`` is set in the interpreter, whose dot and rounding of bf16 are wrong: tiles are multiplied in fp32 there.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def tanh(x):
    # Near 0, where 1 - 2 / (e^2x + 1) cancels, an odd polynomial; the one of csrc/cpu/simd.h.
    size = tl.abs(x)
    wide = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    return tl.where(square < 0.390625, p * square * x + x, tl.where(x < 0, -wide, wide))


@triton.jit
def rescale(old, new):
    # 2^(old - new), and 0 for an empty state even if both are -inf.
    return tl.exp2(old - tl.where(new == float("-inf"), 0.0, new))


@triton.jit
def multiply(query, keys, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(query.to(tl.float32), tl.trans(keys.to(tl.float32)), input_precision="ieee")
    return tl.dot(query, tl.trans(keys), input_precision="ieee")


@triton.jit
def adjusted(products, offset, slope, inner, outer, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    # Products become scores in units of ln 2, in the order in which models apply these; and the soft-cap's derivative.
    scores = products * inner
    slant = scores
    if HAS_SOFTCAP:
        bent = tanh(scores)
        slant = 1.0 - bent * bent
        scores = outer * bent
    if HAS_ALIBI:
        scores += slope * offset
    return scores, slant


@triton.jit
def absorb(scores, factor, values, top, total, sums, UPCAST: tl.constexpr):
    # The state of all rows takes in a block whose scores are `factor` >= 0 times what is given. A NaN may get lost in
    # the maximum: it makes the total NaN.
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - base[:, None])
    keep = tl.exp2(top - base)
    total = total * keep + tl.sum(weights, 1)
    sums = sums * keep[:, None]
    if UPCAST:
        sums = tl.dot(weights, values.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
    return new_top, total, sums


@triton.jit
def with_sink(top, total, sink):
    # A sink is a score without a value; -inf where there is none. Also returns the factor of the sums.
    new_top = tl.maximum(top, sink)
    keep = rescale(top, new_top)
    return new_top, total * keep + rescale(sink, new_top), keep
