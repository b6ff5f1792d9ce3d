// The arguments of the MLP's operators, the checks of them that every device needs, and the
// operators' outputs.
#pragma once

#include <string>

#include "activation.h"
#include "tensor.h"

namespace tfkern {

// The name of an activation, as operators take it: torch's own conversion of a `str` to std::string
// loses memory in every call (pytorch issue 191340), up to torch 2.13 at least.
using ActivationName = StringHandle;

// Frees the name, so operators call this once, before anything else.
inline std::string take(ActivationName name) {
  size_t length = 0;
  const char* letters = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &letters));
  const std::string taken(letters, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(name));
  return taken;
}

inline Activation parse_activation(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "quick_gelu", "tfkern::mlp: unknown activation");
  return Activation::quick_gelu;
}

// Tells whether y is absent, or a matrix of the sizes and dtype of x.
inline bool is_such_matrix(const Optional& y, const Tensor& x) {
  return !y || (y->dim() == 2 && y->size(0) == x.size(0) && y->size(1) == x.size(1) &&
                y->scalar_type() == x.scalar_type());
}

inline void check_mlp_forward(const Tensor& pre, const Optional& up) {
  check_memory(pre, up);
  check_floating(pre);
  STD_TORCH_CHECK(pre.dim() == 2 && is_such_matrix(up, pre),
                  "tfkern::mlp_activation_forward: pre must be (M, F), and up as it is");
  check_countable({kPadding, pre.size(0), pre.size(1)});
}

inline void check_mlp_backward(const Tensor& dh, const Tensor& pre, const Optional& up) {
  check_memory(dh, pre, up);
  check_floating(pre);
  STD_TORCH_CHECK(pre.dim() == 2 && is_such_matrix(dh, pre) && is_such_matrix(up, pre),
                  "tfkern::mlp_activation_backward: dh, pre and up do not fit together");
  check_countable({kPadding, pre.size(0), pre.size(1)});
}

// ---- outputs, not initialised ----

// dpre with dup, h, and db with db_up, which is absent unless `bias`
inline std::tuple<Tensor, Tensor, Tensor> mlp_backward_outputs(const Tensor& pre,
                                                               const Optional& up, bool bias) {
  const int64_t M = pre.size(0), F = pre.size(1), kinds = up ? 2 : 1;
  const ScalarType type = pre.scalar_type();
  return {empty(pre, {kinds, M, F}, type), empty_like(pre, pre),
          bias ? empty(pre, {kinds, F}, type) : absent(pre, type)};
}

}  // namespace tfkern
