// Registers the kernels with torch, for CUDA; see csrc/bindings.cpp. Values, which lie in the device's memory, are
// checked by the kernels: a bad one sets a flag there. Built on the SIMT shim, this is a library of its own for the
// CPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../commit.h"
#include "../route.h"
#include "../sample_children.h"
#include "../tree_attention.h"
#include "commit.h"
#include "route.h"
#include "sample_children.h"
#include "tree_attention.h"
#include "workspace.h"

#ifndef LBR_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

#ifdef LBR_SIMT
#define LBR_KEY CPU  // and the build says LBR_LIBRARY
#else
#define LBR_LIBRARY lbr_kernels
#define LBR_KEY CUDA
#endif

namespace lbr {
namespace {

gpu::Counters counters;

// The word of each device into which kernels or their flags, as Python has handed it over.
std::mutex flags_mutex;
std::map<int32_t, int*> flags;

int* flags_of(const Tensor& t) {
  const std::lock_guard<std::mutex> lock(flags_mutex);
  const auto found = flags.find(t.get_device());
  if (found == flags.end()) throw std::runtime_error("this device was not made ready, expected prepare before");
  return found->second;
}

#ifdef LBR_SIMT
gpu::Stream current_stream(int32_t /*device*/) { return nullptr; }
#else
gpu::Stream current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("the current CUDA stream cannot be had");
  return static_cast<gpu::Stream>(stream);
}
#endif

// Makes the tensor's device the current one.
class OnDeviceOf {
#ifdef LBR_SIMT
 public:
  explicit OnDeviceOf(const Tensor& /*t*/) {}
#else
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

std::tuple<Tensor, Tensor> tree_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                          const Tensor& prefix_lens, const Tensor& ancestors,
                                          const OptionalTensor& num_nodes, std::optional<double> scale,
                                          const OptionalTensor& depths, std::optional<int64_t> window,
                                          std::optional<double> softcap, const OptionalTensor& sinks,
                                          const OptionalTensor& alibi_slopes, int64_t /*isa*/) {
  const Checker check("tree_attention", query);
  TreeAttentionParams p = tree_attention_params(check, query, key_cache, value_cache, prefix_lens, ancestors, num_nodes,
                                                scale, depths, window, softcap, sinks, alibi_slopes);
  const OnDeviceOf device(query);
  const gpu::Device properties = gpu::current_device();
  const std::string unsupported = gpu::tree_attention_unsupported(p, properties);
  const bool fits_triton = std::max(p.head_dim, p.value_dim) <= 256 && p.value_dim > 0;
  check(unsupported.empty(), unsupported, " for backend 'cuda'; the nearest accepted backend is '",
        fits_triton ? "triton" : "reference", "'");

  Tensor out = torch::stable::new_empty(query, {p.batch, p.q_heads, p.num_queries, p.value_dim});
  Tensor lse = torch::stable::new_empty(query, {p.batch, p.q_heads, p.num_queries}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (lse.numel() == 0) return {out, lse};

  const gpu::TreeAttentionPlan plan = gpu::plan_tree_attention(p, properties);
  const gpu::Stream stream = current_stream(query.get_device());
  gpu::TreeAttentionWorkspace workspace{nullptr, nullptr, flags_of(query)};
  // Goes back to torch's allocator at the end, which gives it to nobody before this stream has done with it.
  Tensor partials;
  if (plan.splits > 1) {
    partials = torch::stable::new_empty(query, {plan.partials}, ScalarType::Float);
    workspace.partials = static_cast<float*>(partials.mutable_data_ptr());
    workspace.arrivals = counters.take(query.get_device(), stream, plan.arrivals);
  }
  gpu::tree_attention(p, plan, workspace, stream);
  return {out, lse};
}

void commit_(const std::vector<Tensor>& caches, const Tensor& prefix_lens, const Tensor& sources,
             const OptionalTensor& num_moves, int64_t advance, const OptionalTensor& row_advance, int64_t /*isa*/) {
  const Checker check("commit_", prefix_lens);
  const CommitArguments arguments =
      commit_arguments(check, caches, prefix_lens, sources, num_moves, advance, row_advance);
  const int64_t batch = arguments.params.batch;
  if (batch == 0) return;
  const OnDeviceOf device(prefix_lens);
  const gpu::Stream stream = current_stream(prefix_lens.get_device());
  gpu::commit(arguments.params, {counters.take(prefix_lens.get_device(), stream, batch), flags_of(prefix_lens)},
              stream);
}

std::tuple<Tensor, Tensor> route(const Tensor& hidden, const Tensor& weights, int64_t width, int64_t depth, int64_t dim,
                                 int64_t num_heads, int64_t ffn_dim, bool mlp_score, bool independent, bool input_norm,
                                 double temperature, const OptionalTensor& uniforms, const OptionalTensor& valid,
                                 const OptionalTensor& active, int64_t /*isa*/) {
  const Checker check("route", hidden);
  RouteParams p = route_params(check, hidden, weights, width, depth, dim, num_heads, ffn_dim, mlp_score, independent,
                               input_norm, temperature, uniforms, valid, active);
  const OnDeviceOf device(hidden);
  const gpu::Device properties = gpu::current_device();
  const std::string unsupported = gpu::route_unsupported(p, properties);
  check(unsupported.empty(), unsupported, " for backend 'cuda'; the nearest accepted backend is 'triton'");

  Tensor log_probs = torch::stable::new_empty(hidden, {p.batch, width}, ScalarType::Float);
  Tensor choice = torch::stable::new_empty(hidden, {p.batch}, ScalarType::Long);
  p.log_probs = static_cast<float*>(log_probs.mutable_data_ptr());
  p.choice = static_cast<int64_t*>(choice.mutable_data_ptr());
  if (p.batch == 0) return {log_probs, choice};

  const gpu::RoutePlan plan = gpu::plan_route(p, properties);
  const gpu::Stream stream = current_stream(hidden.get_device());
  // Goes back to torch's allocator at the end, as in tree_attention.
  Tensor floats = torch::stable::new_empty(hidden, {plan.workspace}, ScalarType::Float);
  gpu::route(p, plan,
             {static_cast<float*>(floats.mutable_data_ptr()), counters.take(hidden.get_device(), stream, plan.groups),
              flags_of(hidden)},
             stream);
  return {log_probs, choice};
}

// Shared by sample_children (with uniforms) and top_children (with a width).
std::tuple<Tensor, Tensor> draw_children(const Checker& check, const Tensor& logits, const OptionalTensor& uniforms,
                                         int64_t width, double temperature, int64_t top_k, double top_p, double min_p,
                                         const OptionalTensor& row_filters, const OptionalTensor& row_index) {
  SampleChildrenParams p =
      sample_children_params(check, logits, uniforms, width, temperature, top_k, top_p, min_p, row_filters, row_index);
  const OnDeviceOf device(logits);
  Tensor tokens = torch::stable::new_empty(logits, {p.rows, p.width}, ScalarType::Long);
  Tensor log_probs = torch::stable::new_empty(logits, {p.rows, p.width}, ScalarType::Float);
  p.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  p.log_probs = static_cast<float*>(log_probs.mutable_data_ptr());
  p.status = nullptr;
  if (p.rows == 0) return {tokens, log_probs};

  const gpu::SampleChildrenPlan plan = gpu::plan_sample_children(p);
  const gpu::Stream stream = current_stream(logits.get_device());
  gpu::SampleChildrenWorkspace workspace{nullptr, nullptr, flags_of(logits)};
  // Goes back to torch's allocator at the end, which gives it to nobody before this stream has done with it.
  Tensor words;
  if (plan.blocks > 1) {
    words = torch::stable::new_empty(logits, {2 * int64_t(plan.groups) * plan.blocks * plan.words}, ScalarType::Long);
    workspace.words = static_cast<unsigned long long*>(words.mutable_data_ptr());
    workspace.counters = counters.take(logits.get_device(), stream, int64_t(plan.groups) * plan.counters);
  }
  gpu::sample_children(p, plan, workspace, stream);
  return {tokens, log_probs};
}

std::tuple<Tensor, Tensor> sample_children(const Tensor& logits, const Tensor& uniforms, double temperature,
                                           int64_t top_k, double top_p, double min_p, const OptionalTensor& row_filters,
                                           const OptionalTensor& row_index, int64_t /*isa*/) {
  return draw_children(Checker("sample_children", logits), logits, uniforms, 0, temperature, top_k, top_p, min_p,
                       row_filters, row_index);
}

std::tuple<Tensor, Tensor> top_children(const Tensor& logits, int64_t width, double temperature, int64_t top_k,
                                        double top_p, double min_p, const OptionalTensor& row_filters,
                                        const OptionalTensor& row_index, int64_t /*isa*/) {
  return draw_children(Checker("top_children", logits), logits, std::nullopt, width, temperature, top_k, top_p, min_p,
                       row_filters, row_index);
}

// Makes `word`, int32 [1] which Python keeps, the flags of its device. Throws where the kernels cannot run there.
void prepare(const Tensor& word) {
  const OnDeviceOf device(word);
  gpu::require_tree_attention();
  gpu::require_commit();
  gpu::require_route();
  gpu::require_sample_children();
  const std::lock_guard<std::mutex> lock(flags_mutex);
  flags[word.get_device()] = static_cast<int*>(word.mutable_data_ptr());
}

}  // namespace
}  // namespace lbr

STABLE_TORCH_LIBRARY_IMPL(LBR_LIBRARY, LBR_KEY, m) {
  m.impl("tree_attention", TORCH_BOX(&lbr::tree_attention));
  m.impl("commit_", TORCH_BOX(&lbr::commit_));
  m.impl("route", TORCH_BOX(&lbr::route));
  m.impl("sample_children", TORCH_BOX(&lbr::sample_children));
  m.impl("top_children", TORCH_BOX(&lbr::top_children));
  m.impl("prepare", TORCH_BOX(&lbr::prepare));
}
