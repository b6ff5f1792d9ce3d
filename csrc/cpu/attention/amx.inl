// Fragment of forward.inl: the engine of pairs.inl on Intel AMX, which multiplies tiles. A tile
// register holds 16 rows of 64 bytes.

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

// The part of AmxEngine::product whose result is R x N tiles, where R and N are 1 or 2.
template <int R, int N>
inline void amx_product_tiles(int64_t K, const BFloat16* left, int64_t left_stride,
                              const Pair* right, int64_t right_stride, float* out,
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

// Runs tasks until none is left; each fills one tile of `transposed` from x, which has N features.
inline void attention_transpose(const AttentionScores<float>& a, const HeadView& x, int64_t N,
                                std::atomic<int64_t>& next) {
  const int64_t width = round_up(N, kWords);
  Scratch scratch;
  BFloat16* buffer = scratch.get<BFloat16>(kKeys * width);
  Pair* pairs = scratch.get<Pair>(kKeys / 2 * width);
  for (int64_t task = take(next); task < a.first_tile.back(); task = take(next)) {
    const auto after = std::upper_bound(a.first_tile.begin(), a.first_tile.end(), task);
    const Document& document = a.documents[after - a.first_tile.begin() - 1];
    const int64_t tile = task - *(after - 1), tiles = a.tiles(document);
    const int64_t s0 = tile % tiles * kKeys, keys = std::min(kKeys, document.keys - s0);
    const BroadcastMatrix<BFloat16> rows =
        pair_rows(buffer, key_rows(x, document, tile / tiles), s0, keys, N, kKeys, width);
    join_rows(pairs, rows.data, rows.row, kKeys, width);
    transpose_words(pairs, width, kKeys / 2, width, a.transposed + task * kKeys * width, kKeys / 2);
  }
}

struct AmxEngine {
  using Registers = AmxTiles;
  static constexpr int64_t kRows = kAmxRows, kDepth = kAmxDepth;

  static void product(int64_t M, int64_t N, int64_t K, BroadcastMatrix<BFloat16> left,
                      const Pair* right, int64_t right_stride, float* out, int64_t out_stride,
                      bool add) {
    for (int64_t n = 0; n < N; n += 2 * kRows) {
      for (int64_t m = 0; m < M; m += 2 * kRows) {
        const bool tall = m + kRows < M, wide = n + kRows < N;
        (tall   ? wide ? amx_product_tiles<2, 2> : amx_product_tiles<2, 1>
           : wide ? amx_product_tiles<1, 2>
                : amx_product_tiles<1, 1>)(K, left.data + m * left.row, left.row, right + n,
                                           right_stride, out + m * out_stride + n, out_stride, add);
      }
    }
  }
  static void add_transposed(const AttentionScores<float>& a, const HeadView&, const Block& block,
                             int64_t hk, int64_t s0, int64_t keys, int64_t N, float* tile,
                             int64_t width, const KeyRoom&, float* out) {
    const int64_t depth = round_up(keys, kDepth);
    for (int64_t s = round_up(keys, 2); s < depth; s += 2) {
      std::fill(tile + s * kBlock, tile + s * kBlock + width, 0.0f);
    }
    const BFloat16* x = a.transposed_tile(block.number, hk, s0, N) + s0 % kKeys;
    product(round_up(N, kRows), width, depth, {x, kKeys, 1}, reinterpret_cast<const Pair*>(tile),
            kPairStride, out, kBlock, true);
  }
};
