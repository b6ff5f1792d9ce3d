// Softmax attention, backward. The kernels of dq, dk, dv and dbias compute p = exp(s - lse) again,
// tile by tile.
//
// clang-format off
//   dp = do v^T,  delta = rowsum(do o) - dlse,  ds = p (dp keep - delta)
//   dv = (p keep)^T do,  dq = scale ds k,  dk = scale ds^T q
// clang-format on
//
//   delta_kernel: delta of each query, and its term of dsink.
//   dq_kernel: a block owns a tile of queries and sums dq over the keys.
//   dkv_kernel: a block owns a tile of keys and sums dk or dv over the queries of all heads that
//     share the keys.
//   dbias_kernel: a block owns a tile of dbias and sums over the dimensions that bias is broadcast
//     along. If there are few tiles, several blocks sum parts of each, which are added afterwards.
//   sink_kernel: a block sums dsink of a head.
//
// There are no atomics, and how the work is cut depends on the shapes only, so every run gives the
// same bits. The workspace is one float per query (two with a sink), and the parts of dbias.
#include "attention_bias.h"

namespace tfkern::cuda {
namespace {

constexpr int kLeastRows = 32;  // the smallest kRows
// Queries (keys in dkv_kernel) that a block owns, 16 to a warp.
template <class T, int D>
constexpr int kRows = kPlanes<T> == 3 && D == 256 ? kLeastRows : 64;
// Keys (queries in dkv_kernel) that a block loads at each step of its walk.
template <class T, int D>
constexpr int kStep = kPlanes<T> == 1 && D <= 128 ? 32 : 16;
// Bytes of shared memory: two tiles that the block owns and two that pass by.
template <class T, int D>
constexpr int64_t kShared = 2 * (Tile<T, kRows<T, D>, D>::kBytes + Tile<T, kStep<T, D>, D>::kBytes);

struct Backward {
  Attention in;
  int64_t tiles;  // tiles of kRows queries (or keys) of all documents
  HeadView d_o, o;
  // (B, H, T): log-sum-exp rounded, -inf in rows that see nothing, and what the rounding left out
  const float *lse, *lse_rest;
  const float* dlse;          // (B, H, T), may be null
  float *delta, *sink_terms;  // (B, H, T); sink_terms is null without a sink
  void *dq, *dk, *dv;
  void* dbias;  // dbias, or its parts one after the other in float32
  Dtype dbias_dtype;
  BiasTiles bias;

  __device__ int64_t row(const Document& d, int h, int t) const {
    return (static_cast<int64_t>(d.batch) * in.H + h) * in.T + d.query0 + t;
  }
};

// Computes delta and, with a sink, the term -p_sink delta of dsink. Each warp has one row.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(Backward a) {
  const Attention& in = a.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(in.B) * in.H * in.T) return;
  const int64_t t = row % in.T, h = row / in.T % in.H, b = row / in.T / in.H;
  const auto* d_o =
      reinterpret_cast<const T*>(a.d_o.data + b * a.d_o.batch + h * a.d_o.head + t * a.d_o.row);
  const auto* o = reinterpret_cast<const T*>(a.o.data + b * a.o.batch + h * a.o.head + t * a.o.row);
  float sum = 0;
  // Rows that see nothing may hold anything, NaN included. A row whose scores are NaN has
  // lse = NaN and counts as seen.
  const bool seen = a.lse[row] != -kInfinity;
  for (int n = threadIdx.x % 32; seen && n < in.Dv; n += 32)
    sum += to_float(d_o[n]) * to_float(o[n]);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
  if (threadIdx.x % 32 != 0) return;
  if (seen && a.dlse) sum -= a.dlse[row];
  a.delta[row] = sum;
  if (a.sink_terms == nullptr) return;
  const float sink = in.sink.number(0, h);
  a.sink_terms[row] = seen ? -expf(sink - a.lse[row] - a.lse_rest[row]) * sum : 0.0f;
}

__device__ inline void store_number(void* out, Dtype type, int64_t at, float x) {
  TFKERN_CUDA_DTYPE(type, static_cast<T*>(out)[at] = from_float<T>(x));
}

// Sums dsink: each block adds up the terms of one head.
__global__ void __launch_bounds__(kThreads) sink_kernel(Backward a, void* dsink, Dtype type) {
  auto* shared = shared_memory<double>();
  const Attention& in = a.in;
  const int64_t h = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(in.B) * in.T; i += kThreads) {
    sum += a.sink_terms[(i / in.T * in.H + h) * in.T + i % in.T];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) sum += shared[i];
  store_number(dsink, type, h, static_cast<float>(sum));
}

// Turns x = q k^T of a tile into p keep, and dp = do v^T into ds, without the factor `scale`. ds is
// the gradient before the softcap or, with `of_bias`, after it. Rows are queries or, if the origin
// is transposed, keys.
template <int N>
__device__ inline void gradients(float (&x)[N][4], float (&dp)[N][4], const Backward& a,
                                 const Document& d, const TileOrigin& origin, bool limits,
                                 bool of_bias) {
  const Attention& in = a.in;
  float slopes[N][4];
  scores<N>(x, slopes, in, d, origin);
  if (in.seed) drop(dp, in, d, origin);
  each<N>([&](int n, int i, int row, int column) {
    const Place p = origin.at(row, column);
    const bool there = p.t < d.queries;
    const int64_t at = a.row(d, p.h, p.t);
    const float lse = there ? a.lse[at] : 0.0f, lse_rest = there ? a.lse_rest[at] : 0.0f;
    const float delta = there ? a.delta[at] : 0.0f;
    // x - lse is exact for all weights that matter, and lse_rest is small. A row that sees nothing
    // has lse = -inf; its scores are -inf too, so that p = 0, or each_hidden sets p and ds to 0
    // below.
    x[n][i] -= lse == -kInfinity ? 0.0f : lse;
    x[n][i] = exp2_approx(fmaf(x[n][i], kLog2E, -kLog2E * lse_rest));
    dp[n][i] = x[n][i] * (dp[n][i] - delta);
    if (!of_bias) dp[n][i] *= slopes[n][i];
  });
  // Hidden scores went through the exponential as well, so their p and ds may be anything by now.
  each_hidden<N>(in, d, origin, limits, [&](int n, int i) { x[n][i] = dp[n][i] = 0; });
  if (in.seed) drop(x, in, d, origin);
}

// Tells whether a length or the window may hide elements of queries t0 to t1 and keys s0 to s1.
__device__ inline bool cuts(const Attention& a, const Document& d, int t0, int t1, int s0, int s1) {
  return t1 >= d.queries || s1 >= d.keys || t1 + d.offset() - s0 > a.left ||
         s1 - t0 - d.offset() > a.right;
}

// Writes the accumulators of 16 rows, times `scale`, to rows from `first` on of a contiguous
// (batch, head, row, feature) tensor. Only `rows` rows and `features` features exist.
template <class T, int N>
__device__ inline void store_rows(void* out, const float (&acc)[N][4], int64_t first, int rows,
                                  int features, float scale) {
  each<N>([&](int n, int i, int row, int feature) {
    if (row < rows && feature < features) {
      static_cast<T*>(out)[(first + row) * features + feature] = from_float<T>(acc[n][i] * scale);
    }
  });
}

// Computes dq: each block sums a tile of queries of one head over the keys.
template <class T, int D>
__global__ void __launch_bounds__(2 * kRows<T, D>) dq_kernel(Backward a) {
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>, N = kSize / 8;
  using Own = Tile<T, kOwn, D>;
  using Step = Tile<T, kSize, D>;
  const Attention& in = a.in;
  const int warp = threadIdx.x / 32;
  Document d;
  int tile;
  if (!find_tile(in, blockIdx.x % a.tiles, false, kOwn, d, tile)) return;
  const int h = static_cast<int>(blockIdx.x / a.tiles), t0 = tile * kOwn;
  if (t0 >= d.queries) return;
  const int t1 = min(t0 + kOwn, d.queries) - 1;
  const Own q{shared_memory<uint4>()}, d_o{q.end()};
  const Step k{d_o.end()}, v{k.end()};
  const float* lse = a.lse + a.row(d, h, 0);
  q.load(in.q, d.batch, h, d.query0, t0, d.queries, 0, lse);
  d_o.load(a.d_o, d.batch, h, d.query0, t0, d.queries, 0, lse);
  copy_commit();  // the loop may be empty
  const Range keys = keys_of(in, d, t0, t1);
  float dq[D / 8][4] = {};
  for (int s0 = keys.begin / kSize * kSize; s0 < keys.end; s0 += kSize) {
    k.load(in.k, d.batch, h / in.group(), d.key0, s0, d.keys);
    v.load(in.v, d.batch, h / in.group(), d.key0, s0, d.keys);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float x[N][4] = {}, dp[N][4] = {};
    multiply_rows<T>(x, q, 16 * warp, k);
    multiply_rows<T>(dp, d_o, 16 * warp, v);
    const TileOrigin origin{h, t0 + 16 * warp, s0, 0, false, 0};
    gradients<N>(x, dp, a, d, origin, cuts(in, d, t0, t0 + kOwn - 1, s0, s0 + kSize - 1), false);
    multiply_columns<T>(dq, dp, k);
    __syncthreads();
  }
  copy_wait<0>();
  const int first = t0 + 16 * warp;
  store_rows<T>(a.dq, dq, a.row(d, h, first), d.queries - first, in.D, in.scale);
}

// Computes dk and dv of a tile of keys by a block each: registers then hold one of the two sums
// whatever the head size, and only q k^T is formed twice. The launch bounds tell the compiler that
// two blocks of the 16-bit types share an SM: it would spill to make room for a third.
template <class T, int D>
__global__ void __launch_bounds__(2 * kRows<T, D>, kPlanes<T> == 1 ? 2 : 0) dkv_kernel(Backward a) {
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>, N = kSize / 8;
  using Own = Tile<T, kOwn, D>;
  using Step = Tile<T, kSize, D>;
  const Attention& in = a.in;
  const int warp = threadIdx.x / 32;
  const int part = static_cast<int>(blockIdx.x % 2);  // 0 is dk, 1 is dv
  const int64_t index = blockIdx.x / 2;
  Document d;
  int tile;
  if (!find_tile(in, index % a.tiles, true, kOwn, d, tile)) return;
  const int hk = static_cast<int>(index / a.tiles), s0 = tile * kOwn;
  if (s0 >= d.keys) return;
  const int s1 = min(s0 + kOwn, d.keys) - 1;
  const Own k{shared_memory<uint4>()}, v{k.end()};
  const Step q{v.end()}, d_o{q.end()};
  k.load(in.k, d.batch, hk, d.key0, s0, d.keys);
  v.load(in.v, d.batch, hk, d.key0, s0, d.keys);
  copy_commit();  // the loop may be empty
  const Range queries = queries_of(in, d, s0, s1);
  float sum[D / 8][4] = {};
  for (int h = hk * in.group(); h < (hk + 1) * in.group(); ++h) {
    for (int t0 = queries.begin / kSize * kSize; t0 < queries.end; t0 += kSize) {
      const float* lse = a.lse + a.row(d, h, 0);
      q.load(in.q, d.batch, h, d.query0, t0, d.queries, 0, lse);
      d_o.load(a.d_o, d.batch, h, d.query0, t0, d.queries, 0, lse);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      float x[N][4] = {}, dp[N][4] = {};
      multiply_rows<T, true>(x, k, 16 * warp, q);
      if (part == 0) multiply_rows<T>(dp, v, 16 * warp, d_o);
      const TileOrigin origin{h, t0, s0 + 16 * warp, 0, true, 0};
      gradients<N>(x, dp, a, d, origin, cuts(in, d, t0, t0 + kSize - 1, s0, s0 + kOwn - 1), false);
      if (part == 0) {
        multiply_columns<T>(sum, dp, q);
      } else {
        multiply_columns<T>(sum, x, d_o);
      }
      __syncthreads();
    }
  }
  copy_wait<0>();
  const int first = s0 + 16 * warp;
  const int64_t row = (static_cast<int64_t>(d.batch) * in.Hk + hk) * in.S + d.key0 + first;
  store_rows<T>(part == 0 ? a.dk : a.dv, sum, row, d.keys - first, part == 0 ? in.D : in.Dv,
                part == 0 ? in.scale : 1.0f);
}

// Computes a tile of dbias, or one part of the sum.
template <class T, int D>
__global__ void __launch_bounds__(2 * kRows<T, D>, 2) dbias_kernel(Backward a) {
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>, N = kSize / 8;
  using Own = Tile<T, kOwn, D>;
  using Step = Tile<T, kSize, D>;
  const Attention& in = a.in;
  const BiasTiles& bias = a.bias;
  const int warp = threadIdx.x / 32;
  const int64_t part = blockIdx.x % bias.parts;
  const BiasTile own = bias.tile(blockIdx.x / bias.parts);
  const Own q{shared_memory<uint4>()}, d_o{q.end()};
  const Step k{d_o.end()}, v{k.end()};
  float sum[N][4] = {};
  const int64_t last = min((part + 1) * bias.part_terms, bias.terms());
  for (int64_t i = part * bias.part_terms, next; i < last; i = next) {
    next = min((i / bias.sum_s + 1) * bias.sum_s, last);  // the terms that share the same queries
    const BiasTile term = bias.term(own, i);
    const Document d = document_of(in, term.b);
    const int h = term.h, t0 = term.t * kOwn;
    const Range keys = keys_of(in, d, t0, t0 + kOwn - 1);
    const int begin = max(term.s, keys.begin / kSize);
    const int end = min(term.s + static_cast<int>(next - i), tiles_of(keys.end, kSize));
    if (t0 >= d.queries || begin >= end) continue;
    const float* lse = a.lse + a.row(d, h, 0);
    q.load(in.q, d.batch, h, 0, t0, d.queries, 0, lse);
    d_o.load(a.d_o, d.batch, h, 0, t0, d.queries, 0, lse);
    for (int s0 = begin * kSize; s0 < end * kSize; s0 += kSize) {
      k.load(in.k, d.batch, h / in.group(), 0, s0, d.keys);
      v.load(in.v, d.batch, h / in.group(), 0, s0, d.keys);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      float x[N][4] = {}, dp[N][4] = {};
      multiply_rows<T>(x, q, 16 * warp, k);
      multiply_rows<T>(dp, d_o, 16 * warp, v);
      const TileOrigin origin{h, t0 + 16 * warp, s0, 0, false, 0};
      gradients<N>(x, dp, a, d, origin, cuts(in, d, t0, t0 + kOwn - 1, s0, s0 + kSize - 1), true);
      each<N>([&](int n, int i, int, int) { sum[n][i] += dp[n][i]; });
      __syncthreads();
    }
  }
  auto* sums = shared_memory<float>();  // (kOwn, kSize)
  each<N>([&](int n, int i, int row, int column) {
    sums[(16 * warp + row) * kSize + column] = sum[n][i];
  });
  __syncthreads();
  const int rows = bias.T == 1 ? 1 : kOwn, columns = bias.S == 1 ? 1 : kSize;
  if (columns == 1) {
    for (int t = threadIdx.x; t < kOwn; t += blockDim.x) {
      for (int s = 1; s < kSize; ++s) sums[t * kSize] += sums[t * kSize + s];
    }
    __syncthreads();
  }
  if (rows == 1) {
    for (int s = threadIdx.x; s < columns; s += blockDim.x) {
      for (int t = 1; t < kOwn; ++t) sums[s] += sums[t * kSize + s];
    }
    __syncthreads();
  }
  const int64_t first = ((part * bias.B + own.b) * bias.H + own.h) * bias.T;
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int row = i / columns, column = i % columns;
    const int t = own.t * kOwn + row, s = own.s * kSize + column;
    if (t >= bias.T || s >= bias.S) continue;
    store_number(a.dbias, a.dbias_dtype, (first + t) * bias.S + s, sums[row * kSize + column]);
  }
}

// Launches dq_kernel, dkv_kernel and, unless `dbias` is empty, dbias_kernel.
template <class T, int D>
void run(const Device& device, Backward& a, const Tensor& dbias) {
  const Attention& in = a.in;
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>;
  a.tiles = most_tiles(in, false, kOwn);
  launch(device, dq_kernel<T, D>, a.tiles * in.H, 2 * kOwn, kShared<T, D>, a);
  a.tiles = most_tiles(in, true, kOwn);
  launch(device, dkv_kernel<T, D>, 2 * a.tiles * in.Hk, 2 * kOwn, kShared<T, D>, a);
  if (dbias.numel() == 0) return;
  const int64_t bias_sizes[] = {dbias.size(0), dbias.size(1), dbias.size(2), dbias.size(3)};
  a.bias = BiasTiles(in, bias_sizes, kOwn, kSize);
  const int64_t parts = a.bias.parts > 1 ? a.bias.parts : 0;
  Tensor partial = empty(dbias, {parts, dbias.numel()}, ScalarType::Float);
  a.dbias = parts ? partial.data_ptr() : dbias.data_ptr();
  a.dbias_dtype = dtype(parts ? partial : dbias);
  launch(device, dbias_kernel<T, D>, a.bias.tiles() * a.bias.parts, 2 * kOwn, kShared<T, D>, a);
  if (parts) sum_partials(device, partial, parts, dbias);
}

template <class T>
void run(const Device& device, Backward& a, const Tensor& dbias) {
  const int D = std::max(a.in.D, a.in.Dv);
  const int64_t rows = int64_t{a.in.B} * a.in.H * a.in.T;
  launch(device, delta_kernel<T>, (rows + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0, a);
  if (D <= 64) return run<T, 64>(device, a, dbias);
  if (D <= 128) return run<T, 128>(device, a, dbias);
  run<T, 256>(device, a, dbias);
}

InputGradients backward(const AttentionArguments& given, const AttentionGradients& g) {
  AttentionArguments in = given;
  Backward a{attention(in)};
  const Attention& sizes = a.in;
  const Tensor& q = in.q;
  const Optional &bias = in.bias, &sink = in.sink;
  const int64_t rows = int64_t{sizes.B} * sizes.H * sizes.T;
  check_grid(rows / (kThreads / 32));
  check_grid(most_tiles(sizes, false, kLeastRows) * sizes.H);
  check_grid(2 * most_tiles(sizes, true, kLeastRows) * sizes.Hk);
  const ScalarType type = q.scalar_type();
  Tensor dq = empty(q, {sizes.B, sizes.H, sizes.T, sizes.D}, type);
  Tensor dk = empty(q, {sizes.B, sizes.Hk, sizes.S, sizes.D}, type);
  Tensor dv = empty(q, {sizes.B, sizes.Hk, sizes.S, sizes.Dv}, type);
  Tensor dbias = absent(q, type), dsink = absent(q, type);
  if (bias && g.bias_grad) {
    dbias =
        empty(q, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, bias->scalar_type());
  }
  if (sink) dsink = empty(q, {sizes.H}, sink->scalar_type());
  const Device device(q);
  const bool nothing = q.numel() == 0 || sizes.S == 0 || sizes.documents == 0;
  if (in.query_lengths || in.key_lengths || in.cu_seqlens_q || nothing) {  // some rows are unused
    for (Tensor* x : {&dq, &dk, &dv}) torch::stable::zero_(*x);
  }
  if (nothing) {
    torch::stable::zero_(dbias);
    if (q.numel() == 0 || sizes.documents == 0) {
      torch::stable::zero_(dsink);
      return {dq, dk, dv, dbias, dsink};
    }
  }
  Tensor delta = empty(q, {sizes.B, sizes.H, sizes.T}, ScalarType::Float);
  Tensor terms = empty(q, {sink ? rows : 0}, ScalarType::Float);
  a.d_o = heads(g.d_o);
  a.o = heads(g.o);
  a.lse = data<const float>(g.lse);
  a.lse_rest = a.lse + rows;
  a.dlse = g.dlse ? data<const float>(*g.dlse) : nullptr;
  a.delta = static_cast<float*>(delta.data_ptr());
  a.sink_terms = sink ? static_cast<float*>(terms.data_ptr()) : nullptr;
  a.dq = dq.data_ptr();
  a.dk = dk.data_ptr();
  a.dv = dv.data_ptr();
  TFKERN_CUDA_DTYPE(sizes.q_dtype, run<T>(device, a, dbias));
  if (sink) {
    launch(device, sink_kernel, sizes.H, kThreads, kThreads * sizeof(double), a, dsink.data_ptr(),
           dtype(dsink));
  }
  return {dq, dk, dv, dbias, dsink};
}

}  // namespace
}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("attention_backward", &tfkern::attention_backward<tfkern::cuda::backward>);
}
