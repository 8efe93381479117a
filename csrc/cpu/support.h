// Small things that the kernels share, in each instruction set's own namespace.
//
// The standard library's templates are avoided on purpose: one that is not inlined becomes a symbol that the linker
// merges over all files, and the copy it keeps may have been compiled for instructions this processor lacks.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace lbr::LBR_ISA {

static inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Uninitialised memory that starts on a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { resize(size); }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Drops the contents. An empty buffer has an element too, so that its start can be referred to.
  void resize(int64_t size) {
    size = largest(size, 1);
    if (size <= capacity_) return;
    free(data_);
    capacity_ = size;
    data_ = (T*)aligned_alloc(64, round_up(size * int64_t(sizeof(T)), 64));
    if (!data_) abort();
  }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace lbr::LBR_ISA
