// tree_attention's arguments, on any device: everything but values is checked, and becomes the kernels' struct.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"

namespace lbr {

// What follows from the arguments; `out` and `lse` are not set.
inline TreeAttentionParams tree_attention_params(const Checker& check, const Tensor& query, const Tensor& key_cache,
                                                 const Tensor& value_cache, const Tensor& prefix_lens,
                                                 const Tensor& ancestors, const OptionalTensor& num_nodes,
                                                 std::optional<double> scale, const OptionalTensor& depths,
                                                 std::optional<int64_t> window, std::optional<double> softcap,
                                                 const OptionalTensor& sinks, const OptionalTensor& alibi_slopes) {
  TreeAttentionParams p;
  check.device("query", query);
  check.shape("query", query, {{"B"}, {"Hq"}, {"N"}, {"D"}});
  p.dtype = check.floating("query", query);
  check.last_contiguous("query", query);
  p.batch = query.size(0), p.q_heads = query.size(1), p.num_queries = query.size(2), p.head_dim = query.size(3);

  check.device("key_cache", key_cache);
  check.shape("key_cache", key_cache, {{"B", p.batch}, {"Hk"}, {"S"}, {"D", p.head_dim}});
  check.dtype("key_cache", key_cache, query.scalar_type());
  check.last_contiguous("key_cache", key_cache);
  p.kv_heads = key_cache.size(1);
  p.slots = key_cache.size(2);

  check.device("value_cache", value_cache);
  check.shape("value_cache", value_cache, {{"B", p.batch}, {"Hk", p.kv_heads}, {"S", p.slots}, {"Dv"}});
  check.dtype("value_cache", value_cache, query.scalar_type());
  check.last_contiguous("value_cache", value_cache);
  p.value_dim = value_cache.size(3);

  check(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0, "query has ", p.q_heads,
        " heads, expected a multiple of key_cache's ", p.kv_heads);
  check(p.head_dim > 0, "query has head size ", p.head_dim, ", expected at least 1");

  p.prefix_lens = check.side_input<int32_t>("prefix_lens", prefix_lens, ScalarType::Int, {{"B", p.batch}});
  check.shape("ancestors", ancestors, {{"B", p.batch, true}, {"T"}, {"W"}});
  p.tree_nodes = ancestors.size(1);
  p.words = (p.tree_nodes + 63) / 64;
  p.ancestors = check.side_input<int64_t>("ancestors", ancestors, ScalarType::Long,
                                          {{"B", p.batch, true}, {"T", p.tree_nodes}, {"W", p.words}});
  check(p.num_queries <= p.tree_nodes, "query has ", p.num_queries, " nodes, expected at most the tree's ",
        p.tree_nodes);
  p.num_nodes = check.side_input<int32_t>("num_nodes", num_nodes, ScalarType::Int, {{"B", p.batch}});
  p.depths = check.side_input<int32_t>("depths", depths, ScalarType::Int, {{"B", p.batch, true}, {"T", p.tree_nodes}});
  p.sinks = check.side_input<float>("sinks", sinks, ScalarType::Float, {{"Hq", p.q_heads}});
  p.alibi_slopes = check.side_input<float>("alibi_slopes", alibi_slopes, ScalarType::Float, {{"Hq", p.q_heads}});
  check(!window || *window >= 1, "window is ", window.value_or(0), ", expected an integer >= 1");
  check(!softcap || *softcap > 0, "softcap is ", softcap.value_or(0), ", expected a number > 0");

  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = query.stride(i);
    p.keys_stride[i] = key_cache.stride(i);
    p.values_stride[i] = value_cache.stride(i);
  }
  p.ancestors_stride[0] = ancestors.size(0) == 1 ? 0 : ancestors.stride(0);
  p.ancestors_stride[1] = ancestors.stride(1);
  p.depths_stride = p.depths && depths->size(0) != 1 ? depths->stride(0) : 0;
  p.scale = float(scale ? *scale : 1.0 / std::sqrt(double(p.head_dim)));
  p.softcap = float(softcap.value_or(0));
  p.window = window.value_or(0);
  p.query = query.const_data_ptr();
  p.keys = key_cache.const_data_ptr();
  p.values = value_cache.const_data_ptr();
  return p;
}

}  // namespace lbr
