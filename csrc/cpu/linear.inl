// Fragment of linear.cpp, compiled once per instruction set. It assumes vec.inl and linear.h.
//
// A tile of the result, kTileRows rows of kPanel columns, is summed in registers. Units of 32 bits
// enter it: a float, which may be a widened number of 16 bits, or a pair of bfloat16 numbers that
// follow one another along K. A unit of a is broadcast; of b, the units of a panel of columns are
// packed side by side.
//
// Each element is the sum, over blocks of kDepth units, of sums in the order of k. So it depends on
// nothing but its row of a and its row of b: not on the number of rows, not on its place.

#include "activation.inl"

constexpr bool kWide = TFKERN_VEC_BYTES == 64;
constexpr int64_t kPanel = 2 * kLanes<float>;             // columns
constexpr int64_t kTileRows = kWide ? 14 : 6;             // as many as registers hold
constexpr int64_t kDepth = kWide ? 256 : 384;             // units of a block
constexpr int64_t kGroup = kWide ? 4 : 8;                 // panels that are packed together
constexpr int64_t kStrip = 8;                             // tiles that are packed together
constexpr int64_t kTileWidth = padded<float>(kTileRows);  // rows that are packed for a tile
constexpr int64_t kChunk = 64;                            // units of a part of a panel

// What becomes of the sums that a tile finds in memory: they are overwritten, the tile goes on
// with them, or its own are added to them.
enum class Sums { overwrite, go_on, add };

// Memory that is fetched while tiles are summed: the cache lines of `bytes` bytes from `row` on,
// then those `stride` bytes further on, and so forth until `last`.
struct LinearAhead {
  const char *row, *last;
  int64_t stride, bytes;
  int64_t offset = 0;
  int64_t pause = 0;  // A line is fetched with the units k for which k & pause is 0.

  // Spreads the fetches over this many units of tiles: a processor waits if too many are under way.
  void spread(int64_t steps) {
    const int64_t rows = stride == 0 ? 1 : (last - row) / stride + 1;
    const int64_t lines = rows * ((bytes + 63) / 64);
    while (pause < 7 && lines * 2 * (pause + 1) <= steps) pause = 2 * pause + 1;
  }

  void fetch(int64_t k) {
    if (k & pause) return;
    __builtin_prefetch(row + offset, 0, 2);
    offset += 64;
    if (offset >= bytes) {
      offset = 0;
      if (row != last) row += stride;
    }
  }
};

using LinearTile = void (*)(int64_t, const uint32_t*, int64_t, const void*, float*, Sums,
                            LinearAhead&);

inline VecUint load_units(const uint32_t* p) {
  VecUint v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline VecUint load_units(const BFloat16* p) { return (VecUint)load(p); }
inline VecUint load_units(const Half* p) { return (VecUint)load(p); }

// Each namespace has the tiles of one kind of units.
namespace linear_floats {
inline VecFloat multiply_add(VecUint a, VecUint b, VecFloat sum) {
  return (VecFloat)a * (VecFloat)b + sum;
}
#include "linear_tile.inl"
}  // namespace linear_floats

#if TFKERN_VEC_BYTES == 64
#pragma GCC push_options
#pragma GCC target("avx512bf16")
namespace linear_pairs {
inline VecFloat multiply_add(VecUint a, VecUint b, VecFloat sum) {
  return (VecFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#include "linear_tile.inl"
}  // namespace linear_pairs
#pragma GCC pop_options
#endif

// ---- units ----

// Loads vectors of units from elements of type T: from all that a vector needs, or from the first
// n, followed by zeros.
template <class T>
struct WideUnits {
  using Element = T;
  static constexpr int kElements = 1;
  static constexpr int kVector = kLanes<float>;  // elements
  static VecFloat along(const T* p) { return load(p); }
  static VecFloat along(const T* p, int64_t n) { return load_left(p, n); }
  // Units of elements that lie `stride` apart, of which there are `n`.
  static VecFloat across(const T* p, int64_t stride, int64_t n, int64_t width) {
    return load_left(p, width);
  }
};

#if TFKERN_VEC_BYTES == 64
struct PairUnits {
  using Element = BFloat16;
  static constexpr int kElements = 2;
  static constexpr int kVector = 2 * kLanes<float>;
  static VecFloat along(const BFloat16* p) {
    VecFloat v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static VecFloat along(const BFloat16* p, int64_t n) {
    if (n >= kVector) return along(p);
    BFloat16 part[kVector] = {};
    std::memcpy(part, p, n * sizeof(BFloat16));
    return along(part);
  }
  static VecFloat across(const BFloat16* p, int64_t stride, int64_t n, int64_t width) {
    const VecUint first = (VecUint)load_left(p, width) >> 16;
    if (n < 2) return (VecFloat)first;
    return (VecFloat)(first | (VecUint)load_left(p + stride, width));
  }
};
#endif

// ---- packing ----

inline void store_halves(float* low, float* high, VecFloat v) {
#if TFKERN_VEC_BYTES == 64
  _mm256_storeu_ps(low, _mm512_castps512_ps256((__m512)v));
  _mm256_storeu_ps(high, _mm512_extractf32x8_ps((__m512)v, 1));
#elif TFKERN_VEC_BYTES == 32
  _mm_storeu_ps(low, _mm256_castps256_ps128((__m256)v));
  _mm_storeu_ps(high, _mm256_extractf128_ps((__m256)v, 1));
#else
  std::memcpy(low, &v, sizeof(v) / 2);
  std::memcpy(high, reinterpret_cast<const char*>(&v) + sizeof(v) / 2, sizeof(v) / 2);
#endif
}

// Packs `rows` rows (at most kPanel) of n elements that lie one after the other: unit k of all rows
// stands at out + k * kPanel. What lies `ahead` elements further on is fetched from memory
// meanwhile.
//
// A transposed square consists of two vectors each of half as many rows as a vector has lanes. Rows
// often lie apart by a multiple of 4096 bytes, and of more of them a cache could not take a line
// each.
template <class U>
void pack_along(const typename U::Element* p, int64_t stride, int64_t rows, int64_t n,
                int64_t ahead, float* out) {
  constexpr int L = kLanes<float>, kHalf = L / 2;
  const int64_t whole = rows < kPanel ? 0 : n / (2 * U::kVector) * (2 * U::kVector);
  for (int64_t first = 0; first < kPanel && whole > 0; first += kHalf) {
    float* to = out + first;
    for (int64_t k = 0; k < whole; k += 2 * U::kVector, to += 2 * L * kPanel) {
      VecFloat v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const auto* from = p + (first + i % kHalf) * stride + k + i / kHalf * U::kVector;
        __builtin_prefetch(from + ahead);
        v[i] = U::along(from);
      }
      transpose<float>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store_halves(to + i * kPanel, to + (i + L) * kPanel, v[i]);
    }
  }
  for (int64_t k = whole; k < n; k += U::kVector) {
    for (int64_t first = 0; first < kPanel; first += L) {
      VecFloat v[L];
      for (int i = 0; i < L; ++i) {
        const bool exists = first + i < rows;
        v[i] = exists ? U::along(p + (first + i) * stride + k, n - k) : VecFloat{};
      }
      transpose<float>(v);
      float* to = out + k / U::kElements * kPanel + first;
      for (int i = 0; i < L; ++i) store(to + i * kPanel, v[i]);
    }
  }
}

// Packs `rows` rows of n elements, where the rows lie one after the other. They are cut into parts
// of `height` rows, with room for `width` each: what follows the rows of a part there is not used.
// Unit k of a part stands at out + k * width, and the next part out_stride further on.
template <class U>
void pack_across(const typename U::Element* p, int64_t stride, int64_t rows, int64_t n,
                 int64_t height, int64_t width, float* out, int64_t out_stride) {
  for (int64_t k = 0; k < n; k += U::kElements, p += U::kElements * stride, out += width) {
    float* part = out;
    for (int64_t row = 0; row < rows; row += height, part += out_stride) {
      for (int64_t i = 0; i < width; i += kLanes<float>) {
        const int64_t count = std::clamp<int64_t>(rows - row - i, 0, kLanes<float>);
        store(part + i, U::across(p + row + i, stride, n - k, count));
      }
    }
  }
}

// Copies `rows` rows of n elements that lie one after the other, as units.
template <class U>
void copy_rows(const typename U::Element* p, int64_t stride, int64_t rows, int64_t n, float* out,
               int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i, p += stride, out += out_stride) {
    for (int64_t k = 0; k < n; k += U::kVector) {
      store(out + k / U::kElements, U::along(p + k, n - k));
    }
  }
}

// ---- products ----

// M rows are cut into tiles of this many rows, so that the last is not much smaller.
inline int64_t tile_height(int64_t M) {
  const int64_t tiles = (M + kTileRows - 1) / kTileRows;
  return (M + tiles - 1) / tiles;
}

// The rows of a that a tile reads: unit k of row i is data[i * stride + k], or data[i + k * stride]
// if they are packed `across`.
struct LinearRows {
  const uint32_t* data;
  int64_t stride;
  bool across;
};

// Up to a vector of the bias from column j on; 0 if there is none.
template <class T>
inline VecFloat bias_left(const void* bias, int64_t j, int64_t left) {
  return bias ? load_left(static_cast<const T*>(bias) + j, left) : VecFloat{};
}

struct Identity {
  static VecFloat value(VecFloat x, VecFloat&) { return x; }
};

// Stores what becomes of the sums of `rows` rows and a panel of columns from (m, n) on.
template <class T, class Act>
void store_activated(const LinearForward& a, const float* const sums[2], int64_t rows, int64_t m,
                     int64_t n) {
  const int64_t end = std::min(a.N, n + kPanel);
  for (int64_t j = n; j < end; j += kLanes<float>) {
    const int64_t left = end - j;
    const VecFloat shift0 = bias_left<T>(a.bias[0], j, left);
    const VecFloat shift1 = bias_left<T>(a.bias[1], j, left);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t from = i * kPanel + j - n, to = (m + i) * a.N + j;
      const VecFloat x = load(sums[0] + from) + shift0;
      VecFloat derivative, value = Act::value(x, derivative);
      if (a.kept[0]) store_left(static_cast<T*>(a.kept[0]) + to, x, left);
      if (a.gated()) {
        const VecFloat up = load(sums[1] + from) + shift1;
        if (a.kept[1]) store_left(static_cast<T*>(a.kept[1]) + to, up, left);
        value = value * up;
      }
      T* out = static_cast<T*>(a.out) + to;
      if (a.add) value = value + load_left(out, left);
      store_left(out, value, left);
    }
  }
}

template <class T>
void store_sums(const LinearForward& a, const float* sums, int64_t distance, int64_t rows,
                int64_t m, int64_t n) {
  const float* const both[] = {sums, sums + distance};
  if (!a.activated) return store_activated<T, Identity>(a, both, rows, m, n);
  TFKERN_ACTIVATION(a.activation, float, return store_activated<T, Act>(a, both, rows, m, n));
}

template <class U>
struct LinearKernel {
  using T = typename U::Element;
  static constexpr int64_t kBlock = kDepth * U::kElements;  // elements

  const LinearForward& a;
  float* scratch;

  static int64_t units(int64_t elements) { return (elements + U::kElements - 1) / U::kElements; }

  static const T* at(const Matrix& matrix, int64_t row, int64_t k) {
    return static_cast<const T*>(matrix.data) + row * matrix.row + k * matrix.column;
  }

  // The function for a tile whose panel has units, or, if `narrow`, elements of 16 bits.
  static LinearTile tile_of(int64_t rows, bool across, bool narrow) {
    if constexpr (U::kElements == 1 && sizeof(T) == 2) {
      if (narrow) return linear_floats::linear_tile_of<T>(rows, across);
    }
#if TFKERN_VEC_BYTES == 64
    if constexpr (U::kElements == 2) return linear_pairs::linear_tile_of<uint32_t>(rows, across);
#endif
    return linear_floats::linear_tile_of<uint32_t>(rows, across);
  }

  // Packs n elements from (row, k) on of the next rows of b, at most a panel of them. What lies
  // `ahead` elements further on in each row is fetched from memory meanwhile.
  void pack(const Matrix& b, int64_t row, int64_t k, int64_t n, int64_t ahead, float* out) const {
    const int64_t rows = std::min(a.N - row, kPanel);
    if (b.column == 1) {
      pack_along<U>(at(b, row, k), b.row, rows, n, ahead, out);
    } else {
      pack_across<U>(at(b, row, k), b.column, rows, n, kPanel, kPanel, out, 0);
    }
  }

  // Element (row, k) of a packed matrix, where a panel begins with the row, and a unit with k.
  static const T* in_panel(const Matrix& b, int64_t row, int64_t k) {
    return static_cast<const T*>(b.data) + row / kPanel * b.row + k * kPanel;
  }

  // The units of n elements of a panel of b: packed in `out`, or where they are, if they are units.
  const float* panel(const Matrix& b, int64_t row, int64_t k, int64_t n, float* out) const {
    if (!b.packed) {
      pack(b, row, k, n, 64 * U::kElements, out);
      return out;
    }
    const T* p = in_panel(b, row, k);
    if constexpr (sizeof(T) * U::kElements == sizeof(float)) {
      return reinterpret_cast<const float*>(p);
    } else {
      for (int64_t i = 0; i < n * kPanel; i += kLanes<float>) store(out + i, load(p + i));
      return out;
    }
  }

  static LinearAhead fetching_nothing() {
    static const char line[64] = {};
    return {line, line, 0, 0};
  }

  // The next block of rows [begin, end) of a matrix from column k on, of K.
  LinearAhead lines(const Matrix& x, int64_t begin, int64_t end, int64_t k, int64_t K) const {
    const int64_t n = std::min(K - k, kBlock), rows = end - begin, size = sizeof(T);
    if (rows <= 0 || n <= 0) return fetching_nothing();
    if (x.packed) {
      const auto panel = [&](int64_t row) {
        return reinterpret_cast<const char*>(in_panel(x, row, k));
      };
      return {panel(begin), panel(end - 1), x.row * size, units(n) * U::kElements * kPanel * size};
    }
    const auto byte = [&](int64_t i, int64_t j) {
      return reinterpret_cast<const char*>(at(x, i, j));
    };
    if (x.column == 1) return {byte(begin, k), byte(end - 1, k), x.row * size, n * size};
    return {byte(begin, k), byte(begin, k + n - 1), x.column * size, rows * size};
  }

  // Rows of a that are units already are read where they are, unless they lie apart by a multiple
  // of a page, or half of one where tiles are tall: they would fight for the same cache lines.
  static bool in_place(const Matrix& x, int64_t n) {
    constexpr int64_t kSize = sizeof(T) * U::kElements, kConflict = kWide ? 2048 : 4096;
    const int64_t bytes = x.row * sizeof(T);
    return kSize == 4 && x.column == 1 && n % U::kElements == 0 && bytes % 4 == 0 &&
           bytes % kConflict != 0 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
  }

  // n elements from k on of the rows of `tiles` tiles, packed in `buffer` if they have to be.
  void rows_of(const Matrix& x, int64_t row, int64_t rows, int64_t height, int64_t k, int64_t n,
               float* buffer, LinearRows* tiles) const {
    const T* p = at(x, row, k);
    const auto* packed = reinterpret_cast<const uint32_t*>(buffer);
    LinearRows first{packed, row_stride(n), false};
    int64_t step = height * first.stride;
    if (x.column != 1) {
      step = kTileWidth * units(n);
      pack_across<U>(p, x.column, rows, n, height, kTileWidth, buffer, step);
      first = {packed, kTileWidth, true};
    } else if (in_place(x, n)) {
      first = {reinterpret_cast<const uint32_t*>(p), x.row / U::kElements, false};
      step = height * first.stride;
    } else {
      copy_rows<U>(p, x.row, rows, n, buffer, first.stride);
    }
    for (int64_t t = 0; t * height < rows; ++t) {
      tiles[t] = {first.data + t * step, first.stride, first.across};
    }
  }

  // Units between copied rows of n elements: whole vectors, but not a multiple of half a page.
  static int64_t row_stride(int64_t n) {
    const int64_t stride = padded<float>(units(n));
    return stride % 512 == 0 ? stride + 16 : stride;
  }

  // As many bytes as there are in `n` units of a panel, 8 KB behind p: one pass over these units
  // fetches them.
  static LinearAhead behind(const T* p, int64_t n) {
    const char* start = reinterpret_cast<const char*>(p) + 8192;
    LinearAhead ahead{start, start, 0, int64_t(n * U::kElements * kPanel * sizeof(T))};
    ahead.spread(n);
    return ahead;
  }

  // Few rows, all of them one tile: b passes by once, a part of a panel at a time.
  static bool streams(const LinearForward& a) {
    bool along = true;
    for (int i = 0; i < a.count; ++i) {
      along &= a.terms[i].a.column == 1 && a.terms[i].b.column == 1;
    }
    return along && a.M <= kTileRows;
  }

  void stream(int64_t begin, int64_t end) {
    // Copies of the rows of a; a block of a term after the other.
    constexpr int64_t kTile = kTileRows * kPanel;
    alignas(64) float part[kChunk * kPanel], sums[2 * kTile], block[kTile];
    LinearRows left[2];
    float* buffer = scratch;
    for (int i = 0; i < a.count; ++i) {
      const auto& [x, b, K] = a.terms[i];
      const int64_t stride = row_stride(K);
      copy_rows<U>(at(x, 0, 0), x.row, a.M, K, buffer, stride);
      left[i] = {reinterpret_cast<const uint32_t*>(buffer), stride, false};
      buffer += a.M * stride;
    }
    for (int64_t row = begin * kPanel; row < std::min(end * kPanel, a.N); row += kPanel) {
      bool first = true;
      for (int i = 0; i < a.count; ++i) {
        const auto& [x, b, K] = a.terms[i];
        const LinearTile run = tile_of(a.M, false, b.packed);
        float* total = a.gated() ? sums + i * kTile : sums;
        first |= a.gated();
        int64_t k = 0;
        do {
          const int64_t stop = std::min(K, k + kBlock);
          float* target = first ? total : block;
          Sums mode = Sums::overwrite;
          do {
            constexpr int64_t kPart = kChunk * U::kElements;
            const int64_t n = std::min(stop - k, kPart);
            const void* right = part;
            LinearAhead ahead = fetching_nothing();
            if (b.packed) {
              right = in_panel(b, row, k);
              ahead = behind(in_panel(b, row, k), units(n));
            } else {
              // The part after the next, which may be one of the next panel.
              const int64_t next = k + 2 * kPart <= K ? kPart : kPanel * b.row + kPart - K;
              pack(b, row, k, n, next, part);
            }
            run(units(n), left[i].data + k / U::kElements, left[i].stride, right, target, mode,
                ahead);
            mode = Sums::go_on;
            k += n;
          } while (k < stop);
          if (!first) {
            for (int64_t j = 0; j < a.M * kPanel; ++j) total[j] += block[j];
          }
          first = false;
        } while (k < K);
      }
      store_sums<T>(a, sums, kTile, a.M, 0, row);
    }
  }

  // Rows [m_begin, m_end) of the result, of the columns of panels [begin, end), at most kGroup.
  void group(int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
    const int64_t M = m_end - m_begin, height = tile_height(M);
    const int64_t stop = std::min(a.N, end * kPanel), next_stop = stop + (end - begin) * kPanel;
    float* packed = scratch;
    float* buffer = packed + kGroup * kDepth * kPanel;
    float* sums = buffer + kStrip * kTileWidth * (kDepth + 16);
    const int64_t distance = ((M + height - 1) / height) * kGroup * kTileRows * kPanel;
    bool first = true;
    for (int i = 0; i < a.count; ++i) {
      const auto& [x, b, K] = a.terms[i];
      first |= a.gated();
      int64_t k = 0;
      do {
        const int64_t n = std::min(K - k, kBlock), depth = units(n);
        const float* panels[kGroup];
        for (int64_t p = begin; p < end; ++p) {
          float* out = packed + (p - begin) * kDepth * kPanel;
          panels[p - begin] = panel(b, p * kPanel, k, n, out);
        }
        const bool more = k + n < K, last = !more && i + 1 == a.count;
        const bool alone = first && last && !a.gated();  // no later block goes on with its sums
        const LinearAhead next_block =
            more    ? lines(b, begin * kPanel, stop, k + n, K)
            : !last ? lines(a.terms[1].b, begin * kPanel, stop, 0, a.terms[1].K)
                    : lines(a.terms[0].b, stop, std::min(a.N, next_stop), 0, a.terms[0].K);
        for (int64_t m0 = 0; m0 < M; m0 += kStrip * height) {
          const int64_t m1 = std::min(M, m0 + kStrip * height);
          const int64_t m2 = std::min(M, m1 + kStrip * height);
          LinearRows left[kStrip];
          rows_of(x, m_begin + m0, m1 - m0, height, k, n, buffer, left);
          LinearAhead ahead = m1 < M ? lines(x, m_begin + m1, m_begin + m2, k, K) : next_block;
          ahead.spread((m1 - m0 + height - 1) / height * (end - begin) * depth);
          for (int64_t p = begin; p < end; ++p) {
            for (int64_t m = m0; m < m1; m += height) {
              const int64_t rows = std::min(height, m1 - m), t = (m - m0) / height;
              const int64_t slot = (alone ? t : m / height) * kGroup + p - begin;
              float* c = sums + (a.gated() ? i * distance : 0) + slot * kTileRows * kPanel;
              tile_of(rows, left[t].across, false)(depth, left[t].data, left[t].stride,
                                                   panels[p - begin], c,
                                                   first ? Sums::overwrite : Sums::add, ahead);
              if (last) {
                store_sums<T>(a, a.gated() ? c - distance : c, distance, rows, m_begin + m,
                              p * kPanel);
              }
            }
          }
        }
        first = false;
        k += n;
      } while (k < K);
    }
  }
};

// Computes parts [begin, end) of the result: a part is a panel of columns of a chunk of rows.
template <class U>
void linear_parts(const LinearForward& a, int64_t begin, int64_t end) {
  using Kernel = LinearKernel<U>;
  const int64_t panels = (a.N + kPanel - 1) / kPanel;
  if (Kernel::streams(a)) {
    int64_t size = 0;
    for (int i = 0; i < a.count; ++i) size += a.M * Kernel::row_stride(a.terms[i].K);
    return Kernel{a, thread_scratch<float>(size)}.stream(begin, end);
  }
  const int64_t longest = (a.M + a.chunks - 1) / a.chunks;
  const int64_t height = tile_height(longest), tiles = (longest + height - 1) / height;
  const int64_t size = kGroup * kDepth * kPanel + kStrip * kTileWidth * (kDepth + 16) +
                       (a.gated() ? 2 : 1) * tiles * kGroup * kTileRows * kPanel;
  Kernel kernel{a, thread_scratch<float>(size)};
  while (begin < end) {
    const int64_t chunk = begin / panels, p = begin % panels;
    const int64_t stop = std::min({p + kGroup, panels, p + end - begin});
    kernel.group(a.M * chunk / a.chunks, a.M * (chunk + 1) / a.chunks, p, stop);
    begin += stop - p;
  }
}

// The elements of a unit.
inline int64_t linear_unit(Dtype dtype) {
#if TFKERN_VEC_BYTES == 64
  if (dtype == Dtype::bf16 && isa() >= Isa::avx512_bf16) return PairUnits::kElements;
#endif
  return 1;
}

inline void linear_forward(const LinearForward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return linear_parts<WideUnits<float>>(a, begin, end);
    case Dtype::f16:
      return linear_parts<WideUnits<Half>>(a, begin, end);
    default:
#if TFKERN_VEC_BYTES == 64
      if (linear_unit(a.dtype) == 2) return linear_parts<PairUnits>(a, begin, end);
#endif
      return linear_parts<WideUnits<BFloat16>>(a, begin, end);
  }
}

inline int64_t linear_panel() { return kPanel; }
