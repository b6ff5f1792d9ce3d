// Softmax attention, backward. The kernels of dq, dk, dv and dbias compute p = exp(s - lse) again,
// tile by tile.
//
// clang-format off
//   dp = do v^T,  delta = rowsum(do o) - dlse,  ds = p (dp keep - delta)
//   dv = (p keep)^T do,  dq = scale ds k,  dk = scale ds^T q
// clang-format on
//
//   statistics_kernel: lse and delta of each query side by side, and its term of dsink.
//   dq_kernel: a block owns a tile of queries and sums dq over the keys.
//   dkv_kernel: a block owns a tile of keys and sums dk, dv or both over the queries of all heads
//     that share the keys.
//   dbias_kernel: a block owns a tile of dbias and sums over the dimensions that bias is broadcast
//     along. If there are few tiles, several blocks sum parts of each, which are added afterwards.
//   sink_kernel: a block sums dsink of a head.
//
// There are no atomics, and how the work is cut depends on the shapes only, so every run gives the
// same bits. The workspace is four floats per query (five with a sink), and the parts of dbias.
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
// Steps that are in shared memory at a time. With heads of 256 features, a second step would leave
// no room for two blocks in an SM of sm_80; float32 is not copied asynchronously.
template <class T, int D>
constexpr int kStages = kPlanes<T> == 1 && D <= 128 ? 2 : 1;
// Tells whether a block of dkv_kernel sums both dk and dv. One of the two fills the registers if
// heads are larger.
template <class T, int D>
constexpr bool kBoth = kPlanes<T> == 1 && D <= 64;

// What a query needs besides q and do. All is 0 for rows that do not exist.
struct alignas(16) Statistics {
  float lse;       // log-sum-exp rounded; 0 if the query sees nothing
  float lse_rest;  // what the rounding left out, times -log2(e)
  float delta;
  float unseen;  // 1 if the query sees nothing
};

struct Backward {
  Attention in;
  int64_t tiles;  // tiles of kRows queries (or keys) of all documents
  HeadView d_o, o;
  // (B, H, T): log-sum-exp rounded, -inf in rows that see nothing, and what the rounding left out
  const float *lse, *lse_rest;
  const float* dlse;       // (B, H, T), may be null
  Statistics* statistics;  // (B, H, T)
  float* sink_terms;       // (B, H, T); null without a sink
  void *dq, *dk, *dv;
  void* dbias;  // dbias, or its parts one after the other in float32
  Dtype dbias_dtype;
  BiasTiles bias;

  __device__ int64_t row(const Document& d, int h, int t) const {
    return (static_cast<int64_t>(d.batch) * in.H + h) * in.T + d.query0 + t;
  }
};

// A tile of queries in shared memory.
template <class T, int ROWS, int D>
struct Queries {
  using Rows = Tile<T, ROWS, D>;
  static constexpr int64_t kBytes = 2 * Rows::kBytes + ROWS * sizeof(Statistics);

  Rows q, d_o;
  Statistics* statistics;

  __device__ explicit Queries(uint4* data)
      : q{data}, d_o{q.end()}, statistics(reinterpret_cast<Statistics*>(d_o.end())) {}

  __device__ void load(const Backward& a, const Document& d, int h, int t0) const {
    q.load(a.in.q, d.batch, h, d.query0, t0, d.queries);
    d_o.load(a.d_o, d.batch, h, d.query0, t0, d.queries);
    const int i = threadIdx.x;
    if (i < ROWS)
      copy_async(statistics + i, a.statistics + a.row(d, h, t0 + i), t0 + i < d.queries);
  }

  // A barrier for tiles whose copies each thread has waited for. Queries that see nothing may hold
  // anything, NaN included, and become 0.
  __device__ void sync() const {
    const bool unseen = threadIdx.x < ROWS && statistics[threadIdx.x].unseen != 0;
    if (!__syncthreads_or(unseen)) return;
    for (int i = threadIdx.x; i < ROWS * Rows::kPieces; i += blockDim.x) {
      const int row = i / Rows::kPieces;
      if (statistics[row].unseen == 0) continue;
      for (int plane = 0; plane < kPlanes<T>; ++plane) {
        *q.piece(plane, row, i % Rows::kPieces) = *d_o.piece(plane, row, i % Rows::kPieces) = {};
      }
    }
    __syncthreads();
  }
};

// Bytes of shared memory: the tiles that a block owns, and those that pass by.
template <class T, int D>
constexpr int64_t kQuerySums =
    Queries<T, kRows<T, D>, D>::kBytes + 2 * kStages<T, D> * Tile<T, kStep<T, D>, D>::kBytes;
template <class T, int D>
constexpr int64_t kKeySums =
    2 * Tile<T, kRows<T, D>, D>::kBytes + kStages<T, D> * Queries<T, kStep<T, D>, D>::kBytes;

// Computes the statistics of each query and, with a sink, the term -p_sink delta of dsink. Each
// warp has one row.
template <class T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Backward a) {
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
  a.statistics[row] =
      seen ? Statistics{a.lse[row], -kLog2E * a.lse_rest[row], sum, 0} : Statistics{0, 0, 0, 1};
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
// is transposed, keys. statistics(row, column) are those of the query of an element.
template <int N, class F>
__device__ inline void gradients(float (&x)[N][4], float (&dp)[N][4], const Backward& a,
                                 const Document& d, const TileOrigin& origin, bool limits,
                                 bool of_bias, const F& statistics) {
  const Attention& in = a.in;
  float slopes[N][4];
  uint32_t kept[4];
  scores<N>(x, slopes, in, d, origin);
  if (in.seed) {
    keep<N>(kept, in, d, origin);
    drop(dp, kept, in);
  }
  each<N>([&](int n, int i, int row, int column) {
    const Statistics& query = statistics(row, column);
    // x - lse is exact for all weights that matter, and lse_rest is small. q, do, lse and delta of
    // a query that sees nothing are 0, so its ds is 0, and so is what p adds to dv. Elements that
    // are hidden are set to 0 below.
    x[n][i] = exp2_approx(fmaf(x[n][i] - query.lse, kLog2E, query.lse_rest));
    dp[n][i] = x[n][i] * (dp[n][i] - query.delta);
  });
  if (in.softcap > 0 && !of_bias) {
    each<N>([&](int n, int i, int, int) { dp[n][i] *= slopes[n][i]; });
  }
  // Hidden scores went through the exponential as well, so their p and ds may be anything by now.
  each_hidden<N>(in, d, origin, limits, [&](int n, int i) { x[n][i] = dp[n][i] = 0; });
  if (in.seed) drop(x, kept, in);
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
    if (i % 2 || row >= rows) return;
    store_pair<T>(out, (first + row) * features, feature, features, acc[n][i] * scale,
                  acc[n][i + 1] * scale);
  });
}

// Computes dq: each block sums a tile of queries of one head over the keys.
template <class T, int D>
__global__ void __launch_bounds__(2 * kRows<T, D>) dq_kernel(Backward a) {
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>, N = kSize / 8;
  using Own = Queries<T, kOwn, D>;
  using Step = Tile<T, kSize, D>;
  const Attention& in = a.in;
  const int warp = threadIdx.x / 32;
  Document d;
  int tile;
  if (!find_tile(in, blockIdx.x % a.tiles, false, kOwn, d, tile)) return;
  tile = longest_first(in, d, kOwn, tile);
  const int h = static_cast<int>(blockIdx.x / a.tiles), t0 = tile * kOwn;
  if (t0 >= d.queries) return;
  const int t1 = min(t0 + kOwn, d.queries) - 1;
  const Own own{shared_memory<uint4>()};
  const auto keys_at = [&](int stage) {
    return Step{shared_memory<uint4>() + (Own::kBytes + 2 * stage * Step::kBytes) / 16};
  };
  const auto values_at = [&](int stage) { return Step{keys_at(stage).end()}; };
  own.load(a, d, h, t0);
  Range keys = keys_of(in, d, t0, t1);
  keys.begin = keys.begin / kSize * kSize;
  const int first = t0 + 16 * warp;
  float dq[D / 8][4] = {};
  walk<kStages<T, D>>(
      tiles_of(max(keys.end - keys.begin, 0), kSize),
      [&](int i, int stage) {
        const int s0 = keys.begin + i * kSize;
        keys_at(stage).load(in.k, d.batch, h / in.group(), d.key0, s0, d.keys);
        values_at(stage).load(in.v, d.batch, h / in.group(), d.key0, s0, d.keys);
      },
      [&](int i, int) { i == 0 ? own.sync() : __syncthreads(); },
      [&](int i, int stage) {
        if (first >= d.queries) return;
        const int s0 = keys.begin + i * kSize;
        float x[N][4] = {}, dp[N][4] = {};
        multiply_rows<T>(x, own.q, 16 * warp, keys_at(stage));
        multiply_rows<T>(dp, own.d_o, 16 * warp, values_at(stage));
        gradients<N>(x, dp, a, d, {h, first, s0, 0, false, 0},
                     cuts(in, d, t0, t0 + kOwn - 1, s0, s0 + kSize - 1), false,
                     [&](int row, int) { return own.statistics[16 * warp + row]; });
        multiply_columns<T>(dq, dp, keys_at(stage));
      });
  store_rows<T>(a.dq, dq, a.row(d, h, first), d.queries - first, in.D, in.scale);
}

// Computes dk and dv of a tile of keys: one block both of them or, if registers hold only one of
// the two sums, a block each, and then q k^T is formed twice. The launch bounds tell the compiler
// that two blocks of the 16-bit types share an SM: it would spill to make room for a third.
template <class T, int D>
__global__ void __launch_bounds__(2 * kRows<T, D>, kPlanes<T> == 1 ? 2 : 0) dkv_kernel(Backward a) {
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>, N = kSize / 8;
  constexpr int kParts = kBoth<T, D> ? 1 : 2;
  using Own = Tile<T, kOwn, D>;
  using Step = Queries<T, kSize, D>;
  const Attention& in = a.in;
  const int warp = threadIdx.x / 32;
  const int part = static_cast<int>(blockIdx.x % kParts);
  const bool of_k = kBoth<T, D> || part == 0, of_v = kBoth<T, D> || part == 1;
  const int64_t index = blockIdx.x / kParts;
  Document d;
  int tile;
  if (!find_tile(in, index % a.tiles, true, kOwn, d, tile)) return;
  const int hk = static_cast<int>(index / a.tiles), s0 = tile * kOwn;
  if (s0 >= d.keys) return;
  const int s1 = min(s0 + kOwn, d.keys) - 1, first = s0 + 16 * warp;
  const Own k{shared_memory<uint4>()}, v{k.end()};
  const auto queries_at = [&](int stage) { return Step{v.end() + stage * Step::kBytes / 16}; };
  k.load(in.k, d.batch, hk, d.key0, s0, d.keys);
  v.load(in.v, d.batch, hk, d.key0, s0, d.keys);
  Range queries = queries_of(in, d, s0, s1);
  queries.begin = queries.begin / kSize * kSize;
  // The walk takes the heads that share the keys one after the other.
  struct Position {
    int h, t0;
  } loaded{hk * in.group(), queries.begin}, used = loaded;
  const auto advance = [&](Position& p) {
    p.t0 += kSize;
    if (p.t0 < queries.end) return;
    p.t0 = queries.begin;
    ++p.h;
  };
  float sums[kBoth<T, D> ? 2 : 1][D / 8][4] = {};  // dk before dv
  walk<kStages<T, D>>(
      tiles_of(max(queries.end - queries.begin, 0), kSize) * in.group(),
      [&](int, int stage) {
        queries_at(stage).load(a, d, loaded.h, loaded.t0);
        advance(loaded);
      },
      [&](int, int stage) { queries_at(stage).sync(); },
      [&](int, int stage) {
        const Step step = queries_at(stage);
        const auto [h, t0] = used;
        advance(used);
        if (first >= d.keys) return;
        float x[N][4] = {}, dp[N][4] = {};
        multiply_rows<T, true>(x, k, 16 * warp, step.q);
        if (of_k) multiply_rows<T>(dp, v, 16 * warp, step.d_o);
        gradients<N>(x, dp, a, d, {h, t0, first, 0, true, 0},
                     cuts(in, d, t0, t0 + kSize - 1, s0, s0 + kOwn - 1), false,
                     [&](int, int column) { return step.statistics[column]; });
        if (of_k) multiply_columns<T>(sums[0], dp, step.q);
        if (of_v) multiply_columns<T>(sums[kBoth<T, D>], x, step.d_o);
      });
  const int64_t row = (static_cast<int64_t>(d.batch) * in.Hk + hk) * in.S + d.key0 + first;
  if (of_k) store_rows<T>(a.dk, sums[0], row, d.keys - first, in.D, in.scale);
  if (of_v) store_rows<T>(a.dv, sums[kBoth<T, D>], row, d.keys - first, in.Dv, 1.0f);
}

// Computes a tile of dbias, or one part of the sum.
template <class T, int D>
__global__ void __launch_bounds__(2 * kRows<T, D>, 2) dbias_kernel(Backward a) {
  constexpr int kOwn = kRows<T, D>, kSize = kStep<T, D>, N = kSize / 8;
  using Own = Queries<T, kOwn, D>;
  using Step = Tile<T, kSize, D>;
  const Attention& in = a.in;
  const BiasTiles& bias = a.bias;
  const int warp = threadIdx.x / 32;
  const int64_t part = blockIdx.x % bias.parts;
  const BiasTile own = bias.tile(blockIdx.x / bias.parts);
  const Own queries{shared_memory<uint4>()};
  const auto keys_at = [&](int stage) {
    return Step{shared_memory<uint4>() + (Own::kBytes + 2 * stage * Step::kBytes) / 16};
  };
  const auto values_at = [&](int stage) { return Step{keys_at(stage).end()}; };
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
    queries.load(a, d, h, t0);
    const int first = t0 + 16 * warp;
    walk<kStages<T, D>>(
        end - begin,
        [&](int j, int stage) {
          const int s0 = (begin + j) * kSize;
          keys_at(stage).load(in.k, d.batch, h / in.group(), 0, s0, d.keys);
          values_at(stage).load(in.v, d.batch, h / in.group(), 0, s0, d.keys);
        },
        [&](int j, int) { j == 0 ? queries.sync() : __syncthreads(); },
        [&](int j, int stage) {
          if (first >= d.queries) return;
          const int s0 = (begin + j) * kSize;
          float x[N][4] = {}, dp[N][4] = {};
          multiply_rows<T>(x, queries.q, 16 * warp, keys_at(stage));
          multiply_rows<T>(dp, queries.d_o, 16 * warp, values_at(stage));
          gradients<N>(x, dp, a, d, {h, first, s0, 0, false, 0},
                       cuts(in, d, t0, t0 + kOwn - 1, s0, s0 + kSize - 1), true,
                       [&](int row, int) { return queries.statistics[16 * warp + row]; });
          each<N>([&](int n, int i, int, int) { sum[n][i] += dp[n][i]; });
        });
    __syncthreads();  // all warps have read the tiles that the next term overwrites
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
  launch(device, dq_kernel<T, D>, a.tiles * in.H, 2 * kOwn, kQuerySums<T, D>, a);
  a.tiles = most_tiles(in, true, kOwn);
  launch(device, dkv_kernel<T, D>, (kBoth<T, D> ? 1 : 2) * a.tiles * in.Hk, 2 * kOwn,
         kKeySums<T, D>, a);
  if (dbias.numel() == 0) return;
  const int64_t bias_sizes[] = {dbias.size(0), dbias.size(1), dbias.size(2), dbias.size(3)};
  a.bias = BiasTiles(in, bias_sizes, kOwn, kSize);
  const int64_t parts = a.bias.parts > 1 ? a.bias.parts : 0;
  Tensor partial = empty(dbias, {parts, dbias.numel()}, ScalarType::Float);
  a.dbias = parts ? partial.data_ptr() : dbias.data_ptr();
  a.dbias_dtype = dtype(parts ? partial : dbias);
  launch(device, dbias_kernel<T, D>, a.bias.tiles() * a.bias.parts, 2 * kOwn, kQuerySums<T, D>, a);
  if (parts) sum_partials(device, partial, parts, dbias);
}

template <class T>
void run(const Device& device, Backward& a, const Tensor& dbias) {
  const int D = std::max(a.in.D, a.in.Dv);
  const int64_t rows = int64_t{a.in.B} * a.in.H * a.in.T;
  launch(device, statistics_kernel<T>, (rows + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0,
         a);
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
  constexpr int64_t kFloats = sizeof(Statistics) / sizeof(float);
  Tensor statistics = empty(q, {sizes.B, sizes.H, sizes.T, kFloats}, ScalarType::Float);
  Tensor terms = empty(q, {sink ? rows : 0}, ScalarType::Float);
  a.d_o = heads(g.d_o);
  a.o = heads(g.o);
  a.lse = data<const float>(g.lse);
  a.lse_rest = a.lse + rows;
  a.dlse = g.dlse ? data<const float>(*g.dlse) : nullptr;
  a.statistics = static_cast<Statistics*>(statistics.data_ptr());
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
