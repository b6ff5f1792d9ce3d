// The activation of an MLP on the CPU, plain or gated; torch forms the products around it. pre, h
// and, where the MLP is gated, up are (M, F) matrices.
//
// Each pass reads and writes every element once. Backward computes h again from pre and up, and
// sums the gradients of the biases in the computing type as it forms dpre and dup.
//
// torch's products may be float32 while pre is bfloat16 or float16. Then everything that enters or
// leaves a product is float32 (total, whose rounding is pre; up in forward; h, dh, dpre and dup),
// and the passes convert on the way.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../mlp_arguments.h"
#include "isa.h"

namespace tfkern {

struct MlpForward {
  Activation activation;
  Dtype dtype;  // type of pre and rounded_up
  bool wide;    // total, up and h have the computing type, not dtype
  int64_t F;
  const void *total, *up;  // x w1^T + b1; x w_up^T + b_up, or null without gate
  void *pre, *rounded_up;  // total and up rounded to dtype; null if they have that type already
  void* h;
};

struct MlpBackward {
  Activation activation;
  Dtype dtype;  // type of pre and up
  bool wide;    // dh, dpre, dup and h have the computing type, not dtype
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

std::tuple<Tensor, Tensor> mlp_activation_forward(Tensor total, Optional up, std::string activation,
                                                  ScalarType type) {
  check_mlp_forward(total, up, type);
  const Activation act = parse_activation(activation);
  const bool wide = is_wide(total, type);
  total = torch::stable::contiguous(total);
  if (up) up = torch::stable::contiguous(*up);
  const int64_t M = total.size(0), F = total.size(1);
  const auto outputs = mlp_forward_outputs(total, up, type);
  const auto& [h, pre] = outputs;
  const MlpForward a{act,
                     dtype(type),
                     wide,
                     F,
                     data<void>(total),
                     up ? data<void>(*up) : nullptr,
                     pre.data_ptr(),
                     wide && up ? second(pre) : nullptr,
                     h.data_ptr()};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, F));
  torch::stable::parallel_for(0, M, grain,
                              [&](int64_t begin, int64_t end) { forward_rows(a, begin, end); });
  return outputs;
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
                                                           std::string activation, bool bias) {
  check_mlp_backward(dh, pre, up);
  const Activation act = parse_activation(activation);
  const bool wide = is_wide(dh, pre.scalar_type());
  dh = torch::stable::contiguous(dh);
  pre = torch::stable::contiguous(pre);
  if (up) up = torch::stable::contiguous(*up);
  const int64_t M = pre.size(0), F = pre.size(1), W = (up ? 2 : 1) * F;
  const auto outputs = mlp_backward_outputs(dh, pre, up, bias);
  const auto& [dpre, h, db] = outputs;
  const MlpBackward a{act,
                      dtype(pre),
                      wide,
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
