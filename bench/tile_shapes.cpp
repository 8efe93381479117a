// Prints the bytes of shared memory that kernels take, one shape a line: kernel, head size and rows of tree_attention's
// tiles, bytes.
#include <cstdio>

#include "cuda/sample_children.h"
#include "cuda/tree_attention.h"

int main() {
  using namespace lbr::gpu;
  for (int head : kHeadClasses)
    for (int rows : {16, 32, 64, 128})
      if (tile_rows(head, rows) == rows)
        std::printf("tree_attention %d %d %d\n", head, rows, tile_shape(head, rows).shared_bytes());
  std::printf("sample_children %d\n", int(sizeof(SampleChildrenBlockShape::Shared)));
}
