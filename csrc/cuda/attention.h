// The arguments of the attention kernels, and the tiles that they work on.
//
// A warp multiplies 16 rows of a tile by the tensor cores' m16n8k16, whose fragments ptx.h
// describes: in an accumulator c[n][i], lane l has row l / 4 + 8 (i / 2) and column 8 n + 2 (l % 4)
// + i % 2. float32 is cut into three bfloat16 planes, x = x0 + x1 + x2, of 8 bits each. Six of the
// nine products of planes are formed; the other three would be lost in float32's rounding. bfloat16
// has float32's exponents, so that nothing below 3.39e38 overflows.
//
// Scores are in natural units, not yet multiplied by log2(e). Forward and backward must form equal
// scores to the last bit: if scores are large, a single different rounding changes p by a factor.
// So whatever a compiler could contract into an FMA in one kernel and not in the other is written
// as an intrinsic.
#pragma once

#include <bit>

#include "../attention_arguments.h"
#include "../dropout.h"
#include "../philox.h"
#include "elements.h"

namespace tfkern::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kThreads = 128;      // threads of most blocks, 16 rows of a tile to each warp
constexpr int kNoLimit = 1 << 29;  // more than any row, key or distance
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A vector or matrix of integers or parameters; null if absent.
struct Table {
  const void* data = nullptr;
  int64_t row = 0, column = 0;  // strides, in elements
  Dtype dtype = Dtype::f32;     // type of parameters
  bool wide = false;            // integers are int64, not int32

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
// distance from one page to the next.
struct HeadView {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  int features = 0;
  bool aligned = false;  // rows start at multiples of 16 bytes and have a multiple of 8 features
  Table pages;
  int page_size = 0, page_count = 0;
};

// The number of the page that holds a row of a batch.
__device__ inline int page_of(const HeadView& x, int batch, int row) {
  const int page = x.pages.integer(batch, row / x.page_size);
  return max(0, min(page, x.page_count - 1));
}

// A (batch, head, query, key) tensor beside the scores; strides are in elements, 0 where broadcast.
struct Elements {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
  Dtype dtype = Dtype::f32;
};

struct Attention {
  int B, H, Hk, T, S, D, Dv;
  Dtype q_dtype;    // type of q, k and v
  int documents;    // number of batches, or of documents of a packed batch
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

// The queries and keys of one batch, or of one document of a packed batch. `number` counts the
// documents; query0 and key0 are the first rows, queries and keys how many there are.
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

// The most tiles of `size` queries (or keys) that all documents together can have.
inline int64_t most_tiles(const Attention& a, bool of_keys, int size) {
  const int rows = of_keys ? a.S : a.T;
  if (a.cu_seqlens_q.data) return int64_t{rows} / size + a.documents;
  return int64_t{a.documents} * tiles_of(rows, size);
}

// Finds the document that tile i belongs to, and the tile's index within it. Returns false if there
// is none. In a packed batch, the tiles of document n start at (first row of n) / size + n, which
// leaves enough for each document.
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
  int low = 0;  // becomes the last document whose tiles start at i or before
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

// The tile of queries that a block takes in place of `tile`. With a limit to the right the last
// queries see the most keys, so their blocks start first.
__device__ inline int longest_first(const Attention& a, const Document& d, int size, int tile) {
  const int length = a.cu_seqlens_q.data ? d.queries : a.T;
  return a.right < kNoLimit ? tiles_of(length, size) - 1 - tile : tile;
}

struct Range {
  int begin, end;  // end is not part of it
};

// The keys of a document that some query from t0 to t1 may see.
__device__ inline Range keys_of(const Attention& a, const Document& d, int t0, int t1) {
  const int begin = t0 + d.offset() - a.left, end = t1 + d.offset() + a.right + 1;
  return {clamp(begin, 0, d.keys), clamp(end, 0, d.keys)};
}

// The queries of a document that may see some key from s0 to s1.
__device__ inline Range queries_of(const Attention& a, const Document& d, int s0, int s1) {
  const int begin = s0 - d.offset() - a.right, end = s1 - d.offset() + a.left + 1;
  return {clamp(begin, 0, d.queries), clamp(end, 0, d.queries)};
}

// ---- tiles in shared memory ----

// The bfloat16 or float16 numbers that hold one element.
template <class T>
constexpr int kPlanes = std::is_same_v<T, float> ? 3 : 1;

// The type that the tensor cores multiply.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;

// Writes the pair (x, y) as kPlanes pairs of factors, the most significant bits first.
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

// ROWS rows of D features in pieces of 8 features (16 bytes). The pieces of a line (8 or 4 pieces
// of a row) are swizzled, so that the 8 rows of a fragment lie in different banks.
template <class T, int ROWS, int D>
struct Tile {
  static constexpr int kPieces = D / 8, kLine = D % 64 == 0 ? 8 : 4;
  static constexpr int64_t kBytes = int64_t{16} * kPlanes<T> * ROWS * kPieces;

  uint4* data;

  __device__ uint4* end() const { return data + kBytes / 16; }

  __device__ uint4* piece(int plane, int row, int i) const {
    const int swizzled = kLine == 8 ? i ^ (row & 7) : i ^ (row >> 1 & 3);
    return data + (plane * ROWS + row) * kPieces + swizzled;
  }

  // The address of the piece that is `rows` rows, a multiple of 8, and an even number `i` of pieces
  // behind piece 0 or 1 of a row, whose address is `first`. Only the exclusive or costs an
  // instruction where rows and i are constant.
  __device__ static SharedAddress behind(SharedAddress first, int rows, int i) {
    return (first ^ 16 * (i % kLine)) + 16 * (i / kLine * kLine + rows * kPieces);
  }

  // Copies rows of 16-bit elements that start at multiples of 16 bytes: row r of the tile lies at
  // from + r * bytes. Rows from `rows` on and features from `features` on become 0. The block has
  // kThreads threads. Each copies the same piece of every kRowStep-th row, so that little besides
  // the copies is left in the loop.
  __device__ void copy(const char* from, int64_t bytes, int features, int rows) const {
    constexpr int kRowStep = static_cast<int>(std::bit_floor(unsigned{kThreads / kPieces}));
    static_assert(ROWS % kRowStep == 0);
    const int row = threadIdx.x / kPieces, i = threadIdx.x % kPieces;
    if (kRowStep * kPieces < kThreads && row >= kRowStep) return;
    const bool there = 8 * i < features;
    from += row * bytes + 16 * i;
    if (rows >= ROWS) {
#pragma unroll
      for (int r = 0; r < ROWS; r += kRowStep) {
        copy_async(piece(0, row + r, i), from + r * bytes, there);
      }
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; r += kRowStep) {
        copy_async(piece(0, row + r, i), from + r * bytes, there && row + r < rows);
      }
    }
  }

  // Loads rows first to first + ROWS of a head, counted from row0; rows from `end` on become 0.
  // With `per_head`, rows run through `per_head` rows of each head after the other. The tile is
  // complete after copy_commit, copy_wait and __syncthreads.
  __device__ void load(const HeadView& x, int batch, int head, int row0, int first, int end,
                       int per_head = 0) const {
    const char* base = x.data + head * x.head + (x.pages.data ? 0 : batch * x.batch);
    if constexpr (kPlanes<T> == 1) {
      const bool one_page = x.pages.data && x.page_size % ROWS == 0 && first < end;
      if (x.aligned && !per_head && (one_page || !x.pages.data)) {
        int64_t row = row0 + first;
        if (one_page) {
          base += page_of(x, batch, first) * x.batch;
          row = first % x.page_size;
        }
        return copy(base + row * x.row, x.row, x.features, end - first);
      }
    }
    for (int i = threadIdx.x; i < ROWS * kPieces; i += blockDim.x) {
      const int row = i / kPieces, feature = i % kPieces * 8;
      const bool valid = first + row < end && feature < x.features;
      const char* from = x.data;
      if (valid && x.pages.data) {
        from =
            base + page_of(x, batch, first + row) * x.batch + (first + row) % x.page_size * x.row;
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

// Walks over `count` tiles that lie in `stages` places of shared memory in turn. With two stages,
// the next tile is copied while this one is multiplied. load(i, stage) starts the copies of tile i,
// sync(i, stage) is a barrier after which they are complete for all threads, and compute(i, stage)
// uses the tile. What was copied before the walk is complete in compute, too.
template <int stages, class Load, class Sync, class Compute>
__device__ inline void walk(int count, const Load& load, const Sync& sync, const Compute& compute) {
  if (stages == 2 && count > 0) load(0, 0);
  for (int i = 0, stage = 0; i < count; ++i) {
    if (stages == 1) {
      __syncthreads();  // all warps have read the tile that is overwritten now
      load(i, 0);
    }
    copy_commit();
    copy_wait<0>();
    sync(i, stage);  // with two stages, all warps have also read the tile before this one
    if (stages == 2 && i + 1 < count) load(i + 1, stage ^ 1);
    compute(i, stage);
    if (stages == 2) stage ^= 1;
  }
  copy_commit();
  copy_wait<0>();  // there may have been no tile
}

// c += a b over the products of planes that count, the smallest first; b is two fragments side by
// side. The products are summed apart from c, since tensor cores truncate small terms that they add
// to a large sum. With `exchanged`, they are summed in the order that b a would have, which gives
// the same bits: a tensor core's sum does not depend on which side a factor is on.
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

// c += a b^T, for rows row0 to row0 + 16 of a and all rows of b. With `exchanged`, c has the bits
// of (b a^T)^T.
template <class T, bool exchanged = false, int N, int R, int D>
__device__ inline void multiply_rows(float (&c)[N][4], const Tile<T, R, D>& a, int row0,
                                     const Tile<T, 8 * N, D>& b) {
  const int lane = threadIdx.x % 32;
  const SharedAddress a0 = shared_address(a.piece(0, row0 + lane % 16, lane / 16));
  const SharedAddress b0 = shared_address(b.piece(0, lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[kPlanes<T>][4], right[kPlanes<T>][4];
#pragma unroll
    for (int p = 0; p < kPlanes<T>; ++p) load_matrices(left[p], a.behind(a0, p * R, 2 * k));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
#pragma unroll
      for (int p = 0; p < kPlanes<T>; ++p) {
        load_matrices(right[p], b.behind(b0, 8 * (p * N + n), 2 * k));
      }
      multiply_planes<T, exchanged>(c[n], c[n + 1], left, right);
    }
  }
}

// c += a b, where a is 16 rows held as accumulators and b is a whole tile.
template <class T, int N, int R, int D>
__device__ inline void multiply_columns(float (&c)[N][4], const float (&a)[R / 8][4],
                                        const Tile<T, R, D>& b) {
  static_assert(8 * N == D);
  const int lane = threadIdx.x % 32;
  const SharedAddress b0 = shared_address(b.piece(0, lane % 16, lane / 16));
  __syncwarp();  // products need the whole warp, whose lanes may have parted to form `a`
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
        load_matrices_transposed(right[p], b.behind(b0, p * R + 16 * k, n));
      }
      multiply_planes<T, false>(c[n], c[n + 1], left, right);
    }
  }
}

// Stores x as feature `feature`, which is even, and y as the next one, of the row that begins at
// element `row_start` of a contiguous tensor, as far as the row has these features.
template <class T>
__device__ inline void store_pair(void* out, int64_t row_start, int feature, int features, float x,
                                  float y) {
  T* to = static_cast<T*>(out) + row_start + feature;
  if (features % 2 == 0) {  // then every pair lies at a multiple of its size
    if (feature >= features) return;
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(to) = pack(x, y, T{});
    } else {
      *reinterpret_cast<uint64_t*>(to) = uint64_t{__float_as_uint(y)} << 32 | __float_as_uint(x);
    }
  } else {
    if (feature < features) to[0] = from_float<T>(x);
    if (feature + 1 < features) to[1] = from_float<T>(y);
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

// The place of an element of an accumulator: query t of head h and key s, counted in the document.
struct Place {
  int h, t, s;
};

// The place of the first element of a tile. Rows are queries or, if transposed, keys. With
// queries_per_head, rows are the queries of several heads, one head after the other.
struct TileOrigin {
  int h0, t0, s0;        // first head, query (row, with queries_per_head) and key
  int queries_per_head;  // queries of each head, or 0 if all rows belong to h0
  bool transposed;
  int rows;  // rows of all heads together; needed with queries_per_head only

  __device__ Place at(int row, int column) const {
    if (transposed) return {h0, t0 + column, s0 + row};
    if (queries_per_head == 0) return {h0, t0 + row, s0 + column};
    const int r = t0 + row;
    if (r >= rows) return {h0, queries_per_head, s0 + column};  // no such query exists
    return {h0 + r / queries_per_head, r % queries_per_head, s0 + column};
  }
};

// Turns x = q k^T into scores, the hidden ones too. If there is a softcap, its derivative is
// written to `slopes`, unless this is null.
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
    each<N>([&](int n, int i, int, int) { x[n][i] = __fmul_rn(x[n][i], a.scale); });
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
    float slope[2];  // ALiBi slopes of the two rows of this lane
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

// Calls f(n, i) for the hidden elements of the tile. `limits` tells whether lengths or the window
// may hide any.
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

// Finds the elements of a tile that dropout keeps: bit 4 n of kept[i] is 1 if element (n, i) is
// kept, and the bits between mean nothing.
// Element (t, s) takes lane s % 4 of counter (s / 4, t, document H + h, 0). So a counter serves
// four keys, which lie in two lanes or, if the tile is transposed, in four: each of these lanes
// draws for its share of the counters and gives the others the bits.
template <int N>
__device__ inline void keep(uint32_t (&kept)[4], const Attention& a, const Document& d,
                            const TileOrigin& origin) {
  static_assert(N <= 8);  // 4 bits each
  const auto seed = static_cast<uint64_t>(*a.seed);
  const int lane = threadIdx.x % 32;
  const int own = origin.transposed ? lane / 4 % 4 : lane % 2 * 2;  // draws for elements (n, own)
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Place p = origin.at(lane / 4 + 8 * (own / 2), 8 * n + 2 * (lane % 4) + own % 2);
    const Philox draw(seed, static_cast<uint32_t>(p.s) / 4, static_cast<uint32_t>(p.t),
                      static_cast<uint32_t>(d.number) * a.H + p.h, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits |= uint32_t{draw.lane[i] > a.dropout.last_dropped} << (4 * n + i);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = origin.transposed ? (lane & ~12) + 4 * i : (lane & ~1) + i / 2;
    const int key = origin.transposed ? own : own + i % 2;  // s % 4
    kept[i] = __shfl_sync(0xffffffff, bits, from) >> key;
  }
}

// Multiplies each element by 1 / (1 - p) if it is kept, and by 0 if it is dropped.
template <int N>
__device__ inline void drop(float (&x)[N][4], const uint32_t (&kept)[4], const Attention& a) {
  each<N>(
      [&](int n, int i, int, int) { x[n][i] *= kept[i] >> 4 * n & 1 ? a.dropout.factor : 0.0f; });
}

// ---- arguments ----

// The arguments as the kernels see them. q, k and v of `in` are replaced by copies with contiguous
// rows where they have none.
Attention attention(AttentionArguments& in);
HeadView heads(const Tensor& t);

}  // namespace tfkern::cuda
