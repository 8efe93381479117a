// packed_tree_attention's arguments, on any device: everything but values is checked, and becomes the kernels' struct.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"

namespace lbr {

// What follows from the arguments; `out` and `lse` are not set.
inline PackedTreeAttentionParams packed_tree_attention_params(
    const Checker& check, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& subtree_end,
    const OptionalTensor& cu_seqlens, const OptionalTensor& positions, const OptionalTensor& sinks,
    const OptionalTensor& alibi_slopes, std::optional<double> scale, std::optional<int64_t> window,
    std::optional<double> softcap) {
  PackedTreeAttentionParams p;
  check.device("query", query);
  check.shape("query", query, {{"B"}, {"Hq"}, {"T"}, {"D"}});
  p.dtype = check.floating("query", query);
  check.last_contiguous("query", query);
  p.batch = query.size(0), p.q_heads = query.size(1), p.nodes = query.size(2), p.head_dim = query.size(3);

  check.device("key", key);
  check.shape("key", key, {{"B", p.batch}, {"Hk"}, {"T", p.nodes}, {"D", p.head_dim}});
  check.dtype("key", key, query.scalar_type());
  check.last_contiguous("key", key);
  p.kv_heads = key.size(1);

  check.device("value", value);
  check.shape("value", value, {{"B", p.batch}, {"Hk", p.kv_heads}, {"T", p.nodes}, {"Dv"}});
  check.dtype("value", value, query.scalar_type());
  check.last_contiguous("value", value);
  p.value_dim = value.size(3);

  check(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0, "query has ", p.q_heads, " heads, expected a multiple of key's ",
        p.kv_heads);
  check(p.head_dim > 0, "query has head size ", p.head_dim, ", expected at least 1");

  const std::initializer_list<Axis> per_node = {{"B", p.batch, true}, {"T", p.nodes}};
  p.subtree_end = check.side_input<int32_t>("subtree_end", subtree_end, ScalarType::Int, per_node);
  p.subtree_end_stride = subtree_end.size(0) == 1 ? 0 : subtree_end.stride(0);
  p.cu_seqlens = check.side_input<int32_t>("cu_seqlens", cu_seqlens, ScalarType::Int, {{"N + 1"}});
  if (cu_seqlens) {
    check(p.batch == 1, "query has ", p.batch, " rows, expected 1 with cu_seqlens");
    check(cu_seqlens->size(0) >= 1, "cu_seqlens is empty, expected at least [0]");
  }
  p.packs = cu_seqlens ? cu_seqlens->size(0) - 1 : 1;
  p.positions = check.side_input<int32_t>("positions", positions, ScalarType::Int, per_node);
  p.positions_stride = p.positions && positions->size(0) != 1 ? positions->stride(0) : 0;
  p.sinks = check.side_input<float>("sinks", sinks, ScalarType::Float, {{"Hq", p.q_heads}});
  p.alibi_slopes = check.side_input<float>("alibi_slopes", alibi_slopes, ScalarType::Float, {{"Hq", p.q_heads}});
  check(!window || *window >= 1, "window is ", window.value_or(0), ", expected an integer >= 1");
  check(!softcap || *softcap > 0, "softcap is ", softcap.value_or(0), ", expected a number > 0");
  check(positions || (!window && !alibi_slopes),
        "positions is None, expected them where there is a window or alibi_slopes");

  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = query.stride(i);
    p.keys_stride[i] = key.stride(i);
    p.values_stride[i] = value.stride(i);
  }
  p.scale = float(scale ? *scale : 1.0 / std::sqrt(double(p.head_dim)));
  p.softcap = float(softcap.value_or(0));
  p.window = window.value_or(0);
  p.query = query.const_data_ptr();
  p.keys = key.const_data_ptr();
  p.values = value.const_data_ptr();
  return p;
}

// The same for the gradient, `forward` being what the function above gave; the gradients are not set.
inline PackedTreeAttentionBackwardParams packed_tree_attention_backward_params(const Checker& check,
                                                                               const PackedTreeAttentionParams& forward,
                                                                               const Tensor& query, const Tensor& grad,
                                                                               const Tensor& out, const Tensor& lse) {
  PackedTreeAttentionBackwardParams p;
  p.forward = forward;
  const auto like_the_output = [&](const char* name, const Tensor& t, int64_t* stride) {
    check.device(name, t);
    check.shape(name, t,
                {{"B", forward.batch}, {"Hq", forward.q_heads}, {"T", forward.nodes}, {"Dv", forward.value_dim}});
    check.dtype(name, t, query.scalar_type());
    check.last_contiguous(name, t);
    for (int i = 0; i < 3; ++i) stride[i] = t.stride(i);
    return t.const_data_ptr();
  };
  p.grad = like_the_output("grad", grad, p.grad_stride);
  p.out = like_the_output("out", out, p.out_stride);
  p.lse = check.side_input<float>("lse", lse, ScalarType::Float,
                                  {{"B", forward.batch}, {"Hq", forward.q_heads}, {"T", forward.nodes}});
  for (int i = 0; i < 2; ++i) p.lse_stride[i] = lse.stride(i);
  return p;
}

}  // namespace lbr
