// The host's side of tree_attention: what is supported, and how a launch is cut into blocks.
#include <algorithm>
#include <cstdint>
#include <sstream>

#include "tree_attention.h"

namespace lbr::gpu {
namespace {

int64_t group_of(const TreeAttentionParams& p) { return p.q_heads / p.kv_heads; }

TileShape tile_for(const TreeAttentionParams& p) {
  const int head = head_class(std::max(p.head_dim, p.value_dim));
  return tile_shape(head, tile_rows(head, p.num_queries * group_of(p)));
}

}  // namespace

std::string tree_attention_unsupported(const TreeAttentionParams& p, const Device& device) {
  std::ostringstream text;
  const auto head_size = [&](const char* name, int64_t size) {
    if (size % 8 == 0 && size > 0 && size <= 256) return false;
    text << name << " has head size " << size << ", expected a multiple of 8 up to 256";
    return true;
  };
  const auto placement = [&](const char* name, const void* data, const int64_t (&stride)[3], const int64_t (&size)[3]) {
    // Copies take 16 bytes at a time.
    for (int axis = 0; axis < 3; ++axis)
      if (size[axis] > 1 && stride[axis] % 8 != 0) {
        text << name << " has a stride of " << stride[axis] << ", expected multiples of 8";
        return true;
      }
    if (reinterpret_cast<uintptr_t>(data) % 16 == 0) return false;
    text << name << " does not start at a multiple of 16 bytes, expected that it does";
    return true;
  };
  if (p.dtype == DType::kFloat32) {
    text << "query has dtype torch.float32, expected torch.float16 or torch.bfloat16";
  } else if (!head_size("query", p.head_dim) && !head_size("value_cache", p.value_dim) &&
             !placement("query", p.query, p.query_stride, {p.batch, p.q_heads, p.num_queries}) &&
             !placement("key_cache", p.keys, p.keys_stride, {p.batch, p.kv_heads, p.slots}) &&
             !placement("value_cache", p.values, p.values_stride, {p.batch, p.kv_heads, p.slots})) {
    const TileShape tile = tile_for(p);
    if (tile.shared_bytes() > device.shared_bytes_per_block)
      text << "query has head size " << std::max(p.head_dim, p.value_dim) << ", which takes " << tile.shared_bytes()
           << " bytes of shared memory, expected at most " << device.shared_bytes_per_block << " on this device";
  }
  return text.str();
}

int choose_splits(int64_t tiles, int64_t key_tiles, int64_t slots, double merge_cost) {
  // Time in key tiles: those that a block reads, and about two for its start and its end; then, in each round of the
  // merge, one for finding out who is last, and the parts that this block reads.
  constexpr int64_t kMaxSplits = 128;
  constexpr double kBlockCost = 2, kRoundCost = 1, kWorthIt = 0.97;
  // Two waves of blocks at most: more would only fill the workspace.
  const int64_t most = std::min({kMaxSplits, (key_tiles + kLeastTiles - 1) / kLeastTiles, 2 * slots / tiles});
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t waves = (tiles * splits + slots - 1) / slots, longest = (key_tiles + splits - 1) / splits;
    double time = waves * (longest + kBlockCost);
    for (int parts = splits; parts > 1; parts = (parts + kFanIn - 1) / kFanIn)
      time += kRoundCost + std::min(parts, kFanIn) * merge_cost;
    if (splits > 1 && time >= least * kWorthIt) continue;
    best = splits;
    least = time;
  }
  return best;
}

TreeAttentionPlan plan_tree_attention(const TreeAttentionParams& p, const Device& device) {
  const TileShape tile = tile_for(p);
  const int64_t rows = p.num_queries * group_of(p);
  const int64_t row_tiles = (rows + tile.rows - 1) / tile.rows;
  const int64_t key_tiles = (p.slots + tile.keys - 1) / tile.keys;
  const int64_t resident =
      std::clamp<int64_t>(device.shared_bytes_per_multiprocessor / (tile.shared_bytes() + kSharedBytesReservedPerBlock),
                          1, tile.resident_blocks);
  const int64_t tiles = p.batch * p.kv_heads * row_tiles;
  // In bytes, a part's sums in fp32 against a tile of keys and values; but parts come out of L2, to the few blocks that
  // still run, which is taken to be four times as fast.
  const double part_bytes = double(std::min<int64_t>(rows, tile.rows)) * p.value_dim * 4;
  const double merge_cost = part_bytes / (tile.keys * (p.head_dim + p.value_dim) * 2.0) / 4;
  const int tile_rows = int((rows + row_tiles - 1) / row_tiles);
  const int64_t splits = choose_splits(tiles, key_tiles, device.multiprocessors * resident, merge_cost);
  const int64_t parts = splits > 1 ? tiles * parts_of(int(splits)) : 0;
  return {tile, int(row_tiles), tile_rows, int(splits), parts * tile.rows * (p.value_dim + 2), parts};
}

void tree_attention(const TreeAttentionParams& params, const TreeAttentionPlan& plan,
                    const TreeAttentionWorkspace& workspace, Stream stream) {
  TreeAttentionLaunch launch{params, workspace, plan.row_tiles, plan.tile_rows, plan.splits};
  launch.params.window = std::min<int64_t>(params.window, INT32_MAX);  // positions are of 32 bits
  switch (plan.tile.head) {
    case 64: return launch_tree_attention_64(launch, plan.tile, stream);
    case 128: return launch_tree_attention_128(launch, plan.tile, stream);
    default: return launch_tree_attention_256(launch, plan.tile, stream);
  }
}

}  // namespace lbr::gpu
