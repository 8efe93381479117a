// tree_attention for head sizes up to 64.
#include "tree_attention.cuh"

namespace lbr::gpu {

void launch_tree_attention_64(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream) {
  launch_head_class<64>(launch, tile, stream);
}

void require_tree_attention() { require_kernel(tree_attention_kernel<Half, 64, 16, true>); }

}  // namespace lbr::gpu
