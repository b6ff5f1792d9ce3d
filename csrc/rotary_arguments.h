// The checks of the arguments of rotary's operators that every device needs, and the operators'
// outputs. Tensors may have any strides.
#pragma once

#include "tensor.h"

namespace tfkern {

// q is (B, H, T, D), k (B, Hk, T, D) or absent, cos and sin are (B, T, R).
inline void check_rotary(const Tensor& q, const Optional& k, const Tensor& cos, const Tensor& sin) {
  check_memory(q, k, cos, sin);
  check_floating(q, k, cos, sin);
  STD_TORCH_CHECK(q.dim() == 4, "tfkern::rotary: expected q (B, H, T, D)");
  const int64_t B = q.size(0), T = q.size(2), D = q.size(3);
  STD_TORCH_CHECK(!k || (k->dim() == 4 && k->size(0) == B && k->size(2) == T && k->size(3) == D &&
                         k->scalar_type() == q.scalar_type()),
                  "tfkern::rotary: q and k do not fit together");
  for (const Tensor* t : {&cos, &sin}) {
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == B && t->size(1) == T &&
                        t->size(2) == cos.size(2) && t->size(2) % 2 == 0 && t->size(2) <= D,
                    "tfkern::rotary: expected cos and sin (B, T, R) with an even R of at most D");
  }
  check_countable({kPadding, B, q.size(1), T, D});
  if (k) check_countable({kPadding, B, k->size(1), T, D});
  if (k) check_countable({kPadding, B, q.size(1) + k->size(1), T});
}

// A new tensor of the shape of x. It is contiguous, or with `inverse` lies in memory as
// (B, T, H, D) does.
inline Tensor rotary_output(const Tensor& x, bool inverse) {
  if (!inverse) return empty(x, x.sizes(), x.scalar_type());
  const Tensor y = empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}, x.scalar_type());
  return torch::stable::transpose(y, 1, 2);
}

// q and k, not initialised
inline std::tuple<Tensor, Tensor> rotary_outputs(const Tensor& q, const Optional& k, bool inverse) {
  return {rotary_output(q, inverse), k ? rotary_output(*k, inverse) : absent(q, q.scalar_type())};
}

}  // namespace tfkern
