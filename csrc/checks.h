// What is wrong with an op's arguments, in the words of the Python reference (lbr_kernels/ops/_checks.py); tests hold
// the two together. Shared by the bindings of all devices.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace lbr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "[") << t.size(i);
  text << (t.dim() ? "]" : "[]");
  return text.str();
}

// An axis that a shape must have: its letter, and its size where that is known (-1: anything; -2: 1 or `size`).
struct Axis {
  const char* name;
  int64_t size = -1;
  bool or_one = false;
};

// Says what is wrong in the form "op: argument has value, expected ...".
class Checker {
 public:
  // All tensors have to be where `lead` is.
  Checker(const char* op, const Tensor& lead) : op_(op), on_cpu_(lead.is_cpu()), device_index_(lead.get_device()) {}

  template <class... Args>
  void operator()(bool ok, const Args&... message) const {
    if (ok) return;
    std::ostringstream text;
    text << op_ << ": ";
    ((text << message), ...);
    throw std::runtime_error(text.str());
  }

  void shape(const char* name, const Tensor& t, std::initializer_list<Axis> axes) const {
    bool ok = t.dim() == int64_t(axes.size());
    if (ok) {
      int64_t i = 0;
      for (const Axis& axis : axes) {
        const int64_t size = t.size(i++);
        ok &= axis.size < 0 || size == axis.size || (axis.or_one && size == 1);
      }
    }
    if (ok) return;
    std::ostringstream expected;
    bool first = true;
    for (const Axis& axis : axes) {
      expected << (first ? "" : ", ");
      first = false;
      if (axis.size < 0) {
        expected << axis.name;
      } else {
        if (axis.or_one && axis.size != 1) expected << "1 or ";
        expected << axis.size;
      }
    }
    (*this)(false, name, " has shape ", shape_of(t), ", expected [", expected.str(), "]");
  }

  void dtype(const char* name, const Tensor& t, ScalarType type) const {
    (*this)(t.scalar_type() == type, name, " has dtype ", dtype_name(t.scalar_type()), ", expected ", dtype_name(type));
  }

  DType floating(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::Half: return DType::kFloat16;
      case ScalarType::BFloat16: return DType::kBFloat16;
      default:
        (*this)(false, name, " has dtype ", dtype_name(t.scalar_type()),
                ", expected torch.float32, torch.float16 or torch.bfloat16");
        return DType::kFloat32;
    }
  }

  void device(const char* name, const Tensor& t) const {
    if (t.is_cpu() == on_cpu_ && (on_cpu_ || t.get_device() == device_index_)) return;
    (*this)(false, name, " is not on ", on_cpu_ ? "cpu" : "cuda:" + std::to_string(device_index_),
            ", expected all tensors on one device");
  }

  // The last axis must be contiguous; of size 0 or 1 it always is.
  void last_contiguous(const char* name, const Tensor& t) const {
    const int64_t last = t.dim() - 1;
    (*this)(t.size(last) <= 1 || t.stride(last) == 1, name, " has stride ", t.stride(last),
            " along its last axis, expected 1");
  }

  // Small integer and fp32 side inputs: right type, here, dense along the last axis.
  template <class T>
  const T* side_input(const char* name, const OptionalTensor& t, ScalarType type,
                      std::initializer_list<Axis> axes) const {
    if (!t) return nullptr;
    device(name, *t);
    dtype(name, *t, type);
    shape(name, *t, axes);
    last_contiguous(name, *t);
    static const T kNothing{};  // an empty tensor may have no address, and null means that it was not given
    const void* data = t->const_data_ptr();
    return data ? static_cast<const T*>(data) : &kNothing;
  }

 private:
  const char* op_;
  const bool on_cpu_;
  const int32_t device_index_;
};

}  // namespace lbr
