// The activation of an MLP on the CPU, plain or gated, where torch forms the products around it,
// and its backward. pre, h and, where the MLP is gated, up are (M, F) matrices.
//
// Each pass reads and writes every element once. Backward computes h again from pre and up, and
// sums the gradients of the biases in the computing type as it forms dpre and dup.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../mlp_arguments.h"
#include "isa.h"

namespace tfkern {

struct MlpForward {
  Activation activation;
  Dtype dtype;
  int64_t F;
  const void *pre, *up;  // x w1^T + b1; x w_up^T + b_up, or null without gate
  void* h;
};

struct MlpBackward {
  Activation activation;
  Dtype dtype;
  int64_t F;
  const void *dh, *pre, *up;
  void *dpre, *dup, *h;
};

}  // namespace tfkern

#define TFKERN_KERNEL "mlp.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

void forward_rows(const MlpForward& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(mlp_forward, a, begin, end);
}

void backward_rows(const MlpBackward& a, int64_t begin, int64_t end, void* db) {
  TFKERN_ISA_CALL(mlp_backward, a, begin, end, db);
}

// The address of the second half of a contiguous tensor.
void* second(const Tensor& pair) {
  return static_cast<char*>(pair.data_ptr()) + pair.numel() / 2 * pair.element_size();
}

Tensor mlp_activation_forward(Tensor pre, Optional up, ActivationName activation) {
  const std::string name = take(activation);
  check_mlp_forward(pre, up);
  const Activation act = parse_activation(name);
  pre = torch::stable::contiguous(pre);
  if (up) up = torch::stable::contiguous(*up);
  const int64_t M = pre.size(0), F = pre.size(1);
  const Tensor h = empty_like(pre, pre);
  const MlpForward a{act,         dtype(pre), F, data<void>(pre), up ? data<void>(*up) : nullptr,
                     h.data_ptr()};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, F));
  torch::stable::parallel_for(0, M, grain,
                              [&](int64_t begin, int64_t end) { forward_rows(a, begin, end); });
  return h;
}

// Adds the partial sums of all chunks, W elements each, and rounds the result to db.
template <class T>
void finish(T* db, Compute<T>* partial, int64_t chunks, int64_t W) {
  for (int64_t i = 1; i < chunks; ++i) {
    for (int64_t n = 0; n < W; ++n) partial[n] += partial[i * W + n];
  }
  baseline::convert(db, partial, W);
}

std::tuple<Tensor, Tensor, Tensor> mlp_activation_backward(Tensor dh, Tensor pre, Optional up,
                                                           ActivationName activation, bool bias) {
  const std::string name = take(activation);
  check_mlp_backward(dh, pre, up);
  const Activation act = parse_activation(name);
  dh = torch::stable::contiguous(dh);
  pre = torch::stable::contiguous(pre);
  if (up) up = torch::stable::contiguous(*up);
  const int64_t M = pre.size(0), F = pre.size(1), W = (up ? 2 : 1) * F;
  const auto outputs = mlp_backward_outputs(pre, up, bias);
  const auto& [dpre, h, db] = outputs;
  const MlpBackward a{act,
                      dtype(pre),
                      F,
                      data<void>(dh),
                      data<void>(pre),
                      up ? data<void>(*up) : nullptr,
                      dpre.data_ptr(),
                      up ? second(dpre) : nullptr,
                      h.data_ptr()};
  // The number of chunks follows from the shape alone, so that the sums do not depend on the number
  // of threads.
  const int64_t chunks = std::clamp<int64_t>(M / 16, 1, 64);
  std::vector<char> partial(bias ? chunks * W * sizeof(double) : 0);
  TFKERN_DTYPE(a.dtype, {
    auto* sums = reinterpret_cast<Compute<T>*>(partial.data());
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        backward_rows(a, M * i / chunks, M * (i + 1) / chunks, bias ? sums + i * W : nullptr);
      }
    });
    if (bias) finish(data<T>(db), sums, chunks, W);
  });
  return outputs;
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("mlp_activation_forward", TORCH_BOX(&tfkern::mlp_activation_forward));
  m.impl("mlp_activation_backward", TORCH_BOX(&tfkern::mlp_activation_backward));
}
