// Fragment of attention.cpp, compiled once per instruction set: a tile of scores, and its dropout,
// for forward and backward. It assumes block.inl.
//
// A tile is kKeys keys times a block of up to kBlock rows, with the rows along the lanes: values
// per row (running maximum, sum, lse, position, slope) are then vectors, and no reduction crosses
// lanes.

// q k^T of a narrow block. Backward uses it as well as forward: sums in another order would differ
// by roundings, which exponentials of large scores turn into factors.
template <class C>
struct NarrowScores {
  C *k_buffer, *rows;

  NarrowScores(Scratch& scratch, int64_t D) {
    k_buffer = scratch.get<C>(kKeys * padded<C>(D));
    rows = scratch.get<C>(kLanes<C> * kKeys);
  }
  // Returns the scores of keys [s0, s0 + keys), one row of kKeys elements for each row of the
  // block.
  C* by_rows(const AttentionScores<C>& a, const Block& block, int64_t hk, int64_t s0, int64_t keys,
             const C* q_rows) {
    const int64_t Dp = padded<C>(a.D);
    const HeadRows k = narrow_rows(k_buffer, key_rows(a.k, block.document, hk), s0, keys, a.D);
    TFKERN_COMPUTED(C, k.dtype,
                    row_product(keys, block.rows(), Dp, matrix<T>(k), q_rows, Dp, rows, kKeys));
    return rows;
  }
  // Writes the same scores as a tile, whose lanes beyond the rows of the block are 0.
  void multiply(const AttentionScores<C>& a, const Block& block, int64_t hk, int64_t s0,
                int64_t keys, const C* q_rows, C* scores) {
    by_rows(a, block, hk, s0, keys, q_rows);
    std::fill(rows + block.rows() * kKeys, rows + kLanes<C> * kKeys, C{0});
    transpose(rows, kKeys, kLanes<C>, padded<C>(keys), scores);
  }
};

// dst[i] = the element `i * e.key` bytes after p, for n elements. A mask gives 0 for True and -inf
// for False.
template <class C>
inline void load_elements(C* dst, const char* p, const ScoreTensor& e, int64_t n) {
  if (e.boolean) {
    for (int64_t i = 0; i < n; ++i) {
      dst[i] = p[i * e.key] ? C{0} : -std::numeric_limits<C>::infinity();
    }
    return;
  }
  TFKERN_DTYPE(e.dtype, {
    const T* x = reinterpret_cast<const T*>(p);
    const int64_t stride = e.key / static_cast<int64_t>(sizeof(T));
    if (stride == 1) return convert(dst, x, n);
    for (int64_t i = 0; i < n; ++i) convert(dst + i, x + i * stride, 1);
  });
}

// tile[s][row] = the element of e for the row and key s0 + s. `buffer` is as large as the tile.
template <class C>
inline void load_tile(C* tile, const ScoreTensor& e, const char* const* lanes, int64_t s0,
                      int64_t keys, int64_t rows, C* buffer) {
  constexpr int L = kLanes<C>;
  const int64_t width = padded<C>(rows), offset = s0 * e.key;
  bool same = true;  // all rows have the same elements
  for (int64_t i = 1; i < rows; ++i) same &= lanes[i] == lanes[0];
  if (same) {
    load_elements(buffer, lanes[0] + offset, e, keys);
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t t = 0; t < width; t += L) store(tile + s * kBlock + t, broadcast(buffer[s]));
    }
  } else if (e.key == 0) {
    std::fill(buffer, buffer + width, C{0});
    for (int64_t i = 0; i < rows; ++i) load_elements(buffer + i, lanes[i], e, 1);
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t t = 0; t < width; t += L) store(tile + s * kBlock + t, load(buffer + t));
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      C* row = buffer + i * kKeys;
      if (i < rows) load_elements(row, lanes[i] + offset, e, keys);
      std::fill(row + (i < rows ? keys : 0), row + padded<C>(keys), C{0});
    }
    transpose(buffer, kKeys, width, keys, tile);
  }
}

// Sets scores to -inf where s lies beyond t + offset + right or before t + offset - left.
template <class C>
inline void mask_band(C* scores, const AttentionShape& a, const Block& block,
                      const RowInputs<C>& lanes, int64_t s0, int64_t keys, int64_t width) {
  constexpr int L = kLanes<C>;
  constexpr int64_t kFar = 1 << 20;  // exact in float, and beyond every tile
  const Vec<C> minus_inf = broadcast(-std::numeric_limits<C>::infinity());
  const int64_t first = block.t0 + block.document.keys - block.document.queries - s0;
  const C low = static_cast<C>(std::clamp(first - a.left, -kFar, kFar));
  const C high = static_cast<C>(std::clamp(first + a.right, -kFar, kFar));
  for (int64_t t = 0; t < width; t += L) {
    const Vec<C> from = load(lanes.query + t) + low, to = load(lanes.query + t) + high;
    for (int64_t s = 0; s < keys; ++s) {
      const Vec<C> key = broadcast(static_cast<C>(s));
      C* p = scores + s * kBlock + t;
      store(p, key < from ? minus_inf : key > to ? minus_inf : load(p));
    }
  }
}

// Tells whether the band hides any of the keys [s0, s0 + keys) from a row of the block.
inline bool band_hides(const AttentionShape& a, const Block& block, int64_t s0, int64_t keys) {
  const int64_t first = block.t0 + block.document.keys - block.document.queries - s0;
  return first + block.queries - 1 > a.left || first + a.right < keys - 1;
}

// Calls part(s, count, t) for the parts of a tile that hold everything its rows see: keys
// [s0 + s, s0 + s + count) and the rows from t on, a multiple of `multiple`. The second half of the
// keys leaves out the first rows, which see none of it.
template <class F>
inline void seen_parts(const AttentionShape& a, const Block& block, int64_t s0, int64_t keys,
                       int64_t multiple, F part) {
  constexpr int64_t kHalf = kKeys / 2;
  const int64_t first = block.t0 + block.document.keys - block.document.queries;
  const int64_t unseeing = block.heads == 1 ? s0 + kHalf - a.right - first : 0;
  const int64_t t = std::clamp<int64_t>(unseeing, 0, block.rows()) / multiple * multiple;
  if (keys <= kHalf || t == 0) return part(0, keys, 0);
  part(0, kHalf, 0);
  part(kHalf, keys - kHalf, t);
}

// Tells whether scores are just q k^T times a positive factor, some of them hidden. The factor can
// then wait until the exponential is taken.
template <class C>
inline bool scaled_late(const AttentionScores<C>& a) {
  return a.scale > 0 && a.softcap == 0 && !a.bias.data && !a.alibi_slopes;
}

// The factor of the scores that finish_scores leaves out, and that the exponential must apply.
template <class C>
inline C late_scale(const AttentionScores<C>& a) {
  return scaled_late(a) ? a.scale : C{1};
}

// Turns q k^T of keys [s0, s0 + keys) into scores, except for the factor late_scale. Unless
// `derivative` is null, the derivative of the softcap is written to it. `tile` and `buffer` are
// room for a tile each.
template <class C>
inline void finish_scores(C* scores, const AttentionScores<C>& a, const Block& block,
                          const RowInputs<C>& lanes, int64_t s0, int64_t keys, C* tile, C* buffer,
                          C* derivative = nullptr) {
  constexpr int L = kLanes<C>;
  const int64_t rows = block.rows(), width = padded<C>(rows);
  const int64_t first = block.t0 + block.document.keys - block.document.queries - s0;
  if (!scaled_late(a)) {
    const C scale = a.softcap > 0 ? a.scale / a.softcap : a.scale;
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t t = s * kBlock; t < s * kBlock + width; t += L) {
        const Vec<C> x = load(scores + t) * scale, y = a.softcap > 0 ? tanh(x) : x;
        store(scores + t, a.softcap > 0 ? y * a.softcap : y);
        if (derivative) store(derivative + t, 1 - y * y);
      }
    }
  }
  if (a.bias.data) {
    load_tile(tile, a.bias, lanes.bias, s0, keys, rows, buffer);
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t t = s * kBlock; t < s * kBlock + width; t += L) {
        store(scores + t, load(scores + t) + load(tile + t));
      }
    }
  }
  if (a.alibi_slopes) {
    for (int64_t t = 0; t < width; t += L) {
      const Vec<C> query = load(lanes.query + t) + static_cast<C>(first);
      const Vec<C> alibi = load(lanes.slope + t);
      for (int64_t s = 0; s < keys; ++s) {
        C* p = scores + s * kBlock + t;
        store(p, load(p) - alibi * abs(query - static_cast<C>(s)));
      }
    }
  }
  if (band_hides(a, block, s0, keys)) mask_band(scores, a, block, lanes, s0, keys, width);
  if (a.mask.data) {
    load_tile(tile, a.mask, lanes.mask, s0, keys, rows, buffer);
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t t = s * kBlock; t < s * kBlock + width; t += L) {
        const Vec<C> hidden = load(tile + t);
        store(scores + t, hidden < 0 ? hidden : load(scores + t));
      }
    }
  }
}

// ---- dropout ----

// keep[s][row] = 1 / (1 - p) where key s0 + s is kept, else 0. s0 is a multiple of 4. Keys are
// filled up to a multiple of 4, so that callers that take them in pairs may read one past the last.
template <class C>
inline void dropout_tile(C* keep, const AttentionScores<C>& a, const RowInputs<C>& lanes,
                         int64_t s0, int64_t keys, int64_t width) {
  constexpr int L = kLanes<float>;
  for (int64_t t = 0; t < width; t += L) {
    VecUint query, stream;
    std::memcpy(&query, lanes.t + t, sizeof(query));
    std::memcpy(&stream, lanes.stream + t, sizeof(stream));
    for (int64_t s = 0; s < keys; s += 4) {
      VecUint draw[4] = {VecUint{} + static_cast<uint32_t>((s0 + s) / 4), query, stream, VecUint{}};
      philox(a.seed, draw);
      for (int64_t i = 0; i < 4; ++i) {
        C* p = keep + (s + i) * kBlock + t;
        if constexpr (std::is_same_v<C, float>) {
          store(p, draw[i] > a.dropout.last_dropped ? broadcast(a.dropout.factor) : Vec<C>{});
        } else {
          for (int j = 0; j < L; ++j)
            p[j] = draw[i][j] > a.dropout.last_dropped ? a.dropout.factor : C{0};
        }
      }
    }
  }
}

// keep[s][row] = weight[row], times the old keep[s][row] if `set`.
template <class C>
inline void weigh_tile(C* keep, const C* weight, bool set, int64_t width) {
  for (int64_t s = 0; s < kKeys; ++s) {
    for (int64_t t = 0; t < width; ++t) {
      C& x = keep[s * kBlock + t];
      x = set ? x * weight[t] : weight[t];
    }
  }
}
