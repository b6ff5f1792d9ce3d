// The kernels of attention.cpp for one instruction set.
#include "attention_product.h"
#include "attention_scores.h"

// ---- forward: a walk over the keys of a block of rows with an online softmax ----

// How far, as a power of two, a score may exceed the maximum it is compared with before that is
// raised. Most tiles then leave the sums of earlier ones as they are (FlashAttention-4).
constexpr int kHeadroom = 8;

// Takes a tile of scores into the maximum (up to kHeadroom) and sum of each query and turns it into
// p = 2^(unit score - maximum), times `keep` unless that is null, for the products to take. Returns
// whether `factor`, by which what was summed before is to be scaled, differs from 1 anywhere; only
// then it is written.
template <class C, class Products>
inline bool online_softmax(const C* scores, const C* keep, int64_t keys, int64_t width, C unit,
                           C* maximum, C* sum, C* factor, Products& products) {
  constexpr int L = kLanes<C>;
  bool rescale = false;
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
    const Vec<C> m = vmax(m0, m1) * unit;
    const VecIndex<C> raised = m > old + C{kHeadroom};
    store(maximum + t, raised ? m : old);
    rescale |= any(raised);
  }
  for (int64_t t = 0; t < width; t += L) {
    // A query that saw no key yet has m = -inf; any finite number in its place gives p = 0.
    const Vec<C> m = load(maximum + t);
    const Vec<C> shift = m == -std::numeric_limits<C>::infinity() ? Vec<C>{} : m;
    // Two sums per tile: their rounding errors grow less than those of one that runs over all keys.
    Vec<C> l0{}, l1{};
    for (int64_t s = 0; s < keys; s += 2) {
      const int64_t n = s * kBlock + t;
      Vec<C> p0 = exp2_flush(load(scores + n) * unit - shift), p1{};
      if (s + 1 < keys) p1 = exp2_flush(load(scores + n + kBlock) * unit - shift);
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
      const Vec<C> f = exp2_flush(before[t / L] - shift);
      store(factor + t, f);
      l = l * f;
    }
    store(sum + t, l + (l0 + l1));
  }
  return rescale;
}

// Rows too few to fill half a vector, as in decoding: products then run along the features instead
// of the rows, and o is kept by rows.
template <class C>
inline bool is_narrow(const Block& block) {
  return block.rows() <= kLanes<C> / 2;
}

// What a walk over keys leaves of each row: an estimate of the maximum of s / ln(2), sum = sum 2^(s
// / ln(2) - maximum) and o = sum 2^(s / ln(2) - maximum) v, whose feature d of row i lies at i *
// row + d * column.
template <class C>
struct Partial {
  C *maximum, *sum, *o;
  int64_t row, column;
};

template <class C>
inline Partial<C> partial_at(C* data, const Block& block, int64_t Dv) {
  C* o = data + 2 * kBlock;
  if (is_narrow<C>(block)) return {data, data + kBlock, o, padded<C>(Dv), 1};
  return {data, data + kBlock, o, 1, kBlock};
}

// Before any key, or after the sink, which is a key whose value is 0.
template <class C>
inline void start(const Partial<C>& partial, const AttentionForward<C>& a, const Block& block,
                  bool with_sink) {
  constexpr C kInf = std::numeric_limits<C>::infinity();
  std::fill(partial.maximum, partial.maximum + kBlock, -kInf);
  std::fill(partial.sum, partial.sum + kBlock, C{0});
  for (int64_t i = 0; with_sink && i < block.rows(); ++i) {
    partial.maximum[i] = a.sink[block.head(i)] * kLog2E<C>;
    partial.sum[i] = partial.maximum[i] > -kInf ? 1 : 0;
  }
  const int64_t size = is_narrow<C>(block) ? block.rows() * partial.row : a.Dv * kBlock;
  std::fill(partial.o, partial.o + size, C{0});
}

template <class C>
inline void rescale(const Partial<C>& partial, const Block& block, int64_t Dv, const C* factor) {
  constexpr int L = kLanes<C>;
  if (is_narrow<C>(block)) {
    for (int64_t i = 0; i < block.rows(); ++i) {
      for (C* p = partial.o + i * partial.row; p < partial.o + (i + 1) * partial.row; p += L) {
        store(p, load(p) * factor[i]);
      }
    }
    return;
  }
  const int64_t width = padded<C>(block.rows());
  for (int64_t d = 0; d < Dv; ++d) {
    for (int64_t t = 0; t < width; t += L) {
      C* p = partial.o + d * kBlock + t;
      store(p, load(p) * load(factor + t));
    }
  }
}

// Takes in what a walk over other keys left.
template <class C>
inline void join(const Partial<C>& partial, const Partial<C>& other, int64_t rows, int64_t Dv) {
  for (int64_t i = 0; i < rows; ++i) {
    const C m = std::max(partial.maximum[i], other.maximum[i]);
    if (m == -std::numeric_limits<C>::infinity()) continue;  // no key seen yet
    const C ours = std::exp2(partial.maximum[i] - m), theirs = std::exp2(other.maximum[i] - m);
    partial.maximum[i] = m;
    partial.sum[i] = partial.sum[i] * ours + other.sum[i] * theirs;
    for (int64_t d = 0; d < Dv; ++d) {
      const int64_t n = i * partial.row + d * partial.column;
      partial.o[n] = partial.o[n] * ours + other.o[n] * theirs;
    }
  }
}

// Room for the rows of o: kBlock rows of padded(Dv).
template <class C>
inline void store_output(const AttentionForward<C>& a, const Block& block,
                         const Partial<C>& partial, C* o_rows) {
  constexpr int L = kLanes<C>;
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const int64_t rows = block.rows(), Dvp = padded<C>(a.Dv);
  const C scale = late_scale(a), unit = kLog2E<C> * scale;
  const bool narrow = is_narrow<C>(block);
  C integer[kBlock], fraction[kBlock];  // of log2 of the sums
  for (int64_t t = 0; t < padded<C>(rows); t += L) {
    Vec<C> n;
    store(fraction + t, log2_fraction(load(partial.sum + t), n));
    store(integer + t, n);
  }
  if (!narrow) {
    for (int64_t t = 0; t < padded<C>(rows); t += L) {
      const Vec<C> sum = load(partial.sum + t);
      const Vec<C> weight = sum == 0 ? Vec<C>{} : 1 / sum;  // 0 if nothing is visible
      for (int64_t d = 0; d < a.Dv; ++d) {
        C* p = partial.o + d * kBlock + t;
        store(p, load(p) * weight);
      }
    }
    transpose(partial.o, kBlock, Dvp, padded<C>(rows), o_rows, Dvp);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t h = block.head(i), t = block.query(i);
    const C sum = partial.sum[i];
    C* row = (narrow ? partial.o : o_rows) + i * Dvp;
    for (int64_t d = 0; narrow && d < a.Dv; ++d) row[d] = sum == 0 ? C{0} : row[d] / sum;
    store_row(query_rows(a.o, block.document, h), t, row, a.Dv);
    // By the factor that the scores were multiplied with, which keeps lse of a single key its score
    // but for rounding.
    const double log2_sum = static_cast<double>(integer[i]) + fraction[i];
    const double lse = (partial.maximum[i] + log2_sum) / unit * scale;
    a.lse[a.row_index(block.document, h, t)] = sum == 0 ? -kInf : static_cast<C>(lse);
  }
}

// A task is a part of the keys of a block of rows.
struct ForwardTask {
  Block block;
  int64_t hk, part, parts;
};

// Neighbouring tasks share keys; within a head the blocks with the most keys come first.
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
// Three ways with the same functions (the third is in attention_amx.h). load: takes the rows of a
// block. multiply: `scores` = q k^T of keys [s0, s0 + keys). take: p of keys s0 + s and s0 + s + 1
// and a vector of rows. add_values: o += p v. A walk may begin at multiples of kFirst.

// By vectors of rows.
template <class C>
struct WideForward {
  static constexpr int64_t kFirst = 4;
  C *q_rows, *qt, *scores;  // which become p in place
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
    seen_parts<C>(a, block, s0, keys, [&](int64_t s, int64_t count, int64_t t) {
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
    // After the last tile come the rows of o.
    const HeadRows output = query_rows(a.o, block.document, block.h0);
    const C* ahead = s0 + keys < block.end ? k_rows.at(k, s0 + keys)
                                           : reinterpret_cast<const C*>(output.at(block.t0));
    seen_parts<C>(a, block, s0, keys, [&](int64_t s, int64_t count, int64_t t) {
      const Left<C> tile = v_rows.get(v, s0 + s, s0 + s + count);
      product(a.Dv, padded<C>(block.rows()) - t, count, transposed(tile), scores + s * kBlock + t,
              kBlock, o + t, kBlock, true, ahead + s * a.Dv);
    });
  }
};

// By vectors of features.
template <class C>
struct NarrowForward {
  static constexpr int64_t kFirst = 4;
  C *q_rows, *k_buffer, *v_buffer, *scores;
  C* row_scores;  // kKeys of each row

  NarrowForward(Scratch& scratch, const AttentionForward<C>& a) {
    q_rows = scratch.get<C>(kLanes<C> / 2 * padded<C>(a.D));
    k_buffer = scratch.get<C>(kKeys * padded<C>(a.D));
    v_buffer = scratch.get<C>(kKeys * padded<C>(a.Dv));
    scores = scratch.get<C>(kKeys * kBlock);
    row_scores = scratch.get<C>(kLanes<C> * kKeys);
  }
  void load(const AttentionForward<C>& a, const Block& block) {
    load_block(q_rows, a.q, block, a.D, block.rows());
  }
  void multiply_rows(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                     int64_t keys) {
    const int64_t Dp = padded<C>(a.D);
    const HeadRows k = narrow_rows(k_buffer, key_rows(a.k, block.document, hk), s0, keys, a.D);
    TFKERN_COMPUTED(
        C, k.dtype,
        row_product(keys, block.rows(), Dp, matrix<T>(k), q_rows, Dp, row_scores, kKeys));
  }
  void multiply(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys) {
    multiply_rows(a, block, hk, s0, keys);
    transpose(row_scores, kKeys, kLanes<C>, padded<C>(keys), scores);
  }
  void take(int64_t s, int64_t t, Vec<C> p0, Vec<C> p1) {
    store(scores + s * kBlock + t, p0);
    store(scores + (s + 1) * kBlock + t, p1);
  }
  void add_values(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, C* o) {
    add_values(a, block, hk, s0, keys, Left<C>{scores, 1, kBlock}, o);
  }
  void add_values(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, Left<C> p, C* o) {
    const int64_t Dvp = padded<C>(a.Dv);
    const HeadRows v = narrow_rows(v_buffer, key_rows(a.v, block.document, hk), s0, keys, a.Dv);
    TFKERN_COMPUTED(C, v.dtype, {
      const Left<T> right = matrix<T>(v);
      product(block.rows(), Dvp, keys, p, right.data, right.row, o, Dvp, true);
    });
  }
};

// ---- the walk ----

// Room for what belongs to a tile of scores.
template <class C>
struct ForwardRoom {
  C *tile, *buffer, *factor;
  Lanes<C> lanes;

  explicit ForwardRoom(Scratch& scratch) {
    for (C** x : {&tile, &buffer}) *x = scratch.get<C>(kKeys * kBlock);
    factor = scratch.get<C>(kBlock);
  }
};

template <class C, class Products>
void walk_keys(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t begin,
               int64_t end, Products& products, ForwardRoom<C>& room, const Partial<C>& partial) {
  const int64_t width = padded<C>(block.rows());
  const C unit = kLog2E<C> * late_scale(a);
  products.load(a, block);
  for (int64_t s0 = begin / Products::kFirst * Products::kFirst; s0 < end; s0 += kKeys) {
    const int64_t keys = std::min<int64_t>(kKeys, end - s0);
    products.multiply(a, block, hk, s0, keys);
    finish_scores(products.scores, a, block, room.lanes, s0, keys, room.tile, room.buffer);
    if (a.dropout) dropout_tile(room.tile, a, room.lanes, s0, keys, width);
    if (online_softmax(products.scores, a.dropout ? room.tile : nullptr, keys, width, unit,
                       partial.maximum, partial.sum, room.factor, products)) {
      rescale(partial, block, a.Dv, room.factor);
    }
    products.add_values(a, block, hk, s0, keys, partial.o);
  }
}

// The same for a narrow block whose rows see all of these keys, with nothing done to the scores:
// decoding as it mostly is. The keys lie along the lanes.
template <class C>
void walk_narrow(const AttentionForward<C>& a, const Block& block, int64_t hk, int64_t begin,
                 int64_t end, NarrowForward<C>& products, const Partial<C>& partial) {
  constexpr int L = kLanes<C>;
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const C unit = kLog2E<C> * late_scale(a);
  products.load(a, block);
  for (int64_t s0 = begin; s0 < end; s0 += kKeys) {
    const int64_t keys = std::min<int64_t>(kKeys, end - s0);
    products.multiply_rows(a, block, hk, s0, keys);
    for (int64_t i = 0; i < block.rows(); ++i) {
      C* p = products.row_scores + i * kKeys;
      std::fill(p + keys, p + padded<C>(keys), -kInf);
      Vec<C> top = broadcast(-kInf);
      for (int64_t s = 0; s < keys; s += L) top = vmax(load(p + s), top);
      const C before = partial.maximum[i], m = max<C>(top) * unit;
      if (m > before + kHeadroom) {
        const C factor = std::exp2(before - m);
        partial.maximum[i] = m;
        partial.sum[i] *= factor;
        C* o = partial.o + i * partial.row;
        for (int64_t d = 0; d < a.Dv; d += L) store(o + d, load(o + d) * factor);
      }
      const C shift = partial.maximum[i] == -kInf ? C{0} : partial.maximum[i];
      Vec<C> sums{};
      for (int64_t s = 0; s < keys; s += L) {
        const Vec<C> e = exp2_flush(load(p + s) * unit - shift);
        store(p + s, e);
        sums = sums + e;
      }
      partial.sum[i] += sum<C>(sums);
    }
    products.add_values(a, block, hk, s0, keys, Left<C>{products.row_scores, kKeys, 1}, partial.o);
  }
}

#if TFKERN_VEC_BYTES == 64
#include "attention_amx.h"
#endif

template <class C, class Products>
void forward_tasks(const AttentionForward<C>& a, std::atomic<int64_t>& next) {
  const int64_t Dv = a.Dv;
  const bool plain = scaled_late(a) && !a.mask.data && !a.dropout;
  Scratch scratch;
  ForwardRoom<C> room(scratch);
  Products products(scratch, a);
  NarrowForward<C> narrow(scratch, a);
  C* own_partial = scratch.get<C>(a.partial_size());
  C* o_rows = scratch.get<C>(kBlock * padded<C>(Dv));

  for (int64_t task = next++; task < a.first_task.back(); task = next++) {
    const auto [block, hk, part, parts] = forward_task(a, task);
    const int64_t begin = std::max(block.begin, part * a.part_keys);
    const int64_t end = parts == 1 ? block.end : std::min(block.end, (part + 1) * a.part_keys);
    C* data = parts == 1 ? own_partial : a.partials + task * a.partial_size();
    const Partial<C> partial = partial_at(data, block, Dv);

    fill_lanes(room.lanes, a, block);
    start(partial, a, block, a.sink && part == 0);
    if (is_narrow<C>(block) && plain && !band_hides(a, block, begin, end - begin)) {
      walk_narrow(a, block, hk, begin, end, narrow, partial);
    } else if (is_narrow<C>(block)) {
      walk_keys(a, block, hk, begin, end, narrow, room, partial);
    } else {
      walk_keys(a, block, hk, begin, end, products, room, partial);
    }
    // Who finishes the last part of a block joins them all, in their order.
    if (parts > 1 && ++a.finished[task - part] < parts) continue;
    const Partial<C> first = partial_at(data - part * a.partial_size(), block, Dv);
    for (int64_t i = 1; i < parts; ++i) {
      C* other = a.partials + (task - part + i) * a.partial_size();
      join(first, partial_at(other, block, Dv), block.rows(), Dv);
    }
    store_output(a, block, first, o_rows);
  }
}

// Runs tasks until none is left. What the parts of a block leave goes to `a.partials`, if there are
// several.
template <class C>
void attention_forward(const AttentionForward<C>& a, std::atomic<int64_t>& next) {
#if TFKERN_VEC_BYTES == 64
  if constexpr (std::is_same_v<C, float>) {
    if (a.transposed) return forward_tasks<C, AmxForward>(a, next);
  }
#endif
  forward_tasks<C, WideForward<C>>(a, next);
}

#include "attention_backward.h"
