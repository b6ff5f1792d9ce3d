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
//
// Kernels have an element type T: where all tensors are of one 16-bit type and rows consist of
// whole pieces, code for one type leaves registers for longer rows; in forward it has no dropout.
// Backward then keeps the parts of dweight and dbias of long rows in shared memory. T = void takes
// every tensor by its own type.
#include "../dropout.h"
#include "../layer_norm_arguments.h"
#include "../philox.h"
#include "elements.h"

namespace tfkern::cuda {
namespace {

// The most warps of a row, and of a block. Code for one type needs half of the registers in
// forward.
constexpr int kMaxWarps = 16, kForwardMaxWarps = 32;
constexpr int V = 8;  // consecutive elements that a thread loads or stores at once
// Pieces of V elements of a row that a thread holds. In backward it holds parts of dweight and
// dbias for them as well, unless these are in shared memory.
constexpr int kForwardPieces = 4;
constexpr int kBackwardPieces = 2, kBackwardMostPieces = 4;
constexpr int kLongPieces = 2;             // pieces of a thread if rows are read part by part
constexpr float kLargest = 3.4028235e38f;  // the largest float
constexpr int kResidentWarps = 16;         // warps that an SM can hold in backward

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

// Tells whether the row has element j of piece i; with a type T, pieces are whole.
template <class T>
__device__ bool is_in(const Pieces& at, int i, int j) {
  if constexpr (!std::is_void_v<T>) return has_piece(at, i);
  return at.column + i * at.column_step + j < at.columns;
}

// Adds up each x over the threads of a row. All threads of the block take part.
template <int K>
__device__ void sum_row(float (&x)[K], int warps_per_row) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(0xffffffff, x[k], lanes);
  }
  if (warps_per_row == 1) return;
  float* shared = shared_memory<float>();  // (K, kForwardMaxWarps)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = warp / warps_per_row * warps_per_row;
  __syncthreads();  // all threads have read the sums of the previous call
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (lane == 0) shared[k * kForwardMaxWarps + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = lane < warps_per_row ? shared[k * kForwardMaxWarps + first + lane] : 0.0f;
    for (int lanes = 16; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(0xffffffff, x[k], lanes);
  }
}

// Bytes of shared memory that sum_row needs for two sums.
constexpr int64_t kSumBytes = 2 * kForwardMaxWarps * sizeof(float);

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
template <class T, bool multiply, int K>
__device__ void combine(float (&x)[K][V], const Matrix& y, Pieces at) {
  if (y.data == nullptr) return;
#pragma unroll
  for (int i = 0; i < K; i += 2) {
    float pair[2][V];
    load<T>(pair, y, at);
    at.column += 2 * at.column_step;
#pragma unroll
    for (int j = 0; j < 2 * V; ++j) {
      float& out = x[i + j / V][j % V];
      out = multiply ? out * pair[j / V][j % V] : out + pair[j / V][j % V];
    }
  }
}

// Computes h = residual + dropout(x).
template <class T, int K>
__device__ void load_h(float (&h)[K][V], const Forward& a, const Pieces& at) {
  load<T>(h, a.x, at);
  if constexpr (std::is_void_v<T>) drop(h, a.seed, a.dropout, at);
  combine<T, false>(h, a.residual, at);
}

// Normalises rows, of which a thread holds K pieces. With LONG a row does not fit into registers
// and is read again for each step.
template <class T, int K, bool LONG>
__global__ void __launch_bounds__(32 * (std::is_void_v<T> ? kMaxWarps : kForwardMaxWarps))
    forward_kernel(Forward a) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int threads = 32 * a.warps_per_row;  // threads of a row
  const int64_t m =
      static_cast<int64_t>(blockIdx.x) * (warps / a.warps_per_row) + warp / a.warps_per_row;
  Pieces at{m, 0, a.M, static_cast<int64_t>(threadIdx.x % threads) * V, threads * V, a.N};
  const int64_t first = at.column;
  // Each step walks over the row, `width` elements at a time; a row in registers takes one turn.
  const int64_t width = LONG ? threads * V * K : 1, end = LONG ? a.N : 1;
  const auto N = static_cast<float>(a.N);
  float h[K][V];

  float mean = 0;
  if constexpr (!LONG) load_h<T>(h, a, at);
  if (!a.rms) {
    float sum[1] = {0};
    for (int64_t n = 0; n < end; n += width) {
      at.column = first + n;
      if constexpr (LONG) load_h<T>(h, a, at);
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
  for (int64_t n = 0; n < end; n += width) {
    at.column = first + n;
    if constexpr (LONG) load_h<T>(h, a, at);
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = is_in<T>(at, i, j) ? h[i][j] - mean : 0.0f;
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

  for (int64_t n = 0; n < end; n += width) {
    at.column = first + n;
    if constexpr (LONG) load_h<T>(h, a, at);
    if (a.h.data) store<T>(a.h, h, at);
    const Pieces parameters{0, 0, 1, at.column, at.column_step, a.N};
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) h[i][j] = (h[i][j] - mean) * rstd;
    }
    combine<T, true>(h, a.weight, parameters);
    combine<T, false>(h, a.bias, parameters);
    store<T>(a.y, h, at);
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

// Loads dy, and computes xhat = (h - mean) rstd, of one row. Where there are no elements, dy is 0,
// and with SUMMED xhat is finite: their product must not be NaN.
template <class T, bool SUMMED, int K>
__device__ void load_gradient(float (&dy)[K][V], float (&xhat)[K][V], const Backward& a,
                              const Pieces& at) {
  load<T>(dy, a.dy, at);
  load<T>(xhat, a.h, at);
  const bool there = at.row < a.M;
  const float mean = there && a.mean ? a.mean[at.row] : 0.0f, rstd = there ? a.rstd[at.row] : 0.0f;
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) xhat[i][j] = (xhat[i][j] - mean) * rstd;
  }
  if constexpr (SUMMED) {
    if (fabsf(mean * rstd) <= kLargest) return;  // so is (0 - mean) rstd
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!is_in<T>(at, i, j)) xhat[i][j] = 0;
      }
    }
  }
}

template <class T, int K>
__device__ void load_weight(float (&weight)[K][V], const Backward& a, const Pieces& at) {
  if (a.weight.data) {
    load<T>(weight, a.weight, Pieces{0, 0, 1, at.column, at.column_step, a.N});
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
  constexpr int K = kLongPieces;
  const int threads = blockDim.x;
  Pieces at{blockIdx.x, 0, a.M, 0, threads * V, a.N};
  float sums[2] = {0, 0};
  for (int64_t n = threadIdx.x * V; n < a.N; n += threads * V * K) {
    at.column = n;
    float dy[K][V], xhat[K][V], weight[K][V];
    load_gradient<void, true>(dy, xhat, a, at);
    load_weight<void>(weight, a, at);
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
  if (row + 1 == rows) store_as<float>(out, part, at);
}

// Where a block keeps its parts of dweight and dbias, and whether it has all columns of its rows.
enum class Parts { registers, shared, long_rows };

// Adds x to the sums of this thread in shared memory, or reads them. Nobody else touches them:
// they lie so that the lanes of a warp access 16 bytes each side by side.
template <int K>
__device__ float* own_sums(int which, int i, int half) {
  float* sums = shared_memory<float>() + kSumBytes / sizeof(float);  // (2, K, 2, threads, 4)
  return sums + (((which * K + i) * 2 + half) * blockDim.x + threadIdx.x) * 4;
}

template <int K>
__device__ void add_own(int which, const float (&x)[K][V]) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) own_sums<K>(which, i, j / 4)[j % 4] += x[i][j];
  }
}

template <int K>
__device__ void read_own(float (&x)[K][V], int which) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) x[i][j] = own_sums<K>(which, i, j / 4)[j % 4];
  }
}

// Computes dx, dresidual and this block's parts of dweight and dbias. A thread holds K pieces.
template <class T, int K, Parts PARTS>
__global__ void __launch_bounds__(32 * kMaxWarps) backward_kernel(Backward a) {
  constexpr bool LONG = PARTS == Parts::long_rows, SHARED = PARTS == Parts::shared;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int threads = 32 * a.warps_per_row;                                // threads of a row
  const int rows = warps / a.warps_per_row, row = warp / a.warps_per_row;  // rows at a time
  const int64_t column_block = LONG ? blockIdx.x % a.column_blocks : 0;
  const int64_t block = LONG ? blockIdx.x / a.column_blocks : blockIdx.x;
  const int64_t blocks = LONG ? gridDim.x / a.column_blocks : gridDim.x;
  Pieces at{0,           0,  a.M, column_block * (threads * V * K) + threadIdx.x % threads * V,
            threads * V, a.N};
  const auto N = static_cast<float>(a.N);
  float weight[K][V], dweight[K][V] = {}, dbias[K][V] = {};
  if constexpr (SHARED) {
    for (int i = 0; i < 2 * K; ++i) {
      for (int j = 0; j < V; ++j) own_sums<K>(0, i, j / 4)[j % 4] = 0;
    }
  } else {
    load_weight<T>(weight, a, at);
  }
  for (int64_t m = block * rows; m < a.M; m += blocks * rows) {
    at.row = m + row;
    // forward: y = xhat * weight + bias, xhat = (h - mean) * rstd
    float g[K][V], xhat[K][V], sums[2] = {0, 0};
    load_gradient<T, !LONG>(g, xhat, a, at);
    if constexpr (SHARED) {
      add_own(1, g);
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) own_sums<K>(0, i, j / 4)[j % 4] += g[i][j] * xhat[i][j];
      }
      combine<T, true>(g, a.weight, Pieces{0, 0, 1, at.column, at.column_step, a.N});
    }
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if constexpr (!SHARED) {
          dbias[i][j] += g[i][j];
          dweight[i][j] += g[i][j] * xhat[i][j];
          g[i][j] *= weight[i][j];
        }
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
      load<T>(xhat, a.dh, at);
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) g[i][j] += xhat[i][j];
      }
    }
    // forward: h = residual + dropout(x)
    if (a.dresidual.data) store<T>(a.dresidual, g, at);
    drop(g, a.seed, a.dropout, at);
    store<T>(a.dx, g, at);
  }
  at.row = block;
  at.rows = blocks;
  if constexpr (SHARED) read_own(dweight, 0);
  store_part(dweight, a.dweight, at, row, rows);
  if constexpr (SHARED) read_own(dbias, 1);
  store_part(dbias, a.dbias, at, row, rows);
}

// ---- operators ----

// The number of warps, a power of two, that hold a row of N elements, `pieces` pieces a thread; 0
// if that is over `most`.
int warps_per_row(int64_t N, int pieces, int most = kMaxWarps) {
  int warps = 1;
  while (warps <= most && warps * 32 * pieces * V < N) warps *= 2;
  return warps <= most ? warps : 0;
}

// Tells whether the matrices that there are have one 16-bit type, and rows of whole pieces.
bool all_alike(int64_t N, std::initializer_list<Matrix> matrices) {
  std::optional<Dtype> type;
  for (const Matrix& m : matrices) {
    if (!m.data) continue;
    if (!type) type = m.dtype;
    if (m.dtype != *type || !m.aligned) return false;
  }
  return type != Dtype::f32 && N % V == 0;
}

LayerNormOutputs layer_norm_forward(Tensor x, Optional weight, Optional bias, Optional residual,
                                    Optional seed, double dropout_p, double eps, bool rms,
                                    int64_t axes) {
  check_layer_norm_forward(x, weight, bias, residual, seed, dropout_p, axes);
  check_no_float64(x, weight, bias, residual);
  const auto [M, N] = matrix_size(x, axes);
  x = with_row_stride(x, axes);
  residual = with_row_stride(residual, axes);
  const LayerNormOutputs outputs = layer_norm_forward_outputs(x, residual, seed, rms, axes);
  const auto& [y, h, mean, rstd] = outputs;
  Forward a{M,
            N,
            static_cast<float>(eps),
            rms,
            warps_per_row(N, kForwardPieces),
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
  void (*kernel)(Forward) = forward_kernel<void, kForwardPieces, false>;
  if (!a.seed && all_alike(N, {a.x, a.residual, a.weight, a.bias, a.y, a.h})) {
    a.warps_per_row = warps_per_row(N, kForwardPieces, kForwardMaxWarps);
    TFKERN_CUDA_16_BIT(a.x.dtype, kernel = forward_kernel<T, kForwardPieces, false>);
  }
  if (a.warps_per_row == 0) {
    a.warps_per_row = kMaxWarps;
    kernel = forward_kernel<void, kLongPieces, true>;
  }
  const int warps = std::max(a.warps_per_row, 4), rows = warps / a.warps_per_row;
  launch(Device(x), kernel, (M + rows - 1) / rows, 32 * warps, kSumBytes, a);
  return outputs;
}

LayerNormOutputs layer_norm_backward(Tensor dy, Optional dh, Tensor h, Optional weight,
                                     Optional bias, Optional mean, Tensor rstd, Optional seed,
                                     double dropout_p, bool separate_residual, int64_t axes) {
  check_layer_norm_backward(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, axes);
  check_no_float64(dy, dh, h, weight, bias);
  const auto [M, N] = matrix_size(dy, axes);
  dy = with_row_stride(dy, axes);
  dh = with_row_stride(dh, axes);
  h = with_row_stride(h, axes);
  const LayerNormOutputs outputs =
      layer_norm_backward_outputs(dy, h, weight, bias, separate_residual);
  const auto& [dx, dresidual, dweight, dbias] = outputs;
  const Device device(dy);
  Backward a{M,
             N,
             !mean,
             warps_per_row(N, kBackwardPieces),
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
             {},
             {},
             1,
             nullptr};
  const bool alike = all_alike(N, {a.dy, a.dh, a.h, a.weight, a.dx, a.dresidual});
  int pieces = kBackwardPieces;
  int64_t own = 0;  // bytes of shared memory that hold the parts of dweight and dbias
  void (*kernel)(Backward) = backward_kernel<void, kBackwardPieces, Parts::registers>;
  if (alike) {
    TFKERN_CUDA_16_BIT(a.dy.dtype, kernel = backward_kernel<T, kBackwardPieces, Parts::registers>);
  }
  if (alike && a.warps_per_row == 0) {
    const int64_t bytes = 2 * 32 * kMaxWarps * kBackwardMostPieces * V * sizeof(float);
    const int found = warps_per_row(N, kBackwardMostPieces);
    if (found && kSumBytes + bytes <= device.most_shared_bytes()) {
      a.warps_per_row = found;
      pieces = kBackwardMostPieces;
      own = bytes;
      TFKERN_CUDA_16_BIT(a.dy.dtype,
                         kernel = backward_kernel<T, kBackwardMostPieces, Parts::shared>);
    }
  }
  const bool is_long = a.warps_per_row == 0;
  if (is_long) {
    check_grid(M);
    a.warps_per_row = 8;
    kernel = backward_kernel<void, kLongPieces, Parts::long_rows>;
    pieces = kLongPieces;
  }
  const int warps = std::max(a.warps_per_row, 4), rows = warps / a.warps_per_row;
  const int64_t width = int64_t{32} * a.warps_per_row * pieces * V;
  if (is_long) a.column_blocks = (N + width - 1) / width;
  // As many blocks as the device can run at the same time, or as there are rows for.
  const int64_t resident = int64_t{device.multiprocessors()} * std::max(1, kResidentWarps / warps);
  const int64_t blocks =
      std::min((M + rows - 1) / rows, std::max<int64_t>(1, resident / a.column_blocks));
  const Tensor part_dweight = empty(dy, {weight ? blocks : 0, N}, ScalarType::Float);
  const Tensor part_dbias = empty(dy, {bias ? blocks : 0, N}, ScalarType::Float);
  const Tensor row_sums = empty(dy, {is_long ? M : 0, 2}, ScalarType::Float);
  if (weight) a.dweight = matrix(part_dweight);
  if (bias) a.dbias = matrix(part_dbias);
  a.row_sums = static_cast<float*>(row_sums.data_ptr());
  if (is_long) launch(device, row_sums_kernel, M, 32 * kMaxWarps, kSumBytes, a);
  const int64_t exchanged = rows > 1 ? width * static_cast<int64_t>(sizeof(float)) : 0;
  launch(device, kernel, blocks * a.column_blocks, 32 * warps, std::max(kSumBytes + own, exchanged),
         a);
  Partials sums[2];
  int count = 0;
  if (weight) sums[count++] = partials(part_dweight, dweight);
  if (bias) sums[count++] = partials(part_dbias, dbias);
  if (count) sum_partials(device, blocks, N, sums[0], sums[1]);
  return outputs;
}

}  // namespace
}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("layer_norm_forward", TORCH_BOX(&tfkern::cuda::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&tfkern::cuda::layer_norm_backward));
}
