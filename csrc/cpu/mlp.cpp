// The activation of an MLP on the CPU, plain or gated; torch forms the products around it. pre is
// an (M, F) matrix, gated (M, 2F) with the gate in the first F columns, and h is (M, F).
//
// Each pass reads and writes every element once. Backward computes h again from pre, and sums db1
// in the registers' precision while dpre goes by.
//
// Products may be float32 where tensors are bfloat16 or float16. Then their results and factors
// (the total that pre is the rounding of, h, dh, dpre) are float32, and the passes convert as they
// go.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../mlp_arguments.h"
#include "isa.h"

namespace tfkern {

struct MlpForward {
  Activation activation;
  bool gated;
  Dtype dtype;  // of pre
  bool wide;    // all else is in the computing type, not in that of pre
  int64_t F;
  const void* total;  // x w1^T + b1
  void* pre;          // null if it is total
  void* h;
};

struct MlpBackward {
  Activation activation;
  bool gated;
  Dtype dtype;
  bool wide;
  int64_t F;
  const void *dh, *pre;
  void *dpre, *h;
};

}  // namespace tfkern

#define TFKERN_KERNEL "mlp.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

void forward_rows(const MlpForward& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(mlp_forward, a, begin, end);
}

void backward_rows(const MlpBackward& a, int64_t begin, int64_t end, void* db1) {
  TFKERN_ISA_CALL(mlp_backward, a, begin, end, db1);
}

std::tuple<Tensor, Tensor> mlp_activation_forward(Tensor total, std::string activation, bool gated,
                                                  ScalarType type) {
  check_mlp_forward(total, gated, type);
  const Activation act = parse_activation(activation);
  const bool wide = is_wide(total, type);
  total = torch::stable::contiguous(total);
  const int64_t M = total.size(0), W = total.size(1), F = gated ? W / 2 : W;
  Tensor h = empty(total, {M, F}, total.scalar_type());
  Tensor pre = wide ? empty(total, {M, W}, type) : absent(total, type);
  const MlpForward a{
      act,         gated, dtype(type), wide, F, data<void>(total), wide ? pre.data_ptr() : nullptr,
      h.data_ptr()};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, F));
  torch::stable::parallel_for(0, M, grain,
                              [&](int64_t begin, int64_t end) { forward_rows(a, begin, end); });
  return {h, pre};
}

// The sum of the partial sums of all chunks, rounded.
template <class T>
void finish(T* db1, Compute<T>* partial, int64_t chunks, int64_t W) {
  for (int64_t i = 1; i < chunks; ++i) {
    for (int64_t n = 0; n < W; ++n) partial[n] += partial[i * W + n];
  }
  baseline::convert(db1, partial, W);
}

std::tuple<Tensor, Tensor, Tensor> mlp_activation_backward(Tensor dh, Tensor pre,
                                                           std::string activation, bool gated,
                                                           bool bias) {
  check_mlp_backward(dh, pre, gated);
  const Activation act = parse_activation(activation);
  const bool wide = is_wide(dh, pre.scalar_type());
  dh = torch::stable::contiguous(dh);
  pre = torch::stable::contiguous(pre);
  const int64_t M = pre.size(0), W = pre.size(1), F = dh.size(1);
  Tensor dpre = empty(pre, {M, W}, dh.scalar_type()), h = empty(pre, {M, F}, dh.scalar_type());
  Tensor db1 = empty(pre, {bias ? W : 0}, pre.scalar_type());
  const MlpBackward a{act,         gated,          dtype(pre),      wide,
                      F,           data<void>(dh), data<void>(pre), dpre.data_ptr(),
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
    if (bias) finish(static_cast<T*>(db1.data_ptr()), sums, chunks, W);
  });
  return {dpre, h, db1};
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("mlp_activation_forward", TORCH_BOX(&tfkern::mlp_activation_forward));
  m.impl("mlp_activation_backward", TORCH_BOX(&tfkern::mlp_activation_backward));
}
