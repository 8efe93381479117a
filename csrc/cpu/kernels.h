// The CPU kernels, once per instruction set, and the choice between them.
#pragma once

#include "../params.h"

namespace lbr {

// Values of the ops' `isa` argument; kBest is the last of the others that this processor has.
enum class Isa : int64_t { kBest, kPortable, kAvx2, kAvx512, kAvx512Bf16, kCount };

struct CpuKernels {
  void (*linear)(const LinearParams&, const ThreadPool&);
  void (*tree_attention)(const TreeAttentionParams&, const ThreadPool&);
  void (*packed_tree_attention)(const PackedTreeAttentionParams&, const ThreadPool&);
  void (*packed_tree_attention_backward)(const PackedTreeAttentionBackwardParams&, const ThreadPool&);
  void (*sample_children)(const SampleChildrenParams&, const ThreadPool&);
  void (*route)(const RouteParams&, const ThreadPool&);
};

// Null if this processor, or the compiler that built this file, lacks the instruction set.
const CpuKernels* cpu_kernels(Isa isa);

// Needs no instruction set: it only moves bytes.
void commit(const CommitParams& params, const ThreadPool& pool);

}  // namespace lbr
