// The scheduler of the SIMT shim: fibres, warps, blocks, and what is done when a warp or a block has met.
//
// One launch runs at a time, all of it on the thread that launched. At most a few blocks are alive; of their warps the
// one of highest priority runs, and of its lanes the first in the warp's order, until that lane meets others or ends.
// Priorities and orders are random, and are drawn anew now and then (probabilistic concurrency testing), so that a warp
// may fall behind as far as synchronisation lets it. All randomness comes from the seed and the launch's number.
//
// A fault fills Launch::fault and returns to launch(), which throws; the fibres are then dropped where they stand. So
// nothing here keeps an object with a destructor on a fibre's stack across a switch.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "primitives.cuh"

#if !defined(__x86_64__)
#define LBR_SIMT_UCONTEXT
#endif
#ifdef LBR_SIMT_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lbr::gpu::simt {

Thread* running = nullptr;

namespace {

constexpr int kPoison = 0xff;
constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
// So many scheduling points in a row at which no thread came any further are a fault.
constexpr long kPatience = 20'000'000;

// ---- Fibres: a stack of their own, and a switch ----

// Where something that is not running goes on.
struct Context {
#ifdef LBR_SIMT_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* bottom = nullptr;  // the stack, for AddressSanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

Context home;  // of launch()

#ifdef LBR_SIMT_UCONTEXT
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}
void exchange_registers(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
#else
// What the calling convention lets a function keep is kept on the stack that is left. The jump is predicted by its own
// history, where a return would always be mispredicted.
extern "C" void lbr_simt_exchange(void** from, void* to);
asm(R"(
.text
.hidden lbr_simt_exchange
.globl lbr_simt_exchange
.type lbr_simt_exchange, @function
lbr_simt_exchange:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size lbr_simt_exchange, .-lbr_simt_exchange
)");

void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* frame = reinterpret_cast<uint64_t*>(stack + bytes) - 8;  // six registers, the entry, and nowhere to return to
  std::fill(frame, frame + 8, 0);
  frame[6] = reinterpret_cast<uint64_t>(entry);
  context.stack_pointer = frame;
}
void exchange_registers(Context& from, Context& to) { lbr_simt_exchange(&from.stack_pointer, to.stack_pointer); }
#endif

// Returns when somebody switches back to `from`; never, if it leaves for good.
void switch_context(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
  exchange_registers(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// ---- Threads, warps, blocks ----

// A copy from global to shared memory that its thread has not yet waited for.
struct Copy {
  char* to;
  const char* from;  // nullptr for zeros
  uint64_t group;
  Site site;
  bool late;   // the destination is poisoned until the copy arrives
  bool again;  // the source is read when it arrives
  char data[16];
};

struct Waiting {
  Operation operation = Operation::kNone;
  int detail = 0;
  Site site{};
};

bool same(const Waiting& x, const Waiting& y) {
  return x.operation == y.operation && x.detail == y.detail && x.site.line == y.site.line &&
         (x.site.file == y.site.file || std::strcmp(x.site.file, y.site.file) == 0);
}

struct Block;
struct Warp;

struct Fibre : Thread {
  Warp* warp;
  Context context;
  Waiting waiting;
  std::vector<Copy> copies;
  uint64_t groups;  // that it has closed
};

// Threads that come to one place.
struct Meeting {
  Waiting first;
  int arrived = 0;
  bool divergent = false;  // somebody came to another place: they will never meet

  bool complete_with(const Waiting& waiting, int threads) {
    if (arrived++ == 0) first = waiting;
    divergent = divergent || !same(first, waiting);
    return arrived == threads && !divergent;
  }
};

// With the stacks of its fibres, each above a page that cannot be touched.
struct Warp {
  Block* block;
  uint64_t priority;
  uint32_t runnable;  // bit p: the lane order[p]
  uint8_t order[kWarpSize], place[kWarpSize];
  Meeting meeting;
  Exchange exchange;
  Fibre lanes[kWarpSize];

  Warp() {
    void* memory =
        mmap(nullptr, kMapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(memory);
    for (int i = 0; i < kWarpSize; ++i) mprotect(stacks_ + i * (kPage + kStackBytes), kPage, PROT_NONE);
  }
  ~Warp() { munmap(stacks_, kMapped); }
  Warp(const Warp&) = delete;

  char* stack(int lane) const { return stacks_ + lane * (kPage + kStackBytes) + kPage; }
  Fibre& first() { return lanes[order[__builtin_ctz(runnable)]]; }

 private:
  static constexpr size_t kMapped = kWarpSize * (kPage + kStackBytes);
  char* stacks_;
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

struct Block : BlockView {
  int threads;
  int ended;
  Meeting meeting;
  std::unique_ptr<char, Free> memory;
  std::vector<std::unique_ptr<Warp>> warps;  // may be more than the launch has; kept for the next one

  int num_warps() const { return threads / kWarpSize; }
  bool can_go_on() const {
    return std::any_of(warps.begin(), warps.begin() + num_warps(),
                       [](const auto& warp) { return warp->runnable != 0; });
  }
};

// Splitmix64.
struct Random {
  uint64_t state;

  uint64_t operator()() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  uint64_t below(uint64_t limit) { return (*this)() % limit; }
  template <class T>
  void shuffle(T* items, size_t count) {
    for (size_t i = count; i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
};

struct Launch {
  const Kernel& kernel;
  Random random;
  uint64_t change_interval;  // meetings of warps from one change of a priority to the next, on average
  uint64_t until_change;
  uint64_t scheduling_odds;  // one in so many scheduling points changes a priority
  long without_progress = 0;
  bool faulty = false;
  char fault[512];
};

std::mutex alone;
Configuration configured;
uint64_t next_launch = 0;
Launch* now = nullptr;
std::vector<std::unique_ptr<Block>> pool;  // the blocks that may be alive

Fibre& self() { return *static_cast<Fibre*>(running); }

const char* short_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash == nullptr ? file : slash + 1;
}

void go_home(Fibre& fibre, bool for_good = false) {
  running = nullptr;
  switch_context(fibre.context, home, for_good);
}

// The next lane of the warp goes on, which may be the same one, or else launch() chooses a warp.
void go_on(Fibre& fibre) {
  Warp& warp = *fibre.warp;
  if (warp.runnable == 0) return go_home(fibre);
  Fibre& next = warp.first();
  if (&next == &fibre) return;
  running = &next;
  switch_context(fibre.context, next.context);
}

void stop(Fibre& fibre, const Waiting& waiting) {
  fibre.waiting = waiting;
  fibre.warp->runnable &= ~(1u << fibre.warp->place[fibre.lane]);
}

[[noreturn, gnu::format(printf, 2, 3)]] void fault(Site site, const char* format, ...) {
  Fibre& fibre = self();
  char what[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  const Grid& block = fibre.block->index;
  std::snprintf(now->fault, sizeof now->fault, "%s, at %s:%d, block (%u, %u, %u), thread %d", what,
                short_name(site.file), site.line, block.x, block.y, block.z, fibre.index);
  now->faulty = true;
  go_home(fibre, true);
  __builtin_unreachable();
}

// The warp gets another priority, and its lanes another order.
void redraw(Warp& warp) {
  uint32_t lanes = 0;
  for (int p = 0; p < kWarpSize; ++p) lanes |= (warp.runnable >> p & 1u) << warp.order[p];
  warp.priority = now->random();
  now->random.shuffle(warp.order, kWarpSize);
  warp.runnable = 0;
  for (int p = 0; p < kWarpSize; ++p) {
    warp.place[warp.order[p]] = uint8_t(p);
    warp.runnable |= (lanes >> warp.order[p] & 1u) << p;
  }
}

void enter() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (home.bytes == 0) {  // the launch's first fibre, which launch() has switched to
    home.bottom = bottom;
    home.bytes = bytes;
  }
#endif
  now->kernel.run(now->kernel);
  Fibre& fibre = self();
  if (!fibre.copies.empty()) {
    fault(fibre.copies[0].site, "thread ended with %zu copies in flight, the first one started", fibre.copies.size());
  }
  stop(fibre, {Operation::kEnded, 0, {"", 0}});
  ++fibre.warp->block->ended;
  now->without_progress = 0;
  if (fibre.warp->runnable == 0) go_home(fibre, true);
  running = &fibre.warp->first();
  switch_context(fibre.context, self().context, true);
}

// ---- The warp's operations ----

template <class T>
void multiply(Exchange& exchange) {
  constexpr int kSide = 8, kMatrix = kSide * kSide;
  uint16_t bits[6 * kMatrix];
  float wide[6 * kMatrix];  // four quadrants of a, two halves of the transposed b
  std::memcpy(bits, exchange.a, sizeof exchange.a);
  std::memcpy(bits + 4 * kMatrix, exchange.b, sizeof exchange.b);
  for (int i = 0; i < 6 * kMatrix; ++i) wide[i] = to_float(T{bits[i]});

  using Four = float __attribute__((vector_size(16)));
  alignas(16) float b[2 * kSide][kSide];
  for (int k = 0; k < 2 * kSide; ++k) {
    for (int n = 0; n < kSide; ++n) b[k][n] = wide[(4 + k / kSide) * kMatrix + n * kSide + k % kSide];
  }
  for (int m = 0; m < 2 * kSide; ++m) {
    Four c[2];
    std::memcpy(c, &exchange.c[m / kSide][m % kSide * 4], sizeof c);
    for (int k = 0; k < 2 * kSide; ++k) {
      const float a = wide[(k / kSide * 2 + m / kSide) * kMatrix + m % kSide * kSide + k % kSide];
      Four row[2];
      std::memcpy(row, b[k], sizeof row);
      c[0] += a * row[0];
      c[1] += a * row[1];
    }
    std::memcpy(&exchange.c[m / kSide][m % kSide * 4], c, sizeof c);
  }
}

void load(Exchange& exchange, bool transposed) {
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], exchange.row[8 * m + i], sizeof matrix[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      exchange.matrix[m][lane] = high << 16 | low;
    }
  }
}

void execute(const Waiting& met, Exchange& exchange) {
  switch (met.operation) {
    case Operation::kShuffle:
      for (int lane = 0; lane < kWarpSize; ++lane) exchange.received[lane] = exchange.sent[lane ^ met.detail];
      break;
    case Operation::kShuffleUp:
      for (int lane = 0; lane < kWarpSize; ++lane)
        exchange.received_up[lane] = exchange.sent_up[lane < met.detail ? lane : lane - met.detail];
      break;
    case Operation::kBallot:
      exchange.votes = 0;
      for (int lane = 0; lane < kWarpSize; ++lane) exchange.votes |= unsigned(exchange.voted[lane]) << lane;
      break;
    case Operation::kLoadMatrices: load(exchange, false); break;
    case Operation::kLoadMatricesTransposed: load(exchange, true); break;
    case Operation::kMultiplyHalf: multiply<Half>(exchange); break;
    case Operation::kMultiplyBFloat16: multiply<BFloat16>(exchange); break;
    default: break;
  }
}

// ---- Launches ----

std::string describe(const Waiting& waiting) {
  std::string name;
  switch (waiting.operation) {
    case Operation::kBarrier: name = "block_barrier"; break;
    case Operation::kShuffle: name = "shuffle_xor by " + std::to_string(waiting.detail); break;
    case Operation::kShuffleUp: name = "shuffle_up by " + std::to_string(waiting.detail); break;
    case Operation::kBallot: name = "ballot"; break;
    case Operation::kLoadMatrices: name = "load_matrices"; break;
    case Operation::kLoadMatricesTransposed: name = "load_matrices_transposed"; break;
    case Operation::kMultiplyHalf: name = "multiply_accumulate<Half>"; break;
    case Operation::kMultiplyBFloat16: name = "multiply_accumulate<BFloat16>"; break;
    case Operation::kEnded: return "have ended";
    case Operation::kNone: return "can go on";
  }
  return "wait at " + std::string(short_name(waiting.site.file)) + ":" + std::to_string(waiting.site.line) + " (" +
         name + ")";
}

// What the threads of a block are doing of which none can go on.
std::string describe_divergence(const Block& block) {
  struct Group {
    Waiting waiting;
    int threads, first;
  };
  std::vector<Group> groups;
  bool barrier = false;
  for (int t = 0; t < block.threads; ++t) {
    const Waiting& waiting = block.warps[size_t(t / kWarpSize)]->lanes[t % kWarpSize].waiting;
    barrier = barrier || waiting.operation == Operation::kBarrier;
    const auto group =
        std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return same(g.waiting, waiting); });
    if (group == groups.end()) {
      groups.push_back({waiting, 1, t});
    } else {
      ++group->threads;
    }
  }
  std::string text = barrier ? "divergent barrier" : "divergent warp";
  for (const Group& group : groups) {
    text += (&group == groups.data() ? ": " : ", ") + std::to_string(group.threads) + " threads (first " +
            std::to_string(group.first) + ") " + describe(group.waiting);
  }
  const Grid& index = block.index;
  return text + "; block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

void start(Block& block, Grid index, int threads, int shared_bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, size_t(shared_bytes)) != 0) throw std::bad_alloc();
  if (shared_bytes > 0) std::memset(memory, kPoison, size_t(shared_bytes));
  block.memory.reset(static_cast<char*>(memory));
  static_cast<BlockView&>(block) = {index, block.memory.get(), shared_bytes};
  block.threads = threads;
  block.ended = 0;
  block.meeting = {};
  while (int(block.warps.size()) < block.num_warps()) block.warps.push_back(std::make_unique<Warp>());
  for (int w = 0; w < block.num_warps(); ++w) {
    Warp& warp = *block.warps[w];
    warp.block = &block;
    warp.runnable = ~0u;
    warp.meeting = {};
    std::iota(warp.order, warp.order + kWarpSize, uint8_t(0));
    redraw(warp);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Fibre& fibre = warp.lanes[lane];
      static_cast<Thread&>(fibre) = {w * kWarpSize + lane, lane, &warp.exchange, &block};
      fibre.warp = &warp;
      fibre.waiting = {};
      fibre.copies.clear();
      fibre.groups = 0;
      char* stack = warp.stack(lane);
      fibre.context.bottom = stack;
      fibre.context.bytes = kStackBytes;
#ifdef __SANITIZE_ADDRESS__
      ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // what a dropped fibre has left
#endif
      // Stacks that all begin at the same offset in a page would share a few lines of the cache.
      prepare(fibre.context, stack, kStackBytes - size_t(fibre.index) * 704 % kPage / 16 * 16, enter);
    }
  }
}

// Runs the blocks `waiting`, the last one first. Returns the fault, or nothing.
std::string run_blocks(std::vector<Grid>& waiting, int resident, int threads, int shared_bytes) {
  while (int(pool.size()) < resident) pool.push_back(std::make_unique<Block>());
  std::vector<Block*> alive;
  const auto start_next = [&](Block* block) {
    start(*block, waiting.back(), threads, shared_bytes);
    waiting.pop_back();
    alive.push_back(block);
  };
  for (int i = 0; i < resident && !waiting.empty(); ++i) start_next(pool[size_t(i)].get());
  while (!alive.empty()) {
    Warp* best = nullptr;
    for (Block* block : alive) {
      for (int w = 0; w < block->num_warps(); ++w) {
        Warp* warp = block->warps[size_t(w)].get();
        if (warp->runnable != 0 && (best == nullptr || warp->priority > best->priority)) best = warp;
      }
    }
    running = &best->first();
    switch_context(home, self().context);
    if (now->faulty) return now->fault;
    Block* block = best->block;
    if (block->can_go_on()) continue;
    if (block->ended != block->threads) return describe_divergence(*block);
    block->memory.reset();
    alive.erase(std::find(alive.begin(), alive.end(), block));
    if (!waiting.empty()) start_next(block);
  }
  return {};
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("launch: " + what);
}

}  // namespace

void configure(const Configuration& configuration) {
  const std::lock_guard<std::mutex> lock(alone);
  configured = configuration;
  next_launch = configuration.first_launch;
}

const Configuration& configuration() { return configured; }

void launch(const Kernel& kernel, Grid grid, int threads, int shared_bytes, bool cooperative, Site site) {
  const std::lock_guard<std::mutex> lock(alone);
  require(grid.x > 0 && grid.y > 0 && grid.z > 0, "the grid is empty");
  require(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "the grid has more blocks than CUDA takes");
  require(threads > 0 && threads <= 1024 && threads % kWarpSize == 0,
          std::to_string(threads) + " threads in a block; a multiple of 32 up to 1024 is accepted");
  require(shared_bytes >= 0 && shared_bytes <= configured.device.shared_bytes_per_block,
          std::to_string(shared_bytes) + " bytes of shared memory; a block can have " +
              std::to_string(configured.device.shared_bytes_per_block));

  const uint64_t number = next_launch++;
  Random random{Random{configured.seed}() + number};
  random.state = random();
  const uint64_t all = uint64_t(grid.x) * grid.y * grid.z;
  require(!cooperative || all <= uint64_t(configured.device.multiprocessors),
          std::to_string(all) + " blocks that run side by side; this device holds " +
              std::to_string(configured.device.multiprocessors));
  const int some = 1 + int(random.below(uint64_t(configured.resident_blocks)));
  const int resident = cooperative ? int(all) : some;
  std::vector<Grid> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  random.shuffle(blocks.data(), blocks.size());
  const uint64_t change_interval = uint64_t(16) << random.below(9), scheduling_odds = uint64_t(2)
                                                                                      << 2 * random.below(3);

  Launch state{kernel, random, change_interval, 1 + change_interval, scheduling_odds, 0, false, {}};
  now = &state;
  home = {};
  std::string fault;
  try {
    fault = run_blocks(blocks, resident, threads, shared_bytes);
  } catch (...) {
    now = nullptr;
    throw;
  }
  now = nullptr;
  if (fault.empty()) return;
  for (const auto& block : pool) block->memory.reset();
  throw std::runtime_error(fault + "; launched at " + short_name(site.file) + ":" + std::to_string(site.line) +
                           ", seed " + std::to_string(configured.seed) + ", launch " + std::to_string(number));
}

void meet_block(Site site) {
  Fibre& fibre = self();
  Block& block = *fibre.warp->block;
  const Waiting waiting{Operation::kBarrier, 0, site};
  stop(fibre, waiting);
  if (!block.meeting.complete_with(waiting, block.threads)) return go_on(fibre);
  block.meeting = {};
  for (int w = 0; w < block.num_warps(); ++w) block.warps[size_t(w)]->runnable = ~0u;
  now->without_progress = 0;
  go_home(fibre);  // another warp may have a higher priority
}

void meet_warp(Operation operation, int detail, Site site) {
  Fibre& fibre = self();
  Warp& warp = *fibre.warp;
  const Waiting waiting{operation, detail, site};
  const bool shuffle = operation == Operation::kShuffle || operation == Operation::kShuffleUp;
  if (shuffle && (detail < 0 || detail >= kWarpSize)) {
    fault(site, "shuffle_%s by %d, which names no lane", operation == Operation::kShuffle ? "xor" : "up", detail);
  }
  stop(fibre, waiting);
  if (!warp.meeting.complete_with(waiting, kWarpSize)) return go_on(fibre);
  execute(waiting, warp.exchange);
  warp.meeting = {};
  warp.runnable = ~0u;
  now->without_progress = 0;
  if (--now->until_change > 0) return go_on(fibre);
  now->until_change = 1 + now->random.below(2 * now->change_interval);
  redraw(warp);
  go_home(fibre);
}

void scheduling_point(Site site) {
  Fibre& fibre = self();
  if (++now->without_progress > kPatience) {
    fault(site, "no progress: a thread seems to wait for one that cannot run");
  }
  if (now->random.below(now->scheduling_odds) != 0) return;
  redraw(*fibre.warp);
  go_home(fibre);
}

void yield(Site site) {
  Fibre& fibre = self();
  if (++now->without_progress > kPatience) {
    fault(site, "no progress: a thread seems to wait for one that cannot run");
  }
  redraw(*fibre.warp);
  go_home(fibre);
}

void start_copy(void* shared, const void* global, bool valid, Site site) {
  Fibre& fibre = self();
  const ptrdiff_t offset = static_cast<char*>(shared) - fibre.block->shared;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fault(site, "copy to a misaligned address: offset %td", offset);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fault(site, "copy from a misaligned address: %p", global);
  if (offset < 0 || offset + 16 > fibre.block->shared_bytes) {
    fault(site, "copy to offset %td of shared memory, which has %d bytes", offset, fibre.block->shared_bytes);
  }
  const uint64_t coins = now->random();
  Copy copy{static_cast<char*>(shared), nullptr, fibre.groups, site, (coins >> 62 & 1) != 0, (coins >> 63) != 0, {}};
  if (valid) {  // read in any case, so that the sanitizer's report names this place
    copy.from = static_cast<const char*>(global);
    std::memcpy(copy.data, copy.from, sizeof copy.data);
  }
  if (copy.late) {
    std::memset(copy.to, kPoison, sizeof copy.data);
  } else {
    std::memcpy(copy.to, copy.data, sizeof copy.data);
  }
  fibre.copies.push_back(copy);
}

void commit_copies() { ++self().groups; }

void finish_copies(int pending) {
  Fibre& fibre = self();
  auto copy = fibre.copies.begin();
  for (; copy != fibre.copies.end() && copy->group + uint64_t(pending) < fibre.groups; ++copy) {
    if (!copy->late) continue;
    if (copy->again && copy->from != nullptr) std::memcpy(copy->data, copy->from, sizeof copy->data);
    std::memcpy(copy->to, copy->data, sizeof copy->data);
  }
  fibre.copies.erase(fibre.copies.begin(), copy);
}

void check_row(const void* row, Site site) {
  const BlockView& block = *running->block;
  const ptrdiff_t offset = static_cast<const char*>(row) - block.shared;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fault(site, "matrix row at a misaligned address: offset %td", offset);
  if (offset < 0 || offset + 16 > block.shared_bytes) {
    fault(site, "matrix row at offset %td of shared memory, which has %d bytes", offset, block.shared_bytes);
  }
}

}  // namespace lbr::gpu::simt
