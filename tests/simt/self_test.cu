// Small kernels for the tests of the shim itself (tests/test_simt.py), some of them wrong on purpose.
//
// All take the same parameters: what a pointer or a number means is said beside the kernel that uses it.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block_group.cuh"
#include "primitives.cuh"

namespace lbr::gpu {
namespace {

struct Arguments {
  void* pointers[4];
  int numbers[4];

  template <class T>
  T* pointer(int i) const {
    return static_cast<T*>(pointers[i]);
  }
};

// Two rounds in which each thread reads what another one wrote: `numbers` = threads, distance to the other one, bit 0:
// barrier before the reads, bit 1: barrier after them. Pointer 0: int32 [2, threads].
LBR_KERNEL(1024, 1) rotate(LBR_PARAMETER Arguments p) {
  const int threads = p.numbers[0], t = thread_index();
  auto* shared = reinterpret_cast<int*>(shared_memory());
  for (int round = 0; round < 2; ++round) {
    shared[t] = round * threads + t;
    if (p.numbers[2] & 1) block_barrier();
    p.pointer<int>(0)[round * threads + t] = shared[(t + p.numbers[1]) % threads];
    if (p.numbers[2] & 2) block_barrier();
  }
}

// All threads write to one word, as often as number 0 says. Pointer 0: int32 [rounds], who was the last.
LBR_KERNEL(1024, 1) race(LBR_PARAMETER Arguments p) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  for (int round = 0; round < p.numbers[0]; ++round) {
    shuffle_xor(0, 1);
    *shared = thread_index();
    block_barrier();
    p.pointer<int>(0)[round] = *shared;
    block_barrier();
  }
}

// The first numbers[0] threads of the block go another way in this kernel and the next four.
LBR_KERNEL(1024, 1) end_before_barrier(LBR_PARAMETER Arguments p) {
  if (thread_index() < p.numbers[0]) block_barrier();
}

LBR_KERNEL(1024, 1) two_barriers(LBR_PARAMETER Arguments p) {
  if (thread_index() < p.numbers[0]) {
    block_barrier();
  } else {
    block_barrier();
  }
}

LBR_KERNEL(1024, 1) shuffle_by_some(LBR_PARAMETER Arguments p) {
  if (thread_index() < p.numbers[0]) shuffle_xor(1, 1);
}

LBR_KERNEL(1024, 1) barrier_beside_shuffle(LBR_PARAMETER Arguments p) {
  if (thread_index() < p.numbers[0]) shuffle_xor(1, 1);
  block_barrier();
}

LBR_KERNEL(1024, 1) two_masks(LBR_PARAMETER Arguments p) { shuffle_xor(1, thread_index() < p.numbers[0] ? 1 : 2); }

// Pointers 0 and 1: float [threads] to what comes out of it. Number 0: mask.
LBR_KERNEL(1024, 1) shuffle(LBR_PARAMETER Arguments p) {
  const int t = thread_index();
  p.pointer<float>(1)[t] = shuffle_xor(p.pointer<float>(0)[t], p.numbers[0]);
}

// Pointers: int32 [threads], int32 [threads] what shuffle_up by number 0 gives, uint32 [threads] the votes for odd
// ones.
LBR_KERNEL(1024, 1) shuffle_up_and_ballot(LBR_PARAMETER Arguments p) {
  const int t = thread_index(), value = p.pointer<int>(0)[t];
  p.pointer<int>(1)[t] = shuffle_up(value, p.numbers[0]);
  p.pointer<unsigned>(2)[t] = ballot(value % 2 != 0);
}

// Two groups of 16 bytes a thread, then wait<1>, a barrier, and all of shared memory goes out. Pointer 0: int32
// [2, threads, 4], pointer 1: likewise. `numbers` = threads, threads whose copies are valid, whether the rest is waited
// for.
LBR_KERNEL(1024, 1) copy(LBR_PARAMETER Arguments p) {
  const int t = thread_index(), threads = p.numbers[0];
  const bool valid = t < p.numbers[1];
  auto* shared = reinterpret_cast<int*>(shared_memory());
  for (int group = 0; group < 2; ++group) {
    const int at = (group * threads + t) * 4;
    copy_async_16(shared + at, valid ? p.pointer<int>(0) + at : nullptr, valid);
    copy_async_commit();
  }
  copy_async_wait<1>();
  block_barrier();
  for (int i = t; i < 8 * threads; i += threads) p.pointer<int>(1)[i] = shared[i];
  block_barrier();
  if (p.numbers[2]) copy_async_wait<0>();
}

// One copy by thread 0. Pointer 0: source; `numbers` = byte offset in shared memory, byte offset in the source.
LBR_KERNEL(1024, 1) copy_to(LBR_PARAMETER Arguments p) {
  if (thread_index() > 0) return;
  copy_async_16(shared_memory() + p.numbers[0], p.pointer<char>(0) + p.numbers[1], true);
  copy_async_commit();
  copy_async_wait<0>();
}

// Pointers: shared memory's 16-byte rows, int32 [32] the byte offset each lane names, uint32 [32, 4] what it gets.
// `numbers` = bytes of shared memory, transposed.
LBR_KERNEL(32, 1) load(LBR_PARAMETER Arguments p) {
  const int t = thread_index();
  for (int i = t; i < p.numbers[0]; i += 32) shared_memory()[i] = p.pointer<char>(0)[i];
  block_barrier();
  uint32_t r[4];
  const char* row = shared_memory() + p.pointer<int>(1)[t];
  if (p.numbers[1]) {
    load_matrices_transposed(r, row);
  } else {
    load_matrices(r, row);
  }
  for (int i = 0; i < 4; ++i) p.pointer<uint32_t>(2)[4 * t + i] = r[i];
}

// Pointers: uint32 [blocks, 32, 4] a, [blocks, 32, 2] b, float [blocks, 32, 4] c, read and written. `numbers` =
// repetitions.
template <class T>
LBR_KERNEL(32, 1)
products(LBR_PARAMETER Arguments p) {
  const int lane = int(block_index().x) * 32 + thread_index();
  const uint32_t* from = p.pointer<uint32_t>(0) + 4 * lane;
  const uint32_t a[4] = {from[0], from[1], from[2], from[3]};
  const uint32_t* b = p.pointer<uint32_t>(1) + 2 * lane;
  float* to = p.pointer<float>(2) + 4 * lane;
  float c[4] = {to[0], to[1], to[2], to[3]};
  for (int i = 0; i < p.numbers[0]; ++i) multiply_accumulate<T>(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) to[i] = c[i];
}

// Each block draws a ticket, sets a bit, and counts once more without an atomic. Pointers: uint32 [2] counters, uint32
// [blocks] tickets, int32 [blocks / 32] bits. The grid is [x, 2].
LBR_KERNEL(32, 1) count(LBR_PARAMETER Arguments p) {
  if (thread_index() > 0) return;
  const Grid index = block_index();
  const int block = int(index.x * 2 + index.y);
  p.pointer<unsigned>(1)[block] = atomic_add(p.pointer<unsigned>(0), 1);
  atomic_or(p.pointer<int>(2) + block / 32, int(1u << block % 32));
  unsigned* counter = p.pointer<unsigned>(0) + 1;
  const unsigned before = load_shared_by_blocks(counter);
  fence();
  *counter = before + 1;
}

// All threads of all blocks add to a sum of 64 bits and raise a maximum. Pointers: uint64 [1], uint32 [1].
LBR_KERNEL(1024, 1) sum_and_maximum(LBR_PARAMETER Arguments p) {
  const unsigned me = block_index().x * 1000 + unsigned(thread_index());
  atomic_add(p.pointer<unsigned long long>(0), (1ull << 40) + me);
  atomic_max(p.pointer<unsigned>(1), me);
}

// In each round a block writes its number and reads the next block's of that round. Pointers: uint32 [1] counter, int32
// [rounds, blocks], int32 [rounds, blocks] what was read. `numbers` = rounds, blocks, blocks that the group counts.
LBR_KERNEL(64, 1) meet(LBR_PARAMETER Arguments p) {
  const int rounds = p.numbers[0], blocks = p.numbers[1], me = int(block_index().x);
  BlockGroup group(p.pointer<unsigned>(0), p.numbers[2]);
  for (int round = 0; round < rounds; ++round) {
    if (thread_index() == 40) p.pointer<int>(1)[round * blocks + me] = 100 * round + me;
    group.barrier();
    const int next = round * blocks + (me + 1) % blocks;
    if (thread_index() == 7) p.pointer<int>(2)[next] = load_shared_by_blocks(p.pointer<int>(1) + next);
  }
  group.leave();
}

// Waits for a value that nobody writes.
LBR_KERNEL(32, 1) wait_for_ever(LBR_PARAMETER Arguments p) {
  while (load_shared_by_blocks(p.pointer<float>(0)) == 0.f) {
  }
}

// The source of a copy is written to while it is in flight. Pointers: int32 [32, 4] source, int32 [32, 4] what arrives.
LBR_KERNEL(32, 1) overwrite_source(LBR_PARAMETER Arguments p) {
  const int t = thread_index();
  auto* shared = reinterpret_cast<int*>(shared_memory());
  copy_async_16(shared + 4 * t, p.pointer<int>(0) + 4 * t, true);
  copy_async_commit();
  for (int i = 0; i < 4; ++i) p.pointer<int>(0)[4 * t + i] = 1;
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) p.pointer<int>(1)[4 * t + i] = shared[4 * t + i];
}

// Shared memory as it is found, `numbers[0]` words of it; with `numbers[1]` a word is written behind its end.
LBR_KERNEL(1024, 1) fresh(LBR_PARAMETER Arguments p) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  for (int i = 0; i < p.numbers[0]; ++i) p.pointer<int>(0)[i] = shared[i];
  if (p.numbers[1]) shared[p.numbers[0]] = 1;
}

// Pointer 0: float [numbers[0]], 1: uint32 packed with the negative above, 2 likewise in bfloat16, 3: float [5, n]
// exp2, log2, tanh, max(x, 1), max(1, x).
LBR_KERNEL(32, 1) convert(LBR_PARAMETER Arguments p) {
  const int n = p.numbers[0];
  float* functions = p.pointer<float>(3);
  for (int i = thread_index(); i < n; i += 32) {
    const float x = p.pointer<float>(0)[i];
    p.pointer<uint32_t>(1)[i] = pack<Half>(x, -x);
    p.pointer<uint32_t>(2)[i] = pack<BFloat16>(x, -x);
    functions[i] = exp2(x);
    functions[n + i] = log2(x);
    functions[2 * n + i] = tanh(x);
    functions[3 * n + i] = max(x, 1.f);
    functions[4 * n + i] = max(1.f, x);
  }
}

// Pointers: float [32], fp64 [6, 32] erf, sqrt, exp, log of its square, and x * x - 1 in steps that are not fused.
LBR_KERNEL(32, 1) functions(LBR_PARAMETER Arguments p) {
  const int t = thread_index();
  const float x = p.pointer<float>(0)[t];
  double* to = p.pointer<double>(1) + t;
  to[0] = erf(x);
  to[32] = sqrt(x * x);
  to[64] = exp(double(x));
  to[96] = log(double(x) * double(x));
  to[128] = subtract(multiply(double(x) / 3, double(x) / 3), 1);
  to[160] = add(multiply(double(x) / 3, double(x) / 3), 1);
}

// Pointers: int64 [32], int32 [32, 2] number of bits, lowest bit.
LBR_KERNEL(32, 1) bits(LBR_PARAMETER Arguments p) {
  const int t = thread_index();
  const uint64_t x = p.pointer<uint64_t>(0)[t];
  p.pointer<int>(1)[2 * t] = count_bits(x);
  p.pointer<int>(1)[2 * t + 1] = lowest_bit(x);
}

const std::pair<const char*, void (*)(Arguments)> kKernels[] = {
    {"rotate", rotate},
    {"race", race},
    {"end_before_barrier", end_before_barrier},
    {"two_barriers", two_barriers},
    {"shuffle_by_some", shuffle_by_some},
    {"barrier_beside_shuffle", barrier_beside_shuffle},
    {"two_masks", two_masks},
    {"shuffle", shuffle},
    {"shuffle_up_and_ballot", shuffle_up_and_ballot},
    {"sum_and_maximum", sum_and_maximum},
    {"functions", functions},
    {"copy", copy},
    {"copy_to", copy_to},
    {"load", load},
    {"multiply_half", products<Half>},
    {"multiply_bfloat16", products<BFloat16>},
    {"count", count},
    {"wait_for_ever", wait_for_ever},
    {"overwrite_source", overwrite_source},
    {"fresh", fresh},
    {"convert", convert},
    {"bits", bits},
};

void run(const std::string& name, const std::vector<uintptr_t>& pointers, const std::vector<int>& numbers,
         const std::vector<unsigned>& grid, int threads, int shared_bytes) {
  Arguments arguments{};
  for (size_t i = 0; i < pointers.size(); ++i) arguments.pointers[i] = reinterpret_cast<void*>(pointers.at(i));
  for (size_t i = 0; i < numbers.size(); ++i) arguments.numbers[i] = numbers.at(i);
  if (name == "meet") {
    return launch_cooperative(meet, {grid.at(0), grid.at(1), grid.at(2)}, threads, shared_bytes, {}, arguments);
  }
  for (const auto& [known, kernel] : kKernels) {
    if (name == known)
      return launch(kernel, {grid.at(0), grid.at(1), grid.at(2)}, threads, shared_bytes, {}, arguments);
  }
  throw std::invalid_argument("no kernel " + name);
}

}  // namespace

namespace simt {

void bind(pybind11::module_& module) {
  module.def("run", run);
  module.def("device", [] {
    const Device device = current_device();
    return std::vector<int>{device.multiprocessors, device.shared_bytes_per_multiprocessor,
                            device.shared_bytes_per_block};
  });
}

}  // namespace simt
}  // namespace lbr::gpu
