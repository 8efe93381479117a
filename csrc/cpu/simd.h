// Vectors of floats for one instruction set, over the compiler's own vector types.
//
// Included once by each isa_*.cpp after it has chosen its target, so every name lives in a namespace of that target
// (LBR_ISA) and nothing here is shared between them. Memory need not be aligned. `fma` and `dot_add` are the only fused
// operations: the sources are compiled without contraction, so that a sum means the same on every machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lbr::LBR_ISA {

#if defined(LBR_AVX512)
constexpr int kLanes = 16;
#elif defined(LBR_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

// unroll<N>(f) calls f(Index<0>{}), ..., f(Index<N - 1>{}). Arrays that are indexed by these constants, and only they,
// are kept in registers; a loop over them is unrolled too late for that, and every access goes to the stack.
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

#define LBR_INLINE __attribute__((always_inline))

template <int N, int I = 0, class F>
LBR_INLINE static inline void unroll(const F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

constexpr int64_t kCacheLine = 64;  // bytes

// Not the compiler's builtin: a loop that does nothing else is taken for empty, and removed.
static inline void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*(const char*)p));
#else
  __builtin_prefetch(p);
#endif
}

// 16-bit storage formats; only the functions of this file know their layout.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// x - 0 is x, also for -0, so compilers make a broadcast of it; 0 + x is not.
static inline vfloat splat(float x) { return x - vfloat{}; }

template <class V, class T>
static inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

static inline vfloat load(const float* p) { return load_as<vfloat>(p); }
static inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

static inline vfloat load(const BFloat16* p) {
  typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
  return (vfloat)(__builtin_convertvector(load_as<vhalf>(p), vuint) << 16);
}

static inline float widen(float x) { return x; }

static inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

static inline float widen(Float16 x) {
  // Shift the fields into place and let a multiplication by 2^112 rescale the exponent, subnormals included.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t bits = magnitude;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  f *= 0x1p112f;
  std::memcpy(&bits, &f, sizeof f);
  if (magnitude >= 0x0f800000) bits |= 0x7f800000;  // infinities and NaN keep the largest exponent
  bits |= sign;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

static inline vfloat load(const Float16* p) {
#if defined(LBR_AVX512)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(LBR_AVX2)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

static inline void narrow(float x, float* out) { *out = x; }

static inline void narrow(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  out->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t(rounded >> 16);
}

static inline void narrow(float x, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out->bits = sign | 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    out->bits = sign | 0x7c00;  // rounds past the largest finite value
  } else if (bits < 0x38800000) {
    // Subnormal: adding 1/2 leaves the wanted bits, correctly rounded, at the bottom of the mantissa.
    float f;
    std::memcpy(&f, &bits, sizeof f);
    f += 0.5f;
    std::memcpy(&bits, &f, sizeof f);
    out->bits = sign | uint16_t(bits - 0x3f000000);
  } else {
    const uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1);
    out->bits = sign | uint16_t((rounded - 0x38000000) >> 13);
  }
}

// Rounded to nearest, as narrow does.
static inline void store(BFloat16* p, vfloat v) {
  typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
  const vuint bits = (vuint)v, is_nan = (vuint)(v != v);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  const vhalf halves = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), vhalf);
  std::memcpy(p, &halves, sizeof halves);
}

static inline void store(Float16* p, vfloat v) {
#if defined(LBR_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(LBR_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p + i);
#endif
}

static inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(LBR_AVX512)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(LBR_AVX2)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(LBR_AVX512)
// Vectors of two halves.
static inline vfloat swap_halves(vfloat v) { return (vfloat)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e); }
static inline vfloat join_halves(const float* low, const float* high) {
  return (vfloat)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
static inline void split_halves(vfloat v, float* low, float* high) {
  _mm256_storeu_ps(low, _mm512_castps512_ps256((__m512)v));
  _mm256_storeu_ps(high, _mm512_extractf32x8_ps((__m512)v, 1));
}
// The low half of one, the high half of the other.
template <class V>
static inline V blend_halves(V low, V high) {
  return (V)_mm512_mask_blend_ps(0xff00, (__m512)low, (__m512)high);
}
#endif

// How a kernel multiplies what is stored as T: `kPack` neighbours of type `Element` in one step, which dot_add sums up.
template <class T>
struct Dot {
  using Element = float;  // 16-bit formats are widened first
  using Vector = vfloat;
  static constexpr int kPack = 1;
};

static inline vfloat load_packs(const float* p) { return load(p); }
static inline vfloat splat_pack(const float* p) { return splat(*p); }
#if defined(LBR_AVX512)
static inline vfloat load_packs_twice(const float* p) { return join_halves(p, p); }
#endif
static inline vfloat dot_add(vfloat a, vfloat b, vfloat c) { return fma(a, b, c); }

#if defined(LBR_AVX512_BF16)
template <>
struct Dot<BFloat16> {
  using Element = BFloat16;
  using Vector = vint;  // each lane holds a pair
  static constexpr int kPack = 2;
};

static inline vint load_packs(const BFloat16* p) { return load_as<vint>(p); }

static inline vint load_packs_twice(const BFloat16* p) {
  return (vint)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
}

static inline vint splat_pack(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return (vint)_mm512_set1_epi32(pair);
}

static inline vfloat dot_add(vint a, vint b, vfloat c) {
  return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

// a0 b0 a1 b1 ... of the two halves of [a0 ... a15 b0 ... b15].
static inline vint interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vint)_mm512_permutexvar_epi16(order, halves);
}

static inline vint interleave(vhalf a, vhalf b) {
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1));
}

// The same for 32 elements each.
static inline void store_interleaved(vint a, vint b, BFloat16* p) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)a, low, (__m512i)b));
  _mm512_storeu_si512(p + 32, _mm512_permutex2var_epi16((__m512i)a, high, (__m512i)b));
}

// Both rounded to nearest.
static inline vint interleave(vfloat a, vfloat b) {
  return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// The same for the two halves of one vector: eight pairs.
static inline void store_interleaved_halves(vfloat v, float* p) {
  const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutexvar_epi16(order, halves));
}
#endif

// A vector of what is stored as T, as dot_add takes it; the second form reads `count` elements, zeros stand behind
// them.
template <class T>
static inline typename Dot<T>::Vector load_operand(const T* p) {
  if constexpr (Dot<T>::kPack == 1) {
    return load(p);
  } else {
    return load_packs(p);
  }
}

template <class T>
static inline typename Dot<T>::Vector load_operand(const T* p, int64_t count) {
  T some[kLanes * Dot<T>::kPack] = {};
  std::memcpy(some, p, count * sizeof(T));
  return load_operand(some);
}

static inline vfloat select(vint condition, vfloat yes, vfloat no) {
  return (vfloat)((condition & (vint)yes) | (~condition & (vint)no));
}

// Of a NaN and a number these give the second operand.
#if defined(LBR_AVX512)
static inline vfloat max(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vfloat min(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline vfloat max(vfloat a, vfloat b) { return select(a > b, a, b); }
static inline vfloat min(vfloat a, vfloat b) { return select(a < b, a, b); }
#endif

// Lanes where a >= b, as bits.
static inline uint32_t at_least(vfloat a, vfloat b) {
#if defined(LBR_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(LBR_AVX2)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
#endif
}

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

static inline float horizontal_sum(vfloat v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Pairwise, so in few steps and with a small error.
static inline float sum_of_lanes(vfloat v) {
#if defined(LBR_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float part[kLanes];
  store(part, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
#endif
}

static inline float horizontal_max(vfloat v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

constexpr float kLog2E = 1.44269504f;

// 2^x within 1 ulp for x <= 127; exactly 0 below -126, so that what is masked by -inf counts for nothing. NaN stays
// NaN.
static inline vfloat exp2(vfloat x) {
#if defined(LBR_AVX512)
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const vfloat r = x - n;
#else
  const vfloat clamped = max(splat(-126.0f), min(splat(127.0f), x));
  const vfloat shifted = clamped + 0x1.8p23f;  // n sits in its low bits
  const vfloat r = clamped - (shifted - 0x1.8p23f);
#endif
  // The polynomial of least relative error on [-1/2, 1/2].
  vfloat p = splat(0x1.41d334p-13f);
  p = fma(p, r, splat(0x1.5f456ap-10f));
  p = fma(p, r, splat(0x1.3b2dbcp-7f));
  p = fma(p, r, splat(0x1.c6aed4p-5f));
  p = fma(p, r, splat(0x1.ebfbdap-3f));
  p = fma(p, r, splat(0x1.62e430p-1f));
  p = fma(p, r, splat(1.0f));
#if defined(LBR_AVX512)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
#else
  return select(x >= splat(-126.0f), (vfloat)((vint)p + ((vint)shifted << 23)), max(splat(0.0f), x));
#endif
}

// e^x for |x| < 87, relative error 6e-8 (1 + |x|); 0 below.
static inline vfloat exp(vfloat x) { return exp2(x * kLog2E); }

// Within 2 ulp: near 0, where 1 - 2 / (e^2x + 1) cancels, the odd polynomial of the Cephes library.
static inline vfloat tanh(vfloat x) {
  const vfloat wide = splat(1.0f) - splat(2.0f) / (exp(max(splat(-40.0f), min(splat(40.0f), x + x))) + 1.0f);
  const vfloat x2 = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = fma(p, x2, splat(2.06390887954e-2f));
  p = fma(p, x2, splat(-5.37397155531e-2f));
  p = fma(p, x2, splat(1.33314422036e-1f));
  p = fma(p, x2, splat(-3.33332819422e-1f));
  return select(x2 < splat(0.390625f), fma(p * x2, x, x), wide);
}

}  // namespace lbr::LBR_ISA
