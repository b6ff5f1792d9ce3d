// Rows of tensors as the kernels read and write them: V consecutive elements at a time, as float.
//
// The element type is an argument at run time: a branch that a whole launch takes alike costs
// nothing beside the memory traffic, and an instance for each combination of types would cost
// minutes of compilation. Each branch holds all loads of a call, so that they overlap.
#pragma once

#include "../rows.h"
#include "launch.h"
#include "ptx.h"

// Runs the statements with `T` naming the element type, which is never float64.
#define TFKERN_CUDA_DTYPE(dtype, ...)           \
  if ((dtype) == ::tfkern::Dtype::bf16) {       \
    using T = ::tfkern::BFloat16;               \
    __VA_ARGS__;                                \
  } else if ((dtype) == ::tfkern::Dtype::f16) { \
    using T = ::tfkern::Half;                   \
    __VA_ARGS__;                                \
  } else {                                      \
    using T = float;                            \
    __VA_ARGS__;                                \
  }

// The same where the type is known to have 16 bits.
#define TFKERN_CUDA_16_BIT(dtype, ...)    \
  if ((dtype) == ::tfkern::Dtype::bf16) { \
    using T = ::tfkern::BFloat16;         \
    __VA_ARGS__;                          \
  } else {                                \
    using T = ::tfkern::Half;             \
    __VA_ARGS__;                          \
  }

namespace tfkern::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return bf16_to_float(x.bits); }
__device__ inline float to_float(Half x) { return f16_to_float(x.bits); }

__device__ inline uint32_t pack(float low, float high, BFloat16) { return pack_bf16(low, high); }
__device__ inline uint32_t pack(float low, float high, Half) { return pack_f16(low, high); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack(x, 0.0f, T{}))};
  }
}

// Converts 16 bytes to the floats from x[at] on.
template <class T, int V>
__device__ inline void unpack(float (&x)[V], int at, const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[at + i] = __uint_as_float(words[i]);
    } else {
      x[at + 2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
      x[at + 2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

// Converts the floats from x[at] on to 16 bytes.
template <class T, int V>
__device__ inline uint4 packed(const float (&x)[V], int at) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(x[at + i]);
    } else {
      words[i] = pack(x[at + 2 * i], x[at + 2 * i + 1], T{});
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// A matrix with contiguous rows, or a contiguous vector; null data stands for an absent one.
struct Matrix {
  char* data = nullptr;
  int64_t stride = 0;  // bytes from one row to the next
  Dtype dtype = Dtype::f32;
  bool aligned = false;  // every row starts at a multiple of 16 bytes
};

// The matrix of a tensor whose last `axes` axes are the columns and whose rows have a common
// stride.
inline Matrix matrix(const Tensor& t, int64_t axes = 1) {
  const int64_t stride = *row_stride(t, axes) * static_cast<int64_t>(t.element_size());
  auto* first = data<char>(t);
  return {first, stride, dtype(t), (reinterpret_cast<uintptr_t>(first) | stride) % 16 == 0};
}

inline Matrix matrix(const Optional& t, int64_t axes = 1) {
  return t ? matrix(*t, axes) : Matrix{};
}

// Where one thread's K pieces of V elements lie: piece i is in row `row + i * row_step`, from
// column `column + i * column_step` on. Elements past `rows` and `columns` are loaded as 0, and
// are not stored.
struct Pieces {
  int64_t row, row_step, rows;
  int64_t column, column_step, columns;
};

// Tells whether piece i, which is whole or past the end, lies within the columns. Counting in 32
// bits saves registers: kernels take only rows of fewer elements so.
__device__ inline bool has_piece(const Pieces& at, int i) {
  const int column = static_cast<int>(at.column), step = static_cast<int>(at.column_step);
  return column + i * step < static_cast<int>(at.columns);
}

// Loads pieces of which each is whole or past the end, in rows that start at multiples of 16 bytes.
// With MAY_END a piece may also lie across the end, and is not loaded.
template <class T, bool MAY_END = false, int K, int V>
__device__ inline void load_whole(float (&x)[K][V], const Matrix& m, const Pieces& at) {
  constexpr int kLoads = V * sizeof(T) / 16;
  static_assert(kLoads >= 1);
  const T* first = reinterpret_cast<const T*>(m.data + at.row * m.stride) + at.column;
  const int64_t step = at.row_step * m.stride / static_cast<int64_t>(sizeof(T)) + at.column_step;
  uint4 raw[K][kLoads];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const bool in_columns =
        MAY_END ? at.column + i * at.column_step + V <= at.columns : has_piece(at, i);
    const bool whole = in_columns && at.row + i * at.row_step < at.rows;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      raw[i][j] = uint4{0, 0, 0, 0};
      if (whole) raw[i][j] = reinterpret_cast<const uint4*>(first + i * step)[j];
    }
  }
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) unpack<T>(x[i], j * (V / kLoads), raw[i][j]);
  }
}

template <class T, int K, int V>
__device__ inline void load_as(float (&x)[K][V], const Matrix& m, const Pieces& at) {
  if (m.aligned) load_whole<T, true>(x, m, at);
  const T* first = reinterpret_cast<const T*>(m.data + at.row * m.stride) + at.column;
  const int64_t step = at.row_step * m.stride / static_cast<int64_t>(sizeof(T)) + at.column_step;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const int64_t left = at.columns - at.column - i * at.column_step;
    if (m.aligned && left >= V) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const bool there = j < left && at.row + i * at.row_step < at.rows;
      x[i][j] = there ? to_float(first[i * step + j]) : 0.0f;
    }
  }
}

// Loads rows of elements E whose pieces are whole, or for E = void any rows.
template <class E = void, int K, int V>
__device__ inline void load(float (&x)[K][V], const Matrix& m, const Pieces& at) {
  if constexpr (std::is_void_v<E>) {
    TFKERN_CUDA_DTYPE(m.dtype, load_as<T>(x, m, at));
  } else {
    load_whole<E>(x, m, at);
  }
}

// Stores pieces of which each is whole or past the end, in rows that start at multiples of 16
// bytes.
template <class T, int K, int V>
__device__ inline void store_whole(const Matrix& m, const float (&x)[K][V], const Pieces& at) {
  constexpr int kStores = V * sizeof(T) / 16;
  T* first = reinterpret_cast<T*>(m.data + at.row * m.stride) + at.column;
  const int64_t step = at.row_step * m.stride / static_cast<int64_t>(sizeof(T)) + at.column_step;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (at.row + i * at.row_step >= at.rows) continue;
    if (!has_piece(at, i)) continue;
#pragma unroll
    for (int j = 0; j < kStores; ++j) {
      reinterpret_cast<uint4*>(first + i * step)[j] = packed<T>(x[i], j * (V / kStores));
    }
  }
}

template <class T, int K, int V>
__device__ inline void store_as(const Matrix& m, const float (&x)[K][V], const Pieces& at) {
  constexpr int kStores = V * sizeof(T) / 16;
  T* first = reinterpret_cast<T*>(m.data + at.row * m.stride) + at.column;
  const int64_t step = at.row_step * m.stride / static_cast<int64_t>(sizeof(T)) + at.column_step;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (at.row + i * at.row_step >= at.rows) continue;
    const int64_t left = at.columns - at.column - i * at.column_step;
    if (m.aligned && left >= V) {
#pragma unroll
      for (int j = 0; j < kStores; ++j) {
        reinterpret_cast<uint4*>(first + i * step)[j] = packed<T>(x[i], j * (V / kStores));
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (j < left) first[i * step + j] = from_float<T>(x[i][j]);
      }
    }
  }
}

// Stores rows of elements E whose pieces are whole, or for E = void any rows.
template <class E = void, int K, int V>
__device__ inline void store(const Matrix& m, const float (&x)[K][V], const Pieces& at) {
  if constexpr (std::is_void_v<E>) {
    TFKERN_CUDA_DTYPE(m.dtype, store_as<T>(m, x, at));
  } else {
    store_whole<E>(m, x, at);
  }
}

// ---- sums of partial sums ----

// Partial sums (G, N) in float32, and where their sums go: contiguous, of any shape.
struct Partials {
  const float* parts = nullptr;
  Matrix out;
};

inline Partials partials(const Tensor& parts, const Tensor& out) {
  return {static_cast<const float*>(parts.data_ptr()), {data<char>(out), 0, dtype(out)}};
}

// out[n] = sum of parts[g][n] over g < G, in a fixed order, for one or two such sums of one size.
void sum_partials(const Device& device, int64_t G, int64_t N, const Partials& first,
                  const Partials& second = {});

inline void sum_partials(const Device& device, const Tensor& parts, int64_t G, const Tensor& out) {
  sum_partials(device, G, out.numel(), partials(parts, out));
}

}  // namespace tfkern::cuda
