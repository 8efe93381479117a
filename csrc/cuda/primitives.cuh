// What the kernels use of a GPU, and nothing else: one name per primitive, all PTX in this file.
//
// Kernels are written on these names alone. With LBR_SIMT defined the same names come from tests/simt/simt.h, which
// runs a kernel's threads as fibres on a CPU (tests/simt/README.md says what that can show and what it cannot).
// "Collective" means: called by all 32 threads of a warp, or by all threads of a block, from the same place in the
// source.
#pragma once

#include <cstdint>

namespace lbr::gpu {

// Storage of the two types that tensor cores take. Arithmetic is done in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// 16 bytes, which move as one.
struct alignas(16) Float4 {
  float v[4];
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// What a plan of a launch depends on.
struct Device {
  int multiprocessors;
  int shared_bytes_per_multiprocessor;
  int shared_bytes_per_block;
};

constexpr int kWarpSize = 32;
constexpr int kSharedBytesReservedPerBlock = 1024;

}  // namespace lbr::gpu

#ifdef LBR_SIMT
#include "simt.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// A kernel takes one parameter struct by value. At least `blocks` of its blocks shall fit a multiprocessor.
#define LBR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LBR_PARAMETER __grid_constant__ const
#define LBR_DEVICE __device__ __forceinline__
#define LBR_HOST_DEVICE __host__ __device__ __forceinline__

namespace lbr::gpu {

using Stream = cudaStream_t;

#ifdef __CUDACC__  // what follows is for kernels; host code that includes this is compiled by the C++ compiler

LBR_DEVICE int thread_index() { return int(threadIdx.x); }
LBR_DEVICE Grid block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }

// The block's dynamic shared memory, aligned to 128 bytes. Nothing is known of what it holds.
LBR_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Collective over the block: what was written to shared or global memory before it is seen by all its threads after it.
LBR_DEVICE void block_barrier() { __syncthreads(); }

// Collective over the warp.
template <class T>
LBR_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Collective over the warp: the value of the lane `delta` below; the lowest lanes keep their own.
template <class T>
LBR_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, unsigned(delta));
}

// Collective over the warp: bit i says what lane i has given.
LBR_DEVICE unsigned ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// Writes that this thread has made, or has seen through a barrier, are seen by whoever sees its later atomics.
LBR_DEVICE void fence() { __threadfence(); }

// Atomics on global or shared memory, which return what was there before.
LBR_DEVICE unsigned atomic_add(unsigned* word, unsigned value) { return atomicAdd(word, value); }
LBR_DEVICE unsigned long long atomic_add(unsigned long long* word, unsigned long long value) {
  return atomicAdd(word, value);
}
LBR_DEVICE unsigned atomic_max(unsigned* word, unsigned value) { return atomicMax(word, value); }

// Sets bits of a word in global memory.
LBR_DEVICE void atomic_or(int* word, int bits) { atomicOr(word, bits); }

// Returns once a counter in global memory, to which other blocks add, is at least `value`; what they wrote before is
// seen from then on. Only in launches whose blocks are all resident together.
LBR_DEVICE void wait_until(const unsigned* counter, unsigned value) {
  unsigned seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < value);
}

// Reads of global memory that other blocks of the same launch have written: from L2, the only cache that they share.
template <class T>
LBR_DEVICE T load_shared_by_blocks(const T* p) {
  return __ldcg(p);
}
LBR_DEVICE Float4 load_shared_by_blocks(const Float4* p) {
  const float4 loaded = __ldcg(reinterpret_cast<const float4*>(p));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16 bytes. Where not `valid`, nothing is read
// and the 16 bytes become zero. The data are there for this thread after copy_async_wait, for others after a barrier
// too.
LBR_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Closes a group: the copies that this thread has started since the last one.
LBR_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of this thread's groups but the last `kPending` have arrived.
template <int kPending>
LBR_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Collective over the warp: four 8x8 matrices of 16-bit elements out of shared memory. Lane i names row i % 8 of matrix
// i / 8 (16 bytes, aligned). Register m of lane i receives elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of matrix
// m; transposed, of its column i / 4.
LBR_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
LBR_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// Collective over the warp: c += a b for a 16x16, b 16x8, c 16x8 in fp32, fragments as PTX's mma.m16n8k16 lays them
// out.
template <class T>
LBR_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
LBR_DEVICE void multiply_accumulate<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
LBR_DEVICE void multiply_accumulate<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to nearest, the first in the lower half.
template <class T>
LBR_DEVICE uint32_t pack(float low, float high);

template <>
LBR_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
LBR_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Within two units in the last place. In 2^x subnormal numbers count as zero.
LBR_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LBR_DEVICE float log2(float x) { return ::log2f(x); }
LBR_DEVICE float tanh(float x) { return ::tanhf(x); }
LBR_DEVICE float erf(float x) { return ::erff(x); }
LBR_DEVICE float sqrt(float x) { return ::sqrtf(x); }
LBR_DEVICE double exp(double x) { return ::exp(x); }
LBR_DEVICE double log(double x) { return ::log(x); }
LBR_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }  // of a number and NaN the number

// Rounded to nearest each by itself, never fused.
LBR_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
LBR_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
LBR_DEVICE double subtract(double a, double b) { return __dsub_rn(a, b); }

LBR_DEVICE int count_bits(uint64_t x) { return __popcll(x); }
LBR_DEVICE int lowest_bit(uint64_t x) { return __ffsll(int64_t(x)) - 1; }  // of a word that is not 0

#endif

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next one to ask would be told
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline Device current_device() {
  int index = 0;
  Device device{};
  check(cudaGetDevice(&index), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index),
        "cudaDevAttrMultiProcessorCount");
  check(cudaDeviceGetAttribute(&device.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                               index),
        "cudaDevAttrMaxSharedMemoryPerMultiprocessor");
  check(cudaDeviceGetAttribute(&device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "cudaDevAttrMaxSharedMemoryPerBlockOptin");
  return device;
}

// Throws where a kernel was not compiled for the current device.
template <class Params>
void require_kernel(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
}

// Counters at zero in memory that is never freed, also while a stream of this thread is being captured.
inline unsigned* allocate_counters(int64_t count) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* counters = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaMalloc(&counters, count * sizeof(unsigned));
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMemsetAsync(counters, 0, count * sizeof(unsigned), stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (stream != nullptr) cudaStreamDestroy(stream);
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  check(error, "the counters' memory");
  return static_cast<unsigned*>(counters);
}

// Whether the stream is part of a capture.
inline bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

template <class Params>
void allow_shared_memory(void (*kernel)(Params), int shared_bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncAttributeMaxDynamicSharedMemorySize");
}

// Enqueues a launch. The kernel's parameters travel by value; nothing is waited for.
template <class Params>
void launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream stream, const Params& params) {
  allow_shared_memory(kernel, shared_bytes);
  // Else the driver may leave too little of the L1 for as many blocks as were planned.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncAttributePreferredSharedMemoryCarveout");
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads), arguments,
                         shared_bytes, stream),
        "cudaLaunchKernel");
}

// How many blocks of a kernel the current device holds at a time.
template <class Params>
int resident_blocks(void (*kernel)(Params), int threads, int shared_bytes) {
  allow_shared_memory(kernel, shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks * current_device().multiprocessors;
}

// The same launch, of at most resident_blocks blocks, which run side by side and may wait for each other.
template <class Params>
void launch_cooperative(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream stream,
                        const Params& params) {
  allow_shared_memory(kernel, shared_bytes);
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads),
                                    arguments, size_t(shared_bytes), stream),
        "cudaLaunchCooperativeKernel");
}

}  // namespace lbr::gpu

#endif
