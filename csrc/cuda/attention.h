// What the attention kernels are given, and the tiles that they work on.
//
// A warp multiplies 16 rows of a tile by the tensor cores' m16n8k16, whose fragments ptx.h
// describes: in an accumulator c[n][i], lane l has row l / 4 + 8 (i / 2) and column 8 n + 2 (l % 4)
// + i % 2. float32 is cut into three bfloat16 planes, x = x0 + x1 + x2, of 8 bits each. Of the nine
// products of planes, the six that float32 would not lose are formed; bfloat16 has float32's
// exponents, so that nothing below 3.39e38 overflows.
//
// Scores are in natural units, and forward and backward form the same ones to the last bit: a
// softmax of large scores knows no other tolerance. So whatever a compiler could contract into an
// FMA in one kernel and not in the other is written as an intrinsic.
#pragma once

#include "../attention_arguments.h"
#include "../dropout.h"
#include "../philox.h"
#include "elements.h"

namespace tfkern::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kNoLimit = 1 << 29;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A vector or matrix of integers or parameters; null if absent.
struct Table {
  const void* data = nullptr;
  int64_t row = 0, column = 0;  // strides, in elements
  Dtype dtype = Dtype::f32;     // of parameters
  bool wide = false;            // int64, of integers

  __device__ int integer(int64_t i, int64_t j) const {
    const int64_t at = i * row + j * column;
    if (!wide) return static_cast<const int32_t*>(data)[at];
    const int64_t x = static_cast<const int64_t*>(data)[at];
    return static_cast<int>(x < 0 ? 0 : x < kNoLimit ? x : kNoLimit);
  }
  __device__ float number(int64_t i, int64_t j) const {
    float x;
    TFKERN_CUDA_DTYPE(dtype, x = to_float(static_cast<const T*>(data)[i * row + j * column]));
    return x;
  }
};

// A (batch, head, row, feature) tensor; strides are in bytes. With a table of pages, `batch` is the
// stride of pages.
struct HeadView {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  int features = 0;
  bool aligned = false;  // rows consist of whole pieces of 16 bytes
  Table pages;
  int page_size = 0, page_count = 0;
};

// A (batch, head, query, key) tensor beside the scores; strides are in elements, 0 where broadcast.
struct Elements {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
  Dtype dtype = Dtype::f32;
};

struct Attention {
  int B, H, Hk, T, S, D, Dv;
  Dtype q_dtype;    // of q, k and v
  int documents;    // batches, or documents of a packed batch
  int left, right;  // query t sees the keys from t + offset - left to t + offset + right
  float scale, softcap;
  HeadView q, k, v;
  Elements bias, mask;
  Table alibi_slopes, sink;  // (documents, H) and (H,)
  Table query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k;
  const int64_t* seed;  // null without dropout
  Dropout<float> dropout;

  __host__ __device__ int group() const { return H / Hk; }
};

__host__ __device__ inline int tiles_of(int64_t rows, int size) {
  return static_cast<int>((rows + size - 1) / size);
}

__device__ inline int clamp(int x, int low, int high) { return max(low, min(x, high)); }

// Queries and keys that belong together: those of a batch, or of a document of a packed batch.
struct Document {
  int number, batch, query0, key0, queries, keys;

  __device__ int offset() const { return keys - queries; }
};

__device__ inline Document document_of(const Attention& a, int number) {
  if (a.cu_seqlens_q.data == nullptr) {
    const int queries = a.query_lengths.data ? a.query_lengths.integer(0, number) : a.T;
    const int keys = a.key_lengths.data ? a.key_lengths.integer(0, number) : a.S;
    return {number, number, 0, 0, clamp(queries, 0, a.T), clamp(keys, 0, a.S)};
  }
  const int query0 = clamp(a.cu_seqlens_q.integer(0, number), 0, a.T);
  const int key0 = clamp(a.cu_seqlens_k.integer(0, number), 0, a.S);
  return {number,
          0,
          query0,
          key0,
          clamp(a.cu_seqlens_q.integer(0, number + 1), query0, a.T) - query0,
          clamp(a.cu_seqlens_k.integer(0, number + 1), key0, a.S) - key0};
}

// Tiles of `size` queries, or keys, of all documents: as many as there can be.
inline int64_t most_tiles(const Attention& a, bool of_keys, int size) {
  const int rows = of_keys ? a.S : a.T;
  if (a.cu_seqlens_q.data) return int64_t{rows} / size + a.documents;
  return int64_t{a.documents} * tiles_of(rows, size);
}

// The document that tile i belongs to; then `tile` is its number within. false if there is none.
// Packed, the tiles of document n start at n + its first row / size, which leaves enough for each.
__device__ inline bool find_tile(const Attention& a, int64_t i, bool of_keys, int size,
                                 Document& document, int& tile) {
  if (a.cu_seqlens_q.data == nullptr) {
    const int tiles = tiles_of(of_keys ? a.S : a.T, size);
    document = document_of(a, static_cast<int>(i / tiles));
    tile = static_cast<int>(i % tiles);
    return true;
  }
  const Table& firsts = of_keys ? a.cu_seqlens_k : a.cu_seqlens_q;
  const int rows = of_keys ? a.S : a.T;
  const auto start = [&](int n) { return clamp(firsts.integer(0, n), 0, rows) / size + n; };
  int low = 0;  // becomes the last document whose tiles start here or before
  for (int high = a.documents - 1; low < high;) {
    const int middle = (low + high + 1) / 2;
    if (start(middle) <= i) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  document = document_of(a, low);
  tile = static_cast<int>(i) - start(low);
  return tile >= 0 && tile < tiles_of(of_keys ? document.keys : document.queries, size);
}

// The keys that queries t0 to t1 of a document may see: begin to end.
struct Range {
  int begin, end;
};

__device__ inline Range keys_of(const Attention& a, const Document& d, int t0, int t1) {
  const int begin = t0 + d.offset() - a.left, end = t1 + d.offset() + a.right + 1;
  return {clamp(begin, 0, d.keys), clamp(end, 0, d.keys)};
}

// The queries that may see keys s0 to s1: begin to end.
__device__ inline Range queries_of(const Attention& a, const Document& d, int s0, int s1) {
  const int begin = s0 - d.offset() - a.right, end = s1 - d.offset() + a.left + 1;
  return {clamp(begin, 0, d.queries), clamp(end, 0, d.queries)};
}

// ---- tiles in shared memory ----

template <class T>
constexpr int kPlanes = std::is_same_v<T, float> ? 3 : 1;

// The type that the tensor cores multiply.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;

// x and y as three pairs of bfloat16, or as one pair.
template <class T>
__device__ inline void split(float x, float y, uint32_t (&planes)[kPlanes<T>]) {
#pragma unroll
  for (int p = 0; p < kPlanes<T>; ++p) {
    planes[p] = pack(x, y, Factor<T>{});
    if constexpr (kPlanes<T> > 1) {
      x -= bf16_to_float(planes[p] & 0xffff);
      y -= bf16_to_float(planes[p] >> 16);
    }
  }
}

// ROWS rows of D features in pieces of 8, in an order that lets the 8 rows of a fragment lie in
// different banks.
template <class T, int ROWS, int D>
struct Tile {
  static constexpr int kPieces = D / 8, kRows = ROWS;
  static constexpr int64_t kBytes = int64_t{16} * kPlanes<T> * ROWS * kPieces;

  uint4* data;

  __device__ uint4* end() const { return data + kBytes / 16; }

  __device__ uint4* piece(int plane, int row, int i) const {
    const int swizzled = D % 64 == 0 ? i ^ (row & 7) : i ^ (row >> 1 & 3);
    return data + (plane * ROWS + row) * kPieces + swizzled;
  }

  // Rows first to first + ROWS of a head, as far as they are before `end`; others are 0. With
  // `per_head`, rows of one head after the other; with `lse`, that of row 0, rows that see nothing
  // are 0 as well: they may hold anything. Complete after copy_commit, copy_wait and __syncthreads.
  __device__ void load(const HeadView& x, int batch, int head, int row0, int first, int end,
                       int per_head = 0, const float* lse = nullptr) const {
    const char* base = x.data + head * x.head + (x.pages.data ? 0 : batch * x.batch);
    for (int i = threadIdx.x; i < ROWS * kPieces; i += blockDim.x) {
      const int row = i / kPieces, feature = i % kPieces * 8;
      const bool valid = first + row < end && feature < x.features &&
                         (lse == nullptr || lse[first + row] != -kInfinity);
      const char* from = x.data;
      if (valid && x.pages.data) {
        const int page =
            clamp(x.pages.integer(batch, (first + row) / x.page_size), 0, x.page_count - 1);
        from = base + page * x.batch + (first + row) % x.page_size * x.row;
      } else if (valid && per_head) {
        from = base + (first + row) / per_head * x.head +
               static_cast<int64_t>(row0 + (first + row) % per_head) * x.row;
      } else if (valid) {
        from = base + static_cast<int64_t>(row0 + first + row) * x.row;
      }
      const T* element = reinterpret_cast<const T*>(from) + (valid ? feature : 0);
      if (kPlanes<T> == 1 && x.aligned) {
        copy_async(piece(0, row, i % kPieces), element, valid);
        continue;
      }
      float values[8];
      if (x.aligned) {
#pragma unroll
        for (int j = 0; j < static_cast<int>(sizeof(T)) / 2; ++j) {
          uint4 raw{0, 0, 0, 0};
          if (valid) raw = reinterpret_cast<const uint4*>(element)[j];
          unpack<T>(values, j * (16 / static_cast<int>(sizeof(T))), raw);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values[j] = valid && feature + j < x.features ? to_float(element[j]) : 0.0f;
        }
      }
      uint32_t words[4][kPlanes<T>];
#pragma unroll
      for (int j = 0; j < 4; ++j) split<T>(values[2 * j], values[2 * j + 1], words[j]);
#pragma unroll
      for (int p = 0; p < kPlanes<T>; ++p) {
        *piece(p, row, i % kPieces) = {words[0][p], words[1][p], words[2][p], words[3][p]};
      }
    }
  }
};

// c += a b over all planes that count, the smallest first; b is a pair of fragments side by side.
// Planes are summed up apart from c: tensor cores truncate where they add to what is large. With
// `exchanged` their order is that of b a, which gives the same bits: the sum of a tensor core does
// not depend on which side a factor is on.
template <class T, bool exchanged>
__device__ inline void multiply_planes(float (&c0)[4], float (&c1)[4],
                                       const uint32_t (&a)[kPlanes<T>][4],
                                       const uint32_t (&b)[kPlanes<T>][4]) {
  if constexpr (kPlanes<T> == 1) {
    multiply(c0, a[0], b[0][0], b[0][1], T{});
    multiply(c1, a[0], b[0][2], b[0][3], T{});
  } else {
    float sum0[4] = {}, sum1[4] = {};
#pragma unroll
    for (int last = kPlanes<T> - 1; last >= 0; --last) {
#pragma unroll
      for (int i = 0; i <= last; ++i) {
        const int j = exchanged ? last - i : i;
        multiply(sum0, a[j], b[last - j][0], b[last - j][1], BFloat16{});
        multiply(sum1, a[j], b[last - j][2], b[last - j][3], BFloat16{});
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c0[i] += sum0[i];
      c1[i] += sum1[i];
    }
  }
}

// c += a b^T: rows row0 to row0 + 16 of a, all rows of b. `exchanged` gives the bits of (b a^T)^T.
template <class T, bool exchanged = false, int N, int R, int D>
__device__ inline void multiply_rows(float (&c)[N][4], const Tile<T, R, D>& a, int row0,
                                     const Tile<T, 8 * N, D>& b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[kPlanes<T>][4], right[kPlanes<T>][4];
#pragma unroll
    for (int p = 0; p < kPlanes<T>; ++p) {
      load_matrices(left[p], a.piece(p, row0 + lane % 16, 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
#pragma unroll
      for (int p = 0; p < kPlanes<T>; ++p) {
        load_matrices(right[p], b.piece(p, 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      }
      multiply_planes<T, exchanged>(c[n], c[n + 1], left, right);
    }
  }
}

// c += a b: a 16 rows as accumulators, b all rows of a tile.
template <class T, int N, int R, int D>
__device__ inline void multiply_columns(float (&c)[N][4], const float (&a)[R / 8][4],
                                        const Tile<T, R, D>& b) {
  static_assert(8 * N == D);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < R / 16; ++k) {
    uint32_t left[kPlanes<T>][4], right[kPlanes<T>][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t planes[kPlanes<T>];
      split<T>(a[2 * k + i / 2][i % 2 * 2], a[2 * k + i / 2][i % 2 * 2 + 1], planes);
#pragma unroll
      for (int p = 0; p < kPlanes<T>; ++p) left[p][i] = planes[p];
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
#pragma unroll
      for (int p = 0; p < kPlanes<T>; ++p) {
        load_matrices_transposed(right[p],
                                 b.piece(p, 16 * k + lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
      }
      multiply_planes<T, false>(c[n], c[n + 1], left, right);
    }
  }
}

// ---- scores ----

// Calls f(n, i, row, column) for the elements that this lane has of 16 rows and 8 N columns.
template <int N, class F>
__device__ inline void each(const F& f) {
  const int row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(n, i, row + 8 * (i / 2), 8 * n + column + i % 2);
  }
}

// Where the element of an accumulator stands: query t of head h, key s, counted in the document.
// The rows of a tile are queries, of several heads one after the other if `queries_per_head` says
// so, or, transposed, keys.
struct Place {
  int h, t, s;
};

struct TileOrigin {
  int h0, t0, s0;        // the first of the tile
  int queries_per_head;  // of the rows, 0 if they all belong to h0
  bool transposed;
  int rows;  // of all heads together, with queries_per_head

  __device__ Place at(int row, int column) const {
    if (transposed) return {h0, t0 + column, s0 + row};
    if (queries_per_head == 0) return {h0, t0 + row, s0 + column};
    const int r = t0 + row;
    if (r >= rows) return {h0, queries_per_head, s0 + column};  // a query that is not there
    return {h0 + r / queries_per_head, r % queries_per_head, s0 + column};
  }
};

// From x = q k to scores, also where they are hidden. With `slopes`, which may be absent (null),
// also the derivative of the softcap.
template <int N>
__device__ inline void scores(float (&x)[N][4], float (*slopes)[4], const Attention& a,
                              const Document& d, const TileOrigin& origin) {
  if (a.softcap > 0) {
    each<N>([&](int n, int i, int, int) {
      const float tanh = tanhf(__fmul_rn(x[n][i], a.scale / a.softcap));
      x[n][i] = __fmul_rn(tanh, a.softcap);
      if (slopes) slopes[n][i] = 1 - tanh * tanh;
    });
  } else {
    each<N>([&](int n, int i, int, int) {
      x[n][i] = __fmul_rn(x[n][i], a.scale);
      if (slopes) slopes[n][i] = 1;
    });
  }
  if (a.bias.data) {
    TFKERN_CUDA_DTYPE(a.bias.dtype, {
      const T* bias = reinterpret_cast<const T*>(a.bias.data) + d.batch * a.bias.batch;
      each<N>([&](int n, int i, int row, int column) {
        const Place p = origin.at(row, column);
        if (p.t < d.queries && p.s < d.keys) {
          x[n][i] += to_float(bias[p.h * a.bias.head + p.t * a.bias.query + p.s * a.bias.key]);
        }
      });
    });
  }
  if (a.alibi_slopes.data) {
    float slope[2];  // of the rows of this lane
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int h = origin.at(threadIdx.x % 32 / 4 + 8 * half, 0).h;
      slope[half] = a.alibi_slopes.number(d.number, h);
    }
    each<N>([&](int n, int i, int row, int column) {
      const Place p = origin.at(row, column);
      const int distance = p.t + d.offset() - p.s;
      x[n][i] =
          fmaf(slope[i / 2], -static_cast<float>(distance < 0 ? -distance : distance), x[n][i]);
    });
  }
}

// Calls f(n, i) for the elements that are hidden. `limits` says that lengths or the window cut
// through the tile.
template <int N, class F>
__device__ inline void each_hidden(const Attention& a, const Document& d, const TileOrigin& origin,
                                   bool limits, const F& f) {
  if (limits) {
    each<N>([&](int n, int i, int row, int column) {
      const Place p = origin.at(row, column);
      const int distance = p.t + d.offset() - p.s;
      const bool seen =
          p.t < d.queries && p.s < d.keys && distance <= a.left && -distance <= a.right;
      if (!seen) f(n, i);
    });
  }
  if (a.mask.data) {
    const char* mask = a.mask.data + d.batch * a.mask.batch;
    each<N>([&](int n, int i, int row, int column) {
      const Place p = origin.at(row, column);
      const bool there = p.t < d.queries && p.s < d.keys;
      if (!there || !mask[p.h * a.mask.head + p.t * a.mask.query + p.s * a.mask.key]) f(n, i);
    });
  }
}

// Multiplies each element by what dropout does: 0 or 1 / (1 - p). Element (t, s) has lane s % 4 of
// a draw.
template <int N>
__device__ inline void drop(float (&x)[N][4], const Attention& a, const Document& d,
                            const TileOrigin& origin) {
  const auto seed = static_cast<uint64_t>(*a.seed);
  each<N>([&](int n, int i, int row, int column) {
    if (i % 2 && !origin.transposed) return;  // its neighbour has the same draw
    const Place p = origin.at(row, column);
    const auto s = static_cast<uint32_t>(p.s);
    const Philox draw(seed, s / 4, static_cast<uint32_t>(p.t),
                      static_cast<uint32_t>(d.number) * a.H + p.h, 0);
    const uint32_t even = s % 4 < 2 ? draw.lane[0] : draw.lane[2];
    const uint32_t odd = s % 4 < 2 ? draw.lane[1] : draw.lane[3];
    if (origin.transposed) {
      x[n][i] *= (s % 2 ? odd : even) > a.dropout.last_dropped ? a.dropout.factor : 0.0f;
    } else {
      x[n][i] *= even > a.dropout.last_dropped ? a.dropout.factor : 0.0f;
      x[n][i + 1] *= odd > a.dropout.last_dropped ? a.dropout.factor : 0.0f;
    }
  });
}

// ---- arguments ----

// The arguments as the kernels see them. `in` gets contiguous rows where it has none.
Attention attention(AttentionArguments& in);
HeadView heads(const Tensor& t);

}  // namespace tfkern::cuda
