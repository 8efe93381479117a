// tree_attention on a GPU, as the bindings see it: is it supported, how is it split, launch it. No torch, no CUDA types
// but the stream's.
#pragma once

#include <string>

#include "../params.h"
#include "flags.h"
#include "primitives.cuh"

namespace lbr::gpu {

// A block of threads computes `rows` query rows against `keys` slots at a time. Its warps stand in a grid of warps_m x
// warps_n: along m they share out the rows, 16 * tiles_m each, and along n the slots, so that few rows keep four warps
// busy. Keys and values wait in `stages` buffers.
struct TileShape {
  int head;  // the largest head size, of keys and of values; smaller ones leave columns unused
  int rows;
  int warps_m = 0, warps_n = 0, tiles_m = 0, keys = 0, stages = 0;
  int resident_blocks = 0;  // that the registers allow on a multiprocessor

  static constexpr int kWarps = 4;
  LBR_HOST_DEVICE constexpr int threads() const { return kWarps * kWarpSize; }
  LBR_HOST_DEVICE constexpr int query_bytes() const { return rows * head * 2; }
  LBR_HOST_DEVICE constexpr int stage_bytes() const { return 2 * keys * head * 2; }
  // After the last tile, the warps' sums of values lie where query and stages were.
  LBR_HOST_DEVICE constexpr int sums_stride() const { return head + 8; }  // a fragment's rows lie in different banks
  LBR_HOST_DEVICE constexpr int sums_bytes() const { return warps_n * rows * sums_stride() * 4; }
  LBR_HOST_DEVICE constexpr int tiles_bytes() const {
    const int tiles = query_bytes() + stages * stage_bytes();
    return tiles > sums_bytes() ? tiles : sums_bytes();
  }
  LBR_HOST_DEVICE constexpr int shared_bytes() const {
    const int visible = stages * rows * 8, seen = stages * kWarps * 8, key_positions = stages * keys * 4;
    const int row_positions = rows * 4, states = warps_n * rows * 8, is_last = 16;
    return tiles_bytes() + visible + seen + key_positions + row_positions + states + is_last;
  }
};

// The instantiations: head sizes up to 64 and up to 128 with 16, 32, 64 and 128 rows, up to 256 with 16 and 64; all but
// the largest tile a second time for keys and values of exactly 64 or 128; each for two types: 32. A head's rows are
// num_queries * q_heads / kv_heads; the smallest tile that holds them is taken, or several of the largest with equal
// shares.
constexpr int kHeadClasses[] = {64, 128, 256};

constexpr TileShape tile_shape(int head, int rows) {
  const bool wide = head == 256, few = rows <= 32;
  TileShape tile{head, rows};
  tile.warps_m = few ? rows / 16 : 4;
  tile.warps_n = TileShape::kWarps / tile.warps_m;
  tile.tiles_m = rows / (16 * tile.warps_m);
  // What registers and shared memory allow: 255 registers without a spill, and 99 KiB, up to head size 128, or 163.
  tile.keys = rows == 128 || (wide && !few) ? 32 : 64;
  tile.stages = tile.keys == 32 || head == 64 ? 3 : 2;
  tile.resident_blocks = wide ? 1 : rows == 16 ? 3 : 2;
  return tile;
}

constexpr int head_class(int64_t head) { return head <= 64 ? 64 : head <= 128 ? 128 : 256; }

constexpr int tile_rows(int head, int64_t rows) {
  if (rows <= 16) return 16;
  if (head == 256) return 64;
  return rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// What a part reads at least: a cache may be far longer than what it holds.
constexpr int kLeastTiles = 2;

// Parts are merged kFanIn at a time, in rounds.
constexpr int kFanIn = 8;

// How many parts there are in all rounds together, when there are `parts` in the first.
LBR_HOST_DEVICE constexpr int parts_of(int parts) {
  int all = parts;
  while (parts > kFanIn) all += parts = (parts + kFanIn - 1) / kFanIn;
  return all;
}

struct TreeAttentionPlan {
  TileShape tile;
  int row_tiles;  // per sequence and key head
  int tile_rows;  // at most in each of them
  int splits;     // of the slots, at most
  // What the workspace must hold. Partial results may hold anything; arrivals must be zero, and are again afterwards.
  int64_t partials, arrivals;
};

struct TreeAttentionWorkspace {
  float* partials;
  unsigned* arrivals;
  int* flags;  // gets kBadLength or kBadCount where a row's length or count cannot be; such a row's results are NaN
};

// Why these arguments cannot be computed here, as "argument has value, expected ..."; empty if they can.
std::string tree_attention_unsupported(const TreeAttentionParams& params, const Device& device);

// Chosen from shapes and device alone: lengths and counts lie in the device's memory.
TreeAttentionPlan plan_tree_attention(const TreeAttentionParams& params, const Device& device);

// How many parts each of `tiles` row tiles' `key_tiles` shall be split into if `slots` blocks run at a time. Reading
// one part to merge it costs as much as `merge_cost` key tiles.
int choose_splits(int64_t tiles, int64_t key_tiles, int64_t slots, double merge_cost);

// Throws where the kernels were not compiled for the current device.
void require_tree_attention();

// One launch, for a batch that has queries. Nothing is waited for, and nothing of what the pointers name is read on the
// host.
void tree_attention(const TreeAttentionParams& params, const TreeAttentionPlan& plan,
                    const TreeAttentionWorkspace& workspace, Stream stream);

// The parameter of the kernels.
struct TreeAttentionLaunch {
  TreeAttentionParams params;
  TreeAttentionWorkspace workspace;
  int row_tiles, tile_rows, splits;
};

// One per head class, each in a file of its own, so that they compile side by side.
void launch_tree_attention_64(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream);
void launch_tree_attention_128(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream);
void launch_tree_attention_256(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream);

}  // namespace lbr::gpu
