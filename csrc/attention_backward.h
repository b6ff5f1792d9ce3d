// Backward: s and p are recomputed tile by tile.

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
      const Vec<C> p = exp2_flush((load(s + t) - load(lse + t)) * kLog2E<C>);
      store(dp + t, p * (load(dp + t) - load(dot + t) + load(dlse + t)));
      store(s + t, p);
    }
  }
}

// A block of rows as backward sees it, and room for its tiles. Rows that take no part, lse = -inf,
// may hold NaN: they become 0, with lse = inf, so that p = 0.
template <class C>
struct BackwardBlock {
  C *q_rows, *do_rows, *o_rows, *qt, *dot, *ot;  // by rows, and transposed
  C *lse, *dlse, *do_o;                          // do_o = sum(do o)
  C *p, *ds, *slope, *keep, *tile, *buffer, *k_buffer, *v_buffer;
  Lanes<C> lanes;

  BackwardBlock(Scratch<C>& scratch, const AttentionBackward<C>& a) {
    const int64_t Dp = padded<C>(a.D), Dvp = padded<C>(a.Dv);
    for (C** x : {&q_rows, &qt}) *x = scratch.get(Dp * kBlock);
    for (C** x : {&do_rows, &o_rows, &dot, &ot}) *x = scratch.get(Dvp * kBlock);
    for (C** x : {&lse, &dlse, &do_o}) *x = scratch.get(kBlock);
    for (C** x : {&p, &ds, &slope, &keep, &tile, &buffer}) *x = scratch.get(kKeys * kBlock);
    k_buffer = scratch.get(kKeys * a.D);
    v_buffer = scratch.get(kKeys * a.Dv);
  }

  void fill(const AttentionBackward<C>& a, const Block& block) {
    constexpr C kInf = std::numeric_limits<C>::infinity();
    const int64_t D = a.D, Dv = a.Dv, Dp = padded<C>(D), Dvp = padded<C>(Dv);
    const int64_t rows = block.rows(), width = padded<C>(rows);
    fill_lanes(lanes, a, block);
    std::fill(q_rows, q_rows + width * Dp, C{0});
    std::fill(do_rows, do_rows + width * Dvp, C{0});
    std::fill(o_rows, o_rows + width * Dvp, C{0});
    for (int64_t i = 0; i < width; ++i) {
      lse[i] = kInf;
      dlse[i] = 0;
      if (i >= rows) continue;
      const Document& document = block.document;
      const int64_t h = block.head(i), t = block.query(i), saved = a.row_index(document, h, t);
      if (a.lse[saved] == -kInf) continue;
      load_row(q_rows + i * Dp, query_rows(a.q, document, h), t, D);
      load_row(do_rows + i * Dvp, query_rows(a.d_o, document, h), t, Dv);
      load_row(o_rows + i * Dvp, query_rows(a.o, document, h), t, Dv);
      lse[i] = a.lse[saved];
      if (a.dlse) dlse[i] = a.dlse[saved];
    }
    transpose(q_rows, Dp, width, D, qt);
    transpose(do_rows, Dvp, width, Dv, dot);
    transpose(o_rows, Dvp, width, Dv, ot);
    // forward: o = sum_s p v, lse = log sum_s exp(s), hence ds = p (dp - sum(do o) + dlse)
    dot_products(ot, dot, Dv, width, do_o);
  }

  // p, as dropout leaves it, and the gradient of the scores, for keys [s0, s0 + keys).
  void gradients(const AttentionBackward<C>& a, const Block& block, int64_t s0, int64_t keys,
                 Left<C> k_tile, Left<C> v_tile) {
    const int64_t width = padded<C>(block.rows());
    product(keys, width, a.D, k_tile, qt, kBlock, p, kBlock, false, product_scale(a));
    finish_scores(p, a, block, lanes, s0, keys, tile, buffer, slope);
    // forward: o = (p keep) v
    product(keys, width, a.Dv, v_tile, dot, kBlock, ds, kBlock, false);
    if (a.dropout) {
      dropout_tile(keep, a, lanes, s0, keys, width);
      multiply(ds, keep, keys, width);
    }
    score_gradients(p, ds, keys, width, lse, do_o, dlse);
    if (a.dropout) multiply(p, keep, keys, width);
  }
};

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

// Runs tasks (document, key head, chunk of the blocks of rows of its query heads) until none is
// left. A task walks over the keys for one block of rows after the other: dq of a block is
// complete when the walk ends, dk and dv add up in memory. With several chunks per head a
// task's sums go to `partials`, to be added by attention_store_dkv; with one, it stores them
// itself.
template <class C>
void attention_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const int64_t D = a.D, Dv = a.Dv, Dp = padded<C>(D), Dvp = padded<C>(Dv), sums_width = Dp + Dvp;
  const int64_t document_tasks = a.Hk * a.chunks;
  Scratch<C> scratch;
  BackwardBlock<C> room(scratch, a);
  C* dqt = scratch.get(Dp * kBlock);  // dq^T / scale
  C* row = scratch.get(std::max(D, Dv));
  C* own_sums = scratch.get(a.longest() * sums_width);

  for (int64_t task = next++; task < static_cast<int64_t>(a.documents.size()) * document_tasks;
       task = next++) {
    const int64_t number = task / document_tasks, hk = task % document_tasks / a.chunks;
    const int64_t chunk = task % a.chunks;
    const Document& document = a.documents[number];
    const int64_t blocks = a.blocks(document), chunks = a.chunks_of(document);
    if (chunk >= chunks) continue;
    const HeadRows k = key_rows(a.k, document, hk), v = key_rows(a.v, document, hk);
    C* sums = own_sums;
    if (chunks > 1) sums = a.partials + a.partial_row(document, hk, chunk) * sums_width;
    std::fill(sums, sums + document.keys * sums_width, C{0});

    // Every chunk takes blocks from all over the sequence, since causal ones differ in work.
    for (int64_t i = chunk; i < blocks; i += chunks) {
      const Block block = block_of(a, number, hk, i);
      const int64_t rows = block.rows(), width = padded<C>(rows);
      room.fill(a, block);
      if (a.sink_terms) {
        // forward: lse = log(sum exp(s) + exp(sink))
        for (int64_t t = 0; t < rows; ++t) {
          const C p = std::exp(a.sink[block.head(t)] - room.lse[t]);
          a.sink_terms[a.row_index(document, block.head(t), block.query(t))] =
              -p * (room.do_o[t] - room.dlse[t]);
        }
      }
      std::fill(dqt, dqt + D * kBlock, C{0});

      for (int64_t s0 = block.begin; s0 < block.end; s0 += kKeys) {
        const int64_t keys = std::min<int64_t>(kKeys, block.end - s0);
        const Left<C> k_tile = load_rows(room.k_buffer, k, s0, keys, D, D);
        const Left<C> v_tile = load_rows(room.v_buffer, v, s0, keys, Dv, Dv);
        C* dk_sums = sums + s0 * sums_width;
        room.gradients(a, block, s0, keys, k_tile, v_tile);
        // forward: s = softcap tanh(scale q k^T / softcap)
        if (a.softcap > 0) multiply(room.ds, room.slope, keys, width);
        // forward: o = (p keep) v
        const Left<C> p_tile{room.p, kBlock, 1}, ds_tile{room.ds, kBlock, 1};
        product(keys, Dvp, width, p_tile, room.do_rows, Dvp, dk_sums + Dp, sums_width, true);
        // forward: s = scale q k^T
        product(keys, Dp, width, ds_tile, room.q_rows, Dp, dk_sums, sums_width, true);
        product(D, width, keys, transposed(k_tile), room.ds, kBlock, dqt, kBlock, true);
      }

      for (int64_t t = 0; t < rows; ++t) {
        const bool any = room.lse[t] != kInf;
        for (int64_t d = 0; d < D; ++d) row[d] = any ? a.scale * dqt[d * kBlock + t] : C{0};
        store_row(query_rows(a.dq, document, block.head(t)), block.query(t), row, D);
      }
    }
    if (chunks == 1) attention_store_dkv(a, document, hk, 0, document.keys, sums, 1, 0);
  }
}

// ---- gradient of the bias ----

// Runs tasks, each of which owns a tile of dbias and adds up what falls on it, over the batches,
// heads, queries and keys along which bias is broadcast, in their order.
template <class C>
void attention_bias_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  constexpr int L = kLanes<C>;
  const BiasGradient& g = a.dbias;
  const int64_t blocks = g.T == 1 ? 1 : (a.T + kBlock - 1) / kBlock;
  const int64_t ranges = g.S == 1 ? 1 : (a.S + kBiasKeys - 1) / kBiasKeys;
  const int64_t total_rows = g.S == 1 ? kKeys : kBiasKeys;
  Scratch<C> scratch;
  BackwardBlock<C> room(scratch, a);
  C* total = scratch.get(total_rows * kBlock);  // dbias of the task, transposed
  C* row = scratch.get(kBiasKeys);

  for (int64_t task = next++; task < g.B * g.H * blocks * ranges; task = next++) {
    const int64_t range = task % ranges, i = task / ranges % blocks;
    const int64_t head = task / ranges / blocks % g.H, batch = task / ranges / blocks / g.H;
    const int64_t s_begin = range * kBiasKeys, s_end = g.S == 1 ? a.S : s_begin + kBiasKeys;
    std::fill(total, total + total_rows * kBlock, C{0});
    for (int64_t b = g.B == 1 ? 0 : batch; b < (g.B == 1 ? a.B : batch + 1); ++b) {
      for (int64_t h = g.H == 1 ? 0 : head; h < (g.H == 1 ? a.H : head + 1); ++h) {
        const Document& document = a.documents[b];
        const HeadRows k = key_rows(a.k, document, h / a.group());
        const HeadRows v = key_rows(a.v, document, h / a.group());
        const int64_t t_end = g.T == 1 ? document.queries : (i + 1) * kBlock;
        for (int64_t t0 = i * kBlock; t0 < t_end; t0 += kBlock) {
          const Block block = block_at(a, b, h, 1, t0);
          const int64_t width = padded<C>(block.rows()), end = std::min(block.end, s_end);
          int64_t s0 = std::max(block.begin, s_begin);
          if (s0 < end) room.fill(a, block);
          for (; s0 < end; s0 += kKeys) {
            const int64_t keys = std::min<int64_t>(kKeys, end - s0);
            room.gradients(a, block, s0, keys, load_rows(room.k_buffer, k, s0, keys, a.D, a.D),
                           load_rows(room.v_buffer, v, s0, keys, a.Dv, a.Dv));
            // forward: s = s + bias
            C* sums = total + (g.S == 1 ? 0 : s0 - s_begin) * kBlock;
            for (int64_t n = 0; n < keys * kBlock; n += kBlock) {
              for (int64_t t = n; t < n + width; t += L) {
                store(sums + t, load(sums + t) + load(room.ds + t));
              }
            }
          }
        }
      }
    }
    const int64_t t0 = i * kBlock, rows = g.T == 1 ? 1 : std::min<int64_t>(kBlock, a.T - t0);
    const int64_t keys = g.S == 1 ? 1 : std::min<int64_t>(kBiasKeys, a.S - s_begin);
    if (g.S == 1) {
      for (int64_t s = 1; s < kKeys; ++s) {
        for (int64_t t = 0; t < kBlock; ++t) total[t] += total[s * kBlock + t];
      }
    }
    for (int64_t s = 0; g.T == 1 && s < keys; ++s) {
      for (int64_t t = 1; t < kBlock; ++t) total[s * kBlock] += total[s * kBlock + t];
    }
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t s = 0; s < keys; ++s) row[s] = total[s * kBlock + t];
      const int64_t first = ((batch * g.H + head) * g.T + t0 + t) * g.S + s_begin;
      TFKERN_DTYPE(g.dtype, convert(reinterpret_cast<T*>(g.data) + first, row, keys));
    }
  }
}
