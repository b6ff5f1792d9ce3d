// What the bindings need of torch: the stable ABI only, so that one binary serves every torch
// >= 2.11.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "dtype.h"

namespace tfkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "tfkern: expected float32, float64, bfloat16 or float16");
  }
}

inline Dtype dtype(const Tensor& t) { return dtype(t.scalar_type()); }

// The first element of a tensor. A view of bytes may begin between elements; kernels read whole
// ones.
template <class T>
T* data(const Tensor& t) {
  void* first = t.data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(first) % t.element_size() == 0,
                  "tfkern: expected tensors whose memory is aligned to their elements");
  return static_cast<T*>(first);
}

// Tells whether x is a vector of n elements that lie one after the other.
inline bool is_vector(const Tensor& x, int64_t n) {
  return x.dim() == 1 && x.size(0) == n && (n <= 1 || x.stride(0) == 1);
}

inline void check_probability(double p) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "tfkern: expected a dropout_p from 0 to 1");
}

// The seed of dropout, a single int64.
inline uint64_t seed_of(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "tfkern: expected one int64 as seed");
  return static_cast<uint64_t>(*data<const int64_t>(seed));
}

// A new contiguous tensor on the device of `like`. By the shim: a call of torch's operator through
// the dispatcher takes half a microsecond more.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                    ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(),
                                                   static_cast<int64_t>(shape.size()), &dtype,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

// What an operator returns for an output that the call does not have.
inline Tensor absent(const Tensor& like, ScalarType type) { return empty(like, {0}, type); }

// torch.promote_types of the two, or the type of `a` if there is no `b`.
inline ScalarType promote(const Tensor& a, const std::optional<Tensor>& b) {
  if (!b || a.scalar_type() == b->scalar_type()) return a.scalar_type();
  const bool wide = dtype(a) == Dtype::f64 || dtype(*b) == Dtype::f64;
  return wide ? ScalarType::Double : ScalarType::Float;  // bfloat16 with float16 gives float32 too
}

}  // namespace tfkern
