// The kernels of layer_norm.cpp for one instruction set: rows [begin, end) of the arguments.

template <class C>
void load_row(C* dst, const Rows& rows, int64_t m, int64_t N) {
  TFKERN_DTYPE(rows.dtype,
               convert(dst, reinterpret_cast<const T*>(rows.data + m * rows.stride), N));
}

template <class C>
void store_row(const Rows& rows, int64_t m, const C* src, int64_t N) {
  TFKERN_DTYPE(rows.dtype, convert(reinterpret_cast<T*>(rows.data + m * rows.stride), src, N));
}

// row[n] = keep ? row[n] / (1 - p) : 0. Element (m, n) takes lane n % 4 of counter (n / 4, m, m >>
// 32, 1).
template <class C>
void drop(C* row, int64_t m, int64_t N, const Dropout& dropout) {
  const double threshold = std::ldexp(dropout.p, 32);  // keep if the draw is not below it
  const C scale = dropout.p < 1 ? static_cast<C>(1 / (1 - dropout.p)) : C{0};
  for (int64_t n = 0; n < N; n += 4) {
    const Philox draw(dropout.seed, static_cast<uint32_t>(n / 4), static_cast<uint32_t>(m),
                      static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32), 1);
    for (int64_t i = n; i < std::min(n + 4, N); ++i) {
      row[i] = draw.lane[i - n] >= threshold ? row[i] * scale : C{0};
    }
  }
}

// Buffers hold a multiple of the vector length; the elements past N are 0 and stay harmless.
inline int64_t padded(int64_t N, int lanes) { return (N + lanes - 1) / lanes * lanes; }

template <class C>
void layer_norm_forward(const LayerNormForward<C>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<C>;
  const int64_t N = a.N, P = padded(N, L);
  std::vector<C> buffer(2 * P);
  C* h = buffer.data();
  C* other = h + P;
  for (int64_t m = begin; m < end; ++m) {
    load_row(h, a.x, m, N);
    if (a.dropout.p > 0) drop(h, m, N, a.dropout);
    if (a.residual.data) {
      load_row(other, a.residual, m, N);
      for (int64_t n = 0; n < P; n += L) store(h + n, load(h + n) + load(other + n));
    }
    if (a.h.data) store_row(a.h, m, h, N);

    C mean = 0, square;
    if (a.rms) {
      Vec<C> s{};
      for (int64_t n = 0; n < P; n += L) s = s + load(h + n) * load(h + n);
      square = sum<C>(s) / N;
    } else {
      // Two passes over the buffer; the second also corrects the mean by what rounding left over
      // (Chan, Golub and LeVeque 1983), which matters when the mean is large beside the deviation.
      Vec<C> s{}, s1{}, s2{};
      for (int64_t n = 0; n < P; n += L) s = s + load(h + n);
      mean = sum<C>(s) / N;
      int64_t n = 0;
      for (; n + L <= N; n += L) {
        const Vec<C> d = load(h + n) - mean;
        s1 = s1 + d;
        s2 = s2 + d * d;
      }
      if (n < N) {
        C last[L];
        store(last, load(h + n) - mean);
        const Vec<C> d = load(last, static_cast<int>(N - n));
        s1 = s1 + d;
        s2 = s2 + d * d;
      }
      const C shift = sum<C>(s1) / N;
      square = sum<C>(s2) / N - shift * shift;
      mean += shift;
    }
    const C rstd = static_cast<C>(1 / std::sqrt(square + a.eps));  // in double, once a row
    if (a.mean) a.mean[m] = mean;
    a.rstd[m] = rstd;

    for (int64_t n = 0; n < P; n += L) {
      Vec<C> y = (load(h + n) - mean) * rstd;
      if (a.weight) y = y * load(a.weight + n);
      if (a.bias) y = y + load(a.bias + n);
      store(h + n, y);
    }
    store_row(a.y, m, h, N);
    std::fill(h + N, h + P, C{0});
  }
}

// Also writes these rows' sums for dweight and dbias (N each, or null).
template <class C>
void layer_norm_backward(const LayerNormBackward<C>& a, int64_t begin, int64_t end, C* dweight,
                         C* dbias) {
  constexpr int L = kLanes<C>;
  const int64_t N = a.N, P = padded(N, L);
  std::vector<C> buffer(6 * P);
  C* g = buffer.data();
  C* xhat = g + P;
  C* other = xhat + P;
  C* weight = other + P;
  C* sum_dweight = weight + P;
  C* sum_dbias = sum_dweight + P;
  if (a.weight) {
    std::copy(a.weight, a.weight + N, weight);
  } else {
    std::fill(weight, weight + N, C{1});
  }
  for (int64_t m = begin; m < end; ++m) {
    load_row(g, a.dy, m, N);
    load_row(xhat, a.h, m, N);
    const C mean = a.mean ? a.mean[m] : C{0}, rstd = a.rstd[m];
    Vec<C> s1{}, s2{};
    // forward: y = xhat * weight + bias, xhat = (h - mean) * rstd
    for (int64_t n = 0; n < P; n += L) {  // past N: dy and weight are 0, so every product is
      const Vec<C> dy = load(g + n), x = (load(xhat + n) - mean) * rstd;
      store(sum_dbias + n, load(sum_dbias + n) + dy);
      store(sum_dweight + n, load(sum_dweight + n) + dy * x);
      const Vec<C> wdy = load(weight + n) * dy;
      s1 = s1 + wdy * x;
      s2 = s2 + wdy;
      store(xhat + n, x);
      store(g + n, wdy);
    }
    const C c1 = sum<C>(s1) / N, c2 = a.rms ? C{0} : sum<C>(s2) / N;
    for (int64_t n = 0; n < P; n += L) {
      store(g + n, (load(g + n) - load(xhat + n) * c1 - c2) * rstd);
    }
    if (a.dh.data) {
      load_row(other, a.dh, m, N);
      for (int64_t n = 0; n < P; n += L) store(g + n, load(g + n) + load(other + n));
    }
    // forward: h = residual + dropout(x)
    if (a.dresidual.data) store_row(a.dresidual, m, g, N);
    if (a.dropout.p > 0) drop(g, m, N, a.dropout);
    store_row(a.dx, m, g, N);
    std::fill(g + N, g + P, C{0});
    std::fill(xhat + N, xhat + P, C{0});
  }
  if (dweight) std::copy(sum_dweight, sum_dweight + N, dweight);
  if (dbias) std::copy(sum_dbias, sum_dbias + N, dbias);
}
