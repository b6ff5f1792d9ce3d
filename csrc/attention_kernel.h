// The kernels of attention.cpp for one instruction set.
//
// Scores are computed transposed, a tile of keys times a block of queries with the queries along
// the lanes: what is per query (running maximum, sum, lse, delta) is then a vector, no reduction
// crosses lanes, and keys and values enter every product as scalars that are broadcast, so they
// need no packing.

// ---- matrix products ----

// Accumulators, rows times vectors, fill the registers but for a row of `right` and a scalar.
template <class C>
constexpr int kRows = TFKERN_VEC_BYTES == 16 ? 4 : 6;
template <class C>
constexpr int kVectors = TFKERN_VEC_BYTES == 64 ? 4 : 2;

// Terms that one accumulator sums before it is added to the result: rounding errors grow with it.
constexpr int64_t kDepth = 64;

// A matrix whose elements are broadcast one at a time, so that its strides are free.
template <class C>
struct Left {
  const C* data;
  int64_t row, column;
};

// The part of `product` whose accumulators are R rows of NV vectors.
template <int R, int NV, class C>
inline void product_tile(int64_t K, Left<C> left, const C* right, int64_t right_stride, C* out,
                         int64_t out_stride, bool add, C alpha) {
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
    for (; k < end; ++k) {
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
    const C factor = k == K ? alpha : C{1};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        C* p = out + r * out_stride + j * L;
        store(p, (add ? load(p) + sum[r][j] : sum[r][j]) * factor);
      }
    }
    add = true;
  } while (k < K);
}

template <int NV, class C>
inline void product_panel(int64_t M, int64_t K, Left<C> left, const C* right, int64_t right_stride,
                          C* out, int64_t out_stride, bool add, C alpha) {
  constexpr int R = kRows<C>;
  int64_t m = 0;
  for (; m + R <= M; m += R) {
    const Left<C> rows{left.data + m * left.row, left.row, left.column};
    product_tile<R, NV>(K, rows, right, right_stride, out + m * out_stride, out_stride, add, alpha);
  }
  const Left<C> rows{left.data + m * left.row, left.row, left.column};
  out += m * out_stride;
  switch (M - m) {
    case 5:
      return product_tile<5, NV>(K, rows, right, right_stride, out, out_stride, add, alpha);
    case 4:
      return product_tile<4, NV>(K, rows, right, right_stride, out, out_stride, add, alpha);
    case 3:
      return product_tile<3, NV>(K, rows, right, right_stride, out, out_stride, add, alpha);
    case 2:
      return product_tile<2, NV>(K, rows, right, right_stride, out, out_stride, add, alpha);
    case 1:
      return product_tile<1, NV>(K, rows, right, right_stride, out, out_stride, add, alpha);
  }
}

// out[M x N] = alpha (left[M x K] right[K x N] + what out holds, if `add`). N fills whole vectors.
template <class C>
void product(int64_t M, int64_t N, int64_t K, Left<C> left, const C* right, int64_t right_stride,
             C* out, int64_t out_stride, bool add, C alpha = 1) {
  constexpr int L = kLanes<C>, NV = kVectors<C>;
  int64_t n = 0;
  for (; n + NV * L <= N; n += NV * L) {
    product_panel<NV>(M, K, left, right + n, right_stride, out + n, out_stride, add, alpha);
  }
  right += n;
  out += n;
  switch ((N - n) / L) {
    case 3:
      return product_panel<3>(M, K, left, right, right_stride, out, out_stride, add, alpha);
    case 2:
      return product_panel<2>(M, K, left, right, right_stride, out, out_stride, add, alpha);
    case 1:
      return product_panel<1>(M, K, left, right, right_stride, out, out_stride, add, alpha);
  }
}

// ---- memory ----

template <class C>
inline int64_t padded(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// Rows of one head of a tensor.
struct HeadRows {
  char* data;
  int64_t stride;  // in bytes
  Dtype dtype;
};

inline HeadRows head_rows(const Heads& t, int64_t b, int64_t h) {
  return {t.data + b * t.batch + h * t.head, t.row, t.dtype};
}

template <class C>
inline void load_row(C* dst, const HeadRows& rows, int64_t i, int64_t N) {
  const char* p = rows.data + i * rows.stride;
  TFKERN_DTYPE(rows.dtype, convert(dst, reinterpret_cast<const T*>(p), N));
}

template <class C>
inline void store_row(const HeadRows& rows, int64_t i, const C* src, int64_t N) {
  char* p = rows.data + i * rows.stride;
  TFKERN_DTYPE(rows.dtype, convert(reinterpret_cast<T*>(p), src, N));
}

// Rows [begin, begin + count) in the computing type: in place if they have it and lie side by side
// (rows a power of two apart would fight for the same cache sets), else copied to `buffer`.
template <class C>
inline Left<C> load_rows(C* buffer, const HeadRows& rows, int64_t begin, int64_t count, int64_t N) {
  constexpr Dtype kDtype = std::is_same_v<C, double> ? Dtype::f64 : Dtype::f32;
  if (rows.dtype == kDtype && rows.stride == N * static_cast<int64_t>(sizeof(C))) {
    return {reinterpret_cast<const C*>(rows.data + begin * rows.stride), N, 1};
  }
  for (int64_t i = 0; i < count; ++i) load_row(buffer + i * N, rows, begin + i, N);
  return {buffer, N, 1};
}

template <class C>
inline Left<C> transposed(Left<C> a) {
  return {a.data, a.column, a.row};
}

// ---- the pattern of the mask ----

// Keys [0, result) are those that some query in [t, t + count) sees.
template <class Arguments>
inline int64_t visible_keys(const Arguments& a, int64_t b, int64_t t, int64_t count) {
  const int64_t query_length = a.query_lengths[b], key_length = a.key_lengths[b];
  if (count <= 0) return 0;
  if (!a.causal) return key_length;
  return std::clamp<int64_t>(t + count + key_length - query_length, 0, key_length);
}

// scores[s][t] = -inf where query t0 + t does not see key s0 + s: s0 + s > t0 + t + offset.
template <class C>
inline void mask_causal(C* scores, int64_t keys, int64_t width, int64_t s0, int64_t t0,
                        int64_t offset) {
  constexpr int L = kLanes<C>;
  const Vec<C> lane = iota<C>(), minus_inf = Vec<C>{} - std::numeric_limits<C>::infinity();
  for (int64_t s = 0; s < keys; ++s) {
    const int64_t first = std::clamp<int64_t>(s0 + s - t0 - offset, 0, width);  // that sees key s
    for (int64_t t = 0; t < first; t += L) {
      C* p = scores + s * kBlock + t;
      store(p, lane < static_cast<C>(first - t) ? minus_inf : load(p));
    }
  }
}

// ---- forward ----

// Takes a tile of scores into the running maximum and sum of each query and turns it into
// p = exp(s - maximum). Returns whether `factor`, by which what was summed before is to be scaled,
// differs from 1 anywhere.
template <class C>
inline bool online_softmax(C* scores, int64_t keys, int64_t width, C* maximum, C* sum, C* factor) {
  constexpr int L = kLanes<C>;
  bool rescale = false;
  for (int64_t t = 0; t < width; t += L) {
    const Vec<C> before = load(maximum + t);
    Vec<C> m0 = before, m1 = before;
    int64_t s = 0;
    for (; s + 2 <= keys; s += 2) {
      m0 = vmax(load(scores + s * kBlock + t), m0);
      m1 = vmax(load(scores + (s + 1) * kBlock + t), m1);
    }
    if (s < keys) m0 = vmax(load(scores + s * kBlock + t), m0);
    const Vec<C> m = vmax(m0, m1);
    store(maximum + t, m);
    // A query that saw no key yet has m = -inf; any finite number in its place gives p = 0.
    const Vec<C> shift = m == -std::numeric_limits<C>::infinity() ? Vec<C>{} : m;
    const Vec<C> f = exp_flush(before - shift);
    store(factor + t, f);
    for (int i = 0; i < L; ++i) rescale |= factor[t + i] != 1;
    // Two sums per tile: their rounding errors grow less than those of one that runs over all keys.
    Vec<C> l0{}, l1{};
    for (s = 0; s + 2 <= keys; s += 2) {
      C* p = scores + s * kBlock + t;
      const Vec<C> e0 = exp_flush(load(p) - shift), e1 = exp_flush(load(p + kBlock) - shift);
      store(p, e0);
      store(p + kBlock, e1);
      l0 = l0 + e0;
      l1 = l1 + e1;
    }
    if (s < keys) {
      C* p = scores + s * kBlock + t;
      const Vec<C> e = exp_flush(load(p) - shift);
      store(p, e);
      l0 = l0 + e;
    }
    store(sum + t, load(sum + t) * f + (l0 + l1));
  }
  return rescale;
}

// Runs tasks (batch, head, block of queries) until none is left.
template <class C>
void attention_forward(const AttentionForward<C>& a, std::atomic<int64_t>& next) {
  constexpr int L = kLanes<C>;
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const int64_t D = a.D, Dv = a.Dv, blocks = (a.T + kBlock - 1) / kBlock;
  Scratch<C> scratch;
  C* qt = scratch.get(D * kBlock);  // q^T
  C* scores = scratch.get(kKeys * kBlock);
  C* ot = scratch.get(Dv * kBlock);  // o^T, to be divided by `sum`
  C* row = scratch.get(std::max(D, Dv));
  C* k_buffer = scratch.get(kKeys * D);
  C* v_buffer = scratch.get(kKeys * Dv);
  C* maximum = scratch.get(kBlock);
  C* sum = scratch.get(kBlock);
  C* factor = scratch.get(kBlock);

  for (int64_t task = next++; task < a.B * a.H * blocks; task = next++) {
    // Neighbouring tasks share keys; within a head the blocks with the most keys come first.
    const int64_t b = task / blocks / a.H, h = task / blocks % a.H, hk = h / (a.H / a.Hk);
    const int64_t t0 = (blocks - 1 - task % blocks) * kBlock;
    const int64_t rows = std::min<int64_t>(kBlock, a.T - t0);
    const int64_t valid = std::clamp<int64_t>(a.query_lengths[b] - t0, 0, rows);
    const int64_t offset = a.key_lengths[b] - a.query_lengths[b];
    const int64_t width = padded<C>(valid), end = visible_keys(a, b, t0, valid);
    const HeadRows q = head_rows(a.q, b, h), k = head_rows(a.k, b, hk), v = head_rows(a.v, b, hk);
    const HeadRows o = head_rows(a.o, b, h);
    C* lse = a.lse + (b * a.H + h) * a.T + t0;

    for (int64_t t = 0; t < width; ++t) {
      if (t < valid) load_row(row, q, t0 + t, D);
      for (int64_t d = 0; d < D; ++d) qt[d * kBlock + t] = t < valid ? row[d] : C{0};
    }
    std::fill(ot, ot + Dv * kBlock, C{0});
    std::fill(maximum, maximum + kBlock, -kInf);
    std::fill(sum, sum + kBlock, C{0});
    for (int64_t s0 = 0; s0 < end; s0 += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, end - s0);
      const Left<C> k_tile = load_rows(k_buffer, k, s0, keys, D);
      const Left<C> v_tile = load_rows(v_buffer, v, s0, keys, Dv);
      product(keys, width, D, k_tile, qt, kBlock, scores, kBlock, false, a.scale);
      if (a.causal && s0 + keys - 1 > t0 + offset) mask_causal(scores, keys, width, s0, t0, offset);
      if (online_softmax(scores, keys, width, maximum, sum, factor)) {
        for (int64_t d = 0; d < Dv; ++d) {
          for (int64_t t = 0; t < width; t += L) {
            C* p = ot + d * kBlock + t;
            store(p, load(p) * load(factor + t));
          }
        }
      }
      product(Dv, width, keys, transposed(v_tile), scores, kBlock, ot, kBlock, true);
    }

    for (int64_t t = 0; t < width; t += L) {
      const Vec<C> l = load(sum + t);
      for (int64_t d = 0; d < Dv; ++d) {
        C* p = ot + d * kBlock + t;
        store(p, l == 0 ? Vec<C>{} : load(p) / l);  // l is 0 if no key is visible
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      lse[t] = t < valid && sum[t] != 0 ? maximum[t] + std::log(sum[t]) : -kInf;
      for (int64_t d = 0; d < Dv; ++d) row[d] = t < valid ? ot[d * kBlock + t] : C{0};
      store_row(o, t0 + t, row, Dv);
    }
  }
}

// ---- backward ----

// sum[t] = sum_d a[d][t] b[d][t], in the order and rounding of `product`: where a query sees
// one key only, sum(do o) then equals dp and ds is exactly 0.
template <class C>
inline void dot_products(const C* a, const C* b, int64_t D, int64_t width, C* sum) {
  constexpr int L = kLanes<C>;
  for (int64_t t = 0; t < width; t += L) {
    Vec<C> total{};
    for (int64_t d = 0; d < D;) {
      Vec<C> s{};
      for (const int64_t end = std::min(D, d + kDepth); d < end; ++d) {
        s += load(a + d * kBlock + t) * load(b + d * kBlock + t);
      }
      total = total + s;
    }
    store(sum + t, total);
  }
}

// p = exp(s - lse), ds = p (dp - delta), in place of s and dp. Queries that take no part have
// lse = inf. delta = sum(do o) - dlse comes as its two terms: if the first cancels dp, the second
// is left exact.
template <class C>
inline void score_gradients(C* s, C* dp, int64_t keys, int64_t width, const C* lse, const C* dot,
                            const C* dlse) {
  constexpr int L = kLanes<C>;
  for (int64_t i = 0; i < keys; ++i, s += kBlock, dp += kBlock) {
    for (int64_t t = 0; t < width; t += L) {
      // forward: p = exp(s - lse), o = p v
      const Vec<C> p = exp_flush(load(s + t) - load(lse + t));
      store(dp + t, p * (load(dp + t) - load(dot + t) + load(dlse + t)));
      store(s + t, p);
    }
  }
}

// Writes dk and dv of `count` keys of a head: the sums of `parts` partial results, which lie
// `distance` elements apart, in their order. A row of `sums` holds dk / scale and dv, each padded
// to whole vectors.
template <class C>
void attention_store_dkv(const AttentionBackward<C>& a, int64_t b, int64_t hk, int64_t begin,
                         int64_t count, C* sums, int64_t parts, int64_t distance) {
  constexpr int L = kLanes<C>;
  const int64_t Dp = padded<C>(a.D), width = Dp + padded<C>(a.Dv);
  const HeadRows dk = head_rows(a.dk, b, hk), dv = head_rows(a.dv, b, hk);
  sums += begin * width;
  for (int64_t s = begin; s < begin + count; ++s, sums += width) {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t n = 0; n < width; n += L) {
        store(sums + n, load(sums + n) + load(sums + part * distance + n));
      }
    }
    for (int64_t d = 0; d < a.D; ++d) sums[d] *= a.scale;
    store_row(dk, s, sums, a.D);
    store_row(dv, s, sums + Dp, a.Dv);
  }
}

// Number of elements of the sums of dk and dv of one head.
template <class C>
int64_t attention_dkv_size(const AttentionBackward<C>& a) {
  return a.S * (padded<C>(a.D) + padded<C>(a.Dv));
}

// Runs tasks (batch, key head, chunk of the blocks of queries of its query heads) until none is
// left. A task walks over the keys for one block of queries after the other: dq of a block is
// complete when the walk ends, dk and dv add up in memory. With several chunks per head a
// task's sums go to `partial`, to be added by attention_store_dkv; with one, it stores them itself.
template <class C>
void attention_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const int64_t D = a.D, Dv = a.Dv, Dp = padded<C>(D), Dvp = padded<C>(Dv), sums_width = Dp + Dvp;
  const int64_t blocks = (a.T + kBlock - 1) / kBlock, group = a.Hk ? a.H / a.Hk : 0;
  Scratch<C> scratch;
  C* qt = scratch.get(D * kBlock);  // q^T
  C* q_rows = scratch.get(kBlock * Dp);
  C* dot = scratch.get(Dv * kBlock);  // do^T
  C* do_rows = scratch.get(kBlock * Dvp);
  C* ot = scratch.get(Dv * kBlock);    // o^T
  C* dqt = scratch.get(D * kBlock);    // dq^T / scale
  C* p = scratch.get(kKeys * kBlock);  // scores, then p, both transposed
  C* ds = scratch.get(kKeys * kBlock);
  C* row = scratch.get(std::max(D, Dv));
  C* k_buffer = scratch.get(kKeys * D);
  C* v_buffer = scratch.get(kKeys * Dv);
  C* lse = scratch.get(kBlock);
  C* dlse = scratch.get(kBlock);
  C* do_o = scratch.get(kBlock);  // sum(do o) of each query
  C* own_sums = a.chunks == 1 ? scratch.get(attention_dkv_size(a)) : nullptr;

  for (int64_t task = next++; task < a.B * a.Hk * a.chunks; task = next++) {
    const int64_t b = task / a.chunks / a.Hk, hk = task / a.chunks % a.Hk, chunk = task % a.chunks;
    const int64_t offset = a.key_lengths[b] - a.query_lengths[b];
    const HeadRows k = head_rows(a.k, b, hk), v = head_rows(a.v, b, hk);
    C* sums = own_sums ? own_sums : a.partial + task * attention_dkv_size(a);
    std::fill(sums, sums + attention_dkv_size(a), C{0});

    // Every chunk takes blocks from all over the sequence, since causal ones differ in work.
    for (int64_t unit = chunk; unit < group * blocks; unit += a.chunks) {
      const int64_t h = hk * group + unit / blocks, t0 = unit % blocks * kBlock;
      const int64_t rows = std::min<int64_t>(kBlock, a.T - t0);
      const int64_t valid = std::clamp<int64_t>(a.query_lengths[b] - t0, 0, rows);
      const int64_t width = padded<C>(valid), end = visible_keys(a, b, t0, valid);
      const int64_t saved = (b * a.H + h) * a.T + t0;  // where lse and dlse of the block begin
      const HeadRows q = head_rows(a.q, b, h), o = head_rows(a.o, b, h);
      const HeadRows d_o = head_rows(a.d_o, b, h), dq = head_rows(a.dq, b, h);

      for (int64_t t = 0; t < width; ++t) {
        C* q_row = q_rows + t * Dp;
        C* do_row = do_rows + t * Dvp;
        std::fill(q_row, q_row + Dp, C{0});
        std::fill(do_row, do_row + Dvp, C{0});
        lse[t] = kInf;
        dlse[t] = 0;
        if (t < valid && a.lse[saved + t] != -kInf) {
          load_row(q_row, q, t0 + t, D);
          load_row(do_row, d_o, t0 + t, Dv);
          load_row(row, o, t0 + t, Dv);
          lse[t] = a.lse[saved + t];
          if (a.dlse) dlse[t] = a.dlse[saved + t];
        } else {
          std::fill(row, row + Dv, C{0});
        }
        for (int64_t d = 0; d < D; ++d) qt[d * kBlock + t] = q_row[d];
        for (int64_t d = 0; d < Dv; ++d) dot[d * kBlock + t] = do_row[d];
        for (int64_t d = 0; d < Dv; ++d) ot[d * kBlock + t] = row[d];
      }
      // forward: o = sum_s p v, lse = log sum_s exp(s), hence ds = p (dp - sum(do o) + dlse)
      dot_products(ot, dot, Dv, width, do_o);
      std::fill(dqt, dqt + D * kBlock, C{0});

      for (int64_t s0 = 0; s0 < end; s0 += kKeys) {
        const int64_t keys = std::min<int64_t>(kKeys, end - s0);
        const Left<C> k_tile = load_rows(k_buffer, k, s0, keys, D);
        const Left<C> v_tile = load_rows(v_buffer, v, s0, keys, Dv);
        C* dk_sums = sums + s0 * sums_width;
        product(keys, width, D, k_tile, qt, kBlock, p, kBlock, false, a.scale);
        if (a.causal && s0 + keys - 1 > t0 + offset) mask_causal(p, keys, width, s0, t0, offset);
        // forward: o = p v
        product(keys, width, Dv, v_tile, dot, kBlock, ds, kBlock, false);
        score_gradients(p, ds, keys, width, lse, do_o, dlse);
        const Left<C> p_tile{p, kBlock, 1}, ds_tile{ds, kBlock, 1};
        product(keys, Dvp, width, p_tile, do_rows, Dvp, dk_sums + Dp, sums_width, true);
        // forward: s = scale q k^T
        product(keys, Dp, width, ds_tile, q_rows, Dp, dk_sums, sums_width, true);
        product(D, width, keys, transposed(k_tile), ds, kBlock, dqt, kBlock, true);
      }

      for (int64_t t = 0; t < rows; ++t) {
        const bool any = t < width && lse[t] != kInf;
        for (int64_t d = 0; d < D; ++d) row[d] = any ? a.scale * dqt[d * kBlock + t] : C{0};
        store_row(dq, t0 + t, row, D);
      }
    }
    if (own_sums) attention_store_dkv(a, b, hk, 0, a.S, sums, 1, 0);
  }
}
