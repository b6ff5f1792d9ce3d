// Tensors of any rank as the matrices that kernels take: the last `axes` axes are the columns, all
// others the rows.
#pragma once

#include "tensor.h"

namespace tfkern {

struct MatrixSize {
  int64_t rows = 1, columns = 1;
};

inline MatrixSize matrix_size(const Tensor& x, int64_t axes) {
  STD_TORCH_CHECK(axes >= 1 && axes <= x.dim(),
                  "tfkern: expected at least one axis, and at most those of x");
  MatrixSize size;
  for (int64_t i = 0; i < x.dim(); ++i) {
    int64_t& factor = i < x.dim() - axes ? size.rows : size.columns;
    STD_TORCH_CHECK(!__builtin_mul_overflow(factor, x.size(i), &factor),
                    "tfkern: expected sizes whose product is an int64");
  }
  return size;
}

// The number of elements from one row to the next; 0 if there is at most one row. Returns nullopt
// if rows lie at different distances, or if the elements of a row do not lie one after the other.
inline std::optional<int64_t> row_stride(const Tensor& x, int64_t axes) {
  if (x.numel() == 0) return 0;
  int64_t next = 1;  // the stride that an axis has if it continues the axes after it
  int64_t i = x.dim() - 1;
  for (; i >= x.dim() - axes; --i) {
    if (x.size(i) == 1) continue;
    if (x.stride(i) != next) return std::nullopt;
    next *= x.size(i);
  }
  std::optional<int64_t> rows;  // the stride of the last axis of rows whose size is not 1
  for (; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (rows && x.stride(i) != next) return std::nullopt;
    if (!rows) rows = x.stride(i);
    next = x.stride(i) * x.size(i);
  }
  return rows.value_or(0);
}

// x itself, or a contiguous copy where its rows have no common stride.
inline Tensor with_row_stride(const Tensor& x, int64_t axes) {
  return row_stride(x, axes) ? x : torch::stable::contiguous(x);
}

inline Optional with_row_stride(const Optional& x, int64_t axes) {
  return x ? Optional(with_row_stride(*x, axes)) : std::nullopt;
}

// Tells whether `t` is absent or has the sizes of the last `axes` axes of x.
inline bool has_last_sizes(const Optional& t, const Tensor& x, int64_t axes) {
  if (!t) return true;
  if (t->dim() != axes) return false;
  for (int64_t i = 0; i < axes; ++i) {
    if (t->size(i) != x.size(x.dim() - axes + i)) return false;
  }
  return true;
}

// Where the rows of a tensor begin whose last axis is the columns: (batch, T) rows, as those of
// x[:, 1:], have two strides. Strides count elements.
struct RowOffsets {
  int64_t T = 1, stride = 0, batch_stride = 0;

  constexpr int64_t operator()(int64_t m) const {
    return m < T ? m * stride : m / T * batch_stride + m % T * stride;
  }
};

// The offsets of the rows of x, or nullopt if they would need more than two strides, or if the
// elements of a row do not lie one after the other.
inline std::optional<RowOffsets> row_offsets(const Tensor& x) {
  RowOffsets offsets;
  if (x.numel() == 0) return offsets;
  if (x.size(x.dim() - 1) > 1 && x.stride(x.dim() - 1) != 1) return std::nullopt;
  int found = 0;     // strides of rows so far
  int64_t next = 0;  // the stride that an axis has if it continues the axes after it
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (found == 0) {
      offsets.T = x.size(i);
      offsets.stride = x.stride(i);
      found = 1;
    } else if (x.stride(i) != next) {
      if (++found > 2) return std::nullopt;
      offsets.batch_stride = x.stride(i);
    } else if (found == 1) {
      offsets.T *= x.size(i);
    }
    next = x.stride(i) * x.size(i);
  }
  return offsets;
}

}  // namespace tfkern
