// Blocks that work on one thing and wait for each other, in a cooperative launch.
//
// They share a counter in global memory that only grows while they work: a barrier is passed once all have added to it
// once more. It is zero when the first of them begins, and again when the last has left.
#pragma once

#include "primitives.cuh"

namespace lbr::gpu {

class BlockGroup {
 public:
  // `size` blocks have this counter; one block alone needs none.
  LBR_DEVICE BlockGroup(unsigned* counter, int size) : counter_(counter), size_(unsigned(size)) {}

  // Collective over all blocks of the group. What any of their threads has written before is seen by all after it,
  // through load_shared_by_blocks.
  LBR_DEVICE void barrier() {
    block_barrier();  // all of this block's writes are made
    if (size_ > 1 && thread_index() == 0) {
      fence();
      atomic_add(counter_, 1u);
      passed_ += size_;
      wait_until(counter_, passed_);
    }
    block_barrier();
  }

  // Collective likewise, and the last thing that a block does with its group.
  LBR_DEVICE void leave() {
    if (size_ == 1 || thread_index() > 0) return;
    // Whoever comes last knows that nobody waits any more.
    if (atomic_add(counter_, 1u) == passed_ + size_ - 1) *counter_ = 0;
  }

 private:
  unsigned* const counter_;
  const unsigned size_;
  unsigned passed_ = 0;  // in thread 0
};

}  // namespace lbr::gpu
