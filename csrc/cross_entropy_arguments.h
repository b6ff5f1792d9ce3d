// The arguments of cross entropy's operators, the checks of them that every device needs, and the
// operators' outputs. tfkern/reference/cross_entropy.py has the formulas. Logits may have any
// strides: those whose rows need more than two strides are copied.
#pragma once

#include "rows.h"

namespace tfkern {

// What both passes are told beside their tensors. The logits have all classes, or in backward those
// from `first` on; `classes` is the number of all.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing, softcap;
  int64_t first, classes;
};

inline int64_t columns(const Tensor& logits) {
  return logits.dim() == 0 ? 0 : logits.size(logits.dim() - 1);
}

// Tells whether x is absent, or has one element of `type` for each target.
inline bool is_for_each(const Optional& x, const Tensor& targets, ScalarType type) {
  return !x || (x->numel() == targets.numel() && x->scalar_type() == type);
}

inline void check_cross_entropy(const Tensor& logits, const Tensor& targets, const Optional& weight,
                                const CrossEntropyOptions& options) {
  check_memory(logits, targets, weight);
  check_floating(logits);
  bool fits = logits.dim() == targets.dim() + 1 && targets.scalar_type() == ScalarType::Long;
  for (int64_t i = 0; fits && i < targets.dim(); ++i) fits = logits.size(i) == targets.size(i);
  STD_TORCH_CHECK(fits && columns(logits) > 0,
                  "tfkern::cross_entropy: expected logits (..., V) and int64 targets (...)");
  STD_TORCH_CHECK(options.first >= 0 && options.classes - columns(logits) >= options.first,
                  "tfkern::cross_entropy: expected logits of classes that there are");
  const ScalarType type = compute_type(logits.scalar_type());
  STD_TORCH_CHECK(!weight || (is_vector(*weight, options.classes) && weight->scalar_type() == type),
                  "tfkern::cross_entropy: expected contiguous weights (V,) in the type of sums");
  check_countable({kPadding, targets.numel(), options.classes});
}

inline void check_cross_entropy_backward(const Tensor& logits, const Tensor& targets,
                                         const Optional& weight, const Tensor& lse,
                                         const Tensor& rest, const Optional& dloss,
                                         const Optional& dlse, const CrossEntropyOptions& options) {
  check_cross_entropy(logits, targets, weight, options);
  check_memory(logits, lse, rest, dloss, dlse);
  const ScalarType type = compute_type(logits.scalar_type());
  STD_TORCH_CHECK(
      is_for_each(lse, targets, type) && is_for_each(rest, targets, type) &&
          is_for_each(dloss, targets, type) && is_for_each(dlse, targets, type),
      "tfkern::cross_entropy_backward: lse, rest, dloss and dlse do not fit the targets");
}

// Checks that the gradient can be written over the logits.
inline void check_in_place(const Tensor& logits) {
  const std::optional<RowOffsets> rows = row_offsets(logits);
  const int64_t V = columns(logits), M = logits.numel() / V;
  const bool apart = rows && (rows->T == 1 || rows->stride >= V) &&
                     (rows->T >= M || rows->batch_stride >= (rows->T - 1) * rows->stride + V);
  STD_TORCH_CHECK(M == 0 || apart, "tfkern::cross_entropy_backward_: rows of logits overlap");
}

// logits themselves, or a contiguous copy where their rows need more than two strides.
inline Tensor with_row_offsets(const Tensor& logits) {
  return row_offsets(logits) ? logits : torch::stable::contiguous(logits);
}

inline Optional contiguous(const Optional& x) {
  return x ? Optional(torch::stable::contiguous(*x)) : std::nullopt;
}

using CrossEntropyOutputs = std::tuple<Tensor, Tensor, Tensor>;

// loss, lse and rest, not initialised
inline CrossEntropyOutputs cross_entropy_outputs(const Tensor& logits, const Tensor& targets) {
  const ScalarType type = compute_type(logits.scalar_type());
  const auto made = [&] { return empty(logits, targets.sizes(), type); };
  return {made(), made(), made()};
}

// ---- operators ----

// The gradient of the logits on one device, written to dlogits. Its first argument and dlogits have
// row_offsets, and may be the same.
using CrossEntropyGradient = void(const Tensor& logits, const Tensor& targets,
                                  const Optional& weight, const Tensor& lse, const Tensor& rest,
                                  const Optional& dloss, const Optional& dlse,
                                  const CrossEntropyOptions& options, const Tensor& dlogits);

template <CrossEntropyGradient* gradient>
Tensor cross_entropy_backward(Tensor logits, Tensor targets, Optional weight, Tensor lse,
                              Tensor rest, Optional dloss, Optional dlse, int64_t ignore_index,
                              double label_smoothing, double softcap, int64_t first,
                              int64_t classes) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, softcap, first, classes};
  check_cross_entropy_backward(logits, targets, weight, lse, rest, dloss, dlse, options);
  const Tensor dlogits = empty_like(logits, logits);
  gradient(with_row_offsets(logits), targets, weight, lse, rest, dloss, dlse, options, dlogits);
  return dlogits;
}

template <CrossEntropyGradient* gradient>
void cross_entropy_backward_in_place(Tensor logits, Tensor targets, Optional weight, Tensor lse,
                                     Tensor rest, Optional dloss, Optional dlse,
                                     int64_t ignore_index, double label_smoothing, double softcap,
                                     int64_t first, int64_t classes) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, softcap, first, classes};
  check_cross_entropy_backward(logits, targets, weight, lse, rest, dloss, dlse, options);
  check_in_place(logits);
  gradient(logits, targets, weight, lse, rest, dloss, dlse, options, logits);
}

}  // namespace tfkern
