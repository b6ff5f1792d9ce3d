// Fragment of attention.cpp, compiled once per instruction set: matrix products. Keys and values
// enter as scalars that are broadcast, so they need no packing. If there are too few rows to fill a
// vector, keys and values (of type T) are read by vectors instead and widened on the way. It
// assumes vec.inl and pair.inl.

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
template <class T>
struct BroadcastMatrix {
  const T* data;
  int64_t row, column;
};

template <class C>
inline Vec<C> multiply_add(C scalar, Vec<C> row, Vec<C> sum) {
  return sum + scalar * row;
}

// Starts to fetch the cache line of p, which need not exist, from outer caches to the second level.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The part of `product` whose accumulators are R rows of NV vectors. With each term it fetches from
// `ahead`, and moves `ahead` on by `step` elements.
template <bool kStream, int R, int NV, class C, class E, class T>
inline void product_tile(int64_t K, BroadcastMatrix<E> left, const T* right, int64_t right_stride,
                         C* out, int64_t out_stride, bool add, const C* ahead, int64_t step) {
  constexpr int L = kLanes<C>;
  int64_t k = 0;
  do {
    const int64_t end = std::min(K, k + kDepth);
    Vec<C> sum[R][NV];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[r][j] = Vec<C>{};
    }
#pragma GCC unroll 2
    for (; k < end; ++k) {
      if constexpr (!kStream) fetch(ahead + k * step);
      decltype(load(right)) row[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        if constexpr (kStream) fetch(right + (k + kKeys) * right_stride + j * L);
        row[j] = load(right + k * right_stride + j * L);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const E scalar = left.data[r * left.row + k * left.column];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[r][j] = multiply_add(scalar, row[j], sum[r][j]);
      }
    }
#pragma GCC unroll 12
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
template <bool kStream, int NV, class C, class E, class T>
inline void product_panel(int64_t M, int64_t K, BroadcastMatrix<E> left, const T* right,
                          int64_t right_stride, C* out, int64_t out_stride, bool add,
                          const C* ahead, int64_t step) {
  constexpr int R = kRows<C>;
  int64_t m = 0;
  const auto rows_from = [&](int64_t m) -> BroadcastMatrix<E> {
    return {left.data + m * left.row, left.row, left.column};
  };
  // If rows are half as long, the registers hold twice as many.
  if constexpr (2 * NV == kVectors<C>) {
    for (; m + 2 * R <= M; m += 2 * R, ahead += 2 * K * step) {
      product_tile<kStream, 2 * R, NV>(K, rows_from(m), right, right_stride, out + m * out_stride,
                                       out_stride, add, ahead, 2 * step);
    }
  }
  for (; m + R <= M; m += R, ahead += K * step) {
    product_tile<kStream, R, NV>(K, rows_from(m), right, right_stride, out + m * out_stride,
                                 out_stride, add, ahead, step);
  }
  const BroadcastMatrix<E> rows = rows_from(m);
  out += m * out_stride;
  switch (M - m) {
    case 5:
      return product_tile<kStream, 5, NV>(K, rows, right, right_stride, out, out_stride, add, ahead,
                                          step);
    case 4:
      return product_tile<kStream, 4, NV>(K, rows, right, right_stride, out, out_stride, add, ahead,
                                          step);
    case 3:
      return product_tile<kStream, 3, NV>(K, rows, right, right_stride, out, out_stride, add, ahead,
                                          step);
    case 2:
      return product_tile<kStream, 2, NV>(K, rows, right, right_stride, out, out_stride, add, ahead,
                                          step);
    case 1:
      return product_tile<kStream, 1, NV>(K, rows, right, right_stride, out, out_stride, add, ahead,
                                          step);
  }
}

// out[M x N] = left[M x K] right[K x N], added to the old values of out if `add`. N fills whole
// vectors. The terms are products of numbers, or of pairs of them (see pair.inl). Meanwhile the M K
// elements from `ahead` on, which are needed next, are fetched from outer caches: strided reads
// would otherwise wait for them. With kStream `right` is read once, and what lies kKeys rows
// further is fetched.
template <bool kStream = false, class C, class E, class T>
void product(int64_t M, int64_t N, int64_t K, BroadcastMatrix<E> left, const T* right,
             int64_t right_stride, C* out, int64_t out_stride, bool add, const C* ahead = nullptr) {
  constexpr int L = kLanes<C>, NV = kVectors<C>;
  // M / kRows tiles of K terms each fetch M K elements at kRows elements a term. Two elements more
  // make up for the rows that fill no tile.
  const int64_t step = ahead ? kRows<C> + 2 : 0;
  if (!ahead) ahead = out;
  int64_t n = 0;
  for (; n + NV * L <= N; n += NV * L) {
    product_panel<kStream, NV>(M, K, left, right + n, right_stride, out + n, out_stride, add, ahead,
                               step);
  }
  right += n;
  out += n;
  switch ((N - n) / L) {
    case 3:
      return product_panel<kStream, 3>(M, K, left, right, right_stride, out, out_stride, add, ahead,
                                       step);
    case 2:
      return product_panel<kStream, 2>(M, K, left, right, right_stride, out, out_stride, add, ahead,
                                       step);
    case 1:
      return product_panel<kStream, 1>(M, K, left, right, right_stride, out, out_stride, add, ahead,
                                       step);
  }
}

// { a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], b[2] + b[3], ... }
template <class C>
inline Vec<C> pair_sums(Vec<C> a, Vec<C> b) {
  const VecIndex<C> even = iota<C>() * 2;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// The part of `row_product` for R rows.
template <int R, class C, class T>
inline void row_product_part(int64_t M, int64_t K, BroadcastMatrix<T> left, const C* right,
                             int64_t right_stride, C* out, int64_t out_stride) {
  constexpr int L = kLanes<C>, N = L / R;
  for (int64_t m = 0; m < M; m += N) {
    const T* rows[N];
    for (int n = 0; n < N; ++n) rows[n] = left.data + std::min(m + n, M - 1) * left.row;
    Vec<C> part[L] = {};
    for (int64_t k = 0; k < K; k += L) {
      Vec<C> x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(right + r * right_stride + k);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        fetch(rows[n] + k + kKeys * left.row);
        const Vec<C> row = load(rows[n] + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) part[r * N + n] += row * x[r];
      }
    }
#pragma GCC unroll 4
    for (int n = L / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) part[i] = pair_sums<C>(part[2 * i], part[2 * i + 1]);
    }
    C sums[L];
    store(sums, part[0]);
    for (int r = 0; r < R; ++r) std::memcpy(out + r * out_stride + m, sums + r * N, N * sizeof(C));
  }
}

// out[r][m] = sum_k left[m][k] right[r][k], with k along the lanes: for R too small to fill a
// vector. K fills whole vectors. A row of out has room for whole vectors, of which the elements
// from M on are undefined. Meanwhile the row of `left` that lies kKeys rows further on is fetched
// from outer caches.
template <class C, class T>
void row_product(int64_t M, int64_t R, int64_t K, BroadcastMatrix<T> left, const C* right,
                 int64_t right_stride, C* out, int64_t out_stride) {
  int64_t r = 0;
  if constexpr (kLanes<C> >= 4) {
    for (; r + 4 <= R; r += 4) {
      row_product_part<4>(M, K, left, right + r * right_stride, right_stride, out + r * out_stride,
                          out_stride);
    }
  }
  for (; r + 2 <= R; r += 2) {
    row_product_part<2>(M, K, left, right + r * right_stride, right_stride, out + r * out_stride,
                        out_stride);
  }
  if (r < R) {
    row_product_part<1>(M, K, left, right + r * right_stride, right_stride, out + r * out_stride,
                        out_stride);
  }
}
