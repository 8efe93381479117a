// What launches keep between calls, and the stream they go to: the part of a binding that knows both torch and CUDA.
//
// Counters at zero, which kernels leave at zero, belong to the stream that they are used on; under graph capture to
// that capture, where one memset at its beginning sets them in every replay. So neither two streams nor two graphs ever
// share them. Flags are one word per device, which Python allocates and reads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "primitives.cuh"

#ifndef LBR_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace lbr::gpu {

#ifdef LBR_SIMT
inline Stream current_stream(int32_t /*device*/) { return nullptr; }
inline unsigned long long capture_of(Stream /*stream*/) { return 0; }
#else
inline Stream current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("the current CUDA stream cannot be had");
  return static_cast<Stream>(stream);
}

// The capture that the stream is part of; 0 if none is under way.
inline unsigned long long capture_of(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}
#endif

class Workspaces {
 public:
  using Tensor = torch::stable::Tensor;

  // At least `count` counters at zero, on the device of `like`.
  unsigned* counters(const Tensor& like, Stream stream, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const unsigned long long capture = capture_of(stream);
    // A capture's counters may be dropped when the next one begins: their memory is its graph's.
    std::optional<Counters>& kept = counters_[{like.get_device(), stream, capture != 0}];
    if (!kept || kept->capture != capture || kept->zeros.numel() < count) {
      const int64_t size = std::max<int64_t>(count, kFewest);
      Tensor zeros = torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Int);
      torch::stable::zero_(zeros);
      kept = Counters{std::move(zeros), capture};
    }
    return static_cast<unsigned*>(kept->zeros.mutable_data_ptr());
  }

  // Makes `word`, an int32 tensor, the flags of its device.
  void set_flags(const Tensor& word) {
    const std::lock_guard<std::mutex> lock(mutex_);
    flags_.insert_or_assign(word.get_device(), word);
  }

  int* flags(const Tensor& like) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = flags_.find(like.get_device());
    if (found == flags_.end()) throw std::runtime_error("flags of this device were not set, expected set_flags before");
    return static_cast<int*>(found->second.mutable_data_ptr());
  }

 private:
  static constexpr int64_t kFewest = 4096;

  struct Counters {
    Tensor zeros;
    unsigned long long capture;
  };

  struct Key {
    int32_t device;
    Stream stream;
    bool captured;
    bool operator<(const Key& other) const {
      return std::tie(device, stream, captured) < std::tie(other.device, other.stream, other.captured);
    }
  };

  std::mutex mutex_;
  std::map<Key, std::optional<Counters>> counters_;
  std::map<int32_t, Tensor> flags_;
};

}  // namespace lbr::gpu
