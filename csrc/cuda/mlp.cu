// The activation of an MLP, plain or gated; torch forms the products around it.
// tfkern/reference/mlp.py has the formulas. pre, h and, where the MLP is gated, up are (M, F)
// matrices.
//
// A thread owns V columns and strides over the rows, a few at a time. Each element is read
// and written once; backward computes h again from pre and up, and keeps its parts of the
// gradients of the biases in float32 registers. One small kernel adds the parts in a fixed order.
#include "../mlp_arguments.h"
#include "elements.h"

namespace tfkern::cuda {
namespace {

constexpr int V = 8;                                // columns of a thread
constexpr int kThreads = 128;                       // threads of a block
constexpr int kForwardRows = 4, kBackwardRows = 2;  // rows that a thread works on at a time
// Blocks that an SM runs at the same time: grids have as many, and registers are shared out so.
constexpr int kForwardBlocks = 4;
template <class T>
constexpr int kBackwardBlocks = std::is_same_v<T, float> ? 3 : 4;

// Returns sigma(x) = 1 / (1 + exp(-x)); `derivative` becomes its derivative. Neither loses digits
// in either tail.
__device__ inline float sigmoid(float x, float& derivative) {
  const float e = expf(-fabsf(x)), s = 1 / (1 + e);
  derivative = e * s * s;
  return x < 0 ? e * s : s;
}

// Activations: each returns act(x), and sets `derivative` to act'(x). act(NaN) is NaN.
__device__ inline float relu(float x, float& derivative) {
  derivative = x <= 0 ? 0.0f : 1.0f;
  return x <= 0 ? 0.0f : x;
}

// T is the type of the result. erfc keeps all digits where x is far below 0, but is some 20
// instructions longer than erf, whose absolute error is far below a rounding of 16-bit numbers.
template <class T>
__device__ inline float gelu(float x, float& derivative) {
  const float cdf = std::is_same_v<T, float> ? 0.5f * erfcf(-0.70710678f * x)
                                             : 0.5f + 0.5f * erff(0.70710678f * x);
  derivative = cdf + x * (expf(-0.5f * x * x) * 0.39894228f);
  return x * cdf;
}

// x (1 + tanh(u)) / 2 = x sigma(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
__device__ inline float gelu_tanh(float x, float& derivative) {
  constexpr float c = 1.5957691216f;  // sqrt(8 / pi)
  // Beyond 30, sigma is 0 or 1, and the square could overflow.
  const float near = x > 30 ? 30.0f : x < -30 ? -30.0f : x, square = near * near;
  const float sigma = sigmoid(near * (c + c * 0.044715f * square), derivative);
  derivative = sigma + x * (derivative * (c + 3 * c * 0.044715f * square));
  return x * sigma;
}

__device__ inline float silu(float x, float& derivative) {
  const float sigma = sigmoid(x, derivative);
  derivative = sigma + x * derivative;
  return x * sigma;
}

__device__ inline float quick_gelu(float x, float& derivative) {
  constexpr float c = 1.702f;
  const float sigma = sigmoid(c * x, derivative);
  derivative = sigma + x * (derivative * c);
  return x * sigma;
}

template <float (*act)(float, float&), int K>
__device__ void activate_as(float (&x)[K][V], float (&derivative)[K][V]) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) x[i][j] = act(x[i][j], derivative[i][j]);
  }
}

// x = act(x), derivative = act'(x)
template <class T, int K>
__device__ void activate(float (&x)[K][V], float (&derivative)[K][V], Activation activation) {
  if (activation == Activation::relu) activate_as<relu>(x, derivative);
  if (activation == Activation::gelu) activate_as<gelu<T>>(x, derivative);
  if (activation == Activation::gelu_tanh) activate_as<gelu_tanh>(x, derivative);
  if (activation == Activation::silu) activate_as<silu>(x, derivative);
  if (activation == Activation::quick_gelu) activate_as<quick_gelu>(x, derivative);
}

// x *= y
template <int K>
__device__ void scale(float (&x)[K][V], const float (&y)[K][V]) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) x[i][j] *= y[i][j];
  }
}

// How blocks share an (M, F) matrix: column_blocks blocks lie side by side and form a group. All
// groups stride over the rows.
struct Tiling {
  int64_t M, F;
  int threads_per_row;  // threads of a block that share a row, a power of two
  int64_t column_blocks, groups;

  __host__ __device__ int rows() const { return kThreads / threads_per_row; }
  __device__ Pieces first(int K) const {
    const int64_t column_block = blockIdx.x % column_blocks, group = blockIdx.x / column_blocks;
    const int64_t thread = column_block * threads_per_row + threadIdx.x % threads_per_row;
    return {(group * rows() + threadIdx.x / threads_per_row) * K, 1, M, thread * V, 0, F};
  }
  __device__ int64_t step(int K) const { return groups * rows() * K; }
};

Tiling tiling(const Device& device, int64_t M, int64_t F, int K, int blocks_per_sm) {
  Tiling a{M, F, 1, 0, 0};
  while (a.threads_per_row < kThreads && a.threads_per_row * V < F) a.threads_per_row *= 2;
  a.column_blocks = (F + a.threads_per_row * V - 1) / (a.threads_per_row * V);
  const int64_t resident = int64_t{blocks_per_sm} * device.multiprocessors();
  a.groups = std::min((M + K * a.rows() - 1) / (K * a.rows()),
                      std::max<int64_t>(1, resident / std::max<int64_t>(a.column_blocks, 1)));
  return a;
}

struct Forward {
  Tiling tiling;
  Activation activation;
  Matrix pre, up, h;  // up is absent unless gated
};

// Computes h = act(pre), times up if gated. All matrices have elements T.
template <class T>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) forward_kernel(Forward a) {
  constexpr int K = kForwardRows;
  Pieces at = a.tiling.first(K);
  for (; at.row < at.rows; at.row += a.tiling.step(K)) {
    float h[K][V], other[K][V];
    load_as<T>(h, a.pre, at);
    activate<T>(h, other, a.activation);
    if (a.up.data) {
      load_as<T>(other, a.up, at);
      scale(h, other);
    }
    store_as<T>(a.h, h, at);
  }
}

struct Backward {
  Tiling tiling;
  Activation activation;
  Matrix dh, pre, up, dpre, dup, h;
  Matrix db, db_up;  // partial sums, one row for each row of threads
};

// Computes dpre, dup, h and partial sums of the gradients of the biases.
template <class T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T>) backward_kernel(Backward a) {
  constexpr int K = kBackwardRows;
  Pieces at = a.tiling.first(K);
  const int64_t part = at.row / K;
  float db[1][V] = {}, db_up[1][V] = {};
  for (; at.row < at.rows; at.row += a.tiling.step(K)) {
    float dh[K][V], h[K][V], derivative[K][V];
    load_as<T>(dh, a.dh, at);
    load_as<T>(h, a.pre, at);
    // forward: h = act(pre) * up
    activate<T>(h, derivative, a.activation);
    scale(derivative, dh);
    if (a.up.data) {
      float up[K][V];
      load_as<T>(up, a.up, at);
      scale(dh, h);
      scale(h, up);
      scale(derivative, up);
      store_as<T>(a.dup, dh, at);
    }
    store_as<T>(a.dpre, derivative, at);
    store_as<T>(a.h, h, at);
#pragma unroll
    for (int i = 0; i < K; ++i) {  // rows past the end add 0: dh is 0
#pragma unroll
      for (int j = 0; j < V; ++j) {
        db[0][j] += derivative[i][j];
        db_up[0][j] += dh[i][j];
      }
    }
  }
  at.row = part;
  at.rows = part + 1;
  if (a.db.data) store_as<float>(a.db, db, at);
  if (a.db_up.data) store_as<float>(a.db_up, db_up, at);
}

// ---- operators ----

// The matrix of `t` that begins at element `first`.
Matrix from(const Tensor& t, int64_t first) {
  Matrix m = matrix(t);
  m.data += first * static_cast<int64_t>(t.element_size());
  m.aligned = (reinterpret_cast<uintptr_t>(m.data) | m.stride) % 16 == 0;
  return m;
}

Tensor mlp_activation_forward(Tensor pre, Optional up, ActivationName activation) {
  const std::string name = take(activation);
  check_mlp_forward(pre, up);
  check_no_float64(pre);
  const Activation act = parse_activation(name);
  pre = torch::stable::contiguous(pre);
  if (up) up = torch::stable::contiguous(*up);
  const int64_t M = pre.size(0), F = pre.size(1);
  const Tensor h = empty_like(pre, pre);
  const Device device(pre);
  const Forward a{tiling(device, M, F, kForwardRows, kForwardBlocks), act, matrix(pre), matrix(up),
                  matrix(h)};
  const int64_t blocks = a.tiling.column_blocks * a.tiling.groups;
  TFKERN_CUDA_DTYPE(a.pre.dtype, launch(device, forward_kernel<T>, blocks, kThreads, 0, a));
  return h;
}

std::tuple<Tensor, Tensor, Tensor> mlp_activation_backward(Tensor dh, Tensor pre, Optional up,
                                                           ActivationName activation, bool bias) {
  const std::string name = take(activation);
  check_mlp_backward(dh, pre, up);
  check_no_float64(pre);
  const Activation act = parse_activation(name);
  dh = torch::stable::contiguous(dh);
  pre = torch::stable::contiguous(pre);
  if (up) up = torch::stable::contiguous(*up);
  const int64_t M = pre.size(0), F = pre.size(1), kinds = up ? 2 : 1;
  const auto outputs = mlp_backward_outputs(pre, up, bias);
  const auto& [dpre, h, db] = outputs;
  const Device device(pre);
  int per_sm = 0;
  TFKERN_CUDA_DTYPE(dtype(pre), per_sm = kBackwardBlocks<T>);
  const Tiling tiles = tiling(device, M, F, kBackwardRows, per_sm);
  const int64_t parts = tiles.groups * tiles.rows();
  Tensor partial = empty(pre, {parts, bias ? kinds * F : 0}, ScalarType::Float);
  const Backward a{tiles,
                   act,
                   matrix(dh),
                   matrix(pre),
                   matrix(up),
                   matrix(dpre),
                   up ? from(dpre, M * F) : Matrix{},
                   matrix(h),
                   bias ? matrix(partial) : Matrix{},
                   bias && up ? from(partial, F) : Matrix{}};
  const int64_t blocks = tiles.column_blocks * tiles.groups;
  TFKERN_CUDA_DTYPE(a.pre.dtype, launch(device, backward_kernel<T>, blocks, kThreads, 0, a));
  if (bias) sum_partials(device, partial, parts, db);
  return outputs;
}

}  // namespace
}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("mlp_activation_forward", TORCH_BOX(&tfkern::cuda::mlp_activation_forward));
  m.impl("mlp_activation_backward", TORCH_BOX(&tfkern::cuda::mlp_activation_backward));
}
