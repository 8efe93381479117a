// Prints the bytes of shared memory that kernels take, one shape a line: kernel, head size and rows of tree_attention's
// tiles, or dim and place of the weights of route's; bytes. A router is the paper's in shape, for hidden size 3584,
// width 3, depth 1 and a batch of 8, on 128 blocks.
#include <cstdio>

#include "cuda/route.cu"
#include "cuda/sample_children.h"
#include "cuda/tree_attention.h"

int main() {
  using namespace lbr;
  using namespace lbr::gpu;
  for (int head : kHeadClasses)
    for (int rows : {16, 32, 64, 128})
      if (tile_rows(head, rows) == rows)
        std::printf("tree_attention %d %d %d\n", head, rows, tile_shape(head, rows).shared_bytes());
  std::printf("sample_children %d\n", int(sizeof(SampleChildrenBlockShape::Shared)));
  for (int dim : {128, 256})
    for (int bytes : {232448, 8192}) {
      RouteParams p{};
      p.batch = 8, p.width = 3, p.depth = 1, p.nodes = 3, p.hidden_size = 3584;
      p.dim = dim, p.num_heads = 4, p.ffn_dim = 4 * dim;
      const RoutePlan plan = plan_route(p, Device{128, bytes + 1024, bytes});
      std::printf("route %d %d %d\n", int(plan.resident), dim, plan.shared_bytes);
    }
}
