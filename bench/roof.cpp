// What this machine can do at best: bytes read per second from memory, and multiplications per second.
//
// Compiled with -march=native by roof.py and called through ctypes. Each function runs `threads` threads for some
// milliseconds, twice, and returns the rate of the second time. The multiplications are inline assembly, so that no
// compiler spills or removes them.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float vfloat __attribute__((vector_size(4 * kLanes)));

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The time that `work(thread)` takes on all threads at once, from when all of them have started and done it once: by
// then they are awake, their clocks are up, and their share of memory is mapped.
template <class Work>
double together(int threads, const Work& work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  const auto run = [&](int t, bool first) {
    work(t);
    waiting.fetch_add(1);
    while (first ? waiting.load() < threads : !go.load()) {
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t)
    others.emplace_back([&, t] {
      run(t, false);
      work(t);
    });
  run(0, true);
  const double start = seconds();
  go.store(true);
  work(0);
  for (std::thread& thread : others) thread.join();
  return seconds() - start;
}

// Twelve independent chains, more than latency times throughput of any processor.
vfloat multiply_floats(int64_t count) {
  vfloat s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  vfloat x = 1.0f - vfloat{}, y = 1e-3f - vfloat{};
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define LBR_STEP(s) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(s) : "v"(x), "v"(y))
#else
#define LBR_STEP(s) asm volatile("" : "+g"(s = s + x * y))
#endif
  for (int64_t i = 0; i < count; ++i) {
    LBR_STEP(s0);
    LBR_STEP(s1);
    LBR_STEP(s2);
    LBR_STEP(s3);
    LBR_STEP(s4);
    LBR_STEP(s5);
    LBR_STEP(s6);
    LBR_STEP(s7);
    LBR_STEP(s8);
    LBR_STEP(s9);
    LBR_STEP(s10);
    LBR_STEP(s11);
  }
  return s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;
}

#if defined(__AVX512BF16__)
vfloat multiply_bf16_pairs(int64_t count) {
  vfloat s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  __m512i x = _mm512_set1_epi32(0x3f803f80), y = _mm512_set1_epi32(0x3a803a80);
#define LBR_PAIR(s) asm volatile("vdpbf16ps %1, %2, %0" : "+v"(s) : "v"(x), "v"(y))
  for (int64_t i = 0; i < count; ++i) {
    LBR_PAIR(s0);
    LBR_PAIR(s1);
    LBR_PAIR(s2);
    LBR_PAIR(s3);
    LBR_PAIR(s4);
    LBR_PAIR(s5);
    LBR_PAIR(s6);
    LBR_PAIR(s7);
    LBR_PAIR(s8);
    LBR_PAIR(s9);
    LBR_PAIR(s10);
    LBR_PAIR(s11);
  }
  return s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;
}
#endif

volatile float sink;

}  // namespace

// Bytes per second of reading `data`, which should be far larger than the caches.
extern "C" double read_rate(const float* data, int64_t count, int threads) {
  const int64_t share = count / threads / (8 * kLanes) * (8 * kLanes);
  const double time = together(threads, [&](int t) {
    vfloat sum[8] = {};
    for (const float *p = data + t * share, *end = p + share; p < end; p += 8 * kLanes)
      for (int i = 0; i < 8; ++i) {
        vfloat v;
        std::memcpy(&v, p + i * kLanes, sizeof v);
        sum[i] += v;
      }
    vfloat all = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
    sink = all[0];
  });
  return double(share) * threads * sizeof(float) / time;
}

// Floating-point operations per second (a multiplication and an addition are two) in fp32 ...
extern "C" double float_rate(int64_t count, int threads) {
  const double time = together(threads, [&](int) { sink = multiply_floats(count)[0]; });
  return 2.0 * 12 * kLanes * double(count) * threads / time;
}

// ... and of the bf16 dot product that sums in fp32; 0 where the processor has none.
extern "C" double bf16_rate(int64_t count, int threads) {
#if defined(__AVX512BF16__)
  const double time = together(threads, [&](int) { sink = multiply_bf16_pairs(count)[0]; });
  return 2.0 * 2 * 12 * kLanes * double(count) * threads / time;
#else
  return 0 * double(count) * threads;
#endif
}
