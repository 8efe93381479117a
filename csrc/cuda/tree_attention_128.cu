// tree_attention for head sizes up to 128.
#include "tree_attention.cuh"

namespace lbr::gpu {

void launch_tree_attention_128(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream) {
  launch_head_class<128>(launch, tile, stream);
}

}  // namespace lbr::gpu
