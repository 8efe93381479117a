// Products of small fp32 matrices in register tiles.
//
// c[i][j] (+)= sum_s a[i][s] b[s][j], j along the lanes, an element of `a` broadcast: kProductRows rows by one to
// kProductVectors vectors at a time. Strides make any of the products of attention and of its gradient of it.
#pragma once

#include "simd.h"

namespace lbr::LBR_ISA {

constexpr int kProductRows = 6;
constexpr int kProductVectors = kLanes == 16 ? 4 : 2;

// Elements of a matrix that is broadcast: where row i and step s are.
struct Broadcast {
  const float* first;
  int64_t row, step;
};

// Rows of whole vectors.
template <class Float>
struct Rows {
  Float* first;
  int64_t stride;
};

template <bool kAdd, int kVectors>
LBR_INLINE static inline void product_tile(Broadcast a, Rows<const float> b, int64_t steps, Rows<float> c) {
  vfloat sum[kProductRows][kVectors];
  unroll<kProductRows * kVectors>([&](auto i) LBR_INLINE {
    constexpr int kRow = i / kVectors, kVector = i % kVectors;
    sum[kRow][kVector] = kAdd ? load(c.first + kRow * c.stride + kVector * kLanes) : vfloat{};
  });
  const float *from = a.first, *row = b.first;
  for (int64_t s = 0; s < steps; ++s, from += a.step, row += b.stride) {
    vfloat x[kVectors];
    unroll<kVectors>([&](auto v) LBR_INLINE { x[v] = load(row + v * kLanes); });
    unroll<kProductRows>([&](auto i) LBR_INLINE {
      const vfloat factor = splat(from[i * a.row]);
      unroll<kVectors>([&](auto v) LBR_INLINE { sum[i][v] = fma(factor, x[v], sum[i][v]); });
    });
  }
  unroll<kProductRows * kVectors>([&](auto i) LBR_INLINE {
    constexpr int kRow = i / kVectors, kVector = i % kVectors;
    store(c.first + kRow * c.stride + kVector * kLanes, sum[kRow][kVector]);
  });
}

// One tile of 1 ... kProductVectors vectors.
template <bool kAdd>
LBR_INLINE static inline void product(int vectors, Broadcast a, Rows<const float> b, int64_t steps, Rows<float> c) {
  switch (vectors) {
    case 1: return product_tile<kAdd, 1>(a, b, steps, c);
    case 2: return product_tile<kAdd, 2>(a, b, steps, c);
#if defined(LBR_AVX512)
    case 3: return product_tile<kAdd, 3>(a, b, steps, c);
    case 4: return product_tile<kAdd, 4>(a, b, steps, c);
#endif
  }
}

}  // namespace lbr::LBR_ISA
