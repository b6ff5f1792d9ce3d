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

// p = exp(factor s - lse), ds = p (dp - delta), in place of s and dp. Queries that take no part
// have lse = inf. delta = sum(do o) - dlse comes as its two terms: if the first cancels dp, the
// second is left exact.
template <class C>
inline void score_gradients(C* s, C* dp, int64_t keys, int64_t width, C factor, const C* lse,
                            const C* dot, const C* dlse) {
  constexpr int L = kLanes<C>;
  for (int64_t i = 0; i < keys; ++i, s += kBlock, dp += kBlock) {
    for (int64_t t = 0; t < width; t += L) {
      // forward: p = exp(s - lse), o = p v
      const Vec<C> p = exp2_flush((load(s + t) * factor - load(lse + t)) * kLog2E<C>);
      store(dp + t, p * (load(dp + t) - load(dot + t) + load(dlse + t)));
      store(s + t, p);
    }
  }
}

// ---- products of the backward: two ways with the same functions ----
//
// load: takes the rows of a block, of which those with lse = inf become 0, and gives do_o = sum(do
// o). scores: s = q k^T, as in the forward, and dp = do v^T of keys [s0, s0 + keys). add: dv += p^T
// do, dk += ds^T q for these keys, and dq^T += k^T ds, which may also write to ds past the keys.

template <class C>
struct WideBackward {
  static constexpr int64_t kFirst = 4;
  C *q_rows, *do_rows, *o_rows, *qt, *dot, *ot, *k_buffer, *v_buffer;

  WideBackward(Scratch& scratch, const AttentionBackward<C>& a) {
    const int64_t Dp = padded<C>(a.D), Dvp = padded<C>(a.Dv);
    for (C** x : {&q_rows, &qt}) *x = scratch.get<C>(Dp * kBlock);
    for (C** x : {&do_rows, &o_rows, &dot, &ot}) *x = scratch.get<C>(Dvp * kBlock);
    k_buffer = scratch.get<C>(kKeys * a.D);
    v_buffer = scratch.get<C>(kKeys * a.Dv);
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
  C scores(const AttentionBackward<C>& a, const Block& block, int64_t hk, int64_t s0, int64_t keys,
           C* s, C* dp) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    const int64_t width = padded<C>(block.rows());
    product(keys, width, a.D, load_rows(k_buffer, k, s0, keys, a.D, a.D), qt, kBlock, s, kBlock,
            false, product_scale(a));
    product(keys, width, a.Dv, load_rows(v_buffer, v, s0, keys, a.Dv, a.Dv), dot, kBlock, dp,
            kBlock, false);
    return 1;
  }
  void add(const AttentionBackward<C>& a, const Block& block, int64_t hk, int64_t s0, int64_t keys,
           const C* p, C* ds, C* dk, C* dv, int64_t stride, C* dqt) {
    const HeadRows k = key_rows(a.k, block.document, hk);
    const int64_t width = padded<C>(block.rows()), Dp = padded<C>(a.D), Dvp = padded<C>(a.Dv);
    product(keys, Dvp, width, Left<C>{p, kBlock, 1}, do_rows, Dvp, dv, stride, true);
    product(keys, Dp, width, Left<C>{ds, kBlock, 1}, q_rows, Dp, dk, stride, true);
    const Left<C> tile = load_rows(k_buffer, k, s0, keys, a.D, a.D);
    product(a.D, width, keys, transposed(tile), ds, kBlock, dqt, kBlock, true);
  }
};

// ---- a tile of gradients ----

// Room for a block of rows and a tile. Rows that take no part, lse = -inf, may hold NaN: they
// become 0, with lse = inf, so that p = 0.
template <class C>
struct BackwardRoom {
  C *lse, *dlse, *do_o;  // of the rows
  C *p, *ds, *slope, *keep, *tile, *buffer;
  Lanes<C> lanes;

  explicit BackwardRoom(Scratch& scratch) {
    for (C** x : {&lse, &dlse, &do_o}) *x = scratch.get<C>(kBlock);
    for (C** x : {&p, &ds, &slope, &keep, &tile, &buffer}) *x = scratch.get<C>(kKeys * kBlock);
  }
};

template <class C, class Products>
void load_block(BackwardRoom<C>& room, Products& products, const AttentionBackward<C>& a,
                const Block& block) {
  constexpr C kInf = std::numeric_limits<C>::infinity();
  fill_lanes(room.lanes, a, block);
  for (int64_t i = 0; i < kBlock; ++i) {
    room.lse[i] = kInf;
    room.dlse[i] = 0;
    if (i >= block.rows()) continue;
    const int64_t saved = a.row_index(block.document, block.head(i), block.query(i));
    if (a.lse[saved] == -kInf) continue;
    room.lse[i] = a.lse[saved];
    if (a.dlse) room.dlse[i] = a.dlse[saved];
  }
  // forward: o = sum_s p v, lse = log sum_s exp(s), hence ds = p (dp - sum(do o) + dlse)
  products.load(a, block, room.lse, room.do_o);
}

// p, as dropout leaves it, and the gradient ds of the scores, for keys [s0, s0 + keys).
template <class C, class Products>
void tile_gradients(BackwardRoom<C>& room, Products& products, const AttentionBackward<C>& a,
                    const Block& block, int64_t hk, int64_t s0, int64_t keys) {
  const int64_t width = padded<C>(block.rows());
  // forward: s = scale q k^T, o = (p keep) v
  const C factor = products.scores(a, block, hk, s0, keys, room.p, room.ds);
  finish_scores(room.p, a, block, room.lanes, s0, keys, room.tile, room.buffer, room.slope);
  if (a.dropout) {
    dropout_tile(room.keep, a, room.lanes, s0, keys, width);
    multiply(room.ds, room.keep, keys, width);
  }
  score_gradients(room.p, room.ds, keys, width, factor, room.lse, room.do_o, room.dlse);
  if (a.dropout) multiply(room.p, room.keep, keys, width);
}

#if TFKERN_VEC_BYTES == 64
struct AmxBackward {
  static constexpr int64_t kFirst = kKeys;
  AmxTiles tiles;
  int64_t Dp, Dvp;
  BFloat16 *q_rows, *do_rows, *o_rows, *buffer, *p_rows, *ds_rows;
  uint32_t *qt, *dot, *q_pairs, *do_pairs, *ds_pairs;
  float* tail;

  AmxBackward(Scratch& scratch, const AttentionBackward<float>& a)
      : Dp(round_up(a.D, kAmxDepth)), Dvp(round_up(a.Dv, kAmxDepth)) {
    q_rows = scratch.get<BFloat16>(kBlock * Dp);
    for (BFloat16** x : {&do_rows, &o_rows}) *x = scratch.get<BFloat16>(kBlock * Dvp);
    buffer = scratch.get<BFloat16>(kKeys * std::max(Dp, Dvp));
    for (BFloat16** x : {&p_rows, &ds_rows}) *x = scratch.get<BFloat16>(kKeys * kBlock);
    for (uint32_t** x : {&qt, &q_pairs}) *x = scratch.get<uint32_t>(Dp / 2 * kBlock);
    for (uint32_t** x : {&dot, &do_pairs}) *x = scratch.get<uint32_t>(Dvp / 2 * kBlock);
    ds_pairs = scratch.get<uint32_t>(kKeys / 2 * kBlock);
    tail = scratch.get<float>(kKeys * std::max(Dp, Dvp));
  }
  void load(const AttentionBackward<float>& a, const Block& block, const float* lse, float* do_o) {
    amx_block_rows(q_rows, a.q, block, a.D, Dp, lse);
    amx_block_rows(do_rows, a.d_o, block, a.Dv, Dvp, lse);
    amx_block_rows(o_rows, a.o, block, a.Dv, Dvp, lse);
    transpose_words(q_rows, Dp / 2, kBlock, Dp / 2, qt, kBlock);
    transpose_words(do_rows, Dvp / 2, kBlock, Dvp / 2, dot, kBlock);
    join_rows(q_pairs, q_rows, Dp, kBlock, Dp);
    join_rows(do_pairs, do_rows, Dvp, kBlock, Dvp);
    for (int64_t i = 0; i < kBlock; ++i) {
      VecFloat total{};
      for (int64_t d = i * Dvp; d < (i + 1) * Dvp; d += kLanes<float>) {
        total += avx512::load(o_rows + d) * avx512::load(do_rows + d);
      }
      do_o[i] = sum<float>(total);
    }
  }
  float scores(const AttentionBackward<float>& a, const Block& block, int64_t hk, int64_t s0,
               int64_t keys, float* s, float* dp) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    const int64_t width = padded<float>(block.rows());
    amx_key_product(k, s0, keys, a.D, qt, width, buffer, s);
    amx_key_product(v, s0, keys, a.Dv, dot, width, buffer, dp);
    return amx_scale(a, s, keys, width);
  }
  void add(const AttentionBackward<float>& a, const Block& block, int64_t hk, int64_t s0,
           int64_t keys, const float* p, float* ds, float* dk, float* dv, int64_t stride,
           float* dqt) {
    const int64_t width = padded<float>(block.rows());
    join_keys(ds_pairs, ds, keys, width);
    amx_add_transposed(a, block, hk, s0, keys, a.D, ds_pairs, dqt);
    add_rows(p, p_rows, block, keys, do_pairs, Dvp, a.Dv, dv, stride);
    add_rows(ds, ds_rows, block, keys, q_pairs, Dp, a.D, dk, stride);
  }

 private:
  // out += tile right, where `right` holds the rows of the block as pairs and has N features.
  void add_rows(const float* tile, BFloat16* tile_rows, const Block& block, int64_t keys,
                const uint32_t* right, int64_t right_stride, int64_t N, float* out,
                int64_t stride) {
    const int64_t width = padded<float>(block.rows()), depth = round_up(width, kAmxDepth);
    const int64_t height = round_up(keys, kAmxRows), Np = padded<float>(N);
    for (int64_t s = 0; s < height; ++s) {
      BFloat16* row = tile_rows + s * kBlock;
      if (s < keys) narrow_row(row, tile + s * kBlock, width);
      std::memset(row + (s < keys ? width : 0), 0, (depth - (s < keys ? width : 0)) * 2);
    }
    const Left<BFloat16> left{tile_rows, kBlock, 1};
    if (height == keys)
      return amx_product(keys, Np, depth, left, right, right_stride, out, stride, true);
    // The rows behind the last key belong to others.
    amx_product(height, Np, depth, left, right, right_stride, tail, Np, false);
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t n = 0; n < Np; n += kLanes<float>) {
        float* to = out + s * stride + n;
        store(to, avx512::load(to) + avx512::load(tail + s * Np + n));
      }
    }
  }
};
#endif

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

// Runs tasks (document, key head, chunk of the blocks of rows of its query heads) until none is
// left. A task walks over the keys for one block of rows after the other: dq of a block is
// complete when the walk ends, dk and dv add up in memory. With several chunks per head a
// task's sums go to `partials`, to be added by attention_store_dkv; with one, it stores them
// itself.
template <class C, class Products>
void backward_tasks(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  constexpr C kInf = std::numeric_limits<C>::infinity();
  const int64_t D = a.D, Dp = padded<C>(D), sums_width = Dp + padded<C>(a.Dv);
  const int64_t document_tasks = a.Hk * a.chunks;
  Scratch scratch;
  BackwardRoom<C> room(scratch);
  Products products(scratch, a);
  C* dqt = scratch.get<C>(Dp * kBlock);  // dq^T / scale
  C* dq_rows = scratch.get<C>(Dp * kBlock);
  C* own_sums = scratch.get<C>(a.longest() * sums_width);

  for (int64_t task = next++; task < static_cast<int64_t>(a.documents.size()) * document_tasks;
       task = next++) {
    const int64_t number = task / document_tasks, hk = task % document_tasks / a.chunks;
    const int64_t chunk = task % a.chunks;
    const Document& document = a.documents[number];
    const int64_t blocks = a.blocks(document), chunks = a.chunks_of(document);
    if (chunk >= chunks) continue;
    C* sums = own_sums;
    if (chunks > 1) sums = a.partials + a.partial_row(document, hk, chunk) * sums_width;
    std::fill(sums, sums + document.keys * sums_width, C{0});

    // Every chunk takes blocks from all over the sequence, since causal ones differ in work.
    for (int64_t i = chunk; i < blocks; i += chunks) {
      const Block block = block_of(a, number, hk, i);
      const int64_t rows = block.rows(), width = padded<C>(rows);
      load_block(room, products, a, block);
      if (a.sink_terms) {
        // forward: lse = log(sum exp(s) + exp(sink))
        for (int64_t t = 0; t < rows; ++t) {
          const C p = std::exp(a.sink[block.head(t)] - room.lse[t]);
          a.sink_terms[a.row_index(document, block.head(t), block.query(t))] =
              -p * (room.do_o[t] - room.dlse[t]);
        }
      }
      std::fill(dqt, dqt + D * kBlock, C{0});

      for (int64_t s0 = block.begin / Products::kFirst * Products::kFirst; s0 < block.end;
           s0 += kKeys) {
        const int64_t keys = std::min<int64_t>(kKeys, block.end - s0);
        tile_gradients(room, products, a, block, hk, s0, keys);
        // forward: s = softcap tanh(scale q k^T / softcap)
        if (a.softcap > 0) multiply(room.ds, room.slope, keys, width);
        C* dk = sums + s0 * sums_width;
        products.add(a, block, hk, s0, keys, room.p, room.ds, dk, dk + Dp, sums_width, dqt);
      }

      transpose(dqt, kBlock, Dp, width, dq_rows, Dp);
      for (int64_t t = 0; t < rows; ++t) {
        const bool any = room.lse[t] != kInf;
        C* row = dq_rows + t * Dp;
        for (int64_t d = 0; d < D; ++d) row[d] = any ? a.scale * row[d] : C{0};
        store_row(query_rows(a.dq, document, block.head(t)), block.query(t), row, D);
      }
    }
    if (chunks == 1) attention_store_dkv(a, document, hk, 0, document.keys, sums, 1, 0);
  }
}

// ---- gradient of the bias ----

// Runs tasks, each of which owns a tile of dbias and adds up what falls on it, over the batches,
// heads, queries and keys along which bias is broadcast, in their order.
template <class C, class Products>
void bias_tasks(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  constexpr int L = kLanes<C>;
  const BiasGradient& g = a.dbias;
  const int64_t blocks = g.T == 1 ? 1 : (a.T + kBlock - 1) / kBlock;
  const int64_t ranges = g.S == 1 ? 1 : (a.S + kBiasKeys - 1) / kBiasKeys;
  const int64_t total_rows = g.S == 1 ? kKeys : kBiasKeys;
  Scratch scratch;
  BackwardRoom<C> room(scratch);
  Products products(scratch, a);
  C* total = scratch.get<C>(total_rows * kBlock);  // dbias of the task, transposed
  C* row = scratch.get<C>(kBiasKeys);

  for (int64_t task = next++; task < g.B * g.H * blocks * ranges; task = next++) {
    const int64_t range = task % ranges, i = task / ranges % blocks;
    const int64_t head = task / ranges / blocks % g.H, batch = task / ranges / blocks / g.H;
    const int64_t s_begin = range * kBiasKeys, s_end = g.S == 1 ? a.S : s_begin + kBiasKeys;
    std::fill(total, total + total_rows * kBlock, C{0});
    for (int64_t b = g.B == 1 ? 0 : batch; b < (g.B == 1 ? a.B : batch + 1); ++b) {
      for (int64_t h = g.H == 1 ? 0 : head; h < (g.H == 1 ? a.H : head + 1); ++h) {
        const int64_t t_end = g.T == 1 ? a.documents[b].queries : (i + 1) * kBlock;
        for (int64_t t0 = i * kBlock; t0 < t_end; t0 += kBlock) {
          const Block block = block_at(a, b, h, 1, t0);
          const int64_t width = padded<C>(block.rows()), end = std::min(block.end, s_end);
          int64_t s0 = std::max(block.begin / Products::kFirst * Products::kFirst, s_begin);
          if (s0 < end) load_block(room, products, a, block);
          for (; s0 < end; s0 += kKeys) {
            const int64_t keys = std::min<int64_t>(kKeys, end - s0);
            tile_gradients(room, products, a, block, h / a.group(), s0, keys);
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

template <class C>
void attention_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
#if TFKERN_VEC_BYTES == 64
  if constexpr (std::is_same_v<C, float>) {
    if (a.transposed) return backward_tasks<C, AmxBackward>(a, next);
  }
#endif
  backward_tasks<C, WideBackward<C>>(a, next);
}

template <class C>
void attention_bias_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
#if TFKERN_VEC_BYTES == 64
  if constexpr (std::is_same_v<C, float>) {
    if (a.transposed) return bias_tasks<C, AmxBackward>(a, next);
  }
#endif
  bias_tasks<C, WideBackward<C>>(a, next);
}
