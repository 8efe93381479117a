// commit_'s arguments, on any device: everything but values is checked, and becomes the kernels' struct.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "checks.h"

namespace lbr {

// `params.caches` points into `caches`.
struct CommitArguments {
  CommitParams params;
  std::vector<CommitParams::Cache> caches;
};

inline CommitArguments commit_arguments(const Checker& check, const std::vector<Tensor>& caches,
                                        const Tensor& prefix_lens, const Tensor& sources,
                                        const OptionalTensor& num_moves, int64_t advance,
                                        const OptionalTensor& row_advance) {
  CommitArguments arguments;
  CommitParams& p = arguments.params;
  check.device("prefix_lens", prefix_lens);
  check.shape("prefix_lens", prefix_lens, {{"B"}});
  check.dtype("prefix_lens", prefix_lens, ScalarType::Int);
  check.last_contiguous("prefix_lens", prefix_lens);
  p.batch = prefix_lens.size(0);
  p.sources = check.side_input<int32_t>("sources", sources, ScalarType::Int, {{"B", p.batch}, {"M"}});
  p.max_moves = sources.size(1);
  p.sources_stride = sources.stride(0);
  p.num_moves = check.side_input<int32_t>("num_moves", num_moves, ScalarType::Int, {{"B", p.batch}});
  p.advance = check.side_input<int32_t>("advance", row_advance, ScalarType::Int, {{"B", p.batch}});
  p.advance_all = advance;

  std::unordered_map<const char*, size_t> first_use;
  arguments.caches.reserve(caches.size());
  for (size_t c = 0; c < caches.size(); ++c) {
    const Tensor& cache = caches[c];
    const std::string name = "caches[" + std::to_string(c) + "]";
    check.device(name.c_str(), cache);
    check.shape(name.c_str(), cache, {{"B", p.batch}, {"H"}, {"S"}, {"D"}});
    check.last_contiguous(name.c_str(), cache);
    for (int64_t d = 0; d < 4; ++d)
      check(cache.size(d) <= 1 || cache.stride(d) != 0, name, " is expanded, expected memory of its own");
    const int64_t size = int64_t(cache.element_size());
    char* const data = static_cast<char*>(cache.mutable_data_ptr());
    if (cache.numel() > 0) {
      const auto [first, is_new] = first_use.emplace(data, c);
      check(is_new, name, " is caches[", first->second, "] again, expected each buffer once");
    }
    arguments.caches.push_back({data, cache.size(1), cache.size(3) * size, cache.stride(0) * size,
                                cache.stride(1) * size, cache.stride(2) * size});
    if (p.slots < 0 || cache.size(2) < p.slots) p.slots = cache.size(2);
  }
  p.caches = arguments.caches.data();
  p.num_caches = int64_t(arguments.caches.size());
  p.prefix_lens = static_cast<int32_t*>(prefix_lens.mutable_data_ptr());
  return arguments;
}

}  // namespace lbr
