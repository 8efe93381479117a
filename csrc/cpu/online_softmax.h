// Softmax over a sequence that is read in pieces: the state, and its algebra.
//
// A state stands for a set of (score, value) pairs: a score near the largest of them, called top, and the sums of
// 2^(score - top) and of 2^(score - top) * value. Scores are in units of ln 2 here, which saves a multiplication for
// each. The empty set is (-inf, 0, 0). Merging is the union of two sets; it is associative up to rounding, so pieces
// are always merged in the same order, whoever computed them. One NaN score makes the sums NaN.
#pragma once

#include <math.h>

#include <cstdint>

namespace lbr::LBR_ISA {

constexpr float kSlack = 8;  // what is summed up may grow to 2^kSlack before it is scaled down

struct OnlineSoftmax {
  float top = -INFINITY;
  float sum = 0;
};

// 2^(from - to), and 0 for an empty state even if both are -inf.
static inline float rescale_factor(float from, float to) { return from == -INFINITY ? 0.0f : exp2f(from - to); }

// `into` becomes the union of both; the values' sums are scaled with it.
static inline void merge(OnlineSoftmax& into, float* into_values, OnlineSoftmax other, const float* other_values,
                         int64_t dim) {
  const float top = into.top > other.top ? into.top : other.top;
  const float keep = rescale_factor(into.top, top), add = rescale_factor(other.top, top);
  into.top = top;
  into.sum = into.sum * keep + other.sum * add;
  for (int64_t d = 0; d < dim; ++d) into_values[d] = into_values[d] * keep + other_values[d] * add;
}

// A sink is a score without a value, in units of ln 2 too.
static inline void merge_sink(OnlineSoftmax& into, float* into_values, float sink, int64_t dim) {
  const float top = into.top > sink ? into.top : sink;
  const float keep = rescale_factor(into.top, top);
  into.top = top;
  into.sum = into.sum * keep + rescale_factor(sink, top);
  for (int64_t d = 0; d < dim; ++d) into_values[d] *= keep;
}

// The natural logarithm of the sum of e^score.
static inline float log_sum_exp(OnlineSoftmax state) {
  return state.sum == 0 ? -INFINITY : (state.top + log2f(state.sum)) * 0.693147181f;
}

// What the values' sums are divided by: 0 for the empty set, whose result is zero.
static inline float normaliser(OnlineSoftmax state) { return state.sum == 0 ? 0.0f : 1.0f / state.sum; }

}  // namespace lbr::LBR_ISA
