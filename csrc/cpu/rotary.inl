// Fragment of rotary.cpp, compiled once per instruction set: the kernel for blocks [begin, end) of
// tokens, counted over all batches. It assumes vec.inl.
//
// Where the elements of a vector of a head do not lie one after the other, it passes through a
// buffer. So does a row of a table unless it has the computing type. Every step reads its pairs
// before it writes them, so that results may lie in the place of x.

// n elements that are `stride` apart, one after the other.
template <class T>
inline void gather(T* out, const T* in, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i * stride];
}
template <class T>
inline void scatter(T* out, int64_t stride, const T* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i * stride] = in[i];
}

// The row of cos or sin at token t, in the computing type: in place, or copied to `buffer`.
template <class C>
inline const C* table_row(const Heads& table, int64_t b, int64_t t, int64_t R, C* buffer) {
  const char* row = table.data + b * table.batch + t * table.token;
  const bool computing = table.dtype == (sizeof(C) == 8 ? Dtype::f64 : Dtype::f32);
  if (computing && table.feature == 1) return reinterpret_cast<const C*>(row);
  TFKERN_DTYPE(table.dtype, {
    const T* x = reinterpret_cast<const T*>(row);
    if (table.feature == 1) {
      convert(buffer, x, R);
    } else {
      for (int64_t r = 0; r < R; ++r) convert(buffer + r, x + r * table.feature, 1);
    }
  });
  return buffer;
}

// The first n lanes, of which there are L if `whole`.
template <bool whole, class T>
inline auto load_lanes(const T* x, int n) {
  if constexpr (whole)
    return load(x);
  else
    return load(x, n);
}
template <bool whole, class T, class V>
inline void store_lanes(T* y, V v, int n) {
  if constexpr (whole)
    store(y, v);
  else
    store(y, v, n);
}

// Turns n pairs whose elements are `half` apart.
template <bool inverse, bool whole, class C, class T>
inline void turn_halves(T* y, const T* x, const C* cos, const C* sin, int64_t half, int n) {
  const Vec<C> xi = load_lanes<whole>(x, n), xj = load_lanes<whole>(x + half, n);
  const Vec<C> ci = load_lanes<whole>(cos, n), cj = load_lanes<whole>(cos + half, n);
  const Vec<C> si = load_lanes<whole>(sin, n), sj = load_lanes<whole>(sin + half, n);
  store_lanes<whole>(y, inverse ? xi * ci + xj * sj : xi * ci - xj * si, n);
  store_lanes<whole>(y + half, inverse ? xj * cj - xi * si : xj * cj + xi * sj, n);
}

// Turns the n / 2 pairs of n elements.
template <bool inverse, bool whole, class C, class T>
inline void turn_neighbours(T* y, const T* x, const C* cos, const C* sin, int n) {
  const Vec<C> v = load_lanes<whole>(x, n), c = load_lanes<whole>(cos, n);
  const Vec<C> s = load_lanes<whole>(sin, n);
  const VecIndex<C> other = iota<C>() ^ 1;
  const Vec<C> signed_s = (iota<C>() & 1) == 0 ? -s : s;
  if constexpr (inverse) {
    store_lanes<whole>(y, v * c + __builtin_shuffle(v * signed_s, other), n);
  } else {
    store_lanes<whole>(y, v * c + __builtin_shuffle(v, other) * signed_s, n);
  }
}

// Turns the vector of a head, and copies what is not turned.
template <bool interleaved, bool inverse, class C, class T>
inline void turn_row(T* y, const T* x, const C* cos, const C* sin, int64_t R, int64_t D) {
  constexpr int L = kLanes<C>;
  int64_t i = 0;
  if constexpr (interleaved) {
    for (; i + L <= R; i += L) {
      turn_neighbours<inverse, true>(y + i, x + i, cos + i, sin + i, L);
    }
    if (i < R) {
      turn_neighbours<inverse, false>(y + i, x + i, cos + i, sin + i, static_cast<int>(R - i));
    }
  } else {
    const int64_t half = R / 2;
    for (; i + L <= half; i += L) {
      turn_halves<inverse, true>(y + i, x + i, cos + i, sin + i, half, L);
    }
    if (i < half) {
      const int n = static_cast<int>(half - i);
      turn_halves<inverse, false>(y + i, x + i, cos + i, sin + i, half, n);
    }
  }
  if (y != x) std::memcpy(y + R, x + R, (D - R) * sizeof(T));
}

// Turns tokens [begin, end) of batch b in all heads of x; cos and sin have a row for each of them.
template <bool interleaved, bool inverse, class C, class T>
void turn_tokens(const Rotary& a, const Heads& x, const Heads& y, int64_t b, int64_t begin,
                 int64_t end, const C* const* cos, const C* const* sin, T* buffer) {
  const bool dense = x.feature == 1 && y.feature == 1;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < x.H; ++h) {
      auto* from = reinterpret_cast<T*>(x.data + b * x.batch + h * x.head + t * x.token);
      auto* to = reinterpret_cast<T*>(y.data + b * y.batch + h * y.head + t * y.token);
      if (dense) {
        turn_row<interleaved, inverse>(to, from, cos[t - begin], sin[t - begin], a.R, a.D);
      } else {
        gather(buffer, from, x.feature, a.D);
        turn_row<interleaved, inverse>(buffer, buffer, cos[t - begin], sin[t - begin], a.R, a.D);
        scatter(to, y.feature, buffer, a.D);
      }
    }
  }
}

// Turns blocks [begin, end). The first argument gives the computing type.
template <class C>
void turn(C, const Rotary& a, int64_t begin, int64_t end) {
  std::vector<C> tables(2 * kBlock * a.R), buffer(a.D);
  const C *cos[kBlock], *sin[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.blocks, first = i % a.blocks * kBlock;
    const int64_t last = std::min(first + kBlock, a.T);
    for (int64_t t = first; t < last; ++t) {
      C* copies = tables.data() + 2 * (t - first) * a.R;
      cos[t - first] = table_row(a.cos, b, t, a.R, copies);
      sin[t - first] = table_row(a.sin, b, t, a.R, copies + a.R);
    }
    for (int j = 0; j < 2; ++j) {
      TFKERN_COMPUTED(C, a.x[j].dtype, {
        auto* run =
            a.interleaved
                ? (a.inverse ? turn_tokens<true, true, C, T> : turn_tokens<true, false, C, T>)
                : (a.inverse ? turn_tokens<false, true, C, T> : turn_tokens<false, false, C, T>);
        run(a, a.x[j], a.y[j], b, first, last, cos, sin, reinterpret_cast<T*>(buffer.data()));
      })
    }
  }
}
