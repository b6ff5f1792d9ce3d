// Fragment of forward.inl: attention's products of bfloat16 that are summed in float, on processors
// that have them (see multiplies_pairs and prepare_amx). It is compiled for AVX-512.
//
// The right operand of a product consists of pairs: for even k, pair (k / 2, n) holds elements
// (k, n) and (k + 1, n). The left operand is rows of bfloat16. Keys stand on the left and are read
// where they lie; the operand on the right, from the rows of a block, is packed once per block.
//
// An engine multiplies: PairEngine here, by vectors, or AmxEngine in amx.inl. It has
//
//   Registers: an object that lives as long as a thread multiplies.
//   kRows, kDepth: what M and K below are multiples of.
//   product: out[M x N] = left[M x K] right[K x N], added to the old values of out if `add`. N is a
//     multiple of 16.
//   add_transposed: out += x^T tile, where x is keys [s0, s0 + keys) of a tensor with N features,
//     and `tile` holds pairs of keys, the last with 0 for a key that does not exist.

constexpr int64_t kWords = 16;      // 32-bit words of a vector
constexpr int64_t kMostDepth = 32;  // a multiple of every engine's kDepth

// ---- packing ----

// Transposes M rows of N words (32 bits) into rows that lie `out_stride` words apart. M and N are
// multiples of 16.
inline void transpose_words(const void* rows, int64_t stride, int64_t M, int64_t N, void* out,
                            int64_t out_stride) {
  transpose(static_cast<const float*>(rows), stride, M, N, static_cast<float*>(out), out_stride);
}

// Rows [begin, begin + count), filled up with zeros to `height` rows of `width` elements. They are
// used in place if there is nothing to fill, else copied to `buffer`.
inline BroadcastMatrix<BFloat16> pair_rows(BFloat16* buffer, const HeadRows& rows, int64_t begin,
                                           int64_t count, int64_t N, int64_t height,
                                           int64_t width) {
  if (!rows.pages && count == height && N == width && rows.stride % sizeof(Pair) == 0) {
    return {reinterpret_cast<const BFloat16*>(rows.at(begin)), rows.stride / 2, 1};
  }
  std::memset(buffer, 0, height * width * 2);
  for (int64_t i = 0; i < count; ++i) std::memcpy(buffer + i * width, rows.at(begin + i), N * 2);
  return {buffer, width, 1};
}

// Copies the rows of a block, filled up with zeros to `height` rows of `width` elements. Rows whose
// lse is +inf become 0 if `lse` is given.
inline void pair_block_rows(BFloat16* dst, const HeadView& heads, const Block& block, int64_t N,
                            int64_t height, int64_t width, const float* lse = nullptr) {
  std::memset(dst, 0, height * width * 2);
  for (int64_t i = 0; i < block.rows(); ++i) {
    if (lse && lse[i] == std::numeric_limits<float>::infinity()) continue;
    const HeadRows rows = query_rows(heads, block.document, block.head(i));
    std::memcpy(dst + i * width, rows.at(block.query(i)), N * 2);
  }
}

// Joins `count` rows, an even number, in pairs: the right operand of a product that sums over them.
// N is a multiple of 16.
inline void join_rows(Pair* pairs, const BFloat16* rows, int64_t stride, int64_t count, int64_t N) {
  for (int64_t i = 0; i < count; i += 2, rows += 2 * stride, pairs += N) {
    for (int64_t n = 0; n < N; n += kWords) {
      const VecUint first = (VecUint)load(rows + n), second = (VecUint)load(rows + stride + n);
      store(pairs + n, first >> 16 | second);
    }
  }
}

// Pairs from one pair of keys to the next in a tile of floats: a pair of keys is stored over the
// first of the two rows that held them.
constexpr int64_t kPairStride = 2 * kBlock;

// Room for a tile of keys with N features.
struct KeyRoom {
  BFloat16* rows;
  Pair* pairs;

  KeyRoom(Scratch& scratch, int64_t N)
      : rows(scratch.get<BFloat16>(kKeys * round_up(N, kMostDepth))),
        pairs(scratch.get<Pair>(kKeys / 2 * round_up(N, kMostDepth))) {}
};

// out = x rows^T, where x is keys [s0, s0 + keys) of a tensor with N features, and `rows` holds
// pairs of features.
template <class Engine>
inline void key_product(const HeadRows& x, int64_t s0, int64_t keys, int64_t N, const Pair* rows,
                        int64_t width, const KeyRoom& room, float* out) {
  const int64_t height = round_up(keys, Engine::kRows), depth = round_up(N, Engine::kDepth);
  const BroadcastMatrix<BFloat16> left = pair_rows(room.rows, x, s0, keys, N, height, depth);
  Engine::product(height, width, depth, left, rows, kBlock, out, kBlock, false);
}

// The dot products of pairs by vectors.
struct PairEngine {
  struct Registers {};
  static constexpr int64_t kRows = 1, kDepth = 2;

  static void product(int64_t M, int64_t N, int64_t K, BroadcastMatrix<BFloat16> left,
                      const Pair* right, int64_t right_stride, float* out, int64_t out_stride,
                      bool add) {
    const BroadcastMatrix<Pair> pairs{reinterpret_cast<const Pair*>(left.data), left.row / 2, 1};
    avx512::product(M, N, K / 2, pairs, right, right_stride, out, out_stride, add);
  }
  // x is joined in pairs of keys each time, which takes 3 % of a product with a whole block.
  static void add_transposed(const AttentionScores<float>&, const HeadView& x, const Block& block,
                             int64_t hk, int64_t s0, int64_t keys, int64_t N, float* tile,
                             int64_t width, const KeyRoom& room, float* out) {
    const int64_t depth = round_up(keys, 2), Np = round_up(N, kWords);
    const BroadcastMatrix<BFloat16> rows =
        pair_rows(room.rows, key_rows(x, block.document, hk), s0, keys, N, depth, Np);
    join_rows(room.pairs, rows.data, rows.row, depth, Np);
    const BroadcastMatrix<Pair> left{room.pairs, 1, Np};
    avx512::product(N, width, depth / 2, left, reinterpret_cast<const Pair*>(tile), kPairStride,
                    out, kBlock, true);
  }
};

// Tells whether PairEngine serves the call.
template <class C>
inline bool multiplies_pairs(const AttentionScores<C>& a) {
  return isa() == Isa::avx512_bf16 && a.q.dtype == Dtype::bf16;
}

// ---- products of the forward ----

// Products of bfloat16. p is rounded to bfloat16.
template <class Engine>
struct PairForward {
  static constexpr int64_t kKeyAlignment = kKeys;
  [[no_unique_address]] typename Engine::Registers registers;
  int64_t Dp;
  KeyRoom room;
  BFloat16* q_rows;
  Pair* qt;
  float* scores;  // scores, which p replaces in place, as pairs of keys

  PairForward(Scratch& scratch, const AttentionScores<float>& a)
      : Dp(round_up(a.D, kMostDepth)), room(scratch, std::max(a.D, a.Dv)) {
    q_rows = scratch.get<BFloat16>(kBlock * Dp);
    qt = scratch.get<Pair>(Dp / 2 * kBlock);
    scores = scratch.get<float>(kKeys * kBlock);
  }
  void load(const AttentionScores<float>& a, const Block& block) {
    const int64_t width = padded<float>(block.rows());
    pair_block_rows(q_rows, a.q, block, a.D, width, Dp);
    transpose_words(q_rows, Dp / 2, width, Dp / 2, qt, kBlock);
  }
  void multiply(const AttentionScores<float>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys) {
    const HeadRows k = key_rows(a.k, block.document, hk);
    const int64_t width = padded<float>(block.rows());
    seen_parts(a, block, s0, keys, kWords, [&](int64_t s, int64_t count, int64_t t) {
      key_product<Engine>(k, s0 + s, count, a.D, qt + t, width - t, room, scores + s * kBlock + t);
    });
  }
  void take(int64_t s, int64_t t, VecFloat p0, VecFloat p1) {
    store(reinterpret_cast<Pair*>(scores + s * kBlock + t), interleave(narrow(p0, p1)));
  }
  void add_values(const AttentionScores<float>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, float* o) {
    const int64_t width = padded<float>(block.rows());
    seen_parts(a, block, s0, keys, kWords, [&](int64_t s, int64_t count, int64_t t) {
      Engine::add_transposed(a, a.v, block, hk, s0 + s, count, a.Dv, scores + s * kBlock + t,
                             width - t, room, o + t);
    });
  }
};
