// commit_ on a GPU: prune and shift in place, all layers' keys and values in one launch.
//
// A column is a few bytes, the largest unit that everything is aligned to, at one place of one head of one cache of one
// row, in all slots. One thread owns it and walks its moves upwards, so that no move of a column can overtake another:
// spread over threads, node 1 of a tree of width 3 and depth 2 could be overwritten before it has been read. Sources
// ascend, and move i writes slot i and reads slot sources[i] >= i. So whatever a move overwrites, the moves after it
// never read, and a few of them can be loaded before the first of them is stored.
//
// Every thread reads its row's length and moves before it arrives at the row's counter; whoever arrives last lets the
// prefix grow.
#include <algorithm>

#include "commit.h"
#include "flags.h"

namespace lbr::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // moves of a column

struct CommitLaunch {
  struct Cache {
    char* data;
    int64_t batch_stride, head_stride, slot_stride;  // in bytes
    int32_t units;                                   // of a head's slot
    int32_t end;                                     // columns of a row in this cache and all before it
  };
  Cache caches[kMostCaches];
  int32_t num_caches, blocks;  // blocks: per row
  int32_t max_moves, slots;
  bool advances;  // the last launch of a commit
  int32_t* prefix_lens;
  const int32_t* sources;
  int64_t sources_stride;
  const int32_t *num_moves, *advance;
  int32_t advance_all;
  CommitWorkspace workspace;
};

struct alignas(16) Unit16 {
  uint64_t words[2];
};

class RowMoves {
 public:
  LBR_DEVICE RowMoves(const CommitLaunch& launch, int row)
      : sources_(launch.sources + row * launch.sources_stride),
        length_(launch.prefix_lens[row]),
        count_(launch.num_moves ? launch.num_moves[row] : launch.max_moves),
        advance_(launch.advance ? launch.advance[row] : launch.advance_all) {}

  LBR_DEVICE int length() const { return length_; }
  LBR_DEVICE int count() const { return count_; }
  LBR_DEVICE int advance() const { return advance_; }
  LBR_DEVICE int source(int i) const { return sources_[i]; }

  LBR_DEVICE bool can_be(const CommitLaunch& launch) const {
    if (count_ == 0) return true;
    if (count_ < 0 || count_ > launch.max_moves || advance_ < 0 || advance_ > count_ || length_ < 0) return false;
    int last = -1;
    for (int i = 0; i < count_; ++i) {
      const int source = sources_[i];
      if (source <= last) return false;
      last = source;
    }
    return launch.slots < 0 || int64_t(length_) + last < launch.slots;
  }

 private:
  const int32_t* const sources_;
  const int length_, count_, advance_;
};

// The column's place in slot 0.
LBR_DEVICE char* column_start(const CommitLaunch& launch, int row, int column, int unit_bytes, int64_t& slot_stride) {
  int low = 0, high = launch.num_caches - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (column < launch.caches[middle].end) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const CommitLaunch::Cache& cache = launch.caches[low];
  column -= low > 0 ? launch.caches[low - 1].end : 0;
  slot_stride = cache.slot_stride;
  return cache.data + row * cache.batch_stride + column / cache.units * cache.head_stride +
         column % cache.units * unit_bytes;
}

template <class Unit>
LBR_KERNEL(kThreads, 8)
commit_kernel(LBR_PARAMETER CommitLaunch launch) {
  const int row = int(block_index().x) / launch.blocks, block = int(block_index().x) % launch.blocks;
  const RowMoves moves(launch, row);
  const bool good = moves.can_be(launch);
  const int columns = launch.num_caches > 0 ? launch.caches[launch.num_caches - 1].end : 0;
  const int column = block * kThreads + thread_index();
  if (good && moves.count() > 0 && column < columns) {
    int64_t slot_stride;
    char* const tree = column_start(launch, row, column, sizeof(Unit), slot_stride) + moves.length() * slot_stride;
    for (int first = 0; first < moves.count(); first += kInFlight) {
      Unit units[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (first + i < moves.count())
          units[i] = *reinterpret_cast<const Unit*>(tree + moves.source(first + i) * slot_stride);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (first + i < moves.count()) *reinterpret_cast<Unit*>(tree + (first + i) * slot_stride) = units[i];
    }
  }
  if (!launch.advances) return;
  block_barrier();  // all threads of this block have read the row's length
  if (thread_index() > 0) return;
  fence();
  if (atomic_add(launch.workspace.arrivals + row, 1u) != unsigned(launch.blocks - 1)) return;
  fence();
  launch.workspace.arrivals[row] = 0;  // for the next launch
  if (!good) {
    atomic_or(launch.workspace.flags, kBadMove);
  } else if (moves.count() > 0) {
    launch.prefix_lens[row] = moves.length() + moves.advance();
  }
}

// The largest unit that all places of all columns are multiples of.
int64_t unit_bytes(const CommitParams& p) {
  int64_t unit = 16;
  for (int64_t c = 0; c < p.num_caches; ++c) {
    const CommitParams::Cache& cache = p.caches[c];
    const int64_t batch = p.batch > 1 ? cache.batch_stride : 0, head = cache.heads > 1 ? cache.head_stride : 0;
    const int64_t all =
        int64_t(reinterpret_cast<uintptr_t>(cache.data)) | batch | head | cache.slot_stride | cache.row_bytes;
    while (all % unit != 0) unit /= 2;
  }
  return unit;
}

void launch_units(int64_t unit, const CommitLaunch& launch, int64_t batch, Stream stream) {
  const Grid grid{unsigned(batch * launch.blocks)};
  switch (unit) {
    case 16: return gpu::launch(commit_kernel<Unit16>, grid, kThreads, 0, stream, launch);
    case 8: return gpu::launch(commit_kernel<uint64_t>, grid, kThreads, 0, stream, launch);
    case 4: return gpu::launch(commit_kernel<uint32_t>, grid, kThreads, 0, stream, launch);
    case 2: return gpu::launch(commit_kernel<uint16_t>, grid, kThreads, 0, stream, launch);
    default: return gpu::launch(commit_kernel<uint8_t>, grid, kThreads, 0, stream, launch);
  }
}

}  // namespace

void require_commit() { require_kernel(commit_kernel<Unit16>); }

void commit(const CommitParams& p, const CommitWorkspace& workspace, Stream stream) {
  const int64_t unit = unit_bytes(p);
  CommitLaunch launch{};
  launch.max_moves = int32_t(p.max_moves);
  launch.slots = int32_t(p.slots);
  launch.prefix_lens = p.prefix_lens;
  launch.sources = p.sources;
  launch.sources_stride = p.sources_stride;
  launch.num_moves = p.num_moves;
  launch.advance = p.advance;
  // A number that no row can advance by stays one.
  launch.advance_all = int32_t(std::clamp<int64_t>(p.advance_all, -1, INT32_MAX));
  launch.workspace = workspace;
  for (int64_t first = 0; first == 0 || first < p.num_caches; first += kMostCaches) {
    const int64_t end = std::min<int64_t>(first + kMostCaches, p.num_caches);
    int64_t columns = 0;
    launch.num_caches = int32_t(end - first);
    for (int64_t c = first; c < end; ++c) {
      const CommitParams::Cache& cache = p.caches[c];
      columns += cache.heads * (cache.row_bytes / unit);
      launch.caches[c - first] = {
          cache.data,      cache.batch_stride, cache.head_stride, cache.slot_stride, int32_t(cache.row_bytes / unit),
          int32_t(columns)};
    }
    launch.blocks = int32_t(std::max<int64_t>((columns + kThreads - 1) / kThreads, 1));
    launch.advances = end == p.num_caches;
    launch_units(unit, launch, p.batch, stream);
  }
}

}  // namespace lbr::gpu
