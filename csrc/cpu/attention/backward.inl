// Fragment of attention.cpp, compiled once per instruction set: backward. s and p are computed
// again, tile by tile. It assumes forward.inl.

// sum[t] = sum_d a[d][t] b[d][t], in the order and rounding of `product`. If a query sees one key
// only, sum(do o) then differs from dp, and so ds from 0, only by the rounding of o.
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

// The number of blocks of rows that walk over the keys together: each tile of k, v, dk and dv is
// fetched once for all of them.
constexpr int64_t kBlocksPerWalk = 4;

// ---- products of the backward ----
//
// There are two implementations with the same functions (the second is in pairs_backward.inl).
// Copies of an object share its buffers for tiles.
//
//   allocate_rows: gives a copy buffers of its own for the rows of a block.
//   load: reads q, do and o of a block (0 for rows with lse = inf), and sets do_o = sum(do o).
//   multiply: s = q k^T, as in forward, and dp = do v^T for keys [s0, s0 + keys). Unless `sums` is
//     null, it points to the dk and dv of these keys, which are prefetched.
//   take: stores p and ds of keys s0 + s and s0 + s + 1 for a vector of rows.
//   add: dv += p^T do and dk += ds^T q for these keys, and dq^T += k^T ds.

// Products with a block's rows along the lanes.
template <class C>
struct WideBackward {
  struct Registers {};
  static constexpr int64_t kKeyAlignment = 4;
  C *q_rows, *do_rows, *o_rows, *qt, *dot, *ot;
  std::shared_ptr<WidenedRows<C>> k_rows, v_rows;
  NarrowScores<C> narrow;
  C *s, *dp;  // p and ds replace s and dp in place

  WideBackward(Scratch& scratch, const AttentionBackward<C>& a) : narrow(scratch, a.D) {
    for (C** x : {&o_rows, &ot}) *x = scratch.get<C>(padded<C>(a.Dv) * kBlock);
    for (C** x : {&s, &dp}) *x = scratch.get<C>(kKeys * kBlock);
    k_rows = std::make_shared<WidenedRows<C>>(scratch, a.longest(), a.D);
    v_rows = std::make_shared<WidenedRows<C>>(scratch, a.longest(), a.Dv);
  }
  void allocate_rows(Scratch& scratch, const AttentionBackward<C>& a) {
    for (C** x : {&q_rows, &qt}) *x = scratch.get<C>(padded<C>(a.D) * kBlock);
    for (C** x : {&do_rows, &dot}) *x = scratch.get<C>(padded<C>(a.Dv) * kBlock);
  }
  void load(const AttentionBackward<C>& a, const Block& block, const C* lse, C* do_o) {
    const int64_t width = padded<C>(block.rows()), Dp = padded<C>(a.D), Dvp = padded<C>(a.Dv);
    load_block(q_rows, a.q, block, a.D, width, lse);
    load_block(do_rows, a.d_o, block, a.Dv, width, lse);
    load_block(o_rows, a.o, block, a.Dv, width, lse);
    transpose(q_rows, Dp, width, a.D, qt);
    transpose(do_rows, Dvp, width, a.Dv, dot);
    transpose(o_rows, Dvp, width, a.Dv, ot);
    dot_products(ot, dot, a.Dv, width, do_o);
  }
  void multiply(const AttentionBackward<C>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys, const C* sums) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    const int64_t width = padded<C>(block.rows());
    const C* rest = sums ? sums + keys * padded<C>(a.D) : nullptr;
    const bool wide = !is_narrow<C>(a, block);
    if (!wide) narrow.multiply(a, block, hk, s0, keys, q_rows, s);
    seen_parts(a, block, s0, keys, kLanes<C>, [&](int64_t i, int64_t count, int64_t t) {
      const int64_t begin = s0 + i, n = i * kBlock + t;
      if (wide) {
        product(count, width - t, a.D, k_rows->get(k, begin, begin + count), qt + t, kBlock, s + n,
                kBlock, false, sums ? sums + i * padded<C>(a.D) : nullptr);
      }
      product(count, width - t, a.Dv, v_rows->get(v, begin, begin + count), dot + t, kBlock, dp + n,
              kBlock, false, rest ? rest + i * padded<C>(a.Dv) : nullptr);
      for (; t > 0 && i < keys; ++i) std::fill(dp + i * kBlock, dp + i * kBlock + t, C{0});
    });
  }
  void take(int64_t i, int64_t t, Vec<C> p0, Vec<C> p1, Vec<C> ds0, Vec<C> ds1) {
    store(s + i * kBlock + t, p0);
    store(s + (i + 1) * kBlock + t, p1);
    store(dp + i * kBlock + t, ds0);
    store(dp + (i + 1) * kBlock + t, ds1);
  }
  void add(const AttentionBackward<C>& a, const Block& block, int64_t hk, int64_t s0, int64_t keys,
           C* dk, C* dv, int64_t stride, C* dqt) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    const int64_t width = padded<C>(block.rows()), Dp = padded<C>(a.D), Dvp = padded<C>(a.Dv);
    seen_parts(a, block, s0, keys, kLanes<C>, [&](int64_t i, int64_t count, int64_t t) {
      const int64_t end = s0 + i + count, n = i * kBlock + t;
      const BroadcastMatrix<C> p{s + n, kBlock, 1}, ds{dp + n, kBlock, 1};
      product(count, Dvp, width - t, p, do_rows + t * Dvp, Dvp, dv + i * stride, stride, true);
      product(count, Dp, width - t, ds, q_rows + t * Dp, Dp, dk + i * stride, stride, true,
              v_rows->at(v, end));
      const BroadcastMatrix<C> tile = k_rows->get(k, s0 + i, end);
      product(a.D, width - t, count, transposed(tile), dp + n, kBlock, dqt + t, kBlock, true,
              k_rows->at(k, end));
    });
  }
};

#if TFKERN_VEC_BYTES == 64
#include "pairs_backward.inl"
#endif

// ---- a tile of gradients ----

// Buffers for a tile.
template <class C>
struct BackwardRoom {
  C *derivative, *keep, *tile, *buffer;

  explicit BackwardRoom(Scratch& scratch) {
    for (C** x : {&derivative, &keep, &tile, &buffer}) *x = scratch.get<C>(kKeys * kBlock);
  }
};

// A block of rows and its buffers. p = 2^((s - lse) / ln(2) - rest), where `rest` is lse_rest in
// base 2. Rows that see no key have lse = -inf and may hold NaN: they are loaded as 0, with
// lse = inf, so that p = 0.
template <class C, class Products>
struct BackwardRows {
  Products products;
  std::optional<Block> block;
  RowInputs<C> lanes;
  C *lse, *rest, *dlse, *do_o, *dqt;  // do_o = sum(do o), dqt = dq^T / scale

  BackwardRows(Scratch& scratch, const AttentionBackward<C>& a, const Products& like)
      : products(like) {
    products.allocate_rows(scratch, a);
    for (C** x : {&lse, &rest, &dlse, &do_o}) *x = scratch.get<C>(kBlock);
    dqt = scratch.get<C>(padded<C>(a.D) * kBlock);
  }
  int64_t width() const { return padded<C>(block->rows()); }
  // The key at which the walk begins.
  int64_t begin() const { return block->begin / Products::kKeyAlignment * Products::kKeyAlignment; }

  void load(const AttentionBackward<C>& a, const Block& rows) {
    constexpr C kInf = std::numeric_limits<C>::infinity();
    block.emplace(rows);
    fill_lanes(lanes, a, rows);
    for (int64_t i = 0; i < kBlock; ++i) {
      lse[i] = kInf;
      rest[i] = dlse[i] = 0;
      if (i >= rows.rows()) continue;
      const int64_t saved = a.row_index(rows.document, rows.head(i), rows.query(i));
      if (a.lse[saved] == -kInf) continue;
      lse[i] = a.lse[saved];
      rest[i] = a.lse_rest[saved] * kLog2E<C>;
      if (a.dlse) dlse[i] = a.dlse[saved];
    }
    // forward: o = sum_s p v, lse = log sum_s exp(s), hence ds = p (dp - sum(do o) + dlse)
    products.load(a, rows, lse, do_o);
  }
};

// Hands `rows.products` p keep, where p = exp(scale s - lse), and ds = p (dp keep - delta) f',
// where f' is the `derivative` of the softcap. `keep` and `derivative` are 1 if null. The two terms
// of delta = sum(do o) - dlse are subtracted one by one: if sum(do o) cancels dp, dlse is left
// exact.
template <class C, class Rows>
inline void score_gradients(Rows& rows, int64_t keys, C scale, const C* keep, const C* derivative) {
  constexpr int L = kLanes<C>;
  for (int64_t t = 0; t < rows.width(); t += L) {
    const Vec<C> lse = load(rows.lse + t), rest = load(rows.rest + t);
    const Vec<C> do_o = load(rows.do_o + t), dlse = load(rows.dlse + t);
    for (int64_t s = 0; s < keys; s += 2) {
      Vec<C> p[2] = {}, ds[2] = {};
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        if (s + i == keys) break;
        const int64_t n = (s + i) * kBlock + t;
        // forward: p = exp(s - lse), o = (p keep) v
        const Vec<C> score = rounded_product(load(rows.products.s + n), broadcast(scale));
        p[i] = exp2_flush((score - lse) * kLog2E<C> - rest);
        Vec<C> dp = load(rows.products.dp + n);
        if (keep) dp = dp * load(keep + n);
        ds[i] = p[i] * (dp - do_o + dlse);
        if (keep) p[i] = p[i] * load(keep + n);
        // forward: s = softcap tanh(scale q k^T / softcap)
        if (derivative) ds[i] = ds[i] * load(derivative + n);
      }
      rows.products.take(s, t, p[0], p[1], ds[0], ds[1]);
    }
  }
}

// Computes p and ds for keys [s0, s0 + keys). ds is the gradient of the products, but for the
// factor `scale`, or without `derivative` the gradient after the softcap.
template <class C, class Rows>
void tile_gradients(BackwardRoom<C>& room, Rows& rows, const AttentionBackward<C>& a, int64_t hk,
                    int64_t s0, int64_t keys, C* derivative, const C* sums) {
  rows.products.multiply(a, *rows.block, hk, s0, keys, sums);
  finish_scores(rows.products.s, a, *rows.block, rows.lanes, s0, keys, room.tile, room.buffer,
                derivative);
  if (a.drops) dropout_tile(room.keep, a, rows.lanes, s0, keys, rows.width());
  score_gradients<C>(rows, keys, late_scale(a), a.drops ? room.keep : nullptr, derivative);
}

// ---- dq, dk and dv ----

// Writes dk and dv of keys [begin, begin + count) of a document: the sums of `parts` partial
// results, which lie `distance` elements apart, in their order. A row of `sums` holds dk / scale
// and dv, each padded to whole vectors.
template <class C>
void attention_store_dkv(const AttentionBackward<C>& a, const Document& document, int64_t hk,
                         int64_t begin, int64_t count, C* sums, int64_t parts, int64_t distance) {
  constexpr int L = kLanes<C>;
  const int64_t Dp = padded<C>(a.D), width = Dp + padded<C>(a.Dv);
  const HeadRows dk = key_rows(a.dk, document, hk), dv = key_rows(a.dv, document, hk);
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

// Number of elements of the sums of dk and dv of one key.
template <class C>
int64_t attention_dkv_width(const AttentionBackward<C>& a) {
  return padded<C>(a.D) + padded<C>(a.Dv);
}

// Writes dq of a block. `dq_rows` is room for kBlock rows.
template <class C, class Rows>
void store_dq(const AttentionBackward<C>& a, Rows& rows, C* dq_rows) {
  const int64_t Dp = padded<C>(a.D);
  const Block& block = *rows.block;
  transpose(rows.dqt, kBlock, Dp, rows.width(), dq_rows, Dp);
  for (int64_t t = 0; t < block.rows(); ++t, dq_rows += Dp) {
    const bool any = rows.lse[t] != std::numeric_limits<C>::infinity();
    for (int64_t d = 0; d < a.D; ++d) dq_rows[d] = any ? a.scale * dq_rows[d] : C{0};
    store_row(query_rows(a.dq, block.document, block.head(t)), block.query(t), dq_rows, a.D);
  }
}

// Writes the terms of dsink of a block's rows: -p_sink (sum(do o) - dlse).
template <class C, class Rows>
void store_sink_terms(const AttentionBackward<C>& a, const Rows& rows) {
  const Block& block = *rows.block;
  for (int64_t t = 0; t < block.rows(); ++t) {
    const int64_t h = block.head(t);
    // forward: lse = log(sum exp(s) + exp(sink))
    const int64_t row = a.row_index(block.document, h, block.query(t));
    const double score = a.sink[h], p = std::exp(score - a.lse[row] - a.lse_rest[row]);
    const bool takes_part = a.lse[row] != -std::numeric_limits<C>::infinity();
    a.sink_terms[row] = takes_part ? static_cast<C>(-p * (rows.do_o[t] - rows.dlse[t])) : C{0};
  }
}

// Runs tasks until none is left. A task is a document, a key head, and a chunk of the blocks of
// rows of the query heads. It takes a few blocks at a time and walks over the keys with them: their
// dq is complete when the walk ends, while dk and dv add up in memory until the task ends. If a key
// head has several chunks, their sums go to `partials`, and attention_store_dkv adds them later;
// otherwise the task stores dk and dv itself.
template <class C, class Products>
void backward_tasks(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  const int64_t Dp = padded<C>(a.D), sums_width = Dp + padded<C>(a.Dv);
  const int64_t document_tasks = a.Hk * a.chunks;
  [[maybe_unused]] const typename Products::Registers registers;
  Scratch scratch;
  BackwardRoom<C> room(scratch);
  const Products products(scratch, a);
  std::vector<BackwardRows<C, Products>> together;
  for (int64_t i = 0; i < kBlocksPerWalk; ++i) together.emplace_back(scratch, a, products);
  C* dq_rows = scratch.get<C>(Dp * kBlock);
  C* own_sums = scratch.get<C>(a.longest() * sums_width);

  for (int64_t task = take(next); task < static_cast<int64_t>(a.documents.size()) * document_tasks;
       task = take(next)) {
    const int64_t number = task / document_tasks, hk = task % document_tasks / a.chunks;
    const int64_t chunk = task % a.chunks;
    const Document& document = a.documents[number];
    const int64_t blocks = a.blocks(document), chunks = a.chunks_of(document);
    if (chunk >= chunks) continue;
    C* sums = own_sums;
    if (chunks > 1) sums = a.partials + a.partial_row(document, hk, chunk) * sums_width;
    // Sums are set to 0 just before they are needed, so that they are in the cache.
    int64_t ready = 0;  // number of keys whose sums have been set
    const auto begin_sums = [&](int64_t end) {
      if (end > ready) std::fill(sums + ready * sums_width, sums + end * sums_width, C{0});
      ready = std::max(ready, end);
    };

    // A chunk takes every chunks-th block of the sequence, since causal blocks differ in work.
    for (int64_t i = chunk; i < blocks;) {
      int64_t begin = document.keys, end = 0, count = 0;
      for (; count < kBlocksPerWalk && i < blocks; ++count, i += chunks) {
        auto& rows = together[count];
        rows.load(a, block_of(a, number, hk, i));
        std::fill(rows.dqt, rows.dqt + a.D * kBlock, C{0});
        if (a.sink_terms) store_sink_terms(a, rows);
        begin = std::min(begin, rows.begin());
        end = std::max(end, rows.block->end);
      }
      for (int64_t s0 = begin; s0 < end; s0 += kKeys) {
        for (int64_t n = 0; n < count; ++n) {
          auto& rows = together[n];
          const int64_t keys = std::min<int64_t>(kKeys, rows.block->end - s0);
          if (keys <= 0 || s0 + kKeys <= rows.begin()) continue;
          begin_sums(s0 + keys);
          C *dk = sums + s0 * sums_width, *derivative = a.softcap > 0 ? room.derivative : nullptr;
          tile_gradients(room, rows, a, hk, s0, keys, derivative, dk);
          rows.products.add(a, *rows.block, hk, s0, keys, dk, dk + Dp, sums_width, rows.dqt);
        }
      }
      for (int64_t n = 0; n < count; ++n) store_dq(a, together[n], dq_rows);
    }
    begin_sums(document.keys);
    if (chunks == 1) attention_store_dkv(a, document, hk, 0, document.keys, sums, 1, 0);
  }
}

// ---- gradient of the bias ----

// Products that add ds to `total`, which has one row of kBlock elements per key.
template <class C, class Products>
struct BiasSums : Products {
  using Products::Products;
  C* total = nullptr;

  void take(int64_t s, int64_t t, Vec<C>, Vec<C>, Vec<C> ds0, Vec<C> ds1) {
    C* sums = total + s * kBlock + t;
    store(sums, load(sums) + ds0);
    store(sums + kBlock, load(sums + kBlock) + ds1);
  }
};

// Runs tasks until none is left. Each owns a tile of dbias and sums ds over the batches, heads,
// queries and keys along which bias is broadcast, always in the same order.
template <class C, class Products>
void bias_tasks(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  const BiasGradient& g = a.dbias;
  const int64_t blocks = g.T == 1 ? 1 : (a.T + kBlock - 1) / kBlock;
  const int64_t ranges = g.S == 1 ? 1 : (a.S + kBiasKeys - 1) / kBiasKeys;
  const int64_t total_rows = g.S == 1 ? kKeys : kBiasKeys;
  [[maybe_unused]] const typename Products::Registers registers;
  Scratch scratch;
  BackwardRoom<C> room(scratch);
  BackwardRows<C, BiasSums<C, Products>> rows(scratch, a, BiasSums<C, Products>(scratch, a));
  C* total = scratch.get<C>(total_rows * kBlock);  // dbias of the task, transposed
  C* row = scratch.get<C>(kBiasKeys);

  for (int64_t task = take(next); task < g.B * g.H * blocks * ranges; task = take(next)) {
    const int64_t range = task % ranges, i = task / ranges % blocks;
    const int64_t head = task / ranges / blocks % g.H, batch = task / ranges / blocks / g.H;
    const int64_t s_begin = range * kBiasKeys, s_end = g.S == 1 ? a.S : s_begin + kBiasKeys;
    std::fill(total, total + total_rows * kBlock, C{0});
    for (int64_t b = g.B == 1 ? 0 : batch; b < (g.B == 1 ? a.B : batch + 1); ++b) {
      for (int64_t h = g.H == 1 ? 0 : head; h < (g.H == 1 ? a.H : head + 1); ++h) {
        const int64_t t_end = g.T == 1 ? a.documents[b].queries : (i + 1) * kBlock;
        for (int64_t t0 = i * kBlock; t0 < t_end; t0 += kBlock) {
          const Block block = block_at(a, b, h, 1, t0);
          const int64_t end = std::min(block.end, s_end);
          int64_t s0 =
              std::max(block.begin / Products::kKeyAlignment * Products::kKeyAlignment, s_begin);
          if (s0 < end) rows.load(a, block);
          for (; s0 < end; s0 += kKeys) {
            const int64_t keys = std::min<int64_t>(kKeys, end - s0);
            // forward: s = s + bias
            rows.products.total = total + (g.S == 1 ? 0 : s0 - s_begin) * kBlock;
            tile_gradients<C>(room, rows, a, h / a.group(), s0, keys, nullptr, nullptr);
          }
        }
      }
    }
    const int64_t t0 = i * kBlock, queries = g.T == 1 ? 1 : std::min<int64_t>(kBlock, a.T - t0);
    const int64_t keys = g.S == 1 ? 1 : std::min<int64_t>(kBiasKeys, a.S - s_begin);
    if (g.S == 1) {
      for (int64_t s = 1; s < kKeys; ++s) {
        for (int64_t t = 0; t < kBlock; ++t) total[t] += total[s * kBlock + t];
      }
    }
    for (int64_t s = 0; g.T == 1 && s < keys; ++s) {
      for (int64_t t = 1; t < kBlock; ++t) total[s * kBlock] += total[s * kBlock + t];
    }
    for (int64_t t = 0; t < queries; ++t) {
      for (int64_t s = 0; s < keys; ++s) row[s] = total[s * kBlock + t];
      const int64_t first = ((batch * g.H + head) * g.T + t0 + t) * g.S + s_begin;
      TFKERN_DTYPE(g.dtype, convert(reinterpret_cast<T*>(g.data) + first, row, keys));
    }
  }
}

template <class C>
void attention_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
#if TFKERN_VEC_BYTES == 64
  if constexpr (std::is_same_v<C, float>) {
    if (a.transposed) return backward_tasks<C, PairBackward<AmxEngine>>(a, next);
    if (multiplies_pairs(a)) return backward_tasks<C, PairBackward<PairEngine>>(a, next);
  }
#endif
  backward_tasks<C, WideBackward<C>>(a, next);
}

template <class C>
void attention_bias_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
#if TFKERN_VEC_BYTES == 64
  if constexpr (std::is_same_v<C, float>) {
    if (a.transposed) return bias_tasks<C, PairBackward<AmxEngine>>(a, next);
    if (multiplies_pairs(a)) return bias_tasks<C, PairBackward<PairEngine>>(a, next);
  }
#endif
  bias_tasks<C, WideBackward<C>>(a, next);
}
