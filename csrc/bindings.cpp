// Registers the kernels with torch, for the CPU.
//
// Torch ends here, and only its stable ABI is used (target 2.10), so that one binary serves every later version. The
// schemas are defined in Python (lbr_kernels/ops). Everything that a kernel relies on is checked before anything is
// written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "commit.h"
#include "cpu/kernels.h"
#include "packed_tree_attention.h"
#include "params.h"
#include "route.h"
#include "sample_children.h"
#include "tree_attention.h"

namespace lbr {
namespace {

const ThreadPool kTorchPool{[](int64_t count, int64_t grain, ThreadPool::Body body, void* context) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}};

const CpuKernels& kernels(const Checker& check, int64_t isa) {
  const CpuKernels* found = isa >= 0 && isa < int64_t(Isa::kCount) ? cpu_kernels(Isa(isa)) : nullptr;
  check(found != nullptr, "isa ", isa, " does not run on this processor");
  return *found;
}

std::tuple<Tensor, Tensor> tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                          const Tensor& prefix_lens, const Tensor& ancestors,
                                          const OptionalTensor& num_nodes, std::optional<double> scale,
                                          const OptionalTensor& depths, std::optional<int64_t> window,
                                          std::optional<double> softcap, const OptionalTensor& sinks,
                                          const OptionalTensor& alibi_slopes, int64_t isa) {
  const Checker check("tree_attention", query);
  TreeAttentionParams p = tree_attention_params(check, query, key_cache, value_cache, prefix_lens, ancestors, num_nodes,
                                                scale, depths, window, softcap, sinks, alibi_slopes);
  const int64_t capacity = p.slots - p.tree_nodes;
  for (int64_t b = 0; b < p.batch; ++b) {
    check(p.prefix_lens[b] >= 0 && p.prefix_lens[b] <= capacity, "prefix_lens[", b, "] is ", p.prefix_lens[b],
          ", expected 0 <= length <= S - T = ", capacity);
    check(!p.num_nodes || (p.num_nodes[b] >= 0 && p.num_nodes[b] <= p.num_queries), "num_nodes[", b, "] is ",
          p.num_nodes ? p.num_nodes[b] : 0, ", expected 0 <= count <= N = ", p.num_queries);
  }

  Tensor out = torch::stable::new_empty(query, {p.batch, p.q_heads, p.num_queries, p.value_dim});
  Tensor lse = torch::stable::new_empty(query, {p.batch, p.q_heads, p.num_queries}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (p.q_heads > 0) kernels(check, isa).tree_attention(p, kTorchPool);
  return {out, lse};
}

// The packs lie one behind the other, and no subtree leaves its own.
void check_packs(const Checker& check, const PackedTreeAttentionParams& p, int64_t trees) {
  const int64_t first_of_one[] = {0, p.nodes};
  const auto bound = [&](int64_t i) { return p.cu_seqlens ? int64_t(p.cu_seqlens[i]) : first_of_one[i]; };
  bool ascending = bound(0) == 0 && bound(p.packs) == p.nodes;
  for (int64_t i = 0; i < p.packs; ++i) ascending &= bound(i) <= bound(i + 1);
  if (!ascending) {
    std::ostringstream bounds;
    for (int64_t i = 0; i <= p.packs; ++i) bounds << (i ? ", " : "[") << bound(i);
    check(false, "cu_seqlens is ", bounds.str(), "], expected an ascending list from 0 to T = ", p.nodes);
  }
  for (int64_t b = 0; b < trees; ++b)
    for (int64_t i = 0; i < p.packs; ++i)
      for (int64_t k = bound(i); k < bound(i + 1); ++k) {
        const int32_t end = p.subtree_end[b * p.subtree_end_stride + k];
        const int64_t length = bound(i + 1) - bound(i);
        check(end >= 0 && end <= length, "subtree_end[", b, ", ", k, "] is ", end, ", expected 0 <= end <= its pack's ",
              length);
      }
}

// [B, H, T, D] as a view of [B, T, H, D], which is how models read it on.
Tensor interleaved(const Tensor& like, int64_t B, int64_t H, int64_t T, int64_t D) {
  return torch::stable::transpose(torch::stable::new_empty(like, {B, T, H, D}), 1, 2);
}

std::tuple<Tensor, Tensor> packed_tree_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                 const Tensor& subtree_end, const OptionalTensor& cu_seqlens,
                                                 const OptionalTensor& positions, const OptionalTensor& sinks,
                                                 const OptionalTensor& alibi_slopes, std::optional<double> scale,
                                                 std::optional<int64_t> window, std::optional<double> softcap,
                                                 int64_t isa) {
  const Checker check("packed_tree_attention", query);
  PackedTreeAttentionParams p = packed_tree_attention_params(check, query, key, value, subtree_end, cu_seqlens,
                                                             positions, sinks, alibi_slopes, scale, window, softcap);
  check_packs(check, p, subtree_end.size(0));
  Tensor out = interleaved(query, p.batch, p.q_heads, p.nodes, p.value_dim);
  Tensor lse = torch::stable::new_empty(query, {p.batch, p.q_heads, p.nodes}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  kernels(check, isa).packed_tree_attention(p, kTorchPool);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_tree_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& subtree_end, const OptionalTensor& cu_seqlens, const OptionalTensor& positions,
    const OptionalTensor& sinks, const OptionalTensor& alibi_slopes, std::optional<double> scale,
    std::optional<int64_t> window, std::optional<double> softcap, int64_t isa) {
  const Checker check("packed_tree_attention_backward", query);
  const PackedTreeAttentionParams forward = packed_tree_attention_params(
      check, query, key, value, subtree_end, cu_seqlens, positions, sinks, alibi_slopes, scale, window, softcap);
  PackedTreeAttentionBackwardParams p = packed_tree_attention_backward_params(check, forward, query, grad, out, lse);
  check_packs(check, forward, subtree_end.size(0));
  Tensor query_grad = interleaved(query, forward.batch, forward.q_heads, forward.nodes, forward.head_dim);
  Tensor key_grad = interleaved(key, forward.batch, forward.kv_heads, forward.nodes, forward.head_dim);
  Tensor value_grad = interleaved(value, forward.batch, forward.kv_heads, forward.nodes, forward.value_dim);
  p.query_grad = query_grad.mutable_data_ptr();
  p.key_grad = key_grad.mutable_data_ptr();
  p.value_grad = value_grad.mutable_data_ptr();
  kernels(check, isa).packed_tree_attention_backward(p, kTorchPool);
  return {query_grad, key_grad, value_grad};
}

void commit_(const std::vector<Tensor>& caches, const Tensor& prefix_lens, const Tensor& sources,
             const OptionalTensor& num_moves, int64_t advance, const OptionalTensor& row_advance, int64_t /*isa*/) {
  const Checker check("commit_", prefix_lens);
  const CommitArguments arguments =
      commit_arguments(check, caches, prefix_lens, sources, num_moves, advance, row_advance);
  const CommitParams& p = arguments.params;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t moves = p.num_moves ? p.num_moves[b] : p.max_moves, len = p.prefix_lens[b];
    check(moves >= 0 && moves <= p.max_moves, "num_moves[", b, "] is ", moves,
          ", expected 0 <= count <= M = ", p.max_moves);
    if (moves == 0) continue;
    const int64_t step = p.advance ? p.advance[b] : advance;
    check(step >= 0 && step <= moves, "advance for row ", b, " is ", step,
          ", expected 0 <= advance <= its moves = ", moves);
    check(len >= 0, "prefix_lens[", b, "] is ", len, ", expected >= 0");
    for (int64_t i = 0; i < moves; ++i) {
      const int64_t source = p.sources[b * p.sources_stride + i];
      const int64_t least = i == 0 ? 0 : p.sources[b * p.sources_stride + i - 1] + 1;
      check(source >= least, "sources[", b, ", ", i, "] is ", source, ", expected ascending sources, here >= ", least);
      check(p.slots < 0 || len + source < p.slots, "sources[", b, ", ", i, "] is ", source,
            ", expected prefix_lens + source < S = ", p.slots, " with prefix_lens = ", len);
    }
  }
  commit(p, kTorchPool);
}

// Shared by sample_children (with uniforms) and top_children (with a width).
std::tuple<Tensor, Tensor> draw_children(const Checker& check, const Tensor& logits, const OptionalTensor& uniforms,
                                         int64_t width, double temperature, int64_t top_k, double top_p, double min_p,
                                         const OptionalTensor& row_filters, const OptionalTensor& row_index,
                                         int64_t isa) {
  SampleChildrenParams p =
      sample_children_params(check, logits, uniforms, width, temperature, top_k, top_p, min_p, row_filters, row_index);
  if (p.row_filters) {
    for (int64_t r = 0; r < p.logit_rows; ++r) {
      const double* f = p.row_filters + 4 * r;
      check(f[1] >= 0 && f[1] <= 0x1p53 && f[1] == std::floor(f[1]), "top_k[", r, "] is ", f[1],
            ", expected an integer >= 0");
      check_filters(check, {f[0], int64_t(f[1]), f[2], f[3]}, r);
    }
  }
  for (int64_t r = 0; p.row_index && r < p.rows; ++r)
    check(p.row_index[r] >= -1 && p.row_index[r] < p.logit_rows, "row_index[", r, "] is ", p.row_index[r],
          ", expected -1 <= index < R = ", p.logit_rows);
  for (int64_t r = 0; p.uniforms && r < p.rows; ++r)
    for (int64_t k = 0; k < p.width; ++k) {
      const double u = p.uniforms[r * p.uniforms_stride + k];
      check(u >= 0 && u < 1, "uniforms[", r, ", ", k, "] is ", u, ", expected 0 <= u < 1");
    }

  Tensor tokens = torch::stable::new_empty(logits, {p.rows, p.width}, ScalarType::Long);
  Tensor log_probs = torch::stable::new_empty(logits, {p.rows, p.width}, ScalarType::Float);
  std::vector<SampleChildrenParams::Status> status(p.logit_rows, SampleChildrenParams::kOk);
  p.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  p.log_probs = static_cast<float*>(log_probs.mutable_data_ptr());
  p.status = status.data();
  kernels(check, isa).sample_children(p, kTorchPool);
  for (int64_t r = 0; r < p.logit_rows; ++r) {
    check(status[r] != SampleChildrenParams::kNaN, "logits row ", r, " holds NaN, expected finite numbers or -inf");
    check(status[r] != SampleChildrenParams::kInfinite, "logits row ", r,
          " holds +inf, expected finite numbers or -inf");
    check(status[r] != SampleChildrenParams::kAllFiltered, "logits row ", r,
          " is -inf everywhere, expected at least one token that is not filtered out");
  }
  return {tokens, log_probs};
}

std::tuple<Tensor, Tensor> sample_children(const Tensor& logits, const Tensor& uniforms, double temperature,
                                           int64_t top_k, double top_p, double min_p, const OptionalTensor& row_filters,
                                           const OptionalTensor& row_index, int64_t isa) {
  return draw_children(Checker("sample_children", logits), logits, uniforms, 0, temperature, top_k, top_p, min_p,
                       row_filters, row_index, isa);
}

std::tuple<Tensor, Tensor> top_children(const Tensor& logits, int64_t width, double temperature, int64_t top_k,
                                        double top_p, double min_p, const OptionalTensor& row_filters,
                                        const OptionalTensor& row_index, int64_t isa) {
  return draw_children(Checker("top_children", logits), logits, std::nullopt, width, temperature, top_k, top_p, min_p,
                       row_filters, row_index, isa);
}

std::tuple<Tensor, Tensor> route(const Tensor& hidden, const Tensor& weights, int64_t width, int64_t depth, int64_t dim,
                                 int64_t num_heads, int64_t ffn_dim, bool mlp_score, bool independent, bool input_norm,
                                 double temperature, const OptionalTensor& uniforms, const OptionalTensor& valid,
                                 const OptionalTensor& active, int64_t isa) {
  const Checker check("route", hidden);
  RouteParams p = route_params(check, hidden, weights, width, depth, dim, num_heads, ffn_dim, mlp_score, independent,
                               input_norm, temperature, uniforms, valid, active);
  for (int64_t b = 0; b < p.batch; ++b) {
    check(!p.uniforms || (p.uniforms[b] >= 0 && p.uniforms[b] < 1), "uniforms[", b, "] is ",
          p.uniforms ? p.uniforms[b] : 0, ", expected 0 <= u < 1");
    if (!p.valid || (p.active && !p.active[b])) continue;
    const bool* row = p.valid + b * p.nodes;
    bool any = false;
    for (int64_t k = 0; k < width; ++k) any |= row[k];
    check(any, "valid row ", b, " has no candidate, expected at least one in an active row");
    for (int64_t node = width; node < p.nodes; ++node) {
      if (!row[node]) continue;
      check(row[(node - width) / width], "valid[", b, ", ", node, "] is set, expected its parent's to be set too");
      check((node - width) % width == 0 || row[node - 1], "valid[", b, ", ", node,
            "] is set, expected the sibling before it to be set too");
    }
  }

  Tensor log_probs = torch::stable::new_empty(hidden, {p.batch, width}, ScalarType::Float);
  Tensor choice = torch::stable::new_empty(hidden, {p.batch}, ScalarType::Long);
  p.log_probs = static_cast<float*>(log_probs.mutable_data_ptr());
  p.choice = static_cast<int64_t*>(choice.mutable_data_ptr());
  std::vector<char> finite(p.batch, true);
  p.finite = reinterpret_cast<bool*>(finite.data());
  kernels(check, isa).route(p, kTorchPool);
  for (int64_t b = 0; b < p.batch; ++b)
    check(finite[b], "hidden row ", b, " has a score that is not finite, expected finite hidden states and weights");
  return {log_probs, choice};
}

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t isa) {
  const Checker check("linear", weight);
  LinearParams p;
  check.device("weight", weight);
  check.shape("weight", weight, {{"O"}, {"I"}});
  p.dtype = check.floating("weight", weight);
  check.last_contiguous("weight", weight);
  p.outputs = weight.size(0), p.inputs = weight.size(1), p.weight_stride = weight.stride(0);
  check.device("input", input);
  check.dtype("input", input, weight.scalar_type());
  const int64_t dims = input.dim();
  check(dims >= 1 && input.size(dims - 1) == p.inputs, "input has shape ", shape_of(input), ", expected [..., ",
        p.inputs, "]");
  check.last_contiguous("input", input);
  if (bias) {
    check.device("bias", *bias);
    check.dtype("bias", *bias, weight.scalar_type());
    check.shape("bias", *bias, {{"O", p.outputs}});
    check.last_contiguous("bias", *bias);
  }

  std::vector<int64_t> out_shape, row_offsets = {0};
  for (int64_t d = 0; d + 1 < dims; ++d) {
    out_shape.push_back(input.size(d));
    std::vector<int64_t> outer = std::move(row_offsets);
    row_offsets.clear();
    for (const int64_t offset : outer)
      for (int64_t i = 0; i < input.size(d); ++i) row_offsets.push_back(offset + i * input.stride(d));
  }
  out_shape.push_back(p.outputs);
  Tensor out = torch::stable::new_empty(input, out_shape);
  p.rows = int64_t(row_offsets.size());
  p.row_offsets = row_offsets.data();
  p.input = input.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  kernels(check, isa).linear(p, kTorchPool);
  return out;
}

bool has_isa(int64_t isa) { return isa > 0 && isa < int64_t(Isa::kCount) && cpu_kernels(Isa(isa)) != nullptr; }

}  // namespace
}  // namespace lbr

STABLE_TORCH_LIBRARY_IMPL(lbr_kernels, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&lbr::tree_attention));
  m.impl("packed_tree_attention", TORCH_BOX(&lbr::packed_tree_attention));
  m.impl("packed_tree_attention_backward", TORCH_BOX(&lbr::packed_tree_attention_backward));
  m.impl("commit_", TORCH_BOX(&lbr::commit_));
  m.impl("sample_children", TORCH_BOX(&lbr::sample_children));
  m.impl("top_children", TORCH_BOX(&lbr::top_children));
  m.impl("route", TORCH_BOX(&lbr::route));
  m.impl("linear", TORCH_BOX(&lbr::linear));
}

STABLE_TORCH_LIBRARY_IMPL(lbr_kernels, CompositeExplicitAutograd, m) { m.impl("has_isa", TORCH_BOX(&lbr::has_isa)); }
