// Fragment of forward.inl: attention's products on Intel AMX, which multiplies bfloat16 and sums in
// float. It is compiled for AVX-512 and used if the processor has AMX (see prepare_amx).
//
// A tile register holds 16 rows of 64 bytes. The right operand of a product consists of pairs: for
// even k, word (k / 2, n) holds elements (k, n) and (k + 1, n). Keys stand on the left and are read
// where they lie; the operand on the right, from the rows of a block, is packed once per block.

constexpr int64_t kAmxRows = 16;   // rows of a tile register, and float columns
constexpr int64_t kAmxDepth = 32;  // terms that a product of two tile registers adds

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

// The memory layout that _tile_loadconfig reads: 8 tiles of 16 rows of 64 bytes.
struct AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures this thread's tile registers at full size as long as the object lives.
struct AmxTiles {
  AmxTiles() {
    alignas(64) static const AmxConfig config;
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
};

// The part of amx_product whose result is R x N tiles, where R and N are 1 or 2.
template <int R, int N>
inline void amx_product_tiles(int64_t K, const BFloat16* left, int64_t left_stride,
                              const uint32_t* right, int64_t right_stride, float* out,
                              int64_t out_stride, bool add) {
  const int64_t out_bytes = out_stride * 4, left_bytes = left_stride * 2;
  const int64_t right_bytes = right_stride * 4;
  float* below = out + kAmxRows * out_stride;
  if (add) {
    _tile_loadd(0, out, out_bytes);
    if (N == 2) _tile_loadd(1, out + kAmxRows, out_bytes);
    if (R == 2) _tile_loadd(2, below, out_bytes);
    if (R == 2 && N == 2) _tile_loadd(3, below + kAmxRows, out_bytes);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (R == 2) _tile_zero(2);
    if (R == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kAmxDepth) {
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(6, right, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (N == 2) {
      _tile_loadd(7, right + kAmxRows, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, left + kAmxRows * left_stride, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
    left += kAmxDepth;
    right += kAmxDepth / 2 * right_stride;
  }
  _tile_stored(0, out, out_bytes);
  if (N == 2) _tile_stored(1, out + kAmxRows, out_bytes);
  if (R == 2) _tile_stored(2, below, out_bytes);
  if (R == 2 && N == 2) _tile_stored(3, below + kAmxRows, out_bytes);
}

#pragma GCC pop_options

// out[M x N] = left[M x K] right[K x N], added to the old values of out if `add`. M and N are
// multiples of 16, K of 32.
inline void amx_product(int64_t M, int64_t N, int64_t K, BroadcastMatrix<BFloat16> left,
                        const uint32_t* right, int64_t right_stride, float* out, int64_t out_stride,
                        bool add) {
  for (int64_t n = 0; n < N; n += 2 * kAmxRows) {
    for (int64_t m = 0; m < M; m += 2 * kAmxRows) {
      const bool tall = m + kAmxRows < M, wide = n + kAmxRows < N;
      (tall   ? wide ? amx_product_tiles<2, 2> : amx_product_tiles<2, 1>
         : wide ? amx_product_tiles<1, 2>
              : amx_product_tiles<1, 1>)(K, left.data + m * left.row, left.row, right + n,
                                         right_stride, out + m * out_stride + n, out_stride, add);
    }
  }
}

// ---- packing ----

// Pairs {a, b} of bfloat16, rounded to nearest, ties away from zero.
inline VecUint narrow_pairs(VecFloat a, VecFloat b) {
  return ((VecUint)a + 0x8000u) >> 16 | (((VecUint)b + 0x8000u) & 0xffff0000u);
}

// Stores the first elements of the pairs to `first` and the second ones to `second`.
inline void store_halves(BFloat16* first, BFloat16* second, VecUint pairs) {
  _mm256_storeu_si256((__m256i*)first, _mm512_cvtepi32_epi16((__m512i)pairs));
  _mm256_storeu_si256((__m256i*)second, _mm512_cvtepi32_epi16((__m512i)(pairs >> 16)));
}

// dst[i] = {a[i], b[i]}
inline void join_pairs(uint32_t* dst, const BFloat16* a, const BFloat16* b, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const VecUint low = (VecUint)load(a + i) >> 16, high = (VecUint)load(b + i);
    const VecUint pairs = low | high;
    std::memcpy(dst + i, &pairs, sizeof(pairs));
  }
}

// Transposes M rows of N words (32 bits) into rows that lie `out_stride` words apart. M and N are
// multiples of 16.
inline void transpose_words(const void* rows, int64_t stride, int64_t M, int64_t N, void* out,
                            int64_t out_stride) {
  transpose(static_cast<const float*>(rows), stride, M, N, static_cast<float*>(out), out_stride);
}

// Rows [begin, begin + count), filled up with zeros to `height` rows of `width` elements. They are
// used in place if there is nothing to fill and they lie side by side, else copied to `buffer`.
inline BroadcastMatrix<BFloat16> amx_rows(BFloat16* buffer, const HeadRows& rows, int64_t begin,
                                          int64_t count, int64_t N, int64_t height, int64_t width) {
  if (!rows.pages && count == height && N == width && rows.stride == 2 * N) {
    return {reinterpret_cast<const BFloat16*>(rows.at(begin)), N, 1};
  }
  std::memset(buffer, 0, height * width * 2);
  for (int64_t i = 0; i < count; ++i) std::memcpy(buffer + i * width, rows.at(begin + i), N * 2);
  return {buffer, width, 1};
}

// Copies the rows of a block, filled up with zeros from N to `width` elements. Rows that do not
// exist become 0 and so do, if `lse` is given, rows whose lse is +inf.
inline void amx_block_rows(BFloat16* dst, const HeadView& heads, const Block& block, int64_t N,
                           int64_t width, const float* lse = nullptr) {
  std::memset(dst, 0, kBlock * width * 2);
  for (int64_t i = 0; i < block.rows(); ++i) {
    if (lse && lse[i] == std::numeric_limits<float>::infinity()) continue;
    const HeadRows rows = query_rows(heads, block.document, block.head(i));
    std::memcpy(dst + i * width, rows.at(block.query(i)), N * 2);
  }
}

// Joins `count` rows, an even number, in pairs: the right operand of a product that sums over them.
inline void join_rows(uint32_t* pairs, const BFloat16* rows, int64_t stride, int64_t count,
                      int64_t N) {
  for (int64_t i = 0; i < count; i += 2) {
    join_pairs(pairs + i / 2 * stride, rows + i * stride, rows + (i + 1) * stride, N);
  }
}

// Words from one pair of keys to the next in a tile of floats: a pair of keys is stored over the
// first of the two rows that held them.
constexpr int64_t kPairStride = 2 * kBlock;

// Sets to 0 the pairs past the last key that a product still reads.
inline void end_pairs(float* tile, int64_t keys) {
  keys += keys % 2;
  std::fill(tile + keys * kBlock, tile + round_up(keys, kAmxDepth) * kBlock, 0.0f);
}

// out = x rows^T, where x is keys [s0, s0 + keys) of a tensor with N features, and `rows` holds
// pairs of features.
inline void amx_key_product(const HeadRows& x, int64_t s0, int64_t keys, int64_t N,
                            const uint32_t* rows, int64_t width, BFloat16* buffer, float* out) {
  const int64_t height = round_up(keys, kAmxRows), Np = round_up(N, kAmxDepth);
  const BroadcastMatrix<BFloat16> left = amx_rows(buffer, x, s0, keys, N, height, Np);
  amx_product(height, width, Np, left, rows, kBlock, out, kBlock, false);
}

// ---- operands that are read along the keys ----

// Runs tasks until none is left; each fills one tile of `transposed` from x, which has N features.
inline void attention_transpose(const AttentionScores<float>& a, const HeadView& x, int64_t N,
                                std::atomic<int64_t>& next) {
  const int64_t width = round_up(N, kAmxRows);
  Scratch scratch;
  BFloat16* buffer = scratch.get<BFloat16>(kKeys * width);
  uint32_t* pairs = scratch.get<uint32_t>(kKeys / 2 * width);
  for (int64_t task = take(next); task < a.first_tile.back(); task = take(next)) {
    const auto after = std::upper_bound(a.first_tile.begin(), a.first_tile.end(), task);
    const Document& document = a.documents[after - a.first_tile.begin() - 1];
    const int64_t tile = task - *(after - 1), tiles = a.tiles(document);
    const int64_t s0 = tile % tiles * kKeys, keys = std::min(kKeys, document.keys - s0);
    const BroadcastMatrix<BFloat16> rows =
        amx_rows(buffer, key_rows(x, document, tile / tiles), s0, keys, N, kKeys, width);
    join_rows(pairs, rows.data, width, kKeys, width);
    transpose_words(pairs, width, kKeys / 2, width, a.transposed + task * kKeys * width, kKeys / 2);
  }
}

// out += x^T tile, where x is the tensor that attention_transpose read, and `tile` holds pairs of
// keys.
inline void amx_add_transposed(const AttentionScores<float>& a, const Block& block, int64_t hk,
                               int64_t s0, int64_t keys, int64_t N, float* tile, float* out) {
  end_pairs(tile, keys);
  const BroadcastMatrix<BFloat16> left{a.transposed_tile(block.number, hk, s0, N), kKeys, 1};
  amx_product(round_up(N, kAmxRows), padded<float>(block.rows()), round_up(keys, kAmxDepth), left,
              reinterpret_cast<const uint32_t*>(tile), kPairStride, out, kBlock, true);
}

// ---- products of the forward ----

// Products of bfloat16 tiles. p is rounded to bfloat16.
struct AmxForward {
  static constexpr int64_t kKeyAlignment = kKeys;
  AmxTiles tiles;
  int64_t Dp;
  BFloat16 *q_rows, *k_buffer;
  uint32_t* qt;
  float* scores;  // scores, which p replaces in place, as pairs of keys

  AmxForward(Scratch& scratch, const AttentionScores<float>& a) : Dp(round_up(a.D, kAmxDepth)) {
    q_rows = scratch.get<BFloat16>(kBlock * Dp);
    k_buffer = scratch.get<BFloat16>(kKeys * Dp);
    qt = scratch.get<uint32_t>(Dp / 2 * kBlock);
    scores = scratch.get<float>(kKeys * kBlock);
  }
  void load(const AttentionScores<float>& a, const Block& block) {
    amx_block_rows(q_rows, a.q, block, a.D, Dp);
    transpose_words(q_rows, Dp / 2, kBlock, Dp / 2, qt, kBlock);
  }
  void multiply(const AttentionScores<float>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys) {
    const int64_t width = padded<float>(block.rows());
    amx_key_product(key_rows(a.k, block.document, hk), s0, keys, a.D, qt, width, k_buffer, scores);
  }
  void take(int64_t s, int64_t t, VecFloat p0, VecFloat p1) {
    const VecUint pairs = narrow_pairs(p0, p1);
    std::memcpy(scores + s * kBlock + t, &pairs, sizeof(pairs));
  }
  void add_values(const AttentionScores<float>& a, const Block& block, int64_t hk, int64_t s0,
                  int64_t keys, float* o) {
    amx_add_transposed(a, block, hk, s0, keys, a.Dv, scores, o);
  }
};
