// Softmax attention, forward: FlashAttention-2 (Dao 2023) on the tensor cores of sm_80 and later.
// tfkern/reference/attention.py defines all options.
//
// A block owns 64 queries, 16 to each warp, and walks over the keys. It keeps a running maximum m
// and sum l per row, and rescales l and acc when m grows:
//
// clang-format off
//   m' = max(m, max s)   p = exp(s - m')   l = l exp(m - m') + sum p   acc = acc exp(m - m') + p v
// clang-format on
//
// The maximum is subtracted before the factor log2(e) is applied: the difference is then exact for
// all weights that matter, however large the scores are, and no finite score overflows. The maximum
// ignores NaN, but p, l and acc become NaN.
//
// For the 16-bit types, the next tile of keys and values is copied while this one is multiplied.
// If there are few queries, the rows of a block are the queries of all heads that share a key head;
// if there are few blocks, the keys are split among more, whose results a second kernel weighs and
// adds.
#include "attention.h"

namespace tfkern::cuda {
namespace {

constexpr int kRows = kThreads / 2;  // rows (queries) of a block
constexpr int kMaxSplits = 64;       // the most blocks that share the keys of a row

// Sizes of the tiles of keys: kSize keys each, kStages tiles in shared memory at a time, and
// kShared bytes of shared memory together with the queries.
template <class T, int D>
struct Keys {
  static constexpr int kSize = kPlanes<T> == 1 ? (D <= 128 ? 64 : 32) : 64 * 64 / D;
  static constexpr int kStages = kPlanes<T> == 1 ? 2 : 1;
  static constexpr int64_t kShared =
      Tile<T, kRows, D>::kBytes + 2 * kStages * Tile<T, kSize, D>::kBytes;
};

struct Forward {
  Attention in;
  int64_t tiles;  // tiles of kRows rows of all documents
  bool packed;    // the rows of a block are the queries of all heads that share a key head
  int splits;     // blocks that share the keys of a row
  void* o;
  float* lse;  // (2, B, H, T): log-sum-exp rounded, and what rounding left out
  float *part_o, *part_m, *part_sum;  // (splits, B, H, T, Dv), and (splits, B, H, T) for the others

  __host__ __device__ int64_t rows() const { return int64_t{in.B} * in.H * in.T; }
};

// exp(x - most) for x <= most. `most` is -inf where nothing has been seen; the result is then 0.
__device__ inline float exp_below(float x, float most) {
  return exp2_approx((x - (most == -kInfinity ? 0.0f : most)) * kLog2E);
}

// The binary logarithm of the largest weight. With weights of at most 2^-8, sums of some hundred
// values near the largest float32 or bfloat16 do not overflow. Values of float16 cannot overflow a
// sum in float32, and weights this small would underflow in float16.
template <class T>
constexpr int kLargest = std::is_same_v<T, Half> ? 0 : -8;

// 2^kLargest exp(x - most)
template <class T>
__device__ inline float weight(float x, float most) {
  return exp2_approx(fmaf(x - (most == -kInfinity ? 0.0f : most), kLog2E, kLargest<T>));
}

// Stores lse = m + log sum, rounded, and what the rounding left out in the second half of `lse`.
template <class T>
__device__ inline void store_lse(const Forward& a, int64_t row, float m, float sum) {
  const float logarithm = logf(ldexpf(sum, -kLargest<T>)), lse = m + logarithm;
  a.lse[row] = lse;
  a.lse[a.rows() + row] = sum == 0 ? 0.0f : m - lse + logarithm;
}

// Computes o and lse of a tile of rows or, with splits, acc / l, m and l over one part of the keys.
// The launch bounds of heads above 64 features ask for two blocks an SM: the compiler would spill
// to make room for a third, for which most of these heads have no shared memory anyway.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, kPlanes<T> == 1 && D > 64 ? 2 : 0)
    forward_kernel(Forward a) {
  using K = Keys<T, D>;
  constexpr int N = K::kSize / 8;
  const Attention& in = a.in;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int split = static_cast<int>(blockIdx.x % a.splits);
  const int64_t index = blockIdx.x / a.splits;
  Document d;
  int tile;
  if (!find_tile(in, index % a.tiles, false, kRows, d, tile)) return;
  if (!a.packed) tile = longest_first(in, d, kRows, tile);
  const int per_head = a.packed ? d.queries : 0;
  const int h0 = static_cast<int>(index / a.tiles) * (a.packed ? in.group() : 1);
  const int row0 = tile * kRows, rows = a.packed ? d.queries * in.group() : d.queries;
  if (row0 >= rows) return;
  const int t0 = a.packed ? 0 : row0, t1 = a.packed ? d.queries - 1 : min(row0 + kRows, rows) - 1;

  const Tile<T, kRows, D> q{shared_memory<uint4>()};
  using KeyTile = Tile<T, K::kSize, D>;
  const auto keys_at = [&](int stage) {
    return KeyTile{q.end() + 2 * stage * KeyTile::kBytes / 16};
  };
  const auto values_at = [&](int stage) { return KeyTile{keys_at(stage).end()}; };
  Range keys = keys_of(in, d, t0, t1);
  keys.begin = keys.begin / K::kSize * K::kSize;
  const int part = tiles_of(max(keys.end - keys.begin, 0), K::kSize * a.splits) * K::kSize;
  keys.begin += split * part;
  keys.end = min(keys.end, keys.begin + part);
  const auto load_keys = [&](int s0, int stage) {
    keys_at(stage).load(in.k, a.packed || in.k.pages.data ? d.number : d.batch, h0 / in.group(),
                        d.key0, s0, d.keys);
    values_at(stage).load(in.v, a.packed || in.v.pages.data ? d.number : d.batch, h0 / in.group(),
                          d.key0, s0, d.keys);
  };

  q.load(in.q, d.batch, h0, d.query0, row0, rows, per_head);
  float acc[D / 8][4] = {};
  float m[2], l[2];  // for rows lane / 4 and lane / 4 + 8; l sums the columns of this lane only
  const TileOrigin rows_of_warp{h0, row0 + 16 * warp, 0, per_head, false, rows};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int h = rows_of_warp.at(lane / 4 + 8 * half, 0).h;
    // The sink is a key whose value is 0.
    m[half] = in.sink.data && split == 0 ? in.sink.number(0, h) : -kInfinity;
    l[half] = lane % 4 == 0 ? weight<T>(m[half], m[half]) : 0.0f;
  }
  // A warp may have no rows if there are few, but it takes part in the copies.
  const bool idle = row0 + 16 * warp >= rows;
  const auto compute = [&](int step, int stage) {
    if (idle) return;
    const int s0 = keys.begin + step * K::kSize;
    float x[N][4] = {};
    multiply_rows<T>(x, q, 16 * warp, keys_at(stage));
    TileOrigin origin = rows_of_warp;
    origin.s0 = s0;
    const bool limits = s0 + K::kSize > d.keys || t1 + d.offset() - s0 > in.left ||
                        s0 + K::kSize - 1 - t0 - d.offset() > in.right;
    scores<N>(x, nullptr, in, d, origin);
    each_hidden<N>(in, d, origin, limits, [&](int n, int i) { x[n][i] = -kInfinity; });
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = m[half];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
      factor[half] = exp_below(m[half], most);
      m[half] = most;
      l[half] *= factor[half];
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          x[n][i] = weight<T>(x[n][i], most);
          l[half] += x[n][i];
        }
      }
    }
    // After the first tiles the maxima seldom grow. If none of the warp's rows has a new maximum,
    // all factors are 1 and acc stays as it is.
    if (__any_sync(0xffffffff, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] *= factor[i / 2];
      }
    }
    if (in.seed) {
      uint32_t kept[4];
      keep<N>(kept, in, d, origin);
      drop(x, kept, in);
    }
    multiply_columns<T>(acc, x, values_at(stage));
  };
  walk<K::kStages>(
      tiles_of(max(keys.end - keys.begin, 0), K::kSize),
      [&](int step, int stage) { load_keys(keys.begin + step * K::kSize, stage); },
      [](int, int) { __syncthreads(); }, compute);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = l[half];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    const int row = lane / 4 + 8 * half;
    if (rows_of_warp.t0 + row >= rows) continue;
    const Place p = rows_of_warp.at(row, 0);
    const int64_t at = (static_cast<int64_t>(d.batch) * in.H + p.h) * in.T + d.query0 + p.t;
    const float scale = sum == 0 ? 0.0f : 1 / sum;
    const int64_t part = split * a.rows() + at;
    if (lane % 4 == 0) {
      if (a.splits > 1) {
        a.part_m[part] = m[half];
        a.part_sum[part] = sum;
      } else {
        store_lse<T>(a, at, m[half], sum);
      }
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int feature = 8 * n + 2 * (lane % 4);
      const float x = acc[n][2 * half] * scale, y = acc[n][2 * half + 1] * scale;
      if (a.splits > 1) {
        store_pair<float>(a.part_o, part * in.Dv, feature, in.Dv, x, y);
      } else {
        store_pair<T>(a.o, at * in.Dv, feature, in.Dv, x, y);
      }
    }
  }
}

// Adds up o and lse of the rows whose keys were split. Each warp has one row.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(Forward a) {
  const Attention& in = a.in;
  const int64_t rows = a.rows();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const Document d = document_of(in, static_cast<int>(row / in.T / in.H));
  if (row % in.T >= d.queries) return;
  float m = -kInfinity, sum = 0;
  for (int i = 0; i < a.splits; ++i) m = fmaxf(m, a.part_m[i * rows + row]);
  const auto sum_of = [&](int i) {
    return exp_below(a.part_m[i * rows + row], m) * a.part_sum[i * rows + row];
  };
  for (int i = 0; i < a.splits; ++i) sum += sum_of(i);
  const float scale = sum == 0 ? 0.0f : 1 / sum;
  for (int n = threadIdx.x % 32; n < in.Dv; n += 32) {
    float o = 0;
    for (int i = 0; i < a.splits; ++i) {
      o += sum_of(i) * scale * a.part_o[(i * rows + row) * in.Dv + n];
    }
    static_cast<T*>(a.o)[row * in.Dv + n] = from_float<T>(o);
  }
  if (threadIdx.x % 32 == 0) store_lse<T>(a, row, m, sum);
}

template <class T, int D>
void run(const Device& device, Forward& a, const Tensor& like) {
  const Attention& in = a.in;
  const int heads = a.packed ? in.Hk : in.H;
  const int64_t blocks = a.tiles * heads;
  // Too few blocks would leave the device idle: then several share the keys of a row.
  const int64_t wanted = 2 * device.multiprocessors() / std::max<int64_t>(blocks, 1);
  const int64_t most = std::min<int64_t>(kMaxSplits, tiles_of(in.S, 4 * Keys<T, D>::kSize));
  a.splits =
      in.cu_seqlens_q.data ? 1 : static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  const int64_t rows = a.splits > 1 ? a.splits * a.rows() : 0;
  Tensor part_o = empty(like, {rows, in.Dv}, ScalarType::Float);
  Tensor part_sums = empty(like, {2, rows}, ScalarType::Float);
  a.part_o = static_cast<float*>(part_o.data_ptr());
  a.part_m = static_cast<float*>(part_sums.data_ptr());
  a.part_sum = a.part_m + rows;
  launch(device, forward_kernel<T, D>, blocks * a.splits, kThreads, Keys<T, D>::kShared, a);
  if (a.splits > 1) {
    launch(device, combine_kernel<T>, (a.rows() + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0,
           a);
  }
}

template <class T>
void run(const Device& device, Forward& a, const Tensor& like) {
  const int D = std::max(a.in.D, a.in.Dv);
  if (D <= 64) return run<T, 64>(device, a, like);
  if constexpr (kPlanes<T> == 1) {
    if (D <= 96) return run<T, 96>(device, a, like);
  }
  if (D <= 128) return run<T, 128>(device, a, like);
  run<T, 256>(device, a, like);
}

std::tuple<Tensor, Tensor> forward(const AttentionArguments& given) {
  AttentionArguments in = given;
  Forward a{attention(in)};
  const Tensor& q = in.q;
  const bool nothing = a.in.T == 0 || a.in.H == 0 || a.in.documents == 0;
  if (!nothing) {
    a.packed = !in.cu_seqlens_q && a.in.group() * a.in.T <= kRows;
    a.tiles = most_tiles(a.in, false, kRows);
    check_grid(a.tiles * a.in.H);
  }
  Tensor o = empty(q, {a.in.B, a.in.H, a.in.T, a.in.Dv}, q.scalar_type());
  Tensor lse = empty(q, {2, a.in.B, a.in.H, a.in.T}, ScalarType::Float);
  const Device device(q);
  if (in.query_lengths || in.cu_seqlens_q) {  // rows may belong to no document
    torch::stable::zero_(o);
    torch::stable::zero_(lse);
    Tensor high = torch::stable::select(lse, 0, 0);
    torch::stable::fill_(high, -kInfinity);
  }
  if (nothing) return {o, lse};
  a.o = o.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  TFKERN_CUDA_DTYPE(a.in.q_dtype, run<T>(device, a, q));
  return {o, lse};
}

Table table(const Optional& t) {
  if (!t) return {};
  const ScalarType type = t->scalar_type();
  const bool integers = type == ScalarType::Long || type == ScalarType::Int;
  return {data<void>(*t), t->dim() == 2 ? t->stride(0) : 0, t->stride(t->dim() - 1),
          integers ? Dtype::f32 : dtype(*t), type == ScalarType::Long};
}

Elements elements(const Optional& t) {
  if (!t) return {};
  int64_t strides[4] = {};
  for (int i = 0; i < 4; ++i) {
    if (t->size(i) != 1) strides[i] = t->stride(i);
  }
  const bool boolean = t->scalar_type() == ScalarType::Bool;
  return {data<const char>(*t), strides[0], strides[1],
          strides[2],           strides[3], boolean ? Dtype::f32 : dtype(*t)};
}

}  // namespace

HeadView heads(const Tensor& t) {
  const auto bytes = static_cast<int64_t>(t.element_size());
  HeadView x{data<char>(t), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes,
             static_cast<int>(t.size(3))};
  const int64_t all = reinterpret_cast<uintptr_t>(x.data) | x.batch | x.head | x.row;
  x.aligned = all % 16 == 0 && x.features % 8 == 0;
  return x;
}

Attention attention(AttentionArguments& in) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  check_no_float64(q, in.bias, in.alibi_slopes, in.sink);
  const int64_t B = q.size(0), H = q.size(1), Hk = k.size(1), T = q.size(2), S = in.S();
  const int64_t counts[] = {B * H, B * Hk, T, S, k.size(0), k.size(2), in.documents()};
  STD_TORCH_CHECK(*std::max_element(std::begin(counts), std::end(counts)) < kNoLimit &&
                      q.size(3) <= 256 && v.size(3) <= 256,
                  "tfkern::attention: the CUDA kernels take heads of at most 256 features, and "
                  "fewer than 2^29 heads, rows or pages");
  in.q = with_contiguous_rows(in.q);
  in.k = with_contiguous_rows(in.k);
  in.v = with_contiguous_rows(in.v);
  Attention a{};
  a.B = static_cast<int>(B);
  a.H = static_cast<int>(H);
  a.Hk = static_cast<int>(Hk);
  a.T = static_cast<int>(T);
  a.S = static_cast<int>(S);
  a.D = static_cast<int>(q.size(3));
  a.Dv = static_cast<int>(v.size(3));
  a.q_dtype = dtype(q);
  a.documents = static_cast<int>(in.documents());
  const auto limit = [](std::optional<int64_t> x) {
    return static_cast<int>(std::clamp<int64_t>(x.value_or(kNoLimit), -kNoLimit, kNoLimit));
  };
  a.left = limit(in.left);
  a.right = limit(in.right);
  a.scale = static_cast<float>(in.scale);
  a.softcap = static_cast<float>(in.softcap);
  a.q = heads(q);
  a.k = heads(k);
  a.v = heads(v);
  if (in.page_table) {
    for (HeadView* x : {&a.k, &a.v}) {
      x->pages = table(in.page_table);
      x->page_size = static_cast<int>(k.size(2));
      x->page_count = static_cast<int>(k.size(0));
    }
  }
  a.bias = elements(in.bias);
  a.mask = elements(in.mask);
  a.alibi_slopes = table(in.alibi_slopes);
  a.sink = table(in.sink);
  a.query_lengths = table(in.query_lengths);
  a.key_lengths = table(in.key_lengths);
  a.cu_seqlens_q = table(in.cu_seqlens_q);
  a.cu_seqlens_k = table(in.cu_seqlens_k);
  if (in.seed && in.dropout_p > 0) {
    a.seed = data<const int64_t>(*in.seed);
    a.dropout = Dropout<float>(in.dropout_p);
  }
  return a;
}

}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("attention_forward", &tfkern::attention_forward<tfkern::cuda::forward>);
}
