// What the bindings hand to the kernels: one struct per op, raw pointers and strides, no torch.
//
// Strides count elements. The innermost axis of every tensor is contiguous unless a stride for it is named. All checks
// of shapes and values are done by the bindings; a kernel may rely on what is written here.
#pragma once

#include <cstdint>

namespace lbr {

enum class DType : int8_t { kFloat32, kFloat16, kBFloat16 };

// The caller's thread pool. `run` splits [0, count) into ranges of at least `grain` and calls `body` on each, possibly
// at the same time; it returns when all are done. Kernels use this and start no threads of their own.
struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t count, int64_t grain, Body body, void* context);

  template <class F>
  void parallel_for(int64_t count, int64_t grain, const F& f) const {
    run(
        count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&f));
  }
};

// softmax(scale * query . keys) . values over the committed prefix and a node's ancestors.
struct TreeAttentionParams {
  DType dtype;                                                // of query, caches and out
  const void* query;                                          // [batch, q_heads, num_queries, head_dim]
  const void* keys;                                           // [batch, kv_heads, slots, head_dim]
  const void* values;                                         // [batch, kv_heads, slots, value_dim]
  void* out;                                                  // [batch, q_heads, num_queries, value_dim], dense
  float* lse;                                                 // [batch, q_heads, num_queries], dense
  int64_t query_stride[3], keys_stride[3], values_stride[3];  // batch, head, query or slot
  int64_t batch, q_heads, kv_heads, num_queries, tree_nodes, slots, head_dim, value_dim;
  const int32_t* prefix_lens;   // [batch]
  const int64_t* ancestors;     // [batch, tree_nodes, words]
  int64_t ancestors_stride[2];  // batch (0 if all rows share a tree), node
  int64_t words;                // ceil(tree_nodes / 64)
  const int32_t* num_nodes;     // [batch] real queries, or null: all of them
  const int32_t* depths;        // [batch, tree_nodes], or null: count of mask bits
  int64_t depths_stride;        // batch (0 if shared)
  const float* sinks;           // [q_heads] or null
  const float* alibi_slopes;    // [q_heads] or null
  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none; else query position - key position < window
};

// softmax(scale * query . keys) . values over the nodes k of the same pack with k <= q < subtree_end[k].
struct PackedTreeAttentionParams {
  DType dtype;                                                // of query, keys, values and out
  const void* query;                                          // [batch, q_heads, nodes, head_dim]
  const void* keys;                                           // [batch, kv_heads, nodes, head_dim]
  const void* values;                                         // [batch, kv_heads, nodes, value_dim]
  void* out;                                                  // [batch, nodes, q_heads, value_dim], dense
  float* lse;                                                 // [batch, q_heads, nodes], dense
  int64_t query_stride[3], keys_stride[3], values_stride[3];  // batch, head, node
  int64_t batch, q_heads, kv_heads, nodes, head_dim, value_dim;
  const int32_t* subtree_end;  // [batch, nodes], counted from the start of a node's pack, at most the pack's length
  int64_t subtree_end_stride;  // batch (0 if all rows share a tree)
  const int32_t* cu_seqlens;   // [packs + 1] ascending from 0 to nodes, or null: one pack
  int64_t packs;
  const int32_t* positions;   // [batch, nodes]; null only without window and alibi_slopes
  int64_t positions_stride;   // batch (0 if shared)
  const float* sinks;         // [q_heads] or null
  const float* alibi_slopes;  // [q_heads] or null
  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none; else query position - key position < window
};

// Gradients of query, keys and values; `forward.out` and `forward.lse` are not used.
struct PackedTreeAttentionBackwardParams {
  PackedTreeAttentionParams forward;
  const void* grad;                                      // [batch, q_heads, nodes, value_dim]
  const void* out;                                       // the same, what the forward pass gave
  const float* lse;                                      // [batch, q_heads, nodes], likewise
  int64_t grad_stride[3], out_stride[3], lse_stride[2];  // batch, head, node
  void* query_grad;                                      // [batch, nodes, q_heads, head_dim], dense
  void* key_grad;                                        // [batch, nodes, kv_heads, head_dim], dense
  void* value_grad;                                      // [batch, nodes, kv_heads, value_dim], dense
};

// caches[c] slot prefix_lens[b] + i receives slot prefix_lens[b] + sources[b][i]; then prefix_lens[b] += advance[b].
struct CommitParams {
  struct Cache {
    char* data;
    int64_t heads, row_bytes;                        // bytes of one slot of one head
    int64_t batch_stride, head_stride, slot_stride;  // in bytes
  };
  const Cache* caches;
  int64_t num_caches, batch, max_moves;
  int64_t slots = -1;      // of the shortest cache; -1: there is none
  int32_t* prefix_lens;    // [batch]
  const int32_t* sources;  // [batch, max_moves], ascending, sources[i] >= i
  int64_t sources_stride;
  const int32_t* num_moves;  // [batch] or null: max_moves each
  const int32_t* advance;    // [batch] or null: advance_all each
  int64_t advance_all;
};

// The filters of one row of logits, in the order in which they apply.
struct SamplingFilters {
  double temperature;  // > 0
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
};

struct SampleChildrenParams {
  DType dtype;         // of logits
  const void* logits;  // [logit_rows, vocab]
  int64_t logits_stride, logit_rows, vocab;
  const double* uniforms;  // [rows, width] in [0, 1); null: the most likely
  int64_t uniforms_stride;
  const int64_t* row_index;  // [rows] into logit_rows, -1: no children, nothing is read; null: row r reads row r
  int64_t rows, width;
  SamplingFilters filters;
  const double* row_filters;  // [logit_rows, 4] in the order above; null: filters
  int64_t* tokens;            // [rows, width]; -1 where no token is left
  float* log_probs;           // [rows, width]; 0 there
  enum Status : int8_t { kOk, kNaN, kInfinite, kAllFiltered };
  Status* status;  // [logit_rows], kOk on entry; other rows are unread
};

// out[r] = weight input[r] + bias.
struct LinearParams {
  DType dtype;                 // of all tensors
  const void* input;           // rows of `inputs` elements, at row_offsets
  const int64_t* row_offsets;  // [rows]
  const void* weight;          // [outputs, inputs]
  const void* bias;            // [outputs] or null
  void* out;                   // [rows, outputs], dense
  int64_t weight_stride, rows, inputs, outputs;
};

// The set-attention router on packed weights (lbr_kernels/ops/route.py names their order), matrices as [in, out].
struct RouteParams {
  DType dtype;               // of hidden
  const void* hidden;        // [batch, nodes, hidden_size]
  int64_t hidden_stride[2];  // batch, node
  const float* weights;
  int64_t batch, nodes, hidden_size, width, depth, dim, num_heads, ffn_dim;
  bool mlp_score, independent, input_norm;
  double temperature;
  const double* uniforms;  // [batch] in [0, 1); null: the most likely
  const bool* valid;       // [batch, nodes], dense; null: all
  const bool* active;      // [batch]; null: all
  float* log_probs;        // [batch, width]
  int64_t* choice;         // [batch]; -1 where not active
  bool* finite;            // [batch], true on entry: whether all scores of an active row are finite
};

}  // namespace lbr
