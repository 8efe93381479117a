// route on a GPU, as the bindings see it: is it supported, how is it laid out, launch it. No torch, no CUDA types but
// the stream's.
#pragma once

#include <string>

#include "../params.h"
#include "flags.h"
#include "primitives.cuh"

namespace lbr::gpu {

constexpr int kRouteThreads = 384;  // which leaves a thread 168 registers

// A warp computes this many rows times columns of a layer at a time, its lanes share the inputs, four each.
constexpr int kRouteRows = 2, kRouteColumns = 4, kRouteInputs = 4 * kWarpSize;

// A dense layer. A block computes `columns` neighbouring outputs of it for all rows.
struct RouteLayer {
  int weight, bias;  // where they begin in the packed weights; -1: no bias
  int stride, inputs, outputs;
  int columns;
  int slice;  // where in shared memory the block's columns lie, one after the other, in floats
};

struct RouteNorm {
  int weight, bias;
};

// A layer of a Transformer. Buffers are where in the workspace it leaves what, a row for each item.
struct RouteEncoder {
  RouteNorm attention_norm, ffn_norm, final_norm;
  RouteLayer project, out, up, down;
  int tokens;     // [dim] what goes in
  int projected;  // queries, keys, values: [3 dim]; of the path encoder keys and values alone
  int attended;   // [dim] after attention, residual included
  int inner;      // [ffn_dim] inside the feed-forward
  int result;     // [dim] after it, residual included
};

// The input projection is cut into pieces of kRouteColumns columns and one of `ranges` ranges of inputs, whose sums are
// added in the order of the ranges. A block has up to `pieces`, one in every `size`.
struct RouteProjection {
  RouteNorm norm;
  int weight, ranges, range_inputs, column_tiles, pieces, slice;
  int partial;  // where in the workspace the sums lie: [ranges, nodes, dim]
};

// Where everything is, for all blocks.
struct RouteLayout {
  RouteProjection in;
  int depth_embed, cls, pool_query, score_weight, score_bias;
  RouteLayer cls_query, score_up;
  RouteEncoder path, subtree, candidate;
  int cls_projected;         // where in the workspace the query of [CLS] lies
  int score_inner;           // and [dim] inside the score's MLP
  int awaited, floats;       // of the workspace: where that begins which is waited for value by value, and the end
  int slices;                // floats of shared memory for weights
  int flag_bytes;            // and bytes behind them for tables
  int nodes, paths, leaves;  // of a row of the batch: nodes, paths, paths of a candidate
};

// `groups` of `size` blocks share out the rows of the batch. A group takes `rows` of them at a time.
struct RoutePlan {
  int size, groups, rows;
  bool resident;  // whether a block's share of all weights stays in its shared memory
  int shared_bytes;
  int64_t workspace;  // floats, which may hold anything
  RouteLayout layout;
};

struct RouteWorkspace {
  float* floats;
  unsigned* counters;  // one per group; zero, and again afterwards
  int* flags;  // gets kBadScore or kBadCandidates where a row's values cannot be; its choice is -1, the rest NaN
};

// Why these arguments cannot be computed here, as "argument has value, expected ..."; empty if they can.
std::string route_unsupported(const RouteParams& params, const Device& device);

// Chosen from shapes and device alone, for arguments that are supported and a batch that is not empty.
RoutePlan plan_route(const RouteParams& params, const Device& device);

// Throws where the kernels were not compiled for the current device.
void require_route();

// One launch, for a batch that is not empty. Nothing is waited for, and nothing of what the pointers name is read on
// the host.
void route(const RouteParams& params, const RoutePlan& plan, const RouteWorkspace& workspace, Stream stream);

// The parameter of the kernels.
struct RouteLaunch {
  RouteParams params;
  RouteWorkspace workspace;
  int size, group_rows, rows;  // of a group: blocks, rows of the batch in all, rows at a time
  int workspace_stride;        // from group to group
  float uniform_log_prob;
  bool hidden_aligned;  // whether four neighbouring elements can be read at once
  RouteLayout layout;
};

}  // namespace lbr::gpu
