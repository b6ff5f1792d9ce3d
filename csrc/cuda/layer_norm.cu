// Layer norm and RMS norm of the rows of tensors, with dropout and residual addition in front;
// tfkern/reference/layer_norm.py has the formulas. Kernels take tensors as matrices (M, N), where
// all but the last `axes` axes are rows.
//
// Forward: some warps hold a row in registers, so x is read once. Backward: a fixed number of
// blocks stride over the rows, read h and dy once, and keep their part of dweight and dbias in
// float32 registers; one small kernel adds the parts in a fixed order, without atomics.
//
// Rows that do not fit into the registers of a block are read again for each step. Forward reads
// them three times (RMS norm twice): for the mean, the deviation and the result. Backward reads
// them twice: one kernel sums along the rows, then blocks that each own some columns do the rest.
#include "../dropout.h"
#include "../layer_norm_arguments.h"
#include "../philox.h"
#include "elements.h"

namespace tfkern::cuda {
namespace {

constexpr int kMaxWarps = 16;         // the most warps of a row, and of a block
constexpr int kForwardElements = 32;  // elements of a row that a thread holds in forward
constexpr int kLongElements = 16;     // elements of a thread if rows are read piece by piece
// Elements of a thread in backward, which holds parts of dweight and dbias for them as well.
constexpr int kBackwardElements = 16;
constexpr int V = 8;                // consecutive elements that a thread loads or stores at once
constexpr int kResidentWarps = 16;  // warps that an SM can hold in backward

// x[n] = keep ? x[n] / (1 - p) : 0.
// Element (m, n) takes lane n % 4 of counter (n / 4, m, m >> 32, 1).
template <int K>
__device__ void drop(float (&x)[K][V], const uint64_t* given, const Dropout<float>& dropout,
                     const Pieces& at) {
  if (given == nullptr) return;
  const uint64_t seed = *given;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const auto group = static_cast<uint32_t>((at.column + i * at.column_step) / 4);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j % 4) continue;
      const Philox draw(seed, group + j / 4, static_cast<uint32_t>(at.row),
                        static_cast<uint32_t>(static_cast<uint64_t>(at.row) >> 32), 1);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        x[i][j + l] = draw.lane[l] > dropout.last_dropped ? x[i][j + l] * dropout.factor : 0.0f;
      }
    }
  }
}

// Adds up each x over the threads of a row. All threads of the block take part.
template <int K>
__device__ void sum_row(float (&x)[K], int warps_per_row) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(0xffffffff, x[k], lanes);
  }
  if (warps_per_row == 1) return;
  float* shared = shared_memory<float>();  // (K, kMaxWarps)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = warp / warps_per_row * warps_per_row;
  __syncthreads();  // all threads have read the sums of the previous call
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (lane == 0) shared[k * kMaxWarps + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = lane < warps_per_row ? shared[k * kMaxWarps + first + lane] : 0.0f;
    for (int lanes = 16; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(0xffffffff, x[k], lanes);
  }
}

// Bytes of shared memory that sum_row needs for two sums.
constexpr int64_t kSumBytes = 2 * kMaxWarps * sizeof(float);

struct Forward {
  int64_t M, N;
  float eps;
  bool rms;
  int warps_per_row;
  const uint64_t* seed;  // null without dropout
  Dropout<float> dropout;
  Matrix x, residual, weight, bias, y, h;
  float *mean, *rstd;
};

// x += y, or x *= y. Only two pieces of y are loaded at a time, to save registers.
template <bool multiply, int K>
__device__ void combine(float (&x)[K][V], const Matrix& y, Pieces at) {
  if (y.data == nullptr) return;
#pragma unroll
  for (int i = 0; i < K; i += 2) {
    float pair[2][V];
    load(pair, y, at);
    at.column += 2 * at.column_step;
#pragma unroll
    for (int j = 0; j < 2 * V; ++j) {
      float& out = x[i + j / V][j % V];
      out = multiply ? out * pair[j / V][j % V] : out + pair[j / V][j % V];
    }
  }
}

// Computes h = residual + dropout(x).
template <int K>
__device__ void load_h(float (&h)[K][V], const Forward& a, const Pieces& at) {
  load(h, a.x, at);
  drop(h, a.seed, a.dropout, at);
  combine<false>(h, a.residual, at);
}

// Normalises rows. With LONG a row does not fit into registers and is read again for each step.
template <bool LONG>
__global__ void __launch_bounds__(32 * kMaxWarps) forward_kernel(Forward a) {
  constexpr int K = (LONG ? kLongElements : kForwardElements) / V;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int threads = 32 * a.warps_per_row;  // threads of a row
  const int64_t m =
      static_cast<int64_t>(blockIdx.x) * (warps / a.warps_per_row) + warp / a.warps_per_row;
  Pieces at{m, 0, a.M, static_cast<int64_t>(threadIdx.x % threads) * V, threads * V, a.N};
  const int64_t first = at.column;
  const int64_t width = LONG ? threads * V * K : a.N + 1;  // elements held at a time; else all
  const auto N = static_cast<float>(a.N);
  float h[K][V];

  float mean = 0;
  if constexpr (!LONG) load_h(h, a, at);
  if (!a.rms) {
    float sum[1] = {0};
    for (int64_t n = 0; n <= a.N; n += width) {
      at.column = first + n;
      if constexpr (LONG) load_h(h, a, at);
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) sum[0] += h[i][j];
      }
    }
    sum_row(sum, a.warps_per_row);
    mean = sum[0] / N;
  }
  // This pass also corrects the mean by its rounding error (Chan, Golub and LeVeque 1983), which
  // matters when the mean is large beside the deviation.
  float sums[2] = {0, 0};
  for (int64_t n = 0; n <= a.N; n += width) {
    at.column = first + n;
    if constexpr (LONG) load_h(h, a, at);
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const bool in = at.column + i * at.column_step + j < a.N;
        const float d = in ? h[i][j] - mean : 0.0f;
        sums[0] += d;
        sums[1] += d * d;
      }
    }
  }
  sum_row(sums, a.warps_per_row);
  const float shift = a.rms ? 0.0f : sums[0] / N;
  const float square = sums[1] / N - shift * shift;
  mean += shift;
  const float rstd = 1 / sqrtf((square < 0 ? 0.0f : square) + a.eps);
  if (m < a.M && threadIdx.x % threads == 0) {
    if (a.mean) a.mean[m] = mean;
    a.rstd[m] = rstd;
  }

  for (int64_t n = 0; n <= a.N; n += width) {
    at.column = first + n;
    if constexpr (LONG) load_h(h, a, at);
    if (a.h.data) store(a.h, h, at);
    const Pieces parameters{0, 0, 1, at.column, at.column_step, a.N};
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) h[i][j] = (h[i][j] - mean) * rstd;
    }
    combine<true>(h, a.weight, parameters);
    combine<false>(h, a.bias, parameters);
    store(a.y, h, at);
  }
}

struct Backward {
  int64_t M, N;
  bool rms;
  int warps_per_row;
  const uint64_t* seed;  // null without dropout
  Dropout<float> dropout;
  Matrix dy, dh, h, weight;
  const float *mean, *rstd;  // mean is null for RMS norm
  Matrix dx, dresidual;
  Matrix dweight, dbias;  // partial sums, one row for each block that has these columns
  int64_t column_blocks;  // blocks side by side, 1 unless rows are long
  float* row_sums;        // (M, 2): sums over each long row of g xhat and of g; g = dy weight
};

// Loads dy, and computes xhat = (h - mean) rstd, of one row. Where there are no elements, dy is 0.
template <int K>
__device__ void load_gradient(float (&dy)[K][V], float (&xhat)[K][V], const Backward& a,
                              const Pieces& at) {
  load(dy, a.dy, at);
  load(xhat, a.h, at);
  const bool there = at.row < a.M;
  const float mean = there && a.mean ? a.mean[at.row] : 0.0f, rstd = there ? a.rstd[at.row] : 0.0f;
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) xhat[i][j] = (xhat[i][j] - mean) * rstd;
  }
}

template <int K>
__device__ void load_weight(float (&weight)[K][V], const Backward& a, const Pieces& at) {
  if (a.weight.data) {
    load(weight, a.weight, Pieces{0, 0, 1, at.column, at.column_step, a.N});
    return;
  }
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) weight[i][j] = 1;
  }
}

// Computes row_sums of long rows; each block has one row.
__global__ void __launch_bounds__(32 * kMaxWarps) row_sums_kernel(Backward a) {
  constexpr int K = kBackwardElements / V;
  const int threads = blockDim.x;
  Pieces at{blockIdx.x, 0, a.M, 0, threads * V, a.N};
  float sums[2] = {0, 0};
  for (int64_t n = threadIdx.x * V; n < a.N; n += threads * V * K) {
    at.column = n;
    float dy[K][V], xhat[K][V], weight[K][V];
    load_gradient(dy, xhat, a, at);
    load_weight(weight, a, at);
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sums[0] += dy[i][j] * weight[i][j] * xhat[i][j];
        sums[1] += dy[i][j] * weight[i][j];
      }
    }
  }
  sum_row(sums, threads / 32);
  if (threadIdx.x < 2) a.row_sums[2 * at.row + threadIdx.x] = sums[threadIdx.x == 0 ? 0 : 1];
}

// Adds up the parts of all rows that a block works on at the same time, and stores the sum. `row`
// is this thread's row among these, and `rows` their number.
template <int K>
__device__ void store_part(float (&part)[K][V], const Matrix& out, const Pieces& at, int row,
                           int rows) {
  if (out.data == nullptr) return;
  float* shared = shared_memory<float>();  // (columns)
  for (int r = 0; r < rows; ++r) {
    __syncthreads();
    if (row != r) continue;
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const auto n = static_cast<int>(at.column + i * at.column_step + j);
        if (r > 0) part[i][j] += shared[n];
        if (r + 1 < rows) shared[n] = part[i][j];
      }
    }
  }
  __syncthreads();
  if (row + 1 == rows) store(out, part, at);
}

// Computes dx, dresidual and this block's parts of dweight and dbias.
template <bool LONG>
__global__ void __launch_bounds__(32 * kMaxWarps) backward_kernel(Backward a) {
  constexpr int K = kBackwardElements / V;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int threads = 32 * a.warps_per_row;                                // threads of a row
  const int rows = warps / a.warps_per_row, row = warp / a.warps_per_row;  // rows at a time
  const int64_t column_block = LONG ? blockIdx.x % a.column_blocks : 0;
  const int64_t block = LONG ? blockIdx.x / a.column_blocks : blockIdx.x;
  const int64_t blocks = LONG ? gridDim.x / a.column_blocks : gridDim.x;
  Pieces at{0,           0,  a.M, column_block * (threads * V * K) + threadIdx.x % threads * V,
            threads * V, a.N};
  const auto N = static_cast<float>(a.N);
  float weight[K][V], dweight[K][V], dbias[K][V];
  load_weight(weight, a, at);
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) dweight[i][j] = dbias[i][j] = 0;
  }
  for (int64_t m = block * rows; m < a.M; m += blocks * rows) {
    at.row = m + row;
    // forward: y = xhat * weight + bias, xhat = (h - mean) * rstd
    float g[K][V], xhat[K][V], sums[2] = {0, 0};
    load_gradient(g, xhat, a, at);
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        dbias[i][j] += g[i][j];
        dweight[i][j] += g[i][j] * xhat[i][j];
        g[i][j] *= weight[i][j];
        sums[0] += g[i][j] * xhat[i][j];
        sums[1] += g[i][j];
      }
    }
    if constexpr (LONG) {
      sums[0] = a.row_sums[2 * at.row];
      sums[1] = a.row_sums[2 * at.row + 1];
    } else {
      sum_row(sums, a.warps_per_row);
    }
    const float c1 = sums[0] / N, c2 = a.rms ? 0.0f : sums[1] / N;
    const float rstd = at.row < a.M ? a.rstd[at.row] : 0.0f;
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) g[i][j] = (g[i][j] - xhat[i][j] * c1 - c2) * rstd;
    }
    if (a.dh.data) {
      load(xhat, a.dh, at);
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) g[i][j] += xhat[i][j];
      }
    }
    // forward: h = residual + dropout(x)
    if (a.dresidual.data) store(a.dresidual, g, at);
    drop(g, a.seed, a.dropout, at);
    store(a.dx, g, at);
  }
  at.row = block;
  at.rows = blocks;
  store_part(dweight, a.dweight, at, row, rows);
  store_part(dbias, a.dbias, at, row, rows);
}

// ---- operators ----

// The number of warps, a power of two, that hold a row of N elements; 0 if that is over kMaxWarps.
int warps_per_row(int64_t N, int elements) {
  int warps = 1;
  while (warps <= kMaxWarps && warps * 32 * elements < N) warps *= 2;
  return warps <= kMaxWarps ? warps : 0;
}

LayerNormOutputs layer_norm_forward(Tensor x, Optional weight, Optional bias, Optional residual,
                                    Optional seed, double dropout_p, double eps, bool rms,
                                    int64_t axes) {
  check_layer_norm_forward(x, weight, bias, residual, seed, dropout_p, axes);
  check_no_float64(x, weight, bias, residual);
  const auto [M, N] = matrix_size(x, axes);
  const int held = warps_per_row(N, kForwardElements);
  const int per_row = held ? held : kMaxWarps;
  const int warps = std::max(per_row, 4), rows = warps / per_row;
  const int64_t blocks = (M + rows - 1) / rows;
  check_grid(blocks);
  x = with_row_stride(x, axes);
  residual = with_row_stride(residual, axes);
  const LayerNormOutputs outputs = layer_norm_forward_outputs(x, residual, seed, rms, axes);
  const auto& [y, h, mean, rstd] = outputs;
  const Forward a{M,
                  N,
                  static_cast<float>(eps),
                  rms,
                  per_row,
                  seed_of(seed, dropout_p),
                  Dropout<float>(dropout_p),
                  matrix(x, axes),
                  matrix(residual, axes),
                  matrix(weight, axes),
                  matrix(bias, axes),
                  matrix(y, axes),
                  matrix(h, axes),
                  data<float>(mean),
                  data<float>(rstd)};
  launch(Device(x), held ? forward_kernel<false> : forward_kernel<true>, blocks, 32 * warps,
         kSumBytes, a);
  return outputs;
}

LayerNormOutputs layer_norm_backward(Tensor dy, Optional dh, Tensor h, Optional weight,
                                     Optional bias, Optional mean, Tensor rstd, Optional seed,
                                     double dropout_p, bool separate_residual, int64_t axes) {
  check_layer_norm_backward(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, axes);
  check_no_float64(dy, dh, h, weight, bias);
  const auto [M, N] = matrix_size(dy, axes);
  const int held = warps_per_row(N, kBackwardElements);
  if (!held) check_grid(M);
  dy = with_row_stride(dy, axes);
  dh = with_row_stride(dh, axes);
  h = with_row_stride(h, axes);
  const LayerNormOutputs outputs =
      layer_norm_backward_outputs(dy, h, weight, bias, separate_residual);
  const auto& [dx, dresidual, dweight, dbias] = outputs;

  const Device device(dy);
  const int per_row = held ? held : 8;
  const int warps = std::max(per_row, 4), rows = warps / per_row;
  const int64_t width = 32 * per_row * kBackwardElements;
  const int64_t column_blocks = held ? 1 : (N + width - 1) / width;
  // As many blocks as the device can run at the same time, or as there are rows for.
  const int64_t resident = int64_t{device.multiprocessors()} * std::max(1, kResidentWarps / warps);
  const int64_t blocks =
      std::min((M + rows - 1) / rows, std::max<int64_t>(1, resident / column_blocks));
  Tensor part_dweight = empty(dy, {weight ? blocks : 0, N}, ScalarType::Float);
  Tensor part_dbias = empty(dy, {bias ? blocks : 0, N}, ScalarType::Float);
  Tensor row_sums = empty(dy, {held ? 0 : M, 2}, ScalarType::Float);
  const Backward a{M,
                   N,
                   !mean,
                   per_row,
                   seed_of(seed, dropout_p),
                   Dropout<float>(dropout_p),
                   matrix(dy, axes),
                   matrix(dh, axes),
                   matrix(h, axes),
                   matrix(weight, axes),
                   mean ? data<const float>(*mean) : nullptr,
                   data<const float>(rstd),
                   matrix(dx, axes),
                   matrix(dresidual, axes),
                   weight ? matrix(part_dweight) : Matrix{},
                   bias ? matrix(part_dbias) : Matrix{},
                   column_blocks,
                   static_cast<float*>(row_sums.data_ptr())};
  if (!held) {
    launch(device, row_sums_kernel, M, 32 * kMaxWarps, kSumBytes, a);
  }
  const int64_t shared = rows > 1 ? width * static_cast<int64_t>(sizeof(float)) : 0;
  launch(device, held ? backward_kernel<false> : backward_kernel<true>, blocks * column_blocks,
         32 * warps, std::max(kSumBytes, shared), a);
  if (weight) sum_partials(device, part_dweight, blocks, dweight);
  if (bias) sum_partials(device, part_dbias, blocks, dbias);
  return outputs;
}

}  // namespace
}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("layer_norm_forward", TORCH_BOX(&tfkern::cuda::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&tfkern::cuda::layer_norm_backward));
}
