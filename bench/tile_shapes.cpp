// Prints the bytes of shared memory of each of tree_attention's tiles: head size, rows, bytes.
#include <cstdio>

#include "cuda/tree_attention.h"

int main() {
  using namespace lbr::gpu;
  for (int head : kHeadClasses)
    for (int rows : {16, 32, 64, 128})
      if (tile_rows(head, rows) == rows) std::printf("%d %d %d\n", head, rows, tile_shape(head, rows).shared_bytes());
}
