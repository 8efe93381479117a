// The two matrix products of attention over a block of keys, in register tiles.
//
// Query rows are packed along the lanes of a tile of kTileRows. scores[key][row] = sum_d key[d] * query[d][row] has a
// key's element broadcast, so keys are used as they lie in memory and no sum ever runs across lanes. The second product
// has the value's axis along the lanes and broadcasts the probability. Both go step by step through `kPack` neighbours
// of their sum (Dot in simd.h): one for floats, a pair for the processor's bf16 dot product.
#pragma once

#include <math.h>

#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

constexpr int kTileVectors = 3;  // vectors of rows per tile
constexpr int kTileRows = kTileVectors * kLanes;

// Rows of memory that will be wanted soon, brought closer while others are being multiplied. Null: nothing.
struct Ahead {
  const char* rows = nullptr;
  int64_t stride = 0;  // bytes
};

// scores[key][row] for kVectors vectors of rows. With kHalf half a vector of rows lies behind them, in which two keys
// share a vector: its low half is the first one's, its high half the second one's.
template <class Element, int kKeys, int kVectors, bool kHalf>
static inline void score_tile(const Element* key, int64_t key_stride, const Element* query, int64_t steps,
                              float* scores, Ahead ahead) {
  using D = Dot<Element>;
  using Vector = typename D::Vector;
  constexpr int64_t kLineSteps = kCacheLine / (D::kPack * sizeof(Element));
  constexpr int kPairs = kHalf ? kKeys / 2 : 0;
  vfloat acc[kKeys][kVectors], shared[kPairs + 1];
  unroll<kKeys * kVectors>([&](auto i) LBR_INLINE { acc[i / kVectors][i % kVectors] = vfloat{}; });
  unroll<kPairs>([&](auto i) LBR_INLINE { shared[i] = vfloat{}; });
  for (int64_t line = 0; line < steps; line += kLineSteps) {
    if (ahead.rows)
      for (int k = 0; k < kKeys; ++k) prefetch(ahead.rows + k * ahead.stride + line / kLineSteps * kCacheLine);
    const int64_t end = smallest(steps, line + kLineSteps);
    for (int64_t step = line; step < end; ++step) {
      const Element* q = query + step * kTileRows * D::kPack;
      Vector rows[kVectors];
      unroll<kVectors>([&](auto v) LBR_INLINE { rows[v] = load_packs(q + v * kLanes * D::kPack); });
      const auto multiply = [&](auto k) LBR_INLINE {
        const Vector x = splat_pack(key + k * key_stride + step * D::kPack);
        unroll<kVectors>([&](auto v) LBR_INLINE { acc[k][v] = dot_add(x, rows[v], acc[k][v]); });
        return x;
      };
      if constexpr (kHalf) {
        const Vector half = load_packs_twice(q + kVectors * kLanes * D::kPack);
        unroll<kPairs>([&](auto i) LBR_INLINE {
          const Vector first = multiply(Index<2 * i>{}), second = multiply(Index<2 * i + 1>{});
          shared[i] = dot_add(blend_halves(first, second), half, shared[i]);
        });
      } else {
        unroll<kKeys>([&](auto k) LBR_INLINE { multiply(k); });
      }
    }
  }
  unroll<kKeys * kVectors>([&](auto i) LBR_INLINE {
    store(scores + i / kVectors * kTileRows + i % kVectors * kLanes, acc[i / kVectors][i % kVectors]);
  });
  if constexpr (kHalf) {
    float* const behind = scores + kVectors * kLanes;
    unroll<kPairs>([&](auto i) LBR_INLINE {
      split_halves(shared[i], behind + 2 * i * kTileRows, behind + (2 * i + 1) * kTileRows);
    });
  }
}

// How the rows of a tile lie in vectors. A last vector that would be no more than half full is shared by two keys,
// where the instruction set has the means.
struct TileShape {
  explicit TileShape(int rows) : vectors(int(ceil_div(rows, kLanes))) {
#if defined(LBR_AVX512)
    half = rows > kLanes && rows % kLanes > 0 && rows % kLanes <= kLanes / 2;
#endif
  }
  int vectors;
  bool half = false;  // the last of them
};

// scores[key][row] of `keys` keys; `query` is [steps][kTileRows][kPack].
template <class Element, int kVectors, bool kHalf>
static void score_block(const Element* key, int64_t key_stride, int keys, const Element* query, int64_t steps,
                        float* scores, Ahead ahead) {
  // So many keys at a time that the sums fill the registers and hide each other's latency.
  constexpr int kKeys = (kLanes == 16 ? 8 : 4) * (kVectors == 1 ? 2 : 1);
  const auto tile = [&](auto count, auto vectors, auto half, int k) LBR_INLINE {
    const Ahead here{ahead.rows ? ahead.rows + k * ahead.stride : nullptr, ahead.stride};
    score_tile<Element, count, vectors, half>(key + k * key_stride, key_stride, query, steps, scores + k * kTileRows,
                                              here);
  };
  int k = 0;
  for (; k + kKeys <= keys; k += kKeys) tile(Index<kKeys>{}, Index<kVectors>{}, Index<kHalf>{}, k);
  for (; k + 4 <= keys; k += 4) tile(Index<4>{}, Index<kVectors>{}, Index<kHalf>{}, k);
  for (; k < keys; ++k) tile(Index<1>{}, Index<kVectors + kHalf>{}, Index<false>{}, k);
}

template <class Element>
static void score_block(TileShape shape, const Element* key, int64_t key_stride, int keys, const Element* query,
                        int64_t steps, float* scores, Ahead ahead) {
  const auto run = [&](auto vectors, auto half) {
    score_block<Element, vectors, half>(key, key_stride, keys, query, steps, scores, ahead);
  };
#if defined(LBR_AVX512)
  if (shape.half) return shape.vectors == 2 ? run(Index<1>{}, Index<true>{}) : run(Index<2>{}, Index<true>{});
#endif
  switch (shape.vectors) {
    case 1: return run(Index<1>{}, Index<false>{});
    case 2: return run(Index<2>{}, Index<false>{});
    default: return run(Index<3>{}, Index<false>{});
  }
}

// How softmax reads the scores of one vector of rows: a vector for each key ...
template <class Element>
struct WholeLanes {
  static constexpr int kKeys = 1;
  static vfloat scores(const float* at, int k, int /*keys*/) { return load(at + k * kTileRows); }
  static vfloat counted(vfloat v, int /*k*/, int /*keys*/) { return v; }
  static vfloat over_keys(vfloat v, vfloat (*)(vfloat, vfloat)) { return v; }
  static vfloat first_of(vfloat v) { return v; }

  // Probabilities take the scores' place, step by step as the second product reads them.
  template <class Probability>
  static void store_probabilities(float* at, int keys, const Probability& probability) {
#if defined(LBR_AVX512_BF16)
    if constexpr (Dot<Element>::kPack == 2) {
      for (int k = 0; k < keys; k += 2) {
        const vfloat even = probability(k), odd = k + 1 < keys ? probability(k + 1) : vfloat{};
        store(at + k / 2 * kTileRows, (vfloat)interleave(even, odd));
      }
      return;
    }
#endif
    for (int k = 0; k < keys; ++k) store(at + k * kTileRows, probability(k));
  }
};

#if defined(LBR_AVX512)
// ... or one for every two keys, each in its half.
template <class Element>
struct HalfLanes {
  static constexpr int kKeys = 2;
  // The last of an odd number of keys stands in both halves, and counts in the first.
  static vfloat scores(const float* at, int k, int keys) {
    return join_halves(at + k * kTileRows, at + (k + 1 < keys ? k + 1 : k) * kTileRows);
  }
  static vfloat counted(vfloat v, int k, int keys) { return k + 1 < keys ? v : first_of(v); }
  static vfloat over_keys(vfloat v, vfloat (*combine)(vfloat, vfloat)) { return combine(v, swap_halves(v)); }
  static vfloat first_of(vfloat v) { return blend_halves(v, vfloat{}); }

  template <class Probability>
  static void store_probabilities(float* at, int keys, const Probability& probability) {
    for (int k = 0; k < keys; k += 2) {
      if constexpr (Dot<Element>::kPack == 1) {
        split_halves(probability(k), at + k * kTileRows, at + (k + 1) * kTileRows);
      } else {
#if defined(LBR_AVX512_BF16)
        store_interleaved_halves(probability(k), at + k / 2 * kTileRows);
#endif
      }
    }
  }
};
#endif

// acc[row][0 .. kVectors * kLanes) += sum over steps of probability[step][row] * value[step][..]; every `interval`-th
// step from `phase` on fetches that step's part of `ahead`.
template <class Element, int kRows, int kVectors>
static inline void value_tile(const Element* probability, const Element* value, int64_t value_stride, int steps,
                              float* acc, int64_t acc_stride, Ahead ahead, int phase, int interval) {
  using D = Dot<Element>;
  vfloat sum[kRows][kVectors];
  unroll<kRows * kVectors>([&](auto i) LBR_INLINE {
    sum[i / kVectors][i % kVectors] = load(acc + i / kVectors * acc_stride + i % kVectors * kLanes);
  });
  for (int step = 0; step < steps; ++step) {
    if (step == phase && ahead.rows) {
      for (int line = 0; line < kVectors * kLanes * 4 / kCacheLine; ++line)
        prefetch(ahead.rows + step * ahead.stride + line * kCacheLine);
      phase += interval;
    }
    typename D::Vector x[kVectors];
    unroll<kVectors>([&](auto v)
                         LBR_INLINE { x[v] = load_packs(value + step * value_stride + v * kLanes * D::kPack); });
    unroll<kRows>([&](auto r) LBR_INLINE {
      const typename D::Vector p = splat_pack(probability + (step * kTileRows + r) * D::kPack);
      unroll<kVectors>([&](auto v) LBR_INLINE { sum[r][v] = dot_add(p, x[v], sum[r][v]); });
    });
  }
  unroll<kRows * kVectors>([&](auto i) LBR_INLINE {
    store(acc + i / kVectors * acc_stride + i % kVectors * kLanes, sum[i / kVectors][i % kVectors]);
  });
}

constexpr int kValueRows = kLanes == 16 ? 6 : 3;
constexpr int kValueVectors = kLanes == 16 ? 4 : 3;

template <class Element, int kVectors>
static void value_columns(const Element* probability, int rows, const Element* value, int64_t value_stride, int steps,
                          float* acc, int64_t acc_stride, Ahead ahead) {
  constexpr int kPack = Dot<Element>::kPack;
  const int tiles = int(ceil_div(rows, kValueRows));  // each fetches a share of what is ahead
  int r = 0;
  const auto tile = [&](auto count) LBR_INLINE {
    value_tile<Element, count, kVectors>(probability + r * kPack, value, value_stride, steps, acc + r * acc_stride,
                                         acc_stride, ahead, r / kValueRows, tiles);
    r += count;
  };
  while (r + kValueRows <= rows) tile(Index<kValueRows>{});
  switch (rows - r) {
    case 5: return tile(Index<5>{});
    case 4: return tile(Index<4>{});
    case 3: return tile(Index<3>{});
    case 2: return tile(Index<2>{});
    case 1: return tile(Index<1>{});
  }
}

// acc[row] += sum over the block's keys of probability[key][row] * value[key]; `probability` is
// [steps][kTileRows][kPack], `value` is [steps][padded_dim][kPack].
template <class Element>
static void value_block(const Element* probability, int rows, const Element* value, int64_t value_stride, int steps,
                        int64_t padded_dim, float* acc, Ahead ahead) {
  constexpr int kPack = Dot<Element>::kPack;
  const auto columns = [&](auto vectors, int64_t d) LBR_INLINE {
    const Ahead here{ahead.rows ? ahead.rows + d * 4 : nullptr, ahead.stride};
    value_columns<Element, vectors>(probability, rows, value + d * kPack, value_stride, steps, acc + d, padded_dim,
                                    here);
  };
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= padded_dim; d += kValueVectors * kLanes) columns(Index<kValueVectors>{}, d);
  for (; d < padded_dim; d += kLanes) columns(Index<1>{}, d);
}

// The rows of a cache that a block consists of: neighbours in memory, or those that `index` names.
template <class T>
struct Slots {
  const T* first = nullptr;
  int64_t stride = 0;
  const int64_t* index = nullptr;
  const T* operator[](int64_t i) const { return first + (index ? index[i] : i) * stride; }
};

// The first `count` elements of a vector of floats, zeros behind them.
template <class T>
static inline vfloat load_some(const T* p, int64_t count) {
  T some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(T));
  return load(some);
}

// Copies rows as floats, each padded with zeros to a whole number of vectors.
template <class T>
static void stage_rows(const Slots<T>& from, int rows, int64_t dim, int64_t padded_dim, float* to) {
  for (int i = 0; i < rows; ++i, to += padded_dim) {
    const T* row = from[i];
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(row + d));
    if (d < dim) store(to + d, load_some(row + d, dim - d));
  }
}

// Values as the second product reads them: step by step.
template <class T>
static void stage_values(const Slots<T>& from, int rows, int64_t dim, int64_t padded_dim, float* to) {
  stage_rows(from, rows, dim, padded_dim, to);
}

#if defined(LBR_AVX512_BF16)
static void stage_rows(const Slots<BFloat16>& from, int rows, int64_t dim, int64_t padded_dim, BFloat16* to) {
  for (int i = 0; i < rows; ++i, to += padded_dim) {
    std::memcpy(to, from[i], dim * sizeof(BFloat16));
    std::memset(to + dim, 0, (padded_dim - dim) * sizeof(BFloat16));
  }
}

static inline vhalf load_some_halves(const BFloat16* p, int64_t count) {
  vhalf v{};
  std::memcpy(&v, p, smallest(count, kLanes) * sizeof(BFloat16));
  return v;
}

// Two rows interleaved: each pair goes into one dot product. Behind an odd number of rows stands one of zeros.
static void stage_values(const Slots<BFloat16>& from, int rows, int64_t dim, int64_t padded_dim, BFloat16* to) {
  for (int i = 0; i < rows; i += 2, to += 2 * padded_dim) {
    const bool paired = i + 1 < rows;
    const BFloat16 *a = from[i], *b = paired ? from[i + 1] : a;
    int64_t d = 0;
    for (; paired && d + 2 * kLanes <= dim; d += 2 * kLanes)
      store_interleaved(load_packs(a + d), load_packs(b + d), to + 2 * d);
    for (; d < dim; d += kLanes) {
      const vhalf second = paired ? load_some_halves(b + d, dim - d) : vhalf{};
      const vint pairs = interleave(load_some_halves(a + d, dim - d), second);
      std::memcpy(to + 2 * d, &pairs, sizeof pairs);
    }
  }
}
#endif

}  // namespace lbr::LBR_ISA
