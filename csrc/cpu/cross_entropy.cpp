// Cross entropy on the CPU. Forward reads each row once: a block of it, while it is in the L1
// cache, is first searched for its maximum and then added to the sum of exponentials.
#include <torch/csrc/stable/ops.h>

#include "../cross_entropy_arguments.h"
#include "isa.h"

namespace tfkern {

template <class C>
struct CrossEntropy {
  int64_t V;               // classes
  int64_t first, columns;  // the classes that the logits have: all, or some in backward
  const char* logits;
  RowOffsets rows;
  Dtype dtype;
  const int64_t* targets;
  const C* weight;  // null if all are 1
  C weights;        // their sum
  int64_t ignore_index;
  C label_smoothing, softcap;
};

template <class C>
struct CrossEntropyForward : CrossEntropy<C> {
  bool ignored_lse;
  C *loss, *lse, *rest;
};

template <class C>
struct CrossEntropyBackward : CrossEntropy<C> {
  const C *lse, *rest, *dloss, *dlse;  // dloss and dlse are null if they are 0
  char* dlogits;
  RowOffsets dlogits_rows;
};

}  // namespace tfkern

#define TFKERN_KERNEL "cross_entropy.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

template <class C>
void forward_rows(const CrossEntropyForward<C>& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(cross_entropy_forward, a, begin, end);
}

template <class C>
void backward_rows(const CrossEntropyBackward<C>& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(cross_entropy_backward, a, begin, end);
}

template <class C>
CrossEntropy<C> common(const Tensor& logits, const Tensor& targets, const Optional& weight,
                       const CrossEntropyOptions& options) {
  const int64_t V = options.classes;
  const C* w = weight ? data<const C>(*weight) : nullptr;
  double weights = static_cast<double>(V);
  if (w && options.label_smoothing > 0) {
    weights = 0;
    for (int64_t n = 0; n < V; ++n) weights += w[n];
  }
  return {V,
          options.first,
          columns(logits),
          data<char>(logits),
          *row_offsets(logits),
          dtype(logits),
          data<const int64_t>(targets),
          w,
          static_cast<C>(weights),
          options.ignore_index,
          static_cast<C>(options.label_smoothing),
          static_cast<C>(options.softcap)};
}

// The fewest rows that are worth a thread.
int64_t grain(int64_t columns) { return std::max<int64_t>(1, 8192 / columns); }

template <class C>
CrossEntropyOutputs forward(const Tensor& logits, const Tensor& targets, const Optional& weight,
                            const CrossEntropyOptions& options, bool ignored_lse) {
  const CrossEntropyOutputs outputs = cross_entropy_outputs(logits, targets);
  const auto& [loss, lse, rest] = outputs;
  const CrossEntropyForward<C> a{common<C>(logits, targets, weight, options), ignored_lse,
                                 data<C>(loss), data<C>(lse), data<C>(rest)};
  torch::stable::parallel_for(0, targets.numel(), grain(a.columns),
                              [&](int64_t begin, int64_t end) { forward_rows(a, begin, end); });
  return outputs;
}

template <class C>
void backward(const Tensor& logits, const Tensor& targets, const Optional& weight,
              const Tensor& lse, const Tensor& rest, const Optional& dloss, const Optional& dlse,
              const CrossEntropyOptions& options, const Tensor& dlogits) {
  const CrossEntropyBackward<C> a{common<C>(logits, targets, weight, options),
                                  data<const C>(lse),
                                  data<const C>(rest),
                                  dloss ? data<const C>(*dloss) : nullptr,
                                  dlse ? data<const C>(*dlse) : nullptr,
                                  data<char>(dlogits),
                                  *row_offsets(dlogits)};
  torch::stable::parallel_for(0, targets.numel(), grain(a.columns),
                              [&](int64_t begin, int64_t end) { backward_rows(a, begin, end); });
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

CrossEntropyOutputs cross_entropy_forward(Tensor logits, Tensor targets, Optional weight,
                                          int64_t ignore_index, double label_smoothing,
                                          double softcap, bool ignored_lse) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, softcap, 0, columns(logits)};
  check_cross_entropy(logits, targets, weight, options);
  return (is_double(logits) ? forward<double> : forward<float>)(with_row_offsets(logits),
                                                                torch::stable::contiguous(targets),
                                                                weight, options, ignored_lse);
}

void gradient(const Tensor& logits, const Tensor& targets, const Optional& weight,
              const Tensor& lse, const Tensor& rest, const Optional& dloss, const Optional& dlse,
              const CrossEntropyOptions& options, const Tensor& dlogits) {
  (is_double(logits) ? backward<double>
                     : backward<float>)(logits, torch::stable::contiguous(targets), weight,
                                        torch::stable::contiguous(lse),
                                        torch::stable::contiguous(rest), contiguous(dloss),
                                        contiguous(dlse), options, dlogits);
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&tfkern::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&tfkern::cross_entropy_backward<tfkern::gradient>));
  m.impl("cross_entropy_backward_",
         TORCH_BOX(&tfkern::cross_entropy_backward_in_place<tfkern::gradient>));
}
