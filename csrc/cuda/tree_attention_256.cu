// tree_attention for head sizes up to 256.
#include "tree_attention.cuh"

namespace lbr::gpu {

void launch_tree_attention_256(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream) {
  launch_head_class<256>(launch, tile, stream);
}

}  // namespace lbr::gpu
