// Fragment of attention.cpp, compiled once per instruction set: matrix products. Keys and values
// enter as scalars that are broadcast, so they need no packing. If there are too few rows to fill a
// vector, keys and values (of type T) are read by vectors instead and widened on the way. It
// assumes vec.inl.

// The accumulators of a tile are kRows rows of kVectors vectors: as many as the registers hold
// beside a row of `right` and a scalar.
template <class C>
constexpr int kRows = TFKERN_VEC_BYTES == 16 ? 4 : 6;
template <class C>
constexpr int kVectors = TFKERN_VEC_BYTES == 64 ? 4 : 2;

// The most terms that one accumulator sums before it is added to the result: rounding errors grow
// with their number.
constexpr int64_t kDepth = 64;

// A matrix whose elements are broadcast one at a time, so that any strides (in elements) will do.
template <class C>
struct BroadcastMatrix {
  const C* data;
  int64_t row, column;
};

// The part of `product` whose accumulators are R rows of NV vectors. With each term it prefetches
// from `ahead`, and moves `ahead` on by `step` elements.
template <int R, int NV, class C, class T>
inline void product_tile(int64_t K, BroadcastMatrix<C> left, const T* right, int64_t right_stride,
                         C* out, int64_t out_stride, bool add, const C* ahead, int64_t step) {
  constexpr int L = kLanes<C>;
  int64_t k = 0;
  do {
    const int64_t end = std::min(K, k + kDepth);
    Vec<C> sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[r][j] = Vec<C>{};
    }
#pragma GCC unroll 2
    for (; k < end; ++k) {
      __builtin_prefetch(ahead + k * step, 0, 2);
      Vec<C> row[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) row[j] = load(right + k * right_stride + j * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const C scalar = left.data[r * left.row + k * left.column];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[r][j] += scalar * row[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        C* p = out + r * out_stride + j * L;
        store(p, add ? load(p) + sum[r][j] : sum[r][j]);
      }
    }
    add = true;
  } while (k < K);
}

// The part of `product` whose result is M rows of NV vectors.
template <int NV, class C, class T>
inline void product_panel(int64_t M, int64_t K, BroadcastMatrix<C> left, const T* right,
                          int64_t right_stride, C* out, int64_t out_stride, bool add,
                          const C* ahead, int64_t step) {
  constexpr int R = kRows<C>;
  int64_t m = 0;
  for (; m + R <= M; m += R, ahead += K * step) {
    const BroadcastMatrix<C> rows{left.data + m * left.row, left.row, left.column};
    product_tile<R, NV>(K, rows, right, right_stride, out + m * out_stride, out_stride, add, ahead,
                        step);
  }
  const BroadcastMatrix<C> rows{left.data + m * left.row, left.row, left.column};
  out += m * out_stride;
  switch (M - m) {
    case 5:
      return product_tile<5, NV>(K, rows, right, right_stride, out, out_stride, add, ahead, step);
    case 4:
      return product_tile<4, NV>(K, rows, right, right_stride, out, out_stride, add, ahead, step);
    case 3:
      return product_tile<3, NV>(K, rows, right, right_stride, out, out_stride, add, ahead, step);
    case 2:
      return product_tile<2, NV>(K, rows, right, right_stride, out, out_stride, add, ahead, step);
    case 1:
      return product_tile<1, NV>(K, rows, right, right_stride, out, out_stride, add, ahead, step);
  }
}

// out[M x N] = left[M x K] right[K x N], added to the old values of out if `add`. N fills whole
// vectors. Meanwhile the M K elements from `ahead` on, which are needed next, are fetched from
// outer caches: strided reads would otherwise wait for them.
template <class C, class T>
void product(int64_t M, int64_t N, int64_t K, BroadcastMatrix<C> left, const T* right,
             int64_t right_stride, C* out, int64_t out_stride, bool add, const C* ahead = nullptr) {
  constexpr int L = kLanes<C>, NV = kVectors<C>;
  // M / kRows tiles of K terms each fetch M K elements at kRows elements a term. Two elements more
  // make up for the rows that fill no tile.
  const int64_t step = ahead ? kRows<C> + 2 : 0;
  if (!ahead) ahead = out;
  int64_t n = 0;
  for (; n + NV * L <= N; n += NV * L) {
    product_panel<NV>(M, K, left, right + n, right_stride, out + n, out_stride, add, ahead, step);
  }
  right += n;
  out += n;
  switch ((N - n) / L) {
    case 3:
      return product_panel<3>(M, K, left, right, right_stride, out, out_stride, add, ahead, step);
    case 2:
      return product_panel<2>(M, K, left, right, right_stride, out, out_stride, add, ahead, step);
    case 1:
      return product_panel<1>(M, K, left, right, right_stride, out, out_stride, add, ahead, step);
  }
}

// { a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], b[2] + b[3], ... }
template <class C>
inline Vec<C> pair_sums(Vec<C> a, Vec<C> b) {
  const VecIndex<C> even = iota<C>() * 2;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// out[r][m] = sum_k left[m][k] right[r][k], with k along the lanes: for R too small to fill a
// vector. K fills whole vectors, and so do the rows of out.
template <class C, class T>
void row_product(int64_t M, int64_t R, int64_t K, BroadcastMatrix<T> left, const C* right,
                 int64_t right_stride, C* out, int64_t out_stride) {
  constexpr int L = kLanes<C>;
  for (int64_t m = 0; m < M; m += L) {
    const T* rows[L];
    for (int i = 0; i < L; ++i) rows[i] = left.data + std::min(m + i, M - 1) * left.row;
    for (int64_t r = 0; r < R; ++r) {
      Vec<C> part[L] = {};
      for (int64_t k = 0; k < K; k += L) {
        const Vec<C> x = load(right + r * right_stride + k);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) part[i] += load(rows[i] + k) * x;
      }
#pragma GCC unroll 4
      for (int n = L / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) part[i] = pair_sums<C>(part[2 * i], part[2 * i + 1]);
      }
      store(out + r * out_stride + m, part[0]);
    }
  }
}
