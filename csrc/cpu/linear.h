// linear on one instruction set: few rows times a large matrix, at the speed of memory.
//
// The weights are what costs: each is read once, as it lies, and multiplied with all rows while it is in a register.
// The sum runs along the lanes and across them at the end, in an order that depends on nothing but the length of a row,
// so a row's result is the same bits whatever rows stand beside it and however many threads there are. While a tile of
// weights is multiplied the next one is fetched.
#pragma once

#include "../params.h"
#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

constexpr int kWeightRows = kLanes == 16 ? 8 : 4;  // rows of the weight that are worked on together

// sums[row][output] of kRows rows of the input and kOutputs of the weight; `steps` whole vectors and `rest` elements.
template <class T, int kRows, int kOutputs>
static inline void linear_tile(const T* weight, int64_t weight_stride, const typename Dot<T>::Element* input,
                               int64_t input_stride, int64_t steps, int64_t rest, bool more, vfloat* sums) {
  using D = Dot<T>;
  using Vector = typename D::Vector;
  constexpr int64_t kStep = kLanes * D::kPack;
  vfloat acc[kRows][kOutputs];
  unroll<kRows * kOutputs>([&](auto i) LBR_INLINE { acc[i / kOutputs][i % kOutputs] = vfloat{}; });
  const auto multiply = [&](int64_t at, auto&& operand) LBR_INLINE {
    Vector x[kRows];
    unroll<kRows>([&](auto r) LBR_INLINE { x[r] = load_packs(input + r * input_stride + at); });
    unroll<kOutputs>([&](auto o) LBR_INLINE {
      const Vector w = operand(weight + o * weight_stride + at);
      unroll<kRows>([&](auto r) LBR_INLINE { acc[r][o] = dot_add(w, x[r], acc[r][o]); });
    });
  };
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step * kStep;
    if (more) unroll<kOutputs>([&](auto o) LBR_INLINE { prefetch(weight + (kWeightRows + o) * weight_stride + at); });
    multiply(at, [](const T* p) LBR_INLINE { return load_operand(p); });
  }
  if (rest > 0) multiply(steps * kStep, [&](const T* p) LBR_INLINE { return load_operand(p, rest); });
  unroll<kRows * kOutputs>([&](auto i) LBR_INLINE { sums[i] = acc[i / kOutputs][i % kOutputs]; });
}

template <class T>
class FewRowLinear {
  using Element = typename Dot<T>::Element;
  static constexpr int64_t kStep = kLanes * Dot<T>::kPack;
  static constexpr int kMostRows = 6;

 public:
  explicit FewRowLinear(const LinearParams& params) : p(params), input_stride_(round_up(p.inputs, kStep)) {}

  void run(const ThreadPool& pool) {
    load_input();
    // A worker should have some ten microseconds of reading before it is worth waking.
    constexpr int64_t kWork = 1 << 17;  // bytes
    const int64_t block_bytes = kWeightRows * p.inputs * int64_t(sizeof(T)) + 1;
    pool.parallel_for(ceil_div(p.outputs, kWeightRows), largest(1, kWork / block_bytes),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t block = begin; block < end; ++block)
                          run_block(block * kWeightRows, block + 1 < end);
                      });
  }

 private:
  // The input's rows as the products take them, padded with zeros to whole vectors.
  void load_input() {
    input_.resize(p.rows * input_stride_);
    for (int64_t r = 0; r < p.rows; ++r) {
      const T* from = (const T*)p.input + p.row_offsets[r];
      Element* to = &input_[r * input_stride_];
      for (int64_t i = 0; i < p.inputs; ++i) narrow(widen(from[i]), to + i);
      for (int64_t i = p.inputs; i < input_stride_; ++i) to[i] = Element{};
    }
  }

  // Up to kWeightRows outputs of all rows. `more`: the next block is this worker's too.
  void run_block(int64_t output, bool more) const {
    const int64_t count = smallest(kWeightRows, p.outputs - output);
    more &= output + 2 * kWeightRows <= p.outputs;
    for (int64_t row = 0; row < p.rows; row += kMostRows) {
      const bool fetch = more && row == 0;
      switch (smallest(kMostRows, p.rows - row)) {
        case 1: run_rows<1>(row, output, count, fetch); break;
        case 2: run_rows<2>(row, output, count, fetch); break;
        case 3: run_rows<3>(row, output, count, fetch); break;
        case 4: run_rows<4>(row, output, count, fetch); break;
        case 5: run_rows<5>(row, output, count, fetch); break;
        default: run_rows<6>(row, output, count, fetch);
      }
    }
  }

  template <int kRows>
  void run_rows(int64_t row, int64_t output, int64_t count, bool fetch) const {
    constexpr int kOutputs = kRows <= 3 ? kWeightRows : kWeightRows / 2;
    int64_t o = 0;
    for (; o + kOutputs <= count; o += kOutputs) run_tile<kRows, kOutputs>(row, output + o, fetch);
    for (; o < count; ++o) run_tile<kRows, 1>(row, output + o, false);
  }

  template <int kRows, int kOutputs>
  void run_tile(int64_t row, int64_t output, bool fetch) const {
    vfloat sums[kRows * kOutputs];
    linear_tile<T, kRows, kOutputs>((const T*)p.weight + output * p.weight_stride, p.weight_stride,
                                    &input_[row * input_stride_], input_stride_, p.inputs / kStep, p.inputs % kStep,
                                    fetch, sums);
    for (int r = 0; r < kRows; ++r)
      for (int o = 0; o < kOutputs; ++o) {
        const float bias = p.bias ? widen(((const T*)p.bias)[output + o]) : 0.0f;
        narrow(sum_of_lanes(sums[r * kOutputs + o]) + bias, (T*)p.out + (row + r) * p.outputs + output + o);
      }
  }

  const LinearParams& p;
  const int64_t input_stride_;
  Buffer<Element> input_;
};

static void linear(const LinearParams& params, const ThreadPool& pool) {
  switch (params.dtype) {
    case DType::kFloat32: return FewRowLinear<float>(params).run(pool);
    case DType::kFloat16: return FewRowLinear<Float16>(params).run(pool);
    case DType::kBFloat16: return FewRowLinear<BFloat16>(params).run(pool);
  }
}

}  // namespace lbr::LBR_ISA
