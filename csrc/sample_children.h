// sample_children's and top_children's arguments, on any device: everything but values in tensors is checked, and
// becomes the kernels' struct.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "checks.h"

namespace lbr {

inline void check_filters(const Checker& check, const SamplingFilters& f, int64_t row) {
  std::string where = row < 0 ? "" : "[" + std::to_string(row) + "]";
  check(f.temperature > 0 && f.temperature < INFINITY, "temperature", where, " is ", f.temperature,
        ", expected a finite number > 0");
  check(f.top_k >= 0, "top_k", where, " is ", f.top_k, ", expected an integer >= 0");
  check(f.top_p >= 0 && f.top_p <= 1, "top_p", where, " is ", f.top_p, ", expected 0 <= top_p <= 1");
  check(f.min_p >= 0 && f.min_p <= 1, "min_p", where, " is ", f.min_p, ", expected 0 <= min_p <= 1");
}

// With uniforms for sample_children, without them and with a width for top_children; outputs are not set.
inline SampleChildrenParams sample_children_params(const Checker& check, const Tensor& logits,
                                                   const OptionalTensor& uniforms, int64_t width, double temperature,
                                                   int64_t top_k, double top_p, double min_p,
                                                   const OptionalTensor& row_filters, const OptionalTensor& row_index) {
  SampleChildrenParams p;
  check.device("logits", logits);
  check.shape("logits", logits, {{"R"}, {"V"}});
  p.dtype = check.floating("logits", logits);
  check.last_contiguous("logits", logits);
  p.logit_rows = logits.size(0), p.vocab = logits.size(1), p.logits_stride = logits.stride(0);
  check(p.vocab >= 1 && p.vocab <= (int64_t(1) << 22), "logits has a vocabulary of ", p.vocab,
        ", expected 1 <= V <= 4194304");
  p.row_index = check.side_input<int64_t>("row_index", row_index, ScalarType::Long, {{"rows"}});
  p.rows = row_index ? row_index->size(0) : p.logit_rows;
  p.uniforms = check.side_input<double>("uniforms", uniforms, ScalarType::Double, {{"rows", p.rows}, {"K"}});
  p.width = uniforms ? uniforms->size(1) : width;
  p.uniforms_stride = uniforms ? uniforms->stride(0) : 0;
  check(p.width >= 1, "width is ", p.width, ", expected an integer >= 1");
  p.filters = {temperature, top_k, top_p, min_p};
  check_filters(check, p.filters, -1);
  p.row_filters =
      check.side_input<double>("row_filters", row_filters, ScalarType::Double, {{"R", p.logit_rows}, {"4", 4}});
  check(!p.row_filters || row_filters->is_contiguous(), "row_filters is not contiguous, expected a dense tensor");
  p.logits = logits.const_data_ptr();
  return p;
}

}  // namespace lbr
