// A linear layer of few rows whose weight is int8, with a scale for each of its rows.
//
//     y = x (scale w)^T + bias
//
// x is (M, K), w (N, K) and scale (N,) float32. Sums are float32. The weight passes by once, at the
// speed of memory; rows of x, widened, stay in the caches. Each element of y is summed by itself,
// in an order that K alone determines, so that it depends neither on the number of rows nor on that
// of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../tensor.h"
#include "isa.h"
#include "scratch.h"

namespace tfkern {

constexpr int64_t kColumns = 4;  // rows of w that are multiplied together

struct LinearInt8 {
  Dtype dtype;  // of bias and y
  int64_t M, N, K, stride;
  const float* x;  // (M, stride), 0 from K on
  const int8_t* w;
  const float* scale;
  const void* bias;  // or null
  void* y;
};

}  // namespace tfkern

#define TFKERN_KERNEL "linear_int8.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

void columns(const LinearInt8& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(linear_int8, a, begin, end);
}

Tensor linear_int8(Tensor x, Tensor w, Tensor scale, Optional bias) {
  check_memory(x, w, scale, bias);
  STD_TORCH_CHECK(dtype(x) != Dtype::f64,
                  "tfkern::linear_int8: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(
      x.dim() == 2 && w.dim() == 2 && w.size(1) == x.size(1) && w.scalar_type() == ScalarType::Char,
      "tfkern::linear_int8: expected x (M, K) and w (N, K) int8");
  const int64_t M = x.size(0), K = x.size(1), N = w.size(0), stride = round_up(K, 16);
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Float && scale.dim() == 1 && scale.size(0) == N,
      "tfkern::linear_int8: expected a float32 scale for each row of w");
  STD_TORCH_CHECK(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == N),
      "tfkern::linear_int8: expected a bias of the dtype of x for each row of w");
  check_countable({kPadding, M, N, K});
  check_countable({kPadding, M, stride});
  x = torch::stable::contiguous(x);
  w = torch::stable::contiguous(w);
  scale = torch::stable::contiguous(scale);
  if (bias) bias = torch::stable::contiguous(*bias);
  Scratch scratch;
  float* rows = scratch.get<float>(M * stride);
  for (int64_t m = 0; m < M; ++m) {
    float* row = rows + m * stride;
    TFKERN_DTYPE(dtype(x),
                 if constexpr (sizeof(T) < 8) baseline::convert(row, data<const T>(x) + m * K, K));
    std::fill(row + K, row + stride, 0.0f);
  }
  const Tensor y = empty(x, {M, N}, x.scalar_type());
  const LinearInt8 a{dtype(x),
                     M,
                     N,
                     K,
                     stride,
                     rows,
                     data<const int8_t>(w),
                     data<const float>(scale),
                     bias ? bias->data_ptr() : nullptr,
                     y.data_ptr()};
  const int64_t parts = (N + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(kColumns * K, 1));
  torch::stable::parallel_for(0, M > 0 ? parts : 0, grain,
                              [&](int64_t begin, int64_t end) { columns(a, begin, end); });
  return y;
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("linear_int8", TORCH_BOX(&tfkern::linear_int8));
}
