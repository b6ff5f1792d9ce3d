// The parts of torch that the bindings use. All belong to the stable ABI, so that one binary serves
// every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include "dtype.h"

namespace tfkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

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

// The type in which kernels compute with elements of `type`, as Compute in dtype.h.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// ---- checks of arguments ----

// Calls f with each tensor that is not absent.
template <class F, class... T>
void each_tensor(const F& f, const T&... tensors) {
  const auto call = [&](const auto& t) {
    if constexpr (std::is_same_v<std::decay_t<decltype(t)>, Tensor>) {
      f(t);
    } else if (t) {
      f(*t);
    }
  };
  (call(tensors), ...);
}

// Checks that all tensors are on the device of the first, and that their memory is aligned to their
// elements: a view of a tensor of bytes may begin anywhere.
template <class... T>
void check_memory(const Tensor& first, const T&... others) {
  const torch::stable::Device device = first.device();
  const auto check = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.device() == device, "tfkern: expected all tensors on the same device");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % t.element_size() == 0,
                    "tfkern: expected tensors whose memory is aligned to their elements");
  };
  each_tensor(check, first, others...);
}

template <class... T>
void check_floating(const T&... tensors) {
  each_tensor([](const Tensor& t) { dtype(t); }, tensors...);
}

// A factor of sizes for check_countable, which leaves room for padding and for counting in bytes.
constexpr int64_t kPadding = 1 << 13;

// Checks that the product of the sizes fits into an int64: kernels multiply sizes. A size of 0
// counts as 1, since kernels may multiply the others alone.
inline void check_countable(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product),
                    "tfkern: expected sizes whose product is an int64");
  }
}

// The seed of dropout is a single int64, absent without dropout.
inline void check_dropout(const Optional& seed, double p) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "tfkern: expected a dropout_p from 0 to 1");
  STD_TORCH_CHECK(!seed || (seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                  "tfkern: expected one int64 as seed");
}

// Tells whether x is a vector of n elements that lie one after the other.
inline bool is_vector(const Tensor& x, int64_t n) {
  return x.dim() == 1 && x.size(0) == n && (n <= 1 || x.stride(0) == 1);
}

// t itself, of four axes, or a contiguous copy where the elements of its last axis lie apart.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// ---- operators ----

// The arguments of an operator as the dispatcher hands them over, in the order of its schema; the
// results overwrite them. It serves operators with too many arguments to write out twice; TORCH_BOX
// wraps the functions of all others.
class Stack {
 public:
  explicit Stack(StableIValue* values) : first_(values), next_(values) {}

  // Each function takes the next argument, which the operator then owns.
  Tensor tensor() { return next<Tensor>(); }
  Optional optional() { return next<Optional>(); }
  std::optional<int64_t> integer() { return next<std::optional<int64_t>>(); }
  double number() { return next<double>(); }
  bool boolean() { return next<bool>(); }

  template <class... T>
  void give(const std::tuple<T...>& results) {
    StableIValue* to = first_;
    std::apply([&](const T&... x) { ((*to++ = torch::stable::detail::from(x)), ...); }, results);
  }

 private:
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }

  StableIValue *first_, *next_;
};

// ---- outputs ----

// A new contiguous tensor on the device of `like`. It calls torch's shim, because the operator
// behind the dispatcher would take half a microsecond more.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                    ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(),
                                                   static_cast<int64_t>(shape.size()), &dtype,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

// The empty tensor that an operator returns for an output that the call does not have. The address
// of its data is null.
inline Tensor absent(const Tensor& like, ScalarType type) { return empty(like, {0}, type); }

// A new contiguous tensor of the shape and dtype of `t`; absent, with the dtype of `other`, if `t`
// is.
inline Tensor empty_like(const Optional& t, const Tensor& other) {
  return t ? empty(*t, t->sizes(), t->scalar_type()) : absent(other, other.scalar_type());
}

// torch.promote_types of the two, or the type of `a` if there is no `b`.
inline ScalarType promote(const Tensor& a, const Optional& b) {
  if (!b || a.scalar_type() == b->scalar_type()) return a.scalar_type();
  const bool wide = dtype(a) == Dtype::f64 || dtype(*b) == Dtype::f64;
  return wide ? ScalarType::Double : ScalarType::Float;  // bfloat16 with float16 gives float32 too
}

}  // namespace tfkern
