// The checks of the arguments of layer norm's operators that every device needs, and the operators'
// outputs. Tensors may have any strides: one whose rows have no common distance is copied (see
// with_row_stride).
#pragma once

#include "rows.h"

namespace tfkern {

// Tells whether t is absent or has the shape of x.
inline bool is_like(const Optional& t, const Tensor& x) { return has_last_sizes(t, x, x.dim()); }

inline void check_layer_norm_parameters(const Optional& weight, const Optional& bias,
                                        const Tensor& x, int64_t axes) {
  for (const Optional* t : {&weight, &bias}) {
    STD_TORCH_CHECK(!*t || (has_last_sizes(*t, x, axes) && row_stride(**t, axes)),
                    "tfkern::layer_norm: expected contiguous parameters of the size of a row");
  }
}

inline void check_layer_norm_forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                     const Optional& residual, const Optional& seed,
                                     double dropout_p, int64_t axes) {
  check_memory(x, weight, bias, residual, seed);
  check_floating(x, weight, bias, residual);
  check_dropout(seed, dropout_p);
  const auto [M, N] = matrix_size(x, axes);
  STD_TORCH_CHECK(is_like(residual, x),
                  "tfkern::layer_norm_forward: residual and x must have the same shape");
  check_layer_norm_parameters(weight, bias, x, axes);
  check_countable({kPadding, M, N});
}

inline void check_layer_norm_backward(const Tensor& dy, const Optional& dh, const Tensor& h,
                                      const Optional& weight, const Optional& bias,
                                      const Optional& mean, const Tensor& rstd,
                                      const Optional& seed, double dropout_p, int64_t axes) {
  check_memory(dy, dh, h, weight, bias, mean, rstd, seed);
  check_floating(dy, dh, h, weight, bias);
  check_dropout(seed, dropout_p);
  const MatrixSize size = matrix_size(dy, axes);
  const ScalarType type = compute_type(h.scalar_type());
  const auto statistics = [&](const Tensor& x) {
    return is_vector(x, size.rows) && x.scalar_type() == type;
  };
  STD_TORCH_CHECK(is_like(dh, dy) && is_like(h, dy) && statistics(rstd) &&
                      (!mean || statistics(*mean)) &&
                      (type == ScalarType::Double || dy.scalar_type() != ScalarType::Double),
                  "tfkern::layer_norm_backward: dy, dh, h, mean and rstd do not fit together");
  check_layer_norm_parameters(weight, bias, dy, axes);
  check_countable({kPadding, size.rows, size.columns});
}

// The address of the seed, or null if nothing is dropped.
inline const uint64_t* seed_of(const Optional& seed, double p) {
  return seed && p > 0 ? data<const uint64_t>(*seed) : nullptr;
}

// ---- outputs, not initialised ----

using LayerNormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// y, h, mean and rstd
inline LayerNormOutputs layer_norm_forward_outputs(const Tensor& x, const Optional& residual,
                                                   const Optional& seed, bool rms, int64_t axes) {
  const int64_t M = matrix_size(x, axes).rows;
  const ScalarType h_type = promote(x, residual), statistics = compute_type(h_type);
  return {empty(x, x.sizes(), x.scalar_type()),
          residual || seed ? empty(x, x.sizes(), h_type) : absent(x, h_type),
          rms ? absent(x, statistics) : empty(x, {M}, statistics), empty(x, {M}, statistics)};
}

// dx, dresidual, dweight and dbias
inline LayerNormOutputs layer_norm_backward_outputs(const Tensor& dy, const Tensor& h,
                                                    const Optional& weight, const Optional& bias,
                                                    bool separate_residual) {
  return {empty_like(dy, dy), separate_residual ? empty_like(h, h) : absent(h, h.scalar_type()),
          empty_like(weight, dy), empty_like(bias, dy)};
}

}  // namespace tfkern
