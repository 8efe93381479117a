// commit_ on a GPU, as the bindings see it.
#pragma once

#include "../params.h"
#include "primitives.cuh"

namespace lbr::gpu {

// How many caches one launch takes: their description travels by value, in 4 KiB at most. More of them take more
// launches.
constexpr int kMostCaches = 80;

struct CommitWorkspace {
  unsigned* arrivals;  // [batch], zero, and zero again afterwards
  int* flags;          // gets kBadMove where a row's moves cannot be; such a row stays as it is
};

// Throws where the kernels were not compiled for the current device.
void require_commit();

// Nothing is waited for, and nothing of what the pointers in `params` name is read on the host, but for `caches`.
void commit(const CommitParams& params, const CommitWorkspace& workspace, Stream stream);

}  // namespace lbr::gpu
