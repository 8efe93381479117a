// Softmax over a sequence that is read in pieces: the state, and its algebra.
//
// A state stands for a set of (score, value) pairs: the largest score, and the sums of exp(score - max) and of
// exp(score - max) * value. The empty set is (-inf, 0, 0). Merging is the union of two sets; it is associative up to
// rounding, so pieces are always merged in the same order, whoever computed them. One NaN score makes the sums NaN.
#pragma once

#include <math.h>

#include <cstdint>

namespace lbr::LBR_ISA {

struct OnlineSoftmax {
  float max = -INFINITY;
  float sum = 0;
};

// exp(from - to), and 0 for an empty state even if both are -inf.
static inline float rescale_factor(float from, float to) { return from == -INFINITY ? 0.0f : expf(from - to); }

// `into` becomes the union of both; the values' sums are scaled with it.
static inline void merge(OnlineSoftmax& into, float* into_values, OnlineSoftmax other, const float* other_values,
                         int64_t dim) {
  const float top = into.max > other.max ? into.max : other.max;
  const float keep = rescale_factor(into.max, top), add = rescale_factor(other.max, top);
  into.max = top;
  into.sum = into.sum * keep + other.sum * add;
  for (int64_t d = 0; d < dim; ++d) into_values[d] = into_values[d] * keep + other_values[d] * add;
}

// A sink is a score without a value.
static inline void merge_sink(OnlineSoftmax& into, float* into_values, float sink, int64_t dim) {
  const float top = into.max > sink ? into.max : sink;
  const float keep = rescale_factor(into.max, top);
  into.max = top;
  into.sum = into.sum * keep + rescale_factor(sink, top);
  for (int64_t d = 0; d < dim; ++d) into_values[d] *= keep;
}

static inline float log_sum_exp(OnlineSoftmax state) {
  return state.sum == 0 ? -INFINITY : state.max + logf(state.sum);
}

// What the values' sums are divided by: 0 for the empty set, whose result is zero.
static inline float normaliser(OnlineSoftmax state) { return state.sum == 0 ? 0.0f : 1.0f / state.sum; }

}  // namespace lbr::LBR_ISA
