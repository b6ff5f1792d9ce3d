// The arguments of the MLP's operators, and what is checked of them on every device.
#pragma once

#include <string>

#include "tensor.h"

namespace tfkern {

enum class Activation { relu, gelu, gelu_tanh, silu };

inline Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "silu", "tfkern::mlp: unknown activation");
  return Activation::silu;
}

// Whether the products around tensors of `dtype` have the computing type, and not just `dtype`.
inline bool is_wide(const Tensor& product, ScalarType dtype) {
  if (product.scalar_type() == dtype) return false;
  STD_TORCH_CHECK(product.scalar_type() == ScalarType::Float &&
                      (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
                  "tfkern::mlp: products have the dtype of pre, or float32 if that has 16 bits");
  return true;
}

inline void check_mlp_forward(const Tensor& total, bool gated, ScalarType type) {
  check_memory(total);
  check_floating(total);
  is_wide(total, type);
  STD_TORCH_CHECK(total.dim() == 2 && !(gated && total.size(1) % 2),
                  "tfkern::mlp_activation_forward: total must be (M, F), gated (M, 2F)");
  check_countable({kPadding, total.size(0), total.size(1)});
}

inline void check_mlp_backward(const Tensor& dh, const Tensor& pre, bool gated) {
  check_memory(dh, pre);
  check_floating(dh, pre);
  is_wide(dh, pre.scalar_type());
  STD_TORCH_CHECK(dh.dim() == 2 && pre.dim() == 2 && dh.size(0) == pre.size(0) &&
                      dh.size(1) * (gated ? 2 : 1) == pre.size(1),
                  "tfkern::mlp_activation_backward: dh and pre do not fit together");
  check_countable({kPadding, pre.size(0), pre.size(1)});
}

}  // namespace tfkern
