// route's arguments, on any device: everything but values in tensors is checked, and becomes the kernels' struct.
#pragma once

#include <cmath>

#include "checks.h"

namespace lbr {

// What follows from the arguments; outputs are not set.
inline RouteParams route_params(const Checker& check, const Tensor& hidden, const Tensor& weights, int64_t width,
                                int64_t depth, int64_t dim, int64_t num_heads, int64_t ffn_dim, bool mlp_score,
                                bool independent, bool input_norm, double temperature, const OptionalTensor& uniforms,
                                const OptionalTensor& valid, const OptionalTensor& active) {
  check(width >= 1, "width is ", width, ", expected an integer >= 1");
  check(depth >= 1, "depth is ", depth, ", expected an integer >= 1");
  int64_t nodes = 0, layer = 1;
  for (int64_t l = 0; l < depth; ++l) nodes += layer *= width;

  RouteParams p;
  check.device("hidden", hidden);
  check.shape("hidden", hidden, {{"B"}, {"T", nodes}, {"D"}});
  p.dtype = check.floating("hidden", hidden);
  check.last_contiguous("hidden", hidden);
  p.batch = hidden.size(0), p.nodes = nodes, p.hidden_size = hidden.size(2);
  p.width = width, p.depth = depth, p.dim = dim, p.num_heads = num_heads, p.ffn_dim = ffn_dim;
  p.mlp_score = mlp_score, p.independent = independent, p.input_norm = input_norm;
  check(dim >= 1 && ffn_dim >= 1 && num_heads >= 1 && dim % num_heads == 0, "dim is ", dim,
        ", expected a multiple of num_heads = ", num_heads);
  const int64_t encoder = 6 * dim + (3 * dim + dim) * (dim + 1) + 2 * dim * ffn_dim + ffn_dim + dim;
  const int64_t mlp = 2 * dim * ffn_dim + ffn_dim + dim;
  const int64_t expected = (input_norm ? 2 * p.hidden_size : 0) + p.hidden_size * dim + depth * dim + 2 * dim +
                           2 * encoder + (independent ? mlp : encoder) + (mlp_score ? dim * (dim + 2) + 1 : dim);
  p.weights = check.side_input<float>("weights", weights, ScalarType::Float, {{"parameters", expected}});
  check(temperature > 0 && temperature < INFINITY, "temperature is ", temperature, ", expected a finite number > 0");
  p.temperature = temperature;
  p.uniforms = check.side_input<double>("uniforms", uniforms, ScalarType::Double, {{"B", p.batch}});
  p.valid = check.side_input<bool>("valid", valid, ScalarType::Bool, {{"B", p.batch}, {"T", nodes}});
  check(!p.valid || valid->is_contiguous(), "valid is not contiguous, expected a dense tensor");
  p.active = check.side_input<bool>("active", active, ScalarType::Bool, {{"B", p.batch}});
  p.hidden_stride[0] = hidden.stride(0), p.hidden_stride[1] = hidden.stride(1);
  p.hidden = hidden.const_data_ptr();
  return p;
}

}  // namespace lbr
