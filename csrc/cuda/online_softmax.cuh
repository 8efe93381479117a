// Softmax over a sequence that is read in pieces: the state, and its algebra; csrc/cpu/online_softmax.h says it in
// full.
//
// A state stands for a set of (score, value) pairs: `top`, the largest score, and the sums of 2^(score - top) and of
// 2^(score - top) * value, the latter kept by whoever holds the state. Scores are in units of ln 2. The empty set is
// (-inf, 0, 0). Merging is the union of two sets. One NaN score makes the sums NaN.
#pragma once

#include "primitives.cuh"

namespace lbr::gpu {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

struct OnlineSoftmax {
  float top = -kInfinity;
  float sum = 0;
};

// What scores are taken relative to: the top, and any number where there is no score yet.
LBR_DEVICE float base_of(float top) { return top == -kInfinity ? 0.0f : top; }

// `into` becomes the union of both. Their values' sums have to be multiplied by what `keep` and `add` return.
LBR_DEVICE void merge(OnlineSoftmax& into, OnlineSoftmax other, float& keep, float& add) {
  const float top = max(into.top, other.top), base = base_of(top);
  keep = exp2(into.top - base);
  add = exp2(other.top - base);
  into.top = top;
  into.sum = into.sum * keep + other.sum * add;
}

// The natural logarithm of the sum of e^score.
LBR_DEVICE float log_sum_exp(OnlineSoftmax state) {
  return state.sum == 0 ? -kInfinity : (state.top + log2(state.sum)) * kLn2;
}

// What the values' sums are multiplied by in the end: 0 for the empty set, whose result is zero.
LBR_DEVICE float normaliser(OnlineSoftmax state) { return state.sum == 0 ? 0.0f : 1.0f / state.sum; }

}  // namespace lbr::gpu
