// sample_children and top_children on a GPU, as the bindings see them: how the work is cut, launch it. No torch, no
// CUDA types but the stream's.
#pragma once

#include <cstdint>

#include "../params.h"
#include "flags.h"
#include "primitives.cuh"

namespace lbr::gpu {

// What a block of threads is, and what it has in shared memory.
struct SampleChildrenBlockShape {
  using Word = unsigned long long;

  static constexpr int kThreads = 512, kWarps = kThreads / kWarpSize;
  static constexpr int kResidentBlocks = 1;  // that the registers allow on a multiprocessor
  static constexpr int kBinBits = 11, kBins = 1 << kBinBits;
  static constexpr int kPieces = 128;       // of a block's part of a row
  static constexpr int kCandidates = 1024;  // that top_children merges at most
  // A group of blocks fills a histogram in global memory while the one before may be read and the one before that is
  // cleared.
  static constexpr int kHistograms = 3;
  static constexpr int kCounterLine = 32;  // what blocks wait for has a line of the cache for itself

  struct Bin {
    Word before, size;
    int place;
  };
  struct Shared {
    alignas(16) unsigned lows[kBins];   // a histogram, empty unless it is being filled: the lower halves of its sums,
    alignas(16) unsigned highs[kBins];  // which native atomics add to, and the upper ones
    Word piece_sums[kPieces];
    unsigned piece_ties[kPieces];
    Word candidates[kCandidates];
    Word of_warps[2][kWarps];  // they take turns
    Word bin_sums[kWarps];
    Bin bin;
    int first_tie;
  };
};

struct SampleChildrenPlan {
  int blocks;  // that share the vocabulary of one row
  int groups;  // of so many blocks; each takes one row after the other
  // What the workspace must hold: 64-bit words per block, which may hold anything, and counters per group, which must
  // be zero, and are again afterwards.
  int words, counters;
};

struct SampleChildrenWorkspace {
  unsigned long long* words;
  unsigned* counters;
  int* flags;  // gets kBadLogits or kBadDraw for values that cannot be; the row's tokens are -1, its log-probabilities
               // NaN
};

// How many of `resident` blocks shall share a row of `vocabulary` tokens when there are `rows` of them; `most` at most.
int choose_blocks(int64_t rows, int64_t vocabulary, int resident, int64_t most);

// Chosen from shapes and device alone: rows and what filters them may lie in the device's memory.
SampleChildrenPlan plan_sample_children(const SampleChildrenParams& params);

// Throws where the kernels were not compiled for the current device.
void require_sample_children();

// One launch, for at least one row; `status` is not used. Nothing is waited for, and nothing of what the pointers name
// is read on the host.
void sample_children(const SampleChildrenParams& params, const SampleChildrenPlan& plan,
                     const SampleChildrenWorkspace& workspace, Stream stream);

// The parameter of the kernels.
struct SampleChildrenLaunch {
  SampleChildrenParams params;
  SampleChildrenPlan plan;
  SampleChildrenWorkspace workspace;
};

}  // namespace lbr::gpu
