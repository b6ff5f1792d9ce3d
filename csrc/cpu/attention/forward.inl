// Fragment of attention.cpp, compiled once per instruction set: forward, a walk over the
// keys of a block of rows with an online softmax. It assumes scores.inl.

// How far a score may exceed the row's maximum before the maximum is raised; p is thus at most 2^8.
// Most tiles then need not rescale the sums of earlier tiles (FlashAttention-4).
template <class C>
constexpr C kHeadroom = 8 / kLog2E<C>;

// exp(scale x - shift)
template <class V, class C>
inline V exp_difference(V x, C scale, V shift) {
  return exp2_flush((rounded_product(x, V{} + scale) - shift) * kLog2E<C>);
}

// Adds a tile of scores to the maximum (up to kHeadroom) and sum of each row, and hands
// p = exp(score - maximum), times `keep` unless that is null, to `products`. A score is `scale`
// times an element of the tile. Returns true if the maximum of some row was raised; only then is
// `factor` written, by which the earlier o of each row must be multiplied. The maximum is
// subtracted from the rounded score, as in backward: if scores are large, a single different
// rounding changes p by a factor.
template <class C, class Products>
inline bool online_softmax(const C* scores, const C* keep, int64_t keys, int64_t width, C scale,
                           C* maximum, C* sum, C* factor, Products& products) {
  constexpr int L = kLanes<C>;
  VecIndex<C> rescales{};
  Vec<C> before[kBlock / L];
  for (int64_t t = 0; t < width; t += L) {
    const Vec<C> old = before[t / L] = load(maximum + t);
    Vec<C> m0 = broadcast(-std::numeric_limits<C>::infinity()), m1 = m0;
    int64_t s = 0;
    for (; s + 2 <= keys; s += 2) {
      m0 = vmax(load(scores + s * kBlock + t), m0);
      m1 = vmax(load(scores + (s + 1) * kBlock + t), m1);
    }
    if (s < keys) m0 = vmax(load(scores + s * kBlock + t), m0);
    const Vec<C> m = rounded_product(vmax(m0, m1), broadcast(scale));
    const VecIndex<C> raised = m - old > kHeadroom<C>;
    store(maximum + t, raised ? m : old);
    rescales |= raised;
  }
  const bool rescale = any(rescales);
  for (int64_t t = 0; t < width; t += L) {
    // A row that has seen no key yet has m = -inf; any finite number in its place gives p = 0.
    const Vec<C> m = load(maximum + t);
    const Vec<C> shift = m == -std::numeric_limits<C>::infinity() ? Vec<C>{} : m;
    // Two sums per tile have smaller rounding errors than one sum over all keys.
    Vec<C> l0{}, l1{};
    for (int64_t s = 0; s < keys; s += 2) {
      const int64_t n = s * kBlock + t;
      Vec<C> p0 = exp_difference(load(scores + n), scale, shift), p1{};
      if (s + 1 < keys) p1 = exp_difference(load(scores + n + kBlock), scale, shift);
      l0 = l0 + p0;
      l1 = l1 + p1;
      if (keep) {
        p0 = p0 * load(keep + n);
        p1 = p1 * load(keep + n + kBlock);
      }
      products.take(s, t, p0, p1);
    }
    Vec<C> l = load(sum + t);
    if (rescale) {
      const Vec<C> f = exp2_flush((before[t / L] - shift) * kLog2E<C>);
      store(factor + t, f);
      l = l * f;
    }
    store(sum + t, l + (l0 + l1));
  }
  return rescale;
}

// The result of a walk over keys for each row: an estimate of the maximum of the scores s, sum =
// sum exp(s - maximum), and o = sum exp(s - maximum) v, which is divided by sum in the end. Feature
// d of row i of o lies at i * row + d * column.
template <class C>
struct Partial {
  C *maximum, *sum, *o;
  int64_t row, column;

  bool by_rows() const { return column == 1; }
};

template <class C>
inline Partial<C> partial_at(C* data, const AttentionShape& a, const Block& block) {
  C* o = data + 2 * kBlock;
  if (is_narrow<C>(a, block)) return {data, data + kBlock, o, padded<C>(a.Dv), 1};
  return {data, data + kBlock, o, 1, kBlock};
}

// Sets the results to the values before the first key.
template <class C>
inline void start(const Partial<C>& partial, const Block& block, int64_t Dv) {
  std::fill(partial.maximum, partial.maximum + kBlock, -std::numeric_limits<C>::infinity());
  std::fill(partial.sum, partial.sum + kBlock, C{0});
  const int64_t size = partial.by_rows() ? block.rows() * partial.row : Dv * kBlock;
  std::fill(partial.o, partial.o + size, C{0});
}

// Multiplies each row of o by its factor, and returns whether all results are finite.
template <class C>
inline bool rescale(const Partial<C>& partial, const Block& block, int64_t Dv, const C* factor) {
  constexpr int L = kLanes<C>;
  Vec<C> zeros{};  // NaN where a number is not finite
  if (partial.by_rows()) {
    for (int64_t i = 0; i < block.rows(); ++i) {
      for (C* p = partial.o + i * partial.row; p < partial.o + (i + 1) * partial.row; p += L) {
        const Vec<C> x = load(p) * factor[i];
        store(p, x);
        zeros += x * C{0};
      }
    }
    return !any(zeros != 0);
  }
  const int64_t width = padded<C>(block.rows());
  for (int64_t d = 0; d < Dv; ++d) {
    for (int64_t t = 0; t < width; t += L) {
      C* p = partial.o + d * kBlock + t;
      const Vec<C> x = load(p) * load(factor + t);
      store(p, x);
      zeros += x * C{0};
    }
  }
  return !any(zeros != 0);
}

// weight = 1 / sum, or 0 for rows that saw no key.
template <class C>
inline void invert(const Partial<C>& partial, const Block& block, C* weight) {
  constexpr int L = kLanes<C>;
  for (int64_t t = 0; t < padded<C>(block.rows()); t += L) {
    const Vec<C> sum = load(partial.sum + t);
    store(weight + t, sum == 0 ? Vec<C>{} : 1 / sum);
  }
}

// Adds the result of a walk over other keys. In both, o is divided by sum already, and so it is in
// the result.
template <class C>
inline void join(const Partial<C>& partial, const Partial<C>& other, int64_t rows, int64_t Dv) {
  for (int64_t i = 0; i < rows; ++i) {
    const C top = std::max(partial.maximum[i], other.maximum[i]);
    const C m = top == -std::numeric_limits<C>::infinity() ? C{0} : top;  // neither has seen a key
    C ours = std::exp(partial.maximum[i] - m) * partial.sum[i];
    C theirs = std::exp(other.maximum[i] - m) * other.sum[i];
    const C sum = ours + theirs;
    partial.maximum[i] = top;
    partial.sum[i] = sum;
    if (sum == 0) continue;
    ours /= sum;
    theirs /= sum;
    for (int64_t d = 0; d < Dv; ++d) {
      const int64_t n = i * partial.row + d * partial.column;
      partial.o[n] = partial.o[n] * ours + other.o[n] * theirs;
    }
  }
}

// A log-sum-exp as maximum + rest: in one number, rest would be lost beside a large score.
struct LogSumExp {
  double maximum, rest;

  // Adds the score of a key whose value is 0, and returns the factor by which it multiplies o.
  double add(double score) {
    const double gap = score - maximum - rest;
    if (!(gap > 0)) {
      rest += std::log1p(std::exp(gap));
      return 1 / (1 + std::exp(gap));
    }
    maximum = score;
    rest = std::log1p(std::exp(-gap));
    return std::exp(-gap) / (1 + std::exp(-gap));
  }
};

// Writes o and lse of a block, with the sink added. `o_rows` is room for kBlock rows of padded(Dv).
template <class C>
inline void store_output(const AttentionForward<C>& a, const Block& block,
                         const Partial<C>& partial, C* o_rows) {
  constexpr int L = kLanes<C>;
  constexpr double kInf = std::numeric_limits<double>::infinity(), kLn2 = 0.69314718055994531;
  const int64_t rows = block.rows(), Dvp = padded<C>(a.Dv);
  C integer[kBlock], fraction[kBlock];  // log2 of the sums in two terms
  C factor[kBlock] = {};                // factors of o due to the sinks
  for (int64_t t = 0; t < padded<C>(rows); t += L) {
    Vec<C> n;
    store(fraction + t, log2_fraction(load(partial.sum + t), n));
    store(integer + t, n);
  }
  for (int64_t i = 0; i < rows; ++i) {
    LogSumExp lse{-kInf, 0};
    const int64_t row = a.row_index(block.document, block.head(i), block.query(i));
    if (partial.sum[i] != 0) {
      lse = {partial.maximum[i], (double{integer[i]} + fraction[i]) * kLn2};
      if (a.sink) factor[i] = static_cast<C>(lse.add(a.sink[block.head(i)]));
    } else if (a.sink) {
      lse.maximum = a.sink[block.head(i)];
    }
    const C value = a.lse[row] = static_cast<C>(lse.maximum + lse.rest);
    a.lse_rest[row] = value == -kInf ? C{0} : static_cast<C>(lse.maximum - value + lse.rest);
  }
  if (a.sink) rescale(partial, block, a.Dv, factor);
  if (!partial.by_rows()) transpose(partial.o, kBlock, Dvp, padded<C>(rows), o_rows, Dvp);
  for (int64_t i = 0; i < rows; ++i) {
    const C* row = (partial.by_rows() ? partial.o : o_rows) + i * Dvp;
    store_row(query_rows(a.o, block.document, block.head(i)), block.query(i), row, a.Dv);
  }
}

// A task: part `part` of the `parts` parts of the keys of a block of rows.
struct ForwardTask {
  Block block;
  int64_t hk, part, parts;
};

// The task of this index. Neighbouring tasks share keys; within a head, the blocks with the most
// keys come first.
template <class C>
inline ForwardTask forward_task(const AttentionForward<C>& a, int64_t task) {
  const auto after = std::upper_bound(a.first_task.begin(), a.first_task.end(), task);
  const int64_t number = after - a.first_task.begin() - 1;
  const Document& document = a.documents[number];
  const int64_t parts = a.parts(document), blocks = a.blocks(document);
  task -= a.first_task[number];
  const int64_t hk = task / parts / blocks, i = blocks - 1 - task / parts % blocks;
  return {block_of(a, number, hk, i), hk, task % parts, parts};
}

// ---- products of the forward ----
//
// There are three implementations with the same functions (the third is in pairs.inl):
//
//   load: reads q of a block.
//   multiply: scores = q k^T for keys [s0, s0 + keys).
//   take: stores p of keys s0 + s and s0 + s + 1 for a vector of rows.
//   add_values: o += p v.
//
// A walk over keys must begin at a multiple of kKeyAlignment.

// Products with a block's rows along the lanes.
template <class C>
struct WideForward {
  static constexpr int64_t kKeyAlignment = 4;
  C *q_rows, *qt, *scores;  // p replaces the scores in place
  WidenedRows<C> k_rows, v_rows;

  WideForward(Scratch& scratch, const AttentionForward<C>& a)
      : k_rows(scratch, a.longest(), a.D), v_rows(scratch, a.longest(), a.Dv) {
    q_rows = scratch.get<C>(kBlock * padded<C>(a.D));
    qt = scratch.get<C>(kBlock * padded<C>(a.D));
    scores = scratch.get<C>(kKeys * kBlock);
  }
  void load(const AttentionForward<C>& a, const Block& block) {
    const int64_t width = padded<C>(block.rows());
    load_block(q_rows, a.q, block, a.D, width);
    transpose(q_rows, padded<C>(a.D), width, a.D, qt);
  }
  void multiply(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    seen_parts(a, block, s0, keys, kLanes<C>, [&](int64_t s, int64_t count, int64_t t) {
      product(count, padded<C>(block.rows()) - t, a.D, k_rows.get(k, s0 + s, s0 + s + count),
              qt + t, kBlock, scores + s * kBlock + t, kBlock, false, v_rows.at(v, s0 + s));
    });
  }
  void take(int64_t s, int64_t t, Vec<C> p0, Vec<C> p1) {
    store(scores + s * kBlock + t, p0);
    store(scores + (s + 1) * kBlock + t, p1);
  }
  void add_values(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, C* o) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    // The next memory that is needed: the next keys or, after the last tile, the rows of o.
    const HeadRows output = query_rows(a.o, block.document, block.h0);
    const C* ahead = s0 + keys < block.end ? k_rows.at(k, s0 + keys)
                                           : reinterpret_cast<const C*>(output.at(block.t0));
    seen_parts(a, block, s0, keys, kLanes<C>, [&](int64_t s, int64_t count, int64_t t) {
      const BroadcastMatrix<C> tile = v_rows.get(v, s0 + s, s0 + s + count);
      product(a.Dv, padded<C>(block.rows()) - t, count, transposed(tile), scores + s * kBlock + t,
              kBlock, o + t, kBlock, true, ahead + s * a.Dv);
    });
  }
};

// Products with the features along the lanes, for narrow blocks.
template <class C>
struct NarrowForward {
  static constexpr int64_t kKeyAlignment = 4;
  C *q_rows, *v_buffer, *scores;
  NarrowScores<C> narrow;

  NarrowForward(Scratch& scratch, const AttentionForward<C>& a) : narrow(scratch, a.D) {
    q_rows = scratch.get<C>(kLanes<C> / 2 * padded<C>(a.D));
    v_buffer = scratch.get<C>(kKeys * padded<C>(a.Dv));
    scores = scratch.get<C>(kKeys * kBlock);
  }
  void load(const AttentionForward<C>& a, const Block& block) {
    load_block(q_rows, a.q, block, a.D, block.rows());
  }
  void multiply(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys) {
    narrow.multiply(a, block, hk, s0, keys, q_rows, scores);
  }
  void take(int64_t s, int64_t t, Vec<C> p0, Vec<C> p1) {
    store(scores + s * kBlock + t, p0);
    store(scores + (s + 1) * kBlock + t, p1);
  }
  void add_values(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, C* o) {
    add_values(a, block, hk, s0, keys, BroadcastMatrix<C>{scores, 1, kBlock}, o);
  }
  void add_values(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, BroadcastMatrix<C> p, C* o) {
    const int64_t Dvp = padded<C>(a.Dv);
    const HeadRows v = narrow_rows(v_buffer, key_rows(a.v, block.document, hk), s0, keys, a.Dv);
    TFKERN_COMPUTED(C, v.dtype, {
      const BroadcastMatrix<T> right = matrix<T>(v);
      product<true>(block.rows(), Dvp, keys, p, right.data, right.row, o, Dvp, true);
    });
  }
};

// ---- the walk ----

// Buffers for a tile of scores.
template <class C>
struct ForwardRoom {
  C *tile, *buffer, *factor;
  RowInputs<C> lanes;

  explicit ForwardRoom(Scratch& scratch) {
    for (C** x : {&tile, &buffer}) *x = scratch.get<C>(kKeys * kBlock);
    factor = scratch.get<C>(kBlock);
  }
};

// Walks over keys [begin, end) and adds them to `partial`. If `weight` is given, it multiplies the
// p of each row in o, but not in their sum.
template <class C, class Products>
void walk_keys(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t begin,
               int64_t end, Products& products, ForwardRoom<C>& room, const Partial<C>& partial,
               const C* weight = nullptr) {
  const int64_t width = padded<C>(block.rows());
  products.load(a, block);
  for (int64_t s0 = begin / Products::kKeyAlignment * Products::kKeyAlignment; s0 < end;
       s0 += kKeys) {
    const int64_t keys = std::min<int64_t>(kKeys, end - s0);
    products.multiply(a, block, hk, s0, keys);
    finish_scores(products.scores, a, block, room.lanes, s0, keys, room.tile, room.buffer);
    if (a.drops) dropout_tile(room.tile, a, room.lanes, s0, keys, width);
    if (weight) weigh_tile(room.tile, weight, a.drops, width);
    if (online_softmax(products.scores, a.drops || weight ? room.tile : nullptr, keys, width,
                       late_scale(a), partial.maximum, partial.sum, room.factor, products)) {
      rescale(partial, block, a.Dv, room.factor);
    }
    products.add_values(a, block, hk, s0, keys, partial.o);
  }
}

// walk_keys for the usual case of decoding: the block is narrow, its rows see all of these keys,
// and scores are just scaled products. The keys lie along the lanes.
template <class C>
void walk_narrow(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t begin,
                 int64_t end, NarrowForward<C>& products, const Partial<C>& partial) {
  constexpr int L = kLanes<C>;
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const C scale = late_scale(a);
  products.load(a, block);
  for (int64_t s0 = begin; s0 < end; s0 += kKeys) {
    const int64_t keys = std::min<int64_t>(kKeys, end - s0);
    C* scores = products.narrow.by_rows(a, block, hk, s0, keys, products.q_rows);
    for (int64_t i = 0; i < block.rows(); ++i) {
      C* p = scores + i * kKeys;
      std::fill(p + keys, p + padded<C>(keys), -kInf);
      Vec<C> top = broadcast(-kInf);
      for (int64_t s = 0; s < keys; s += L) top = vmax(load(p + s), top);
      const C before = partial.maximum[i], m = rounded_product(max<C>(top), scale);
      if (m - before > kHeadroom<C>) {
        const C factor = std::exp(before - m);
        partial.maximum[i] = m;
        partial.sum[i] *= factor;
        C* o = partial.o + i * partial.row;
        for (int64_t d = 0; d < a.Dv; d += L) store(o + d, load(o + d) * factor);
      }
      const C shift = partial.maximum[i] == -kInf ? C{0} : partial.maximum[i];
      Vec<C> sums{};
      for (int64_t s = 0; s < keys; s += L) {
        const Vec<C> e = exp_difference(load(p + s), scale, broadcast(shift));
        store(p + s, e);
        sums = sums + e;
      }
      partial.sum[i] += sum<C>(sums);
    }
    products.add_values(a, block, hk, s0, keys, BroadcastMatrix<C>{scores, kKeys, 1}, partial.o);
  }
}

#if TFKERN_VEC_BYTES == 64
// clang-format off
#include "pairs.inl"
#include "amx.inl"
// clang-format on
#endif

// Runs forward tasks until none is left.
template <class C, class Products>
void forward_tasks(const AttentionForward<C>& a, std::atomic<int64_t>& next) {
  const int64_t Dv = a.Dv;
  const bool plain = scaled_late(a) && !a.mask.data && !a.drops;
  Scratch scratch;
  ForwardRoom<C> room(scratch);
  Products products(scratch, a);
  NarrowForward<C> narrow(scratch, a);
  C* own_partial = scratch.get<C>(a.partial_size());
  C* o_rows = scratch.get<C>(kBlock * padded<C>(Dv));

  for (int64_t task = take(next); task < a.first_task.back(); task = take(next)) {
    const auto [block, hk, part, parts] = forward_task(a, task);
    const int64_t begin = std::max(block.begin, part * a.part_keys);
    const int64_t end = parts == 1 ? block.end : std::min(block.end, (part + 1) * a.part_keys);
    C* data = parts == 1 ? own_partial : a.partials + task * a.partial_size();
    const Partial<C> partial = partial_at(data, a, block);

    fill_lanes(room.lanes, a, block);
    start(partial, block, Dv);
    if (is_narrow<C>(a, block) && plain && !band_hides(a, block, begin, end - begin)) {
      walk_narrow(a, block, hk, begin, end, narrow, partial);
    } else if (is_narrow<C>(a, block)) {
      walk_keys(a, block, hk, begin, end, narrow, room, partial);
    } else {
      walk_keys(a, block, hk, begin, end, products, room, partial);
    }
    C weight[kBlock] = {};
    invert(partial, block, weight);
    if (!rescale(partial, block, Dv, weight)) {
      // Large values overflow if their weights sum up to more than 1. A second walk divides the
      // weights first: the maximum and the sum are known by now.
      C maximum[kBlock];
      std::copy(partial.maximum, partial.maximum + kBlock, maximum);
      start(partial, block, Dv);
      std::copy(maximum, maximum + kBlock, partial.maximum);
      if (is_narrow<C>(a, block)) {
        walk_keys(a, block, hk, begin, end, narrow, room, partial, weight);
      } else {
        walk_keys(a, block, hk, begin, end, products, room, partial, weight);
      }
    }
    // The thread that finishes a block's last part joins all parts, always in the same order.
    if (parts > 1 && ++a.finished[task - part] < parts) continue;
    const Partial<C> first = partial_at(data - part * a.partial_size(), a, block);
    for (int64_t i = 1; i < parts; ++i) {
      C* other = a.partials + (task - part + i) * a.partial_size();
      join(first, partial_at(other, a, block), block.rows(), Dv);
    }
    store_output(a, block, first, o_rows);
  }
}

// Runs tasks until none is left. If a block has several parts, their results go to `a.partials`.
template <class C>
void attention_forward(const AttentionForward<C>& a, std::atomic<int64_t>& next) {
#if TFKERN_VEC_BYTES == 64
  if constexpr (std::is_same_v<C, float>) {
    if (a.transposed) return forward_tasks<C, PairForward<AmxEngine>>(a, next);
    if (multiplies_pairs(a)) return forward_tasks<C, PairForward<PairEngine>>(a, next);
  }
#endif
  forward_tasks<C, WideForward<C>>(a, next);
}
