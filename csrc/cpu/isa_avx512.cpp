// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define LBR_AVX512
#define LBR_ISA avx512
#define LBR_KERNELS kAvx512Kernels
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
