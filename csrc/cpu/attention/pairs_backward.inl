// Fragment of backward.inl: the products of the backward of bfloat16. It assumes pairs.inl.

// Products of bfloat16. p and ds are rounded to bfloat16.
template <class Engine>
struct PairBackward {
  static constexpr int64_t kKeyAlignment = kKeys;
  using Registers = typename Engine::Registers;
  int64_t Dp, Dvp;
  KeyRoom room;
  BFloat16 *q_rows, *do_rows, *o_rows, *p_rows, *ds_rows;
  Pair *qt, *dot, *q_pairs, *do_pairs;
  NarrowScores<float> narrow;
  float *s, *dp, *tail;  // ds replaces dp in place, as pairs of keys
  float* narrow_q;       // q of a narrow block

  PairBackward(Scratch& scratch, const AttentionBackward<float>& a)
      : Dp(round_up(a.D, kMostDepth)),
        Dvp(round_up(a.Dv, kMostDepth)),
        room(scratch, std::max(a.D, a.Dv)),
        narrow(scratch, a.D) {
    q_rows = scratch.get<BFloat16>(kBlock * Dp);
    for (BFloat16** x : {&do_rows, &o_rows}) *x = scratch.get<BFloat16>(kBlock * Dvp);
    for (BFloat16** x : {&p_rows, &ds_rows}) *x = scratch.get<BFloat16>(kKeys * kBlock);
    for (float** x : {&s, &dp}) *x = scratch.get<float>(kKeys * kBlock);
    tail = scratch.get<float>(kKeys * std::max(Dp, Dvp));
  }
  void allocate_rows(Scratch& scratch, const AttentionBackward<float>& a) {
    narrow_q = scratch.get<float>(kLanes<float> / 2 * padded<float>(a.D));
    for (Pair** x : {&qt, &q_pairs}) *x = scratch.get<Pair>(Dp / 2 * kBlock);
    for (Pair** x : {&dot, &do_pairs}) *x = scratch.get<Pair>(Dvp / 2 * kBlock);
  }
  void load(const AttentionBackward<float>& a, const Block& block, const float* lse, float* do_o) {
    if (is_narrow<float>(a, block)) {
      load_block(narrow_q, a.q, block, a.D, block.rows(), lse);
    }
    const int64_t height = round_up(block.rows(), kMostDepth);
    pair_block_rows(q_rows, a.q, block, a.D, height, Dp, lse);
    pair_block_rows(do_rows, a.d_o, block, a.Dv, height, Dvp, lse);
    pair_block_rows(o_rows, a.o, block, a.Dv, height, Dvp, lse);
    transpose_words(q_rows, Dp / 2, height, Dp / 2, qt, kBlock);
    transpose_words(do_rows, Dvp / 2, height, Dvp / 2, dot, kBlock);
    join_rows(q_pairs, q_rows, Dp, height, Dp);
    join_rows(do_pairs, do_rows, Dvp, height, Dvp);
    for (int64_t i = 0; i < height; ++i) {
      VecFloat total{};
      for (int64_t d = i * Dvp; d < (i + 1) * Dvp; d += kLanes<float>) {
        total += avx512::load(o_rows + d) * avx512::load(do_rows + d);
      }
      do_o[i] = sum<float>(total);
    }
  }
  void multiply(const AttentionBackward<float>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys, const float*) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    const int64_t width = padded<float>(block.rows());
    const bool wide = !is_narrow<float>(a, block);
    if (!wide) narrow.multiply(a, block, hk, s0, keys, narrow_q, s);
    seen_parts(a, block, s0, keys, kWords, [&](int64_t i, int64_t count, int64_t t) {
      const int64_t n = i * kBlock + t;
      if (wide) key_product<Engine>(k, s0 + i, count, a.D, qt + t, width - t, room, s + n);
      key_product<Engine>(v, s0 + i, count, a.Dv, dot + t, width - t, room, dp + n);
      for (; t > 0 && i < keys; ++i) std::fill(dp + i * kBlock, dp + i * kBlock + t, 0.0f);
    });
  }
  void take(int64_t i, int64_t t, VecFloat p0, VecFloat p1, VecFloat ds0, VecFloat ds1) {
    const int64_t n = i * kBlock + t;
    store_halves(p_rows + n, p_rows + n + kBlock, avx512::narrow(p0, p1));
    const __m512i both = avx512::narrow(ds0, ds1);
    store_halves(ds_rows + n, ds_rows + n + kBlock, both);
    store(reinterpret_cast<Pair*>(dp + n), interleave(both));
  }
  void add(const AttentionBackward<float>& a, const Block& block, int64_t hk, int64_t s0,
           int64_t keys, float* dk, float* dv, int64_t stride, float* dqt) {
    const int64_t width = padded<float>(block.rows());
    seen_parts(a, block, s0, keys, kMostDepth, [&](int64_t i, int64_t count, int64_t t) {
      const int64_t n = i * kBlock + t;
      Engine::add_transposed(a, a.k, block, hk, s0 + i, count, a.D, dp + n, width - t, room,
                             dqt + t);
      add_rows(p_rows + n, width - t, count, do_pairs + t / 2 * Dvp, Dvp, a.Dv, dv + i * stride,
               stride);
      add_rows(ds_rows + n, width - t, count, q_pairs + t / 2 * Dp, Dp, a.D, dk + i * stride,
               stride);
    });
  }

 private:
  // out += tile right, where `right` has N features and holds pairs of rows of the block.
  void add_rows(BFloat16* tile, int64_t width, int64_t keys, const Pair* right,
                int64_t right_stride, int64_t N, float* out, int64_t stride) {
    const int64_t height = round_up(keys, Engine::kRows), depth = round_up(width, Engine::kDepth);
    const int64_t Np = padded<float>(N);
    for (int64_t i = 0; i < keys && width < depth; ++i) {
      std::memset(tile + i * kBlock + width, 0, (depth - width) * 2);
    }
    const BroadcastMatrix<BFloat16> left{tile, kBlock, 1};
    if (height == keys) {
      return Engine::product(keys, Np, depth, left, right, right_stride, out, stride, true);
    }
    // A product writes `height` rows, but rows of `out` after the last key are not ours.
    std::memset(tile + keys * kBlock, 0, (height - keys) * kBlock * 2);
    Engine::product(height, Np, depth, left, right, right_stride, tail, Np, false);
    for (int64_t i = 0; i < keys; ++i) {
      for (int64_t n = 0; n < Np; n += kLanes<float>) {
        float* to = out + i * stride + n;
        store(to, avx512::load(to) + avx512::load(tail + i * Np + n));
      }
    }
  }
};
