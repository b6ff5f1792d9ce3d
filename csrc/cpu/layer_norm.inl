// Fragment of layer_norm.cpp, compiled once per instruction set: the kernels for rows [begin, end)
// of the arguments. It assumes vec.inl.
//
// A row that has the computing type and consists of whole vectors is read and written in place. Any
// other row passes through a buffer, whose elements past N are 0.

// Tells whether rows are read and written in place.
template <class C>
inline bool in_place(const Rows& rows, int64_t N) {
  return rows.dtype == (sizeof(C) == 8 ? Dtype::f64 : Dtype::f32) && N % kLanes<C> == 0;
}

// Row m in the computing type: in place, or copied to `buffer`.
template <class C>
inline const C* source(const Rows& rows, int64_t m, int64_t N, C* buffer) {
  const char* row = rows.data + m * rows.stride;
  if (in_place<C>(rows, N)) return reinterpret_cast<const C*>(row);
  TFKERN_DTYPE(rows.dtype, convert(buffer, reinterpret_cast<const T*>(row), N));
  return buffer;
}

// The address to write row m to: in place, or `buffer`. A call of `finish` must follow.
template <class C>
inline C* target(const Rows& rows, int64_t m, int64_t N, C* buffer) {
  return in_place<C>(rows, N) ? reinterpret_cast<C*>(rows.data + m * rows.stride) : buffer;
}

// Copies `values` to row m, unless they have been written in place.
template <class C>
inline void finish(const Rows& rows, int64_t m, int64_t N, const C* values) {
  char* row = rows.data + m * rows.stride;
  if (row == reinterpret_cast<const char*>(values)) return;
  TFKERN_DTYPE(rows.dtype, convert(reinterpret_cast<T*>(row), values, N));
}

// out[n] = keep ? row[n] / (1 - p) : 0.
// Element (m, n) takes lane n % 4 of counter (n / 4, m, m >> 32, 1).
template <class C>
inline void drop(C* out, const C* row, int64_t m, int64_t N, uint64_t seed,
                 const Dropout<C>& dropout) {
  constexpr int L = kLanes<float>;
  const auto [last_dropped, factor] = dropout;  // a copy, which `out` cannot be an alias of
  uint32_t draws[4 * L];
  for (int64_t n = 0; n < N; n += 4 * L) {
    VecUint c[4] = {
        (VecUint)iota<float>() + static_cast<uint32_t>(n / 4), VecUint{} + static_cast<uint32_t>(m),
        VecUint{} + static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32), VecUint{} + 1u};
    philox(seed, c);
    std::memcpy(draws, c, sizeof(draws));
    for (int i = 0; i < std::min<int64_t>(N - n, 4 * L); ++i) {
      out[n + i] = draws[i % 4 * L + i / 4] > last_dropped ? row[n + i] * factor : C{0};
    }
  }
}

// Starts to fetch a row. By itself, the processor fetches ahead only within pages of 4 KiB.
inline void prefetch(const Rows& rows, int64_t m, int64_t N) {
  const char* row = rows.data + m * rows.stride;
  for (int64_t i = 0; i < N * size(rows.dtype); i += 64) __builtin_prefetch(row + i);
}

// Computes the mean of a row and the mean square of the differences from it, in two passes. The
// second pass also corrects the mean by its rounding error (Chan, Golub and LeVeque 1983), which
// matters when the mean is large beside the deviation. For RMS norm the mean is 0.
template <class C>
inline void moments(const C* h, int64_t N, bool rms, C& mean, C& square) {
  constexpr int L = kLanes<C>;
  constexpr int kChains = 4;  // independent sums, none of which waits for another
  Vec<C> s[kChains] = {}, s1[kChains] = {}, s2[kChains] = {};
  int64_t n = 0;
  if (!rms) {
    for (; n + kChains * L <= N; n += kChains * L) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) s[i] = s[i] + load(h + n + i * L);
    }
    for (; n < N; n += L) s[0] = s[0] + load(h + n);
  }
  mean = sum<C>((s[0] + s[1]) + (s[2] + s[3])) / N;

  for (n = 0; n + kChains * L <= N; n += kChains * L) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Vec<C> d = load(h + n + i * L) - mean;
      s1[i] = s1[i] + d;
      s2[i] = s2[i] + d * d;
    }
  }
  for (; n < N; n += L) {
    const Vec<C> d =
        iota<C>() < static_cast<int>(std::min<int64_t>(N - n, L)) ? load(h + n) - mean : Vec<C>{};
    s1[0] = s1[0] + d;
    s2[0] = s2[0] + d * d;
  }
  square = sum<C>((s2[0] + s2[1]) + (s2[2] + s2[3])) / N;
  if (!rms) {
    const C shift = sum<C>((s1[0] + s1[1]) + (s1[2] + s1[3])) / N;
    square -= shift * shift;
    mean += shift;
  }
}

// y = (h - mean) * rstd * weight + bias
template <class C, class T>
inline void normalise(T* y, const C* h, C mean, C rstd, const C* weight, const C* bias, int64_t N) {
  constexpr int L = kLanes<C>;
  for (int64_t n = 0; n < N; n += L) {
    store_as(y + n, (load(h + n) - mean) * rstd * load(weight + n) + load(bias + n), N - n);
  }
}

// Normalises rows [begin, end).
template <class C>
void layer_norm_forward(const LayerNormForward<C>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<C>;
  const int64_t N = a.N, P = padded<C>(N);
  std::vector<C> buffers(3 * P);
  C* x_row = buffers.data();
  C* residual_row = x_row + P;
  C* h_row = residual_row + P;
  for (int64_t m = begin; m < end; ++m) {
    const C* h = source(a.x, m, N, x_row);
    if (a.h.data) {  // h = residual + dropout(x)
      if (a.seed) {
        drop(x_row, h, m, N, *a.seed, a.dropout);
        h = x_row;
      }
      if (a.residual.data) {
        const C* residual = source(a.residual, m, N, residual_row);
        C* sum = target(a.h, m, N, h_row);
        for (int64_t n = 0; n < P; n += L) store(sum + n, load(h + n) + load(residual + n));
        h = sum;
      }
      finish(a.h, m, N, h);
    }

    C mean, square;
    moments(h, N, a.rms, mean, square);
    const C rstd = static_cast<C>(1 / std::sqrt(square + a.eps));  // in float64
    if (a.mean) a.mean[m] = mean;
    a.rstd[m] = rstd;
    prefetch(a.x, m + 1, N);
    TFKERN_DTYPE(a.y.dtype, normalise(reinterpret_cast<T*>(a.y.data + m * a.y.stride), h, mean,
                                      rstd, a.weight, a.bias, N));
  }
}

// Sums weight * dy * xhat over the row to `dot` and weight * dy to `total`, and adds dy * xhat to
// dweight and dy to dbias. Past N, dy is 0, and so is every product.
template <class C>
inline void weigh(const C* dy, const C* h, C mean, C rstd, const C* weight, int64_t P, C* dweight,
                  C* dbias, C& dot, C& total) {
  constexpr int L = kLanes<C>;
  Vec<C> s1[2] = {}, s2[2] = {};
  // forward: y = xhat * weight + bias, xhat = (h - mean) * rstd
  int64_t n = 0;
  for (; n < P; n += 2 * L) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t j = n + i * L;
      if (i && j >= P) break;
      const Vec<C> d = load(dy + j), xhat = (load(h + j) - mean) * rstd;
      const Vec<C> g = load(weight + j) * d;
      s1[i] = s1[i] + g * xhat;
      s2[i] = s2[i] + g;
      store(dweight + j, load(dweight + j) + d * xhat);
      store(dbias + j, load(dbias + j) + d);
    }
  }
  dot = sum<C>(s1[0] + s1[1]);
  total = sum<C>(s2[0] + s2[1]);
}

// g = (weight * dy - xhat * c1 - c2) * rstd + dh
template <class C, class T>
inline void gradient(T* g, const C* dy, const C* h, C mean, C rstd, C c1, C c2, const C* weight,
                     const C* dh, int64_t N) {
  constexpr int L = kLanes<C>;
  for (int64_t n = 0; n < N; n += L) {
    const Vec<C> xhat = (load(h + n) - mean) * rstd;
    Vec<C> v = (load(weight + n) * load(dy + n) - xhat * c1 - c2) * rstd;
    if (dh) v = v + load(dh + n);
    store_as(g + n, v, N - n);
  }
}

// Computes dx and dresidual of rows [begin, end), and adds the sums over these rows to dweight and
// dbias, which are padded to whole vectors.
template <class C>
void layer_norm_backward(const LayerNormBackward<C>& a, int64_t begin, int64_t end, C* dweight,
                         C* dbias) {
  const int64_t N = a.N, P = padded<C>(N);
  std::vector<C> buffers(4 * P);
  C* dy_row = buffers.data();
  C* h_row = dy_row + P;
  C* dh_row = h_row + P;
  C* g_row = dh_row + P;
  for (int64_t m = begin; m < end; ++m) {
    const C* dy = source(a.dy, m, N, dy_row);
    const C* h = source(a.h, m, N, h_row);
    const C* dh = a.dh.data ? source(a.dh, m, N, dh_row) : nullptr;
    const C mean = a.mean ? a.mean[m] : C{0}, rstd = a.rstd[m];
    C dot, total;
    weigh(dy, h, mean, rstd, a.weight, P, dweight, dbias, dot, total);
    prefetch(a.dy, m + 1, N);
    prefetch(a.h, m + 1, N);
    const C c1 = dot / N, c2 = a.rms ? C{0} : total / N;
    // forward: h = residual + dropout(x)
    if (a.dresidual.data || a.seed) {
      gradient(g_row, dy, h, mean, rstd, c1, c2, a.weight, dh, N);
      if (a.dresidual.data) finish(a.dresidual, m, N, g_row);
      if (a.seed) drop(g_row, g_row, m, N, *a.seed, a.dropout);
      finish(a.dx, m, N, g_row);
    } else {
      TFKERN_DTYPE(a.dx.dtype, gradient(reinterpret_cast<T*>(a.dx.data + m * a.dx.stride), dy, h,
                                        mean, rstd, c1, c2, a.weight, dh, N));
    }
  }
}
