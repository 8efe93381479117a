// Vectors of floats for one instruction set, over the compiler's own vector types.
//
// Included once by each isa_*.cpp after it has chosen its target, so every name lives in a namespace of that target
// (LBR_ISA) and nothing here is shared between them. Memory need not be aligned. `fma` is the only fused operation: the
// sources are compiled without contraction, so that a sum means the same on every machine.
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

// 16-bit storage formats; only these two functions know their layout.
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

static inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(LBR_AVX512)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(LBR_AVX2)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline vfloat select(vint condition, vfloat yes, vfloat no) {
  return (vfloat)((condition & (vint)yes) | (~condition & (vint)no));
}

// Of a NaN and a number these give the second operand.
static inline vfloat max(vfloat a, vfloat b) { return select(a > b, a, b); }
static inline vfloat min(vfloat a, vfloat b) { return select(a < b, a, b); }

static inline float horizontal_sum(vfloat v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

static inline float horizontal_max(vfloat v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x within 2 ulp for x <= 88; exactly 0 below -87, so that what is masked by -inf counts for nothing. NaN stays NaN.
static inline vfloat exp(vfloat x) {
  const vfloat round_magic = splat(0x1.8p23f);
  const vfloat clamped = max(splat(-87.0f), min(splat(88.0f), x));
  const vfloat shifted = fma(clamped, splat(1.44269504f), round_magic);
  const vfloat n = shifted - round_magic;
  vfloat r = fma(n, splat(-0x1.62e400p-1f), clamped);  // ln 2 in two parts
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  vfloat p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const vint exponent = (vint)shifted << 23;  // n sits in the low bits of the shifted sum
  return select(x >= splat(-87.0f), (vfloat)((vint)p + exponent), max(splat(0.0f), x));
}

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
