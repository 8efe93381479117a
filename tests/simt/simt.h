// The primitives of csrc/cuda/primitives.cuh for a CPU: a kernel compiles unchanged, its threads run as fibres.
//
// Included by primitives.cuh in the place of its CUDA half, never by itself; README.md beside this file says what a run
// can show. A primitive puts what it is given into its warp's Exchange and calls simt.cpp, which stops the fibre until
// the other lanes have arrived, or reports a fault: launch() then throws. All collectives, and whatever else can be at
// fault, take the place that called them as a last argument that nobody writes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>

#define LBR_KERNEL(threads, blocks) void
#define LBR_PARAMETER const
#define LBR_DEVICE inline
#define LBR_HOST_DEVICE inline

namespace lbr::gpu {

using Stream = void*;

namespace simt {

// A place in the source; as a default argument, the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Operation {
  kNone,  // the thread is not waiting
  kBarrier,
  kShuffle,
  kShuffleUp,
  kBallot,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyHalf,
  kMultiplyBFloat16,
  kEnded,  // nor will it ever
};

// What the lanes of a warp hand to each other. Each operation has fields of its own: a lane that is ahead may be
// handing over for the next one while others have not yet fetched what the last one gave them. Four registers of 16-bit
// pairs are, lane after lane, 8x8 matrices in row-major order, as PTX lays them out; so are the accumulators.
struct Exchange {
  alignas(64) uint32_t a[4][kWarpSize];       // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
  alignas(64) uint32_t b[2][kWarpSize];       // columns of rows 0-7, then of rows 8-15
  alignas(64) float c[2][kWarpSize][2];       // rows 0-7, then rows 8-15
  alignas(64) uint32_t matrix[4][kWarpSize];  // what load_matrices has loaded
  const char* row[kWarpSize];                 // from where
  uint64_t sent[kWarpSize], received[kWarpSize];
  uint64_t sent_up[kWarpSize], received_up[kWarpSize];
  bool voted[kWarpSize];
  unsigned votes;
};

struct BlockView {
  Grid index;
  char* shared;
  int shared_bytes;
};

struct Thread {
  int index, lane;
  Exchange* exchange;
  const BlockView* block;
};

struct Configuration {
  uint64_t seed = 0;
  uint64_t first_launch = 0;  // the number of the next launch
  int resident_blocks = 3;    // at most so many blocks are alive at a time
  Device device{3, 233472, 232448};
  int without = 0;  // the line at which synchronisation is left out, in whatever file; 0: nowhere
};

// A kernel and its parameters, their types forgotten.
struct Kernel {
  void (*run)(const Kernel&);
  void (*function)();
  const void* params;
};

extern Thread* running;

void configure(const Configuration& configuration);
const Configuration& configuration();
void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, bool cooperative, Site site);

// Both stop the thread until all others of its block or warp have come to the same place with the same detail. The lane
// that arrives last carries out a warp's operation on its Exchange.
void meet_block(Site site);
void meet_warp(Operation operation, int detail, Site site);

// Another warp may go on here, of this block or of another one.
void scheduling_point(Site site);

// Another warp goes on here, should there be one that can.
void yield(Site site);

void start_copy(void* shared, const void* global, bool valid, Site site);
void commit_copies();
void finish_copies(int pending);
void check_row(const void* row, Site site);

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

// Without branches, so that loops over it are vectorised.
inline float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // infinity and NaN: the largest exponent here, too
  const uint32_t subnormal = to_bits(from_bits((113u << 23) | (magnitude << 13)) - from_bits(113u << 23));
  const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude < 0x0400u ? subnormal : normal;
  return from_bits(bits | uint32_t(x.bits & 0x8000u) << 16);
}

// Rounded to nearest, ties to even. NaN becomes the NaN that PTX's conversions give.
inline uint16_t round_to(BFloat16, float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = to_bits(x);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t round_to(Half, float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= to_bits(65520.f)) return uint16_t(sign | 0x7c00u);
  if (magnitude < to_bits(0x1p-14f)) {
    // The sum's last bit is worth 2^-24, the smallest subnormal: the addition rounds.
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

inline void load(Operation operation, uint32_t (&r)[4], const void* row, Site site) {
  check_row(row, site);
  const Thread& self = *running;
  Exchange& exchange = *self.exchange;
  exchange.row[self.lane] = static_cast<const char*>(row);
  meet_warp(operation, 0, site);
  for (int m = 0; m < 4; ++m) r[m] = exchange.matrix[m][self.lane];
}

}  // namespace simt

inline int thread_index() { return simt::running->index; }
inline Grid block_index() { return simt::running->block->index; }

// Fresh in every block, of exactly the size asked for, and full of 0xFF bytes: NaN in all three types, -1 in integers.
inline char* shared_memory() { return simt::running->block->shared; }

inline void block_barrier(simt::Site site = simt::Site::here()) {
  if (site.line != simt::configuration().without) simt::meet_block(site);
}

template <class T>
T shuffle_xor(T value, int lane_mask, simt::Site site = simt::Site::here()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  const simt::Thread& self = *simt::running;
  std::memcpy(&self.exchange->sent[self.lane], &value, sizeof value);
  simt::meet_warp(simt::Operation::kShuffle, lane_mask, site);
  std::memcpy(&value, &self.exchange->received[self.lane], sizeof value);
  return value;
}

template <class T>
T shuffle_up(T value, int delta, simt::Site site = simt::Site::here()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  const simt::Thread& self = *simt::running;
  std::memcpy(&self.exchange->sent_up[self.lane], &value, sizeof value);
  simt::meet_warp(simt::Operation::kShuffleUp, delta, site);
  std::memcpy(&value, &self.exchange->received_up[self.lane], sizeof value);
  return value;
}

inline unsigned ballot(bool value, simt::Site site = simt::Site::here()) {
  const simt::Thread& self = *simt::running;
  self.exchange->voted[self.lane] = value;
  simt::meet_warp(simt::Operation::kBallot, 0, site);
  return self.exchange->votes;
}

inline void fence(simt::Site site = simt::Site::here()) { simt::scheduling_point(site); }

// Fibres share one thread of the processor, so that a plain operation is atomic. Others may come before and after it.
template <class T>
T atomic_add(T* word, std::common_type_t<T> value, simt::Site site = simt::Site::here()) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  simt::scheduling_point(site);
  const T before = *word;
  *word = before + value;
  simt::scheduling_point(site);
  return before;
}
inline unsigned atomic_max(unsigned* word, unsigned value, simt::Site site = simt::Site::here()) {
  simt::scheduling_point(site);
  const unsigned before = *word;
  if (value > before) *word = value;
  simt::scheduling_point(site);
  return before;
}

inline void atomic_or(int* word, int bits, simt::Site site = simt::Site::here()) {
  simt::scheduling_point(site);
  *word |= bits;
  simt::scheduling_point(site);
}

inline void wait_until(const unsigned* counter, unsigned value, simt::Site site = simt::Site::here()) {
  while (*static_cast<const volatile unsigned*>(counter) < value) simt::yield(site);
}

template <class T>
T load_shared_by_blocks(const T* p, simt::Site site = simt::Site::here()) {
  simt::scheduling_point(site);
  return *p;
}

inline void copy_async_16(void* shared, const void* global, bool valid, simt::Site site = simt::Site::here()) {
  simt::start_copy(shared, global, valid, site);
}
inline void copy_async_commit(simt::Site site = simt::Site::here()) {
  if (site.line != simt::configuration().without) simt::commit_copies();
}
template <int kPending>
void copy_async_wait(simt::Site site = simt::Site::here()) {
  static_assert(kPending >= 0);
  if (site.line != simt::configuration().without) simt::finish_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here()) {
  simt::load(simt::Operation::kLoadMatrices, r, row, site);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here()) {
  simt::load(simt::Operation::kLoadMatricesTransposed, r, row, site);
}

template <class T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         simt::Site site = simt::Site::here()) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  const simt::Thread& self = *simt::running;
  simt::Exchange& exchange = *self.exchange;
  for (int i = 0; i < 4; ++i) exchange.a[i][self.lane] = a[i];
  exchange.b[0][self.lane] = b0;
  exchange.b[1][self.lane] = b1;
  for (int i = 0; i < 4; ++i) exchange.c[i / 2][self.lane][i % 2] = c[i];
  constexpr bool kHalf = std::is_same_v<T, Half>;
  simt::meet_warp(kHalf ? simt::Operation::kMultiplyHalf : simt::Operation::kMultiplyBFloat16, 0, site);
  for (int i = 0; i < 4; ++i) c[i] = exchange.c[i / 2][self.lane][i % 2];
}

template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(simt::round_to(T{}, high)) << 16 | simt::round_to(T{}, low);
}

inline float exp2(float x) {
  const float y = std::exp2(x);  // 1 for whatever is subnormal
  return y < 0x1p-126f ? 0.f : y;
}
inline float log2(float x) { return std::log2(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float erf(float x) { return std::erf(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline double exp(double x) { return std::exp(x); }
inline double log(double x) { return std::log(x); }
inline float max(float a, float b) { return std::fmax(a, b); }

// The build forbids contraction.
inline double multiply(double a, double b) { return a * b; }
inline double add(double a, double b) { return a + b; }
inline double subtract(double a, double b) { return a - b; }

inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }
inline int lowest_bit(uint64_t x) { return __builtin_ctzll(x); }

inline Device current_device() { return simt::configuration().device; }

template <class Params>
void require_kernel(void (* /*kernel*/)(Params)) {}

inline unsigned* allocate_counters(int64_t count) { return new unsigned[count](); }

inline bool is_capturing(Stream /*stream*/) { return false; }

namespace simt {
template <class Params>
void launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, const Params& params, bool cooperative,
            Site site) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096, "what CUDA takes by value");
  const auto run = [](const Kernel& erased) {
    reinterpret_cast<void (*)(Params)>(erased.function)(*static_cast<const Params*>(erased.params));
  };
  launch({run, reinterpret_cast<void (*)()>(kernel), &params}, grid, threads, shared_bytes, cooperative, site);
}
}  // namespace simt

// Runs the kernel to its end. Throws std::runtime_error where CUDA would refuse the launch, and on a kernel's fault.
template <class Params>
void launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream, const Params& params,
            simt::Site site = simt::Site::here()) {
  simt::launch(kernel, grid, threads, shared_bytes, params, false, site);
}
template <class Params>
void launch_cooperative(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, Stream, const Params& params,
                        simt::Site site = simt::Site::here()) {
  simt::launch(kernel, grid, threads, shared_bytes, params, true, site);
}

// The device holds one block of a multiprocessor at a time, as if registers or shared memory left no room for more.
template <class Params>
int resident_blocks(void (* /*kernel*/)(Params), int /*threads*/, int /*shared_bytes*/) {
  return simt::configuration().device.multiprocessors;
}

}  // namespace lbr::gpu
