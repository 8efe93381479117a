// What a kernel sets in its device's word when it meets a value that cannot be: lengths, counts and the like lie in the
// device's memory, where the host cannot check them. lbr_kernels/ops/_flags.py says these bits in words.
#pragma once

namespace lbr::gpu {

enum Flag : int {
  kBadLength = 1 << 0,      // tree_attention: the row's results are NaN
  kBadCount = 1 << 1,       //
  kBadMove = 1 << 2,        // commit_: the row stays as it is
  kBadLogits = 1 << 3,      // sample_children, top_children: NaN, +inf, or -inf everywhere; the row's tokens are -1
  kBadDraw = 1 << 4,        //   a uniform, a filter or an index of a row
  kBadScore = 1 << 5,       // route: a score is not finite; the row's choice is -1
  kBadCandidates = 1 << 6,  //   a row of `valid`, or a uniform
  kBadTree = 1 << 7,        // packed_tree_attention: a subtree's end, or a pack's; the row's results are NaN
};

}  // namespace lbr::gpu
