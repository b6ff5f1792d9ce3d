// Layer norm and RMS norm on the CPU. The operators take tensors of any rank; kernels take them as
// matrices (M, N), where all but the last `axes` axes are rows. A row goes through all steps
// (dropout, residual, statistics, output) before the next row begins, while it is in the L1 cache.
#include <torch/csrc/stable/ops.h>

#include <array>

#include "../dropout.h"
#include "../layer_norm_arguments.h"
#include "isa.h"
#include "scratch.h"

namespace tfkern {

// A matrix of any element type with contiguous rows; null data stands for an absent one.
struct Rows {
  char* data = nullptr;
  int64_t stride = 0;  // bytes from one row to the next
  Dtype dtype = Dtype::f32;
};

template <class C>
struct LayerNormForward {
  int64_t N;
  double eps;
  bool rms;
  const uint64_t* seed;  // null without dropout
  Dropout<C> dropout;
  Rows x, residual;
  const C *weight, *bias;  // N elements each, padded
  Rows y, h;
  C *mean, *rstd;  // (M,); mean is null for RMS norm
};

template <class C>
struct LayerNormBackward {
  int64_t N;
  bool rms;
  const uint64_t* seed;  // null without dropout
  Dropout<C> dropout;
  Rows dy, dh, h;
  const C* weight;       // N elements, padded
  const C *mean, *rstd;  // (M,); mean is null for RMS norm
  Rows dx, dresidual;
};

}  // namespace tfkern

#define TFKERN_KERNEL "layer_norm.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

template <class C>
void forward_rows(const LayerNormForward<C>& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(layer_norm_forward, a, begin, end);
}

template <class C>
void backward_rows(const LayerNormBackward<C>& a, int64_t begin, int64_t end, C* dweight,
                   C* dbias) {
  TFKERN_ISA_CALL(layer_norm_backward, a, begin, end, dweight, dbias);
}

// N rounded up to whole vectors of every instruction set.
int64_t padded(int64_t N) { return round_up(N, 16); }

Rows rows(const Tensor& t, int64_t axes) {
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {data<char>(t), *row_stride(t, axes) * bytes, dtype(t)};
}

Rows rows(const Optional& t, int64_t axes) { return t ? rows(*t, axes) : Rows{}; }

// N parameters in the computing type, padded; N times `neutral` if they are absent.
template <class C>
const C* parameters(const Optional& t, int64_t N, C neutral, Scratch& scratch) {
  const int64_t P = padded(N);
  if (t) {
    const bool computing = dtype(*t) == (sizeof(C) == 8 ? Dtype::f64 : Dtype::f32);
    if (computing && N == P) return data<const C>(*t);
  }
  C* out = std::fill_n(scratch.get<C>(P), P, neutral) - P;
  if (t) TFKERN_DTYPE(dtype(*t), baseline::convert(out, data<const T>(*t), N));
  return out;
}

template <class C>
LayerNormOutputs forward(const Tensor& x, const Optional& weight, const Optional& bias,
                         const Optional& residual, const Optional& seed, double p, double eps,
                         bool rms, int64_t axes) {
  const auto [M, N] = matrix_size(x, axes);
  const LayerNormOutputs outputs = layer_norm_forward_outputs(x, residual, seed, rms, axes);
  const auto& [y, h, mean, rstd] = outputs;
  Scratch scratch;
  const LayerNormForward<C> a{
      N,
      eps,
      rms,
      seed_of(seed, p),
      Dropout<C>(p),
      rows(x, axes),
      rows(residual, axes),
      parameters(weight, N, C{1}, scratch),
      parameters(bias, N, C{0}, scratch),
      rows(y, axes),
      rows(h, axes),
      data<C>(mean),
      data<C>(rstd),
  };
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, N));
  torch::stable::parallel_for(0, M, grain,
                              [&](int64_t begin, int64_t end) { forward_rows(a, begin, end); });
  return outputs;
}

template <class C>
LayerNormOutputs backward(const Tensor& dy, const Optional& dh, const Tensor& h,
                          const Optional& weight, const Optional& bias, const Optional& mean,
                          const Tensor& rstd, const Optional& seed, double p,
                          bool separate_residual, int64_t axes) {
  const auto [M, N] = matrix_size(dy, axes);
  const LayerNormOutputs outputs =
      layer_norm_backward_outputs(dy, h, weight, bias, separate_residual);
  const auto& [dx, dresidual, dweight, dbias] = outputs;
  Scratch scratch;
  const LayerNormBackward<C> a{
      N,
      !mean,
      seed_of(seed, p),
      Dropout<C>(p),
      rows(dy, axes),
      rows(dh, axes),
      rows(h, axes),
      parameters(weight, N, C{1}, scratch),
      mean ? data<const C>(*mean) : nullptr,
      data<const C>(rstd),
      rows(dx, axes),
      rows(dresidual, axes),
  };
  // Each chunk of rows sums its part of dweight and dbias. The number of chunks follows from the
  // shape alone, so that the result does not depend on the number of threads.
  const int64_t chunks = std::clamp<int64_t>(M * N / 32768, 1, std::clamp<int64_t>(M / 16, 1, 64));
  const int64_t P = padded(N);
  C* sums = scratch.get<C>(chunks * 2 * P);  // (chunks, 2, P): dweight and dbias
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C* part = std::fill_n(sums + i * 2 * P, 2 * P, C{0}) - 2 * P;
      backward_rows<C>(a, M * i / chunks, M * (i + 1) / chunks, part, part + P);
    }
  });
  for (int64_t i = 1; i < chunks; ++i) {
    for (int64_t n = 0; n < 2 * P; ++n) sums[n] += sums[i * 2 * P + n];
  }
  const auto round = [&](const Tensor& out, const C* sum) {
    TFKERN_DTYPE(dtype(out), baseline::convert(data<T>(out), sum, N));
  };
  if (weight) round(dweight, sums);
  if (bias) round(dbias, sums + P);
  return outputs;
}

LayerNormOutputs layer_norm_forward(Tensor x, Optional weight, Optional bias, Optional residual,
                                    Optional seed, double dropout_p, double eps, bool rms,
                                    int64_t axes) {
  check_layer_norm_forward(x, weight, bias, residual, seed, dropout_p, axes);
  const bool wide = promote(x, residual) == ScalarType::Double;
  return (wide ? forward<double> : forward<float>)(with_row_stride(x, axes), weight, bias,
                                                   with_row_stride(residual, axes), seed, dropout_p,
                                                   eps, rms, axes);
}

LayerNormOutputs layer_norm_backward(Tensor dy, Optional dh, Tensor h, Optional weight,
                                     Optional bias, Optional mean, Tensor rstd, Optional seed,
                                     double dropout_p, bool separate_residual, int64_t axes) {
  check_layer_norm_backward(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, axes);
  const bool wide = h.scalar_type() == ScalarType::Double;
  return (wide ? backward<double>
               : backward<float>)(with_row_stride(dy, axes), with_row_stride(dh, axes),
                                  with_row_stride(h, axes), weight, bias, mean, rstd, seed,
                                  dropout_p, separate_residual, axes);
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&tfkern::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&tfkern::layer_norm_backward));
}
