// What launches keep between calls: counters at zero, which every launch leaves at zero.
//
// A stream has counters of its own. A captured launch has some that nobody else ever gets, since its graph may run
// beside anything. So no two launches that can run at the same time share them, nothing has to be cleared, and nothing
// is allocated in torch's pools, whose owners expect to know all that lives there. The memory, some KiB a stream and a
// captured launch, stays until the process ends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "primitives.cuh"

namespace lbr::gpu {

class Counters {
 public:
  // `count` counters for a launch on this stream of the current device, `device`.
  unsigned* take(int32_t device, Stream stream, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_capturing(stream)) return cut(device, count);
    Piece& own = of_streams_[{device, stream}];
    if (own.left < count) {
      const int64_t size = std::max(count, kFewest);  // what was its own before stays so: launches may be under way
      own = {cut(device, size), size};
    }
    return own.begin;
  }

 private:
  struct Piece {
    unsigned* begin = nullptr;
    int64_t left = 0;
  };

  unsigned* cut(int32_t device, int64_t count) {
    const int64_t size = (count + kLine - 1) / kLine * kLine;
    Piece& free = free_[device];
    if (free.left < size) {
      const int64_t all = std::max(size, kBlock);
      free = {allocate_counters(all), all};
    }
    unsigned* const begin = free.begin;
    free.begin += size;
    free.left -= size;
    return begin;
  }

  static constexpr int64_t kLine = 32;  // of a cache: 128 bytes
  static constexpr int64_t kFewest = 4096, kBlock = 262144;

  std::mutex mutex_;
  std::map<std::pair<int32_t, Stream>, Piece> of_streams_;
  std::map<int32_t, Piece> free_;
};

}  // namespace lbr::gpu
