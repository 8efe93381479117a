// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LBR_AVX2
#define LBR_ISA avx2
#define LBR_KERNELS kAvx2Kernels
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
