// How packed_tree_attention's work is cut: blocks of queries, and slices of blocks that workers take.
//
// A slice is a run of blocks of one tree, for one key head. Slices cost about the same, and where they are cut depends
// on the tree and on shapes alone, so that sums come out the same for any number of workers and in any batch. A key
// whose subtree reaches into several slices has a share of its gradient from each: it is `shared`, and the shares are
// added in order.
#pragma once

#include "../params.h"
#include "matrix_tiles.h"
#include "support.h"

namespace lbr::LBR_ISA {

// Queries of a block: whole vectors, and whole tiles of kProductRows.
constexpr int kBlockQueries = kLanes == 16 ? 96 : 48;
constexpr int kMaxSlices = 16;            // of one tree and key head
constexpr int64_t kSliceKeys = 48 << 10;  // pairs of a query and a key that are worth a slice

class PackedTreePlan {
 public:
  explicit PackedTreePlan(const PackedTreeAttentionParams& p)
      : trees(p.subtree_end_stride == 0 ? smallest(p.batch, 1) : p.batch),
        nodes(p.nodes),
        ends_(trees * nodes),
        shared_(trees * nodes),
        num_shared_(trees),
        slices_(trees),
        bounds_(trees * (kMaxSlices + 1)) {
    for (int64_t b = 0; b < trees; ++b) {
      find_ends(p, b);
      cut(p, b);
      find_shared(b);
    }
  }

  // One past a node's subtree, counted from the start of the row.
  const int32_t* ends(int64_t b) const { return &ends_[tree(b) * nodes]; }
  int64_t slices(int64_t b) const { return slices_[tree(b)]; }
  // Slice i has the queries from bounds[i] to bounds[i + 1].
  const int64_t* bounds(int64_t b) const { return &bounds_[tree(b) * (kMaxSlices + 1)]; }
  // The number of a shared key among them, -1 for any other.
  const int32_t* shared(int64_t b) const { return &shared_[tree(b) * nodes]; }
  int64_t num_shared(int64_t b) const { return num_shared_[tree(b)]; }
  // The most keys that a block sees.
  int64_t most_keys() const { return most_keys_; }

  int64_t slice_of(int64_t b, int64_t node) const {
    int64_t slice = 0;
    while (bounds(b)[slice + 1] <= node) ++slice;
    return slice;
  }

 private:
  int64_t tree(int64_t b) const { return trees == 1 ? 0 : b; }

  void find_ends(const PackedTreeAttentionParams& p, int64_t b) {
    int32_t* end = &ends_[b * nodes];
    for (int64_t pack = 0; pack < p.packs; ++pack) {
      const int64_t first = p.cu_seqlens ? p.cu_seqlens[pack] : 0;
      const int64_t behind = p.cu_seqlens ? p.cu_seqlens[pack + 1] : nodes;
      for (int64_t k = first; k < behind; ++k) end[k] = int32_t(first + p.subtree_end[b * p.subtree_end_stride + k]);
    }
  }

  // Keys from before a block that reach into it are counted by where they come and go.
  void cut(const PackedTreeAttentionParams& p, int64_t b) {
    const int64_t blocks = ceil_div(nodes, kBlockQueries);
    Buffer<int64_t> change(blocks + 2), keys(blocks + 1);
    for (int64_t i = 0; i < blocks + 2; ++i) change[i] = 0;
    for (int64_t i = 0; i < blocks; ++i) keys[i] = 0;
    const int32_t* end = ends(b);
    for (int64_t k = 0; k < nodes; ++k) {
      if (end[k] <= k) continue;
      const int64_t block = k / kBlockQueries;
      ++keys[block];
      ++change[block + 1];
      --change[(end[k] - 1) / kBlockQueries + 1];
    }
    int64_t open = 0, total = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      open += change[i];
      most_keys_ = largest(most_keys_, open + keys[i]);
      keys[i] = open + keys[i] / 2 + 1;  // what it costs: of its own keys a query sees a part
      total += keys[i];
    }
    const int64_t group = p.q_heads / p.kv_heads;
    const int64_t wanted = smallest(kMaxSlices, ceil_div(total * kBlockQueries * group, kSliceKeys));
    const int64_t slices = largest(1, smallest(blocks, wanted));
    slices_[b] = int32_t(slices);
    int64_t* bound = &bounds_[b * (kMaxSlices + 1)];
    int64_t slice = 0, cost = 0;
    bound[0] = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      cost += keys[i];
      while (slice + 1 < slices && cost * slices >= total * (slice + 1)) bound[++slice] = (i + 1) * kBlockQueries;
    }
    while (slice < slices) bound[++slice] = nodes;
    for (int64_t i = 0; i <= slices; ++i) bound[i] = smallest(bound[i], nodes);
  }

  void find_shared(int64_t b) {
    const int32_t* end = ends(b);
    int32_t count = 0;
    int64_t slice = 0;
    for (int64_t k = 0; k < nodes; ++k) {
      while (bounds(b)[slice + 1] <= k) ++slice;
      shared_[b * nodes + k] = end[k] > bounds(b)[slice + 1] ? count++ : -1;
    }
    num_shared_[b] = count;
  }

  const int64_t trees, nodes;
  Buffer<int32_t> ends_, shared_;
  Buffer<int64_t> num_shared_;
  Buffer<int32_t> slices_;
  Buffer<int64_t> bounds_;
  int64_t most_keys_ = 0;
};

}  // namespace lbr::LBR_ISA
