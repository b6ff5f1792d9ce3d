// Cross entropy of rows of logits; tfkern/reference/cross_entropy.py has the formulas.
//
// Forward reads the logits once: every thread of a row holds a few pieces of it at a time, and
// keeps their maximum, their sum of exponentials and the sums of label smoothing, all relative to
// that maximum. The threads' sums are then added in a fixed order, without atomics. In backward no
// thread needs another: each holds its pieces while it turns them into their gradient, which may
// therefore lie over the logits.
//
// A piece has 16 bytes. Where a row begins anywhere, its first and last piece are short, so that
// all others are loaded whole. Short rows, and gradients that lie otherwise than their logits, have
// pieces of one element: neighbouring threads then have neighbouring elements.
#include "../cross_entropy_arguments.h"
#include "elements.h"

namespace tfkern::cuda {
namespace {

constexpr int kThreads = 256;  // threads of a block, and the most of a row in forward
constexpr int kMaxWarps = kThreads / 32;
constexpr int64_t kShortColumns = 256;  // the longest rows whose pieces have one element
constexpr float kLog2e = 1.44269504f;

// The elements of a piece of 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);
// The elements that a thread holds in pieces of P, and the blocks that an SM runs at the same time.
template <int P>
constexpr int kHeld = P == 1 ? 8 : 16;
template <int P>
constexpr int kBlocks = P == 1 ? 5 : 4;

struct Rows {
  int64_t M, V;            // rows and classes
  int64_t first, columns;  // the classes that the logits have: all, or some in backward
  int threads_per_row;     // threads of a block that share a row, a power of two
  const char* logits;
  RowOffsets offsets;  // of the logits
  const int64_t* targets;
  const float* weight;  // null if all are 1
  int64_t ignore_index;
  float label_smoothing;
  float softcap, softcap_inverse;  // 0 without a softcap
};

// Where a thread's K pieces of P elements lie in a row of `count` columns. Piece i begins at column
// `first + i * step`; only the first piece may begin before column 0.
template <int P>
struct Columns {
  int64_t first, count;
  int step;

  // `part` is the number of the pieces before `thread` 0, and `lead` how many elements the first
  // piece of the row lacks.
  __device__ Columns(int64_t part, int thread, int threads, int lead, int64_t columns)
      : first((part + thread) * P - lead), count(columns), step(threads * P) {}

  // The elements of piece i that the row has are begin <= j < end.
  struct Range {
    int begin, end;
    __device__ bool whole() const { return P > 1 && begin == 0 && end >= P; }
    __device__ bool has(int j) const { return begin <= j && j < end; }
  };
  __device__ Range present(int i) const {
    const int64_t left = count - first;
    const int end = left < kMaxStep ? static_cast<int>(left) : kMaxStep;
    return {i > 0 || P == 1 || first >= 0 ? 0 : static_cast<int>(-first), end - i * step};
  }

 private:
  static constexpr int kMaxStep = 1 << 20;  // more than K * step
};

// The elements before p since the last multiple of 16 bytes.
template <class T, int P>
__device__ int lead(const T* p) {
  return P == 1 ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

__device__ inline uint32_t bits(float x) { return __float_as_uint(x); }
__device__ inline uint32_t bits(BFloat16 x) { return x.bits; }
__device__ inline uint32_t bits(Half x) { return x.bits; }

// The elements of the piece at `first` that are in `range`; `absent` stands for all others.
template <class T, int P>
__device__ uint4 load_part(const T* first, const typename Columns<P>::Range& range, float absent) {
  constexpr int kBits = 8 * sizeof(T);
  const uint32_t none = bits(from_float<T>(absent));
  uint32_t words[4] = {};
#pragma unroll
  for (int j = 0; j < P; ++j) {
    words[j * kBits / 32] |= (range.has(j) ? bits(first[j]) : none) << j * kBits % 32;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Loads a thread's pieces of the row z; `absent` stands for elements that the row does not have.
template <class T, int P, int K>
__device__ void load_row(float (&x)[K][P], const T* z, const Columns<P>& at, float absent) {
  const T* first = z + at.first;
  if constexpr (P == 1) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      x[i][0] = at.present(i).has(0) ? to_float(first[i * at.step]) : absent;
    }
  } else {
    uint4 raw[K];
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const auto range = at.present(i);
      if (range.whole()) {
        raw[i] = *reinterpret_cast<const uint4*>(first + i * at.step);
      } else {
        raw[i] = load_part<T, P>(first + i * at.step, range, absent);
      }
    }
#pragma unroll
    for (int i = 0; i < K; ++i) unpack<T>(x[i], 0, raw[i]);
  }
}

template <class T, int P, int K>
__device__ void store_row(T* z, const float (&x)[K][P], const Columns<P>& at) {
  T* first = z + at.first;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const auto range = at.present(i);
    if constexpr (P > 1) {
      if (range.whole()) {
        *reinterpret_cast<uint4*>(first + i * at.step) = packed<T>(x[i], 0);
        continue;
      }
    }
#pragma unroll
    for (int j = 0; j < P; ++j) {
      if (range.has(j)) first[i * at.step + j] = from_float<T>(x[i][j]);
    }
  }
}

// e^x of x <= 0. Its relative error grows with |x|, but no faster than the result falls.
__device__ inline float exp_fast(float x) { return exp2_approx(x * kLog2e); }

// s = softcap tanh(z / softcap), or z without a softcap
__device__ inline float capped(float z, const Rows& a) {
  return a.softcap > 0 ? a.softcap * tanhf(z * a.softcap_inverse) : z;
}

// What a row's target decides: loss = own (lse - s_t) + label_smoothing * ...
__device__ inline float own_factor(const Rows& a, int64_t target) {
  if (target < 0 || target >= a.V) return __uint_as_float(0x7fc00000);  // NaN
  return (1 - a.label_smoothing) * (a.weight ? a.weight[target] : 1.0f);
}

// ---- forward ----

struct Forward : Rows {
  bool ignored_lse;
  float *loss, *lse, *rest;
};

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Sum {
  __device__ float operator()(float x, float y) const { return x + y; }
};

// Combines each x over the threads of a row. All threads of the block take part; `none` is the
// result for no threads.
template <class Op, int N>
__device__ void combine(float (&x)[N], int threads_per_row, Op op, float none) {
  const int within = threads_per_row < 32 ? threads_per_row : 32;  // threads of a row in a warp
#pragma unroll
  for (int k = 0; k < N; ++k) {
    for (int lanes = within / 2; lanes > 0; lanes /= 2) {
      x[k] = op(x[k], __shfl_xor_sync(0xffffffff, x[k], lanes));
    }
  }
  if (threads_per_row <= 32) return;
  float* shared = shared_memory<float>();  // (N, kMaxWarps)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = threads_per_row / 32;
  const int first = warp / warps * warps;
  __syncthreads();  // all threads have read the results of the previous call
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (lane == 0) shared[k * kMaxWarps + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = lane < warps ? shared[k * kMaxWarps + first + lane] : none;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      x[k] = op(x[k], __shfl_xor_sync(0xffffffff, x[k], lanes));
    }
  }
}

// Bytes of shared memory that `combine` needs for three sums.
constexpr int64_t kSumBytes = 3 * kMaxWarps * sizeof(float);

// Sums over the part of a row that a thread has read. `spread` is for label smoothing, whose terms
// are small beside a large mean of the logits.
struct RowSums {
  float top = -INFINITY;   // the largest s_n, which is no NaN
  float shift = 0;         // top, unless that is -inf
  float exponentials = 0;  // sum_n e^(s_n - shift)
  float spread = 0;        // sum_n w_n (s_n - shift)
  float weights = 0;       // sum_n w_n

  // Makes the sums relative to a larger element.
  __device__ void raise(float next) {
    if (!(next > top)) return;
    exponentials *= exp_fast(top - next);
    spread += weights * (shift - next);
    top = shift = next;
  }
};

// Adds a thread's pieces, whose absent elements are -inf.
template <class T, int P>
__device__ void add_pieces(RowSums& sums, const Rows& a, const T* z, const Columns<P>& at) {
  constexpr int K = kHeld<P> / P;
  float s[K][P];
  load_row(s, z, at, -INFINITY);
  if (a.softcap > 0) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const auto range = at.present(i);
#pragma unroll
      for (int j = 0; j < P; ++j) s[i][j] = range.has(j) ? capped(s[i][j], a) : -INFINITY;
    }
  }
  float top = s[0][0];
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < P; ++j) top = fmaxf(top, s[i][j]);
  }
  sums.raise(top);

  float exponentials[K];  // sums, none of which waits for another
#pragma unroll
  for (int i = 0; i < K; ++i) {
    exponentials[i] = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) exponentials[i] += exp_fast(s[i][j] - sums.shift);
  }
#pragma unroll
  for (int k = K / 2; k > 0; k /= 2) {
#pragma unroll
    for (int i = 0; i < k; ++i) exponentials[i] += exponentials[i + k];
  }
  sums.exponentials += exponentials[0];

  if (a.label_smoothing > 0) {
    const float* weight = a.weight ? a.weight + at.first : nullptr;
    float spread = 0, weights = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const auto range = at.present(i);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        if (!range.has(j)) continue;
        const float w = weight ? weight[i * at.step + j] : 1.0f;
        spread += w * (s[i][j] - sums.shift);
        weights += w;
      }
    }
    sums.spread += spread;
    sums.weights += weights;
  }
}

// Computes loss, lse and rest of rows.
template <class T, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>) forward_kernel(Forward a) {
  const int threads = a.threads_per_row, thread = threadIdx.x % threads;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * (kThreads / threads) + threadIdx.x / threads;
  const int64_t target = m < a.M ? a.targets[m] : a.ignore_index;
  const bool ignored = target == a.ignore_index, read = m < a.M && (!ignored || a.ignored_lse);
  const T* z = reinterpret_cast<const T*>(a.logits) + a.offsets(read ? m : 0);
  const bool inside = target >= 0 && target < a.V;
  const float z_t = read && thread == 0 && inside ? to_float(z[target]) : 0.0f;

  RowSums sums;
  if (read) {
    Columns<P> at(0, thread, threads, lead<T, P>(z), a.columns);
    for (; at.first < at.count; at.first += kHeld<P> / P * at.step) add_pieces(sums, a, z, at);
  }
  float top[1] = {sums.top};
  combine(top, threads, Max(), -INFINITY);
  sums.raise(top[0]);
  float all[3] = {sums.exponentials, sums.spread, sums.weights};
  if (a.label_smoothing > 0) {
    combine(all, threads, Sum(), 0.0f);
  } else {
    float exponentials[1] = {all[0]};
    combine(exponentials, threads, Sum(), 0.0f);
    all[0] = exponentials[0];
  }
  if (m >= a.M || thread != 0) return;
  if (!read) {
    a.loss[m] = a.lse[m] = a.rest[m] = 0;
    return;
  }
  const auto [exponentials, spread, weights] = all;
  const float log_sum = logf(exponentials), lse = sums.shift + log_sum;
  const bool finite = lse - lse == 0;
  float loss = 0;
  if (!ignored) {
    loss = own_factor(a, target) * ((sums.shift - capped(z_t, a)) + log_sum);
    if (a.label_smoothing > 0) {  // sum_n w_n (lse - s_n)
      loss += a.label_smoothing * (weights * log_sum - spread) / static_cast<float>(a.V);
    }
  }
  a.loss[m] = loss;
  a.lse[m] = lse;
  a.rest[m] = finite ? (sums.shift - lse) + log_sum : 0.0f;
}

// ---- backward ----

struct Backward : Rows {
  unsigned column_blocks;                  // blocks side by side
  const float* weights;                    // their sum; null if it is V, or without smoothing
  const float *lse, *rest, *dloss, *dlse;  // dloss and dlse are null if they are 0
  char* dlogits;
  RowOffsets dlogits_offsets;
};

// The factors of a row's gradient.
struct RowFactors {
  float lse, rest;
  float total, share, own;  // of p_n, of w_n, and of the target
};

// Turns a thread's logits into their gradient.
template <bool CAPPED, int P, int K>
__device__ void differentiate(float (&x)[K][P], const Backward& a, const RowFactors& row,
                              int64_t target, const Columns<P>& at) {
  const float* weight = a.weight && row.share != 0 ? a.weight + a.first : nullptr;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const auto range = at.present(i);
    const int64_t column = at.first + i * at.step;
    float derivative[P];
    // forward: s = softcap tanh(z / softcap)
#pragma unroll
    for (int j = 0; j < P; ++j) {
      if constexpr (CAPPED) {
        const float t = tanhf(x[i][j] * a.softcap_inverse);
        x[i][j] = a.softcap * t;
        derivative[j] = 1 - t * t;
      }
    }
    // forward: loss = own (lse - s_t) + label_smoothing sum_n w_n (lse - s_n) / V
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float p = exp_fast((x[i][j] - row.lse) - row.rest);
      const float w = weight && range.has(j) ? weight[column + j] : 1.0f;
      x[i][j] = row.total * p - row.share * w;
    }
    const int64_t n = a.first + column;
    if (target >= n && target < n + P) {
#pragma unroll
      for (int j = 0; j < P; ++j) x[i][j] -= target == n + j ? row.own : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < P; ++j) {
      if constexpr (CAPPED) x[i][j] *= derivative[j];
    }
  }
}

// Computes the gradient of the logits.
template <class T, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>) backward_kernel(Backward a) {
  constexpr int K = kHeld<P> / P;
  const int threads = a.threads_per_row, thread = threadIdx.x % threads;
  const int64_t block = blockIdx.x / a.column_blocks;
  const int64_t part = int64_t{blockIdx.x % a.column_blocks} * threads * K;
  const int64_t m = block * (kThreads / threads) + threadIdx.x / threads;
  if (m >= a.M) return;
  const int64_t target = a.targets[m];
  const float dloss = a.dloss && target != a.ignore_index ? a.dloss[m] : 0.0f;
  const float dlse = a.dlse ? a.dlse[m] : 0.0f;
  T* dz = reinterpret_cast<T*>(a.dlogits) + a.dlogits_offsets(m);
  const Columns<P> at(part, thread, threads, lead<T, P>(dz), a.columns);
  float x[K][P] = {};
  if (dloss != 0 || dlse != 0) {  // otherwise the logits, which may hold NaN, are not read
    load_row(x, reinterpret_cast<const T*>(a.logits) + a.offsets(m), at, 0.0f);
    const float own = dloss == 0 ? 0.0f : dloss * own_factor(a, target);
    const float share = dloss * a.label_smoothing / static_cast<float>(a.V);
    const float weights = a.weights ? *a.weights : static_cast<float>(a.V);
    const RowFactors row{a.lse[m], a.rest[m], own + share * weights + dlse, share, own};
    if (a.softcap > 0) {
      differentiate<true>(x, a, row, target, at);
    } else {
      differentiate<false>(x, a, row, target, at);
    }
  }
  store_row(dz, x, at);
}

// ---- operators ----

// Runs the statements with `T` naming the element type, and `P` the elements of a piece.
#define TFKERN_PIECES(dtype, wide, ...) \
  TFKERN_CUDA_DTYPE(                    \
      dtype,                            \
      if (wide) {                       \
        constexpr int P = kWide<T>;     \
        __VA_ARGS__;                    \
      } else {                          \
        constexpr int P = 1;            \
        __VA_ARGS__;                    \
      })

// How blocks share the logits: each has rows_per_block rows, or some columns of a row.
struct Tiling {
  int threads_per_row = 1;  // threads of a block that share a row, a power of two
  int64_t rows_per_block, row_blocks, column_blocks;

  Tiling(int64_t M, int64_t columns, bool wide, int64_t element_size) {
    const int held = wide ? kHeld<4> : kHeld<1>;
    // The first piece may lack all elements but one.
    const int64_t all = columns + (wide ? 16 / element_size - 1 : 0);
    while (threads_per_row < kThreads && int64_t{threads_per_row} * held < all) {
      threads_per_row *= 2;
    }
    const int64_t width = int64_t{threads_per_row} * held;
    rows_per_block = kThreads / threads_per_row;
    row_blocks = (M + rows_per_block - 1) / rows_per_block;
    column_blocks = (all + width - 1) / width;
  }
};

Rows rows(const Tensor& logits, const Tensor& targets, const Optional& weight,
          const CrossEntropyOptions& options, int threads_per_row) {
  const auto softcap = static_cast<float>(options.softcap);
  const float largest = std::numeric_limits<float>::max();
  return {targets.numel(),
          options.classes,
          options.first,
          columns(logits),
          threads_per_row,
          data<const char>(logits),
          *row_offsets(logits),
          data<const int64_t>(targets),
          weight ? data<const float>(*weight) : nullptr,
          options.ignore_index,
          static_cast<float>(options.label_smoothing),
          softcap,
          softcap > 0 ? std::min(1 / softcap, largest) : 0.0f};
}

CrossEntropyOutputs cross_entropy_forward(Tensor logits, Tensor targets, Optional weight,
                                          int64_t ignore_index, double label_smoothing,
                                          double softcap, bool ignored_lse) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, softcap, 0, columns(logits)};
  check_cross_entropy(logits, targets, weight, options);
  check_no_float64(logits);
  const int64_t V = options.classes;
  const bool wide = V > kShortColumns;
  const Tiling tiling(targets.numel(), V, wide, logits.element_size());
  check_grid(tiling.row_blocks);
  logits = with_row_offsets(logits);
  targets = torch::stable::contiguous(targets);
  const CrossEntropyOutputs outputs = cross_entropy_outputs(logits, targets);
  const auto& [loss, lse, rest] = outputs;
  const Forward a{rows(logits, targets, weight, options, tiling.threads_per_row), ignored_lse,
                  data<float>(loss), data<float>(lse), data<float>(rest)};
  const Device device(logits);
  TFKERN_PIECES(dtype(logits), wide,
                launch(device, forward_kernel<T, P>, tiling.row_blocks, kThreads, kSumBytes, a));
  return outputs;
}

// Tells whether each row of x begins as many bytes after a multiple of 16 as the same row of y. y
// is x, or contiguous.
bool begin_alike(const Tensor& x, const Tensor& y, int64_t M) {
  const RowOffsets a = *row_offsets(x), b = *row_offsets(y);
  const int64_t size = x.element_size();
  const auto differ = [&](int64_t m) { return (a(m) - b(m)) * size % 16 != 0; };
  const auto between =
      reinterpret_cast<uintptr_t>(x.data_ptr()) - reinterpret_cast<uintptr_t>(y.data_ptr());
  return between % 16 == 0 && !(a.T > 1 && differ(1)) && !(M > a.T && differ(a.T));
}

void gradient(const Tensor& logits, const Tensor& targets, const Optional& weight,
              const Tensor& lse, const Tensor& rest, const Optional& dloss, const Optional& dlse,
              const CrossEntropyOptions& options, const Tensor& dlogits) {
  check_no_float64(logits);
  const int64_t M = targets.numel(), N = columns(logits);
  const bool wide = N > kShortColumns && begin_alike(logits, dlogits, M);
  const Tiling tiling(M, N, wide, logits.element_size());
  const int64_t blocks = tiling.row_blocks * tiling.column_blocks;
  check_grid(blocks);
  const Tensor all_targets = torch::stable::contiguous(targets);
  const Tensor all_lse = torch::stable::contiguous(lse), all_rest = torch::stable::contiguous(rest);
  const Optional all_dloss = contiguous(dloss), all_dlse = contiguous(dlse);
  const bool weighted = weight && options.label_smoothing > 0;
  const Optional weights = weighted ? Optional(torch::stable::sum(*weight)) : std::nullopt;
  const Backward a{rows(logits, all_targets, weight, options, tiling.threads_per_row),
                   static_cast<unsigned>(tiling.column_blocks),
                   weights ? data<const float>(*weights) : nullptr,
                   data<const float>(all_lse),
                   data<const float>(all_rest),
                   all_dloss ? data<const float>(*all_dloss) : nullptr,
                   all_dlse ? data<const float>(*all_dlse) : nullptr,
                   data<char>(dlogits),
                   *row_offsets(dlogits)};
  const Device device(logits);
  TFKERN_PIECES(dtype(logits), wide, launch(device, backward_kernel<T, P>, blocks, kThreads, 0, a));
}

}  // namespace
}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&tfkern::cuda::cross_entropy_forward));
  m.impl("cross_entropy_backward",
         TORCH_BOX(&tfkern::cross_entropy_backward<tfkern::cuda::gradient>));
  m.impl("cross_entropy_backward_",
         TORCH_BOX(&tfkern::cross_entropy_backward_in_place<tfkern::cuda::gradient>));
}
