// Fragment of linear.inl: the sums of a tile of the result, which stay in registers. It is compiled
// once for units of one float, and once for units of two bfloat16 numbers; `multiply_add` says what
// a product of units is.
//
// a[r * (across ? 1 : stride) + k * (across ? stride : 1)] is unit k of row r. b is a packed
// panel: unit k of its kPanel columns stands at b + k * kPanel, as a number of 16 bits if that is
// B. Row r of c, which has kPanel sums, stands at c + r * kPanel.

template <class B, int R, bool kAcross>
void linear_tile(int64_t depth, const uint32_t* a, int64_t stride, const void* panel, float* c,
                 Sums mode, LinearAhead& next) {
  constexpr int L = kLanes<float>;
  VecFloat sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      sum[r][j] = mode == Sums::go_on ? load(c + r * kPanel + j * L) : VecFloat{};
    }
  }
  const auto* b = static_cast<const B*>(panel);
  LinearAhead ahead = next;
  for (int64_t k = 0; k < depth; ++k) {
    ahead.fetch(k);
    const VecUint b0 = load_units(b + k * kPanel), b1 = load_units(b + k * kPanel + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VecUint x = VecUint{} + (kAcross ? a[k * stride + r] : a[r * stride + k]);
      sum[r][0] = multiply_add(x, b0, sum[r][0]);
      sum[r][1] = multiply_add(x, b1, sum[r][1]);
    }
  }
  next = ahead;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* p = c + r * kPanel + j * L;
      store(p, mode == Sums::add ? load(p) + sum[r][j] : sum[r][j]);
    }
  }
}

template <class B, bool kAcross, int... R>
constexpr std::array<LinearTile, sizeof...(R)> linear_tiles(std::integer_sequence<int, R...>) {
  return {linear_tile<B, R + 1, kAcross>...};
}

// The function for a tile of `rows` rows.
template <class B>
inline LinearTile linear_tile_of(int64_t rows, bool across) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  static constexpr auto kAlong = linear_tiles<B, false>(Rows());
  static constexpr auto kAcross = linear_tiles<B, true>(Rows());
  return (across ? kAcross : kAlong)[rows - 1];
}
