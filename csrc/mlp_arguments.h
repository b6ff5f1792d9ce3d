// The arguments of the MLP's operators, the checks of them that every device needs, and the
// operators' outputs.
#pragma once

#include <string>

#include "activation.h"
#include "tensor.h"

namespace tfkern {

inline Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "quick_gelu", "tfkern::mlp: unknown activation");
  return Activation::quick_gelu;
}

// Tells whether `product` is wider than the tensors of `dtype` around it: float32 beside 16 bits.
inline bool is_wide(const Tensor& product, ScalarType dtype) {
  if (product.scalar_type() == dtype) return false;
  STD_TORCH_CHECK(product.scalar_type() == ScalarType::Float &&
                      (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
                  "tfkern::mlp: products have the dtype of pre, or float32 if that has 16 bits");
  return true;
}

// Tells whether y is absent, or a matrix of the sizes and dtype of x.
inline bool is_such_matrix(const Optional& y, const Tensor& x) {
  return !y || (y->dim() == 2 && y->size(0) == x.size(0) && y->size(1) == x.size(1) &&
                y->scalar_type() == x.scalar_type());
}

inline void check_mlp_forward(const Tensor& total, const Optional& up, ScalarType type) {
  check_memory(total, up);
  check_floating(total);
  is_wide(total, type);
  STD_TORCH_CHECK(total.dim() == 2 && is_such_matrix(up, total),
                  "tfkern::mlp_activation_forward: total must be (M, F), and up as it is");
  check_countable({kPadding, total.size(0), total.size(1)});
}

inline void check_mlp_backward(const Tensor& dh, const Tensor& pre, const Optional& up) {
  check_memory(dh, pre, up);
  check_floating(dh, pre);
  is_wide(dh, pre.scalar_type());
  STD_TORCH_CHECK(dh.dim() == 2 && pre.dim() == 2 && dh.size(0) == pre.size(0) &&
                      dh.size(1) == pre.size(1) && is_such_matrix(up, pre),
                  "tfkern::mlp_activation_backward: dh, pre and up do not fit together");
  check_countable({kPadding, pre.size(0), pre.size(1)});
}

// ---- outputs, not initialised ----

// h, and pre with the rounded up; the latter is absent unless total is wide.
inline std::tuple<Tensor, Tensor> mlp_forward_outputs(const Tensor& total, const Optional& up,
                                                      ScalarType type) {
  const int64_t M = total.size(0), F = total.size(1), kinds = up ? 2 : 1;
  return {empty_like(total, total),
          is_wide(total, type) ? empty(total, {kinds, M, F}, type) : absent(total, type)};
}

// dpre with dup, h, and db with db_up, which is absent unless `bias`
inline std::tuple<Tensor, Tensor, Tensor> mlp_backward_outputs(const Tensor& dh, const Tensor& pre,
                                                               const Optional& up, bool bias) {
  const int64_t M = pre.size(0), F = pre.size(1), kinds = up ? 2 : 1;
  const ScalarType type = pre.scalar_type();
  return {empty(dh, {kinds, M, F}, dh.scalar_type()), empty_like(dh, dh),
          bias ? empty(pre, {kinds, F}, type) : absent(pre, type)};
}

}  // namespace tfkern
