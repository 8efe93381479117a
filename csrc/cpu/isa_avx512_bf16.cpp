// The kernels for AVX-512 (F, BW, DQ, VL) with its dot product of bf16 pairs.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define LBR_AVX512
#define LBR_AVX512_BF16
#define LBR_ISA avx512_bf16
#define LBR_KERNELS kAvx512Bf16Kernels
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
