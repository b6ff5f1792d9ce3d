// Fragment of backward.inl: the products of the backward on Intel AMX. It assumes amx.inl.

// Products of bfloat16 tiles. p and ds are rounded to bfloat16.
struct AmxBackward {
  static constexpr int64_t kKeyAlignment = kKeys;
  using Registers = AmxTiles;
  int64_t Dp, Dvp;
  BFloat16 *q_rows, *do_rows, *o_rows, *buffer, *p_rows, *ds_rows;
  uint32_t *qt, *dot, *q_pairs, *do_pairs;
  NarrowScores<float> narrow;
  float *s, *dp, *tail;  // ds replaces dp in place, as pairs of keys
  float* narrow_q;       // q of a narrow block

  AmxBackward(Scratch& scratch, const AttentionBackward<float>& a)
      : Dp(round_up(a.D, kAmxDepth)), Dvp(round_up(a.Dv, kAmxDepth)), narrow(scratch, a.D) {
    q_rows = scratch.get<BFloat16>(kBlock * Dp);
    for (BFloat16** x : {&do_rows, &o_rows}) *x = scratch.get<BFloat16>(kBlock * Dvp);
    buffer = scratch.get<BFloat16>(kKeys * std::max(Dp, Dvp));
    for (BFloat16** x : {&p_rows, &ds_rows}) *x = scratch.get<BFloat16>(kKeys * kBlock);
    for (float** x : {&s, &dp}) *x = scratch.get<float>(kKeys * kBlock);
    tail = scratch.get<float>(kKeys * std::max(Dp, Dvp));
  }
  void allocate_rows(Scratch& scratch, const AttentionBackward<float>& a) {
    narrow_q = scratch.get<float>(kLanes<float> / 2 * padded<float>(a.D));
    for (uint32_t** x : {&qt, &q_pairs}) *x = scratch.get<uint32_t>(Dp / 2 * kBlock);
    for (uint32_t** x : {&dot, &do_pairs}) *x = scratch.get<uint32_t>(Dvp / 2 * kBlock);
  }
  void load(const AttentionBackward<float>& a, const Block& block, const float* lse, float* do_o) {
    if (is_narrow<float>(a, block)) {
      load_block(narrow_q, a.q, block, a.D, block.rows(), lse);
    }
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
  void multiply(const AttentionBackward<float>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys, const float*) {
    const HeadRows k = key_rows(a.k, block.document, hk), v = key_rows(a.v, block.document, hk);
    const int64_t width = padded<float>(block.rows());
    if (is_narrow<float>(a, block)) {
      narrow.multiply(a, block, hk, s0, keys, narrow_q, s);
    } else {
      amx_key_product(k, s0, keys, a.D, qt, width, buffer, s);
    }
    amx_key_product(v, s0, keys, a.Dv, dot, width, buffer, dp);
  }
  void take(int64_t i, int64_t t, VecFloat p0, VecFloat p1, VecFloat ds0, VecFloat ds1) {
    BFloat16 *p_row = p_rows + i * kBlock + t, *ds_row = ds_rows + i * kBlock + t;
    store_halves(p_row, p_row + kBlock, narrow_pairs(p0, p1));
    const VecUint pairs = narrow_pairs(ds0, ds1);
    store_halves(ds_row, ds_row + kBlock, pairs);
    std::memcpy(dp + i * kBlock + t, &pairs, sizeof(pairs));
  }
  void add(const AttentionBackward<float>& a, const Block& block, int64_t hk, int64_t s0,
           int64_t keys, float* dk, float* dv, int64_t stride, float* dqt) {
    amx_add_transposed(a, block, hk, s0, keys, a.D, dp, dqt);
    const int64_t width = padded<float>(block.rows());
    add_rows(p_rows, width, keys, do_pairs, Dvp, a.Dv, dv, stride);
    add_rows(ds_rows, width, keys, q_pairs, Dp, a.D, dk, stride);
  }

 private:
  // out += tile right, where `right` has N features and holds pairs of rows of the block.
  void add_rows(BFloat16* tile, int64_t width, int64_t keys, const uint32_t* right,
                int64_t right_stride, int64_t N, float* out, int64_t stride) {
    const int64_t height = round_up(keys, kAmxRows), depth = round_up(width, kAmxDepth);
    const int64_t Np = round_up(N, kAmxRows);
    for (int64_t i = 0; i < keys && width < depth; ++i) {
      std::memset(tile + i * kBlock + width, 0, (depth - width) * 2);
    }
    const BroadcastMatrix<BFloat16> left{tile, kBlock, 1};
    if (height == keys) {
      return amx_product(keys, Np, depth, left, right, right_stride, out, stride, true);
    }
    // A product writes whole tiles of 16 rows, but rows of `out` after the last key are not ours.
    std::memset(tile + keys * kBlock, 0, (height - keys) * kBlock * 2);
    amx_product(height, Np, depth, left, right, right_stride, tail, Np, false);
    for (int64_t i = 0; i < keys; ++i) {
      for (int64_t n = 0; n < Np; n += kLanes<float>) {
        float* to = out + i * stride + n;
        store(to, avx512::load(to) + avx512::load(tail + i * Np + n));
      }
    }
  }
};
