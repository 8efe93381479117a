#include "kernels.h"

namespace lbr {

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// Every processor with AVX2 has F16C too, for which some compilers know no name here.
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const CpuKernels* cpu_kernels(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return &kPortableKernels;
#if defined(__x86_64__)
    case Isa::kAvx2: return has_avx2() ? &kAvx2Kernels : nullptr;
    case Isa::kAvx512: return has_avx512() ? &kAvx512Kernels : nullptr;
    case Isa::kAvx512Bf16: return has_avx512_bf16() ? &kAvx512Bf16Kernels : nullptr;
    case Isa::kBest:
      return has_avx512_bf16() ? &kAvx512Bf16Kernels
             : has_avx512()    ? &kAvx512Kernels
             : has_avx2()      ? &kAvx2Kernels
                               : &kPortableKernels;
#else
    case Isa::kBest: return &kPortableKernels;
#endif
    default: return nullptr;
  }
}

}  // namespace lbr
