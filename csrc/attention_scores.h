// From rows in memory to a tile of scores, for forward and backward.
//
// A tile is kKeys keys times a block of up to kBlock rows, with the rows along the lanes: what is
// per row (running maximum, sum, lse, position, slope) is then a vector, and no reduction crosses
// lanes.

// ---- memory ----

// Rows of one head of a tensor, on pages if there is a table.
struct HeadRows {
  char* data;
  int64_t stride;  // in bytes
  Dtype dtype;
  const int64_t* pages = nullptr;
  int64_t page_size = 0, page_stride = 0;

  char* at(int64_t i) const {
    if (!pages) return data + i * stride;
    return data + pages[i / page_size] * page_stride + i % page_size * stride;
  }
};

// From the first row of a document on.
inline HeadRows query_rows(const Heads& t, const Document& document, int64_t h) {
  char* data = t.data + document.batch * t.batch + h * t.head;
  return {data + document.query0 * t.row, t.row, t.dtype};
}
inline HeadRows key_rows(const Heads& t, const Document& document, int64_t hk) {
  char* data = t.data + hk * t.head;
  if (t.pages) {
    const int64_t* pages = t.pages + document.batch * t.pages_per_batch;
    return {data, t.row, t.dtype, pages, t.page_size, t.batch};
  }
  return {data + document.batch * t.batch + document.key0 * t.row, t.row, t.dtype};
}

template <class C>
inline void load_row(C* dst, const HeadRows& rows, int64_t i, int64_t N) {
  TFKERN_DTYPE(rows.dtype, convert(dst, reinterpret_cast<const T*>(rows.at(i)), N));
}

template <class C>
inline void store_row(const HeadRows& rows, int64_t i, const C* src, int64_t N) {
  TFKERN_DTYPE(rows.dtype, convert(reinterpret_cast<T*>(rows.at(i)), src, N));
}

template <class C>
constexpr Dtype kDtype = std::is_same_v<C, double> ? Dtype::f64 : Dtype::f32;

// Rows of one head of k or v in the computing type, for products that read them by scalars, again
// and again: in place if they are so in memory and side by side (rows a power of two apart would
// fight for the same cache sets), else copied. Copies among the first `kept_` rows serve all blocks
// of queries that follow one another.
template <class C>
class WidenedRows {
 public:
  WidenedRows(Scratch& scratch, int64_t longest, int64_t N)
      : scratch_(&scratch), kept_(std::min(longest, kKept / std::max<int64_t>(N, 1))), N_(N) {}

  // Rows [begin, end), at most kKeys.
  Left<C> get(const HeadRows& rows, int64_t begin, int64_t end) {
    if (in_place(rows)) return {at(rows, begin), N_, 1};
    if (!copies_) copies_ = scratch_->get<C>((kept_ + kKeys) * N_);
    const int64_t place = end <= kept_ ? begin : kept_;
    place == kept_ ? copy(rows, begin, end, place) : keep(rows, begin, end);
    return {copies_ + place * N_, N_, 1};
  }
  // Where `get` will find the rows from `begin` on; null before the first copy.
  const C* at(const HeadRows& rows, int64_t begin) const {
    if (in_place(rows)) return reinterpret_cast<const C*>(rows.at(begin));
    return copies_ ? copies_ + std::min(begin, kept_) * N_ : nullptr;
  }

 private:
  static constexpr int64_t kKept = 1 << 20;  // elements: of the order of a cache

  bool in_place(const HeadRows& rows) const {
    return rows.dtype == kDtype<C> && !rows.pages && rows.stride == N_ * size(rows.dtype);
  }

  // Adds to what is kept, which always is one stretch of one head.
  void keep(const HeadRows& rows, int64_t begin, int64_t end) {
    if (rows.data != data_ || rows.pages != pages_ || begin > end_ || end < begin_) {
      data_ = rows.data;
      pages_ = rows.pages;
      begin_ = end_ = begin;
    }
    if (begin < begin_) copy(rows, begin, begin_, begin);
    if (end > end_) copy(rows, end_, end, end_);
    begin_ = std::min(begin, begin_);
    end_ = std::max(end, end_);
  }

  void copy(const HeadRows& rows, int64_t begin, int64_t end, int64_t place) {
    C* to = copies_ + place * N_;
    if (!rows.pages && rows.stride == N_ * size(rows.dtype)) {
      TFKERN_DTYPE(rows.dtype, return convert(to, reinterpret_cast<const T*>(rows.at(begin)),
                                              (end - begin) * N_));
    }
    for (int64_t i = begin; i < end; ++i, to += N_) load_row(to, rows, i, N_);
  }

  Scratch* scratch_;
  int64_t kept_, N_;
  C* copies_ = nullptr;
  const char* data_ = nullptr;  // of the head whose rows [begin_, end_) are kept
  const int64_t* pages_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
};

// Rows for products that read them once or twice: in place in any type and at any distance if they
// fill whole vectors, else copied, with zeros past N. `matrix` makes them an operand.
template <class C>
inline HeadRows narrow_rows(C* buffer, const HeadRows& rows, int64_t begin, int64_t count,
                            int64_t N) {
  const int64_t width = padded<C>(N);
  if (!rows.pages && width == N) return {rows.at(begin), rows.stride, rows.dtype};
  for (int64_t i = 0; i < count; ++i) {
    load_row(buffer + i * width, rows, begin + i, N);
    std::fill(buffer + i * width + N, buffer + (i + 1) * width, C{0});
  }
  return {reinterpret_cast<char*>(buffer), width * static_cast<int64_t>(sizeof(C)), kDtype<C>};
}

template <class T>
inline Left<T> matrix(const HeadRows& rows) {
  return {reinterpret_cast<const T*>(rows.data), rows.stride / static_cast<int64_t>(sizeof(T)), 1};
}

template <class C>
inline Left<C> transposed(Left<C> a) {
  return {a.data, a.column, a.row};
}

// out[n][m] = rows[m][n]. Whole vectors are read and written.
template <class C>
inline void transpose(const C* rows, int64_t stride, int64_t M, int64_t N, C* out,
                      int64_t out_stride = kBlock) {
  constexpr int L = kLanes<C>;
  for (int64_t m = 0; m < M; m += L) {
    for (int64_t n = 0; n < N; n += L) {
      Vec<C> part[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) part[i] = load(rows + (m + i) * stride + n);
      transpose<C>(part);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (n + i) * out_stride + m, part[i]);
    }
  }
}

// ---- blocks of rows ----

// Queries [t0, t0 + queries) of heads [h0, h0 + heads), one head after the other. Several heads
// share a block if they share keys and all their queries fit: grouped heads then fill the lanes
// that the few queries of decoding leave, and keys are read once.
struct Block {
  const Document& document;
  int64_t number;  // of the document
  int64_t h0, heads, t0, queries;
  int64_t begin, end;  // keys that some row sees

  int64_t rows() const { return heads * queries; }
  // Mostly one head, and no division.
  int64_t head(int64_t row) const { return heads == 1 ? h0 : h0 + row / queries; }
  int64_t query(int64_t row) const { return heads == 1 ? t0 + row : t0 + row % queries; }
};

// Block of queries [t0, t0 + kBlock), as far as they exist, of `heads` heads.
inline Block block_at(const AttentionShape& a, int64_t number, int64_t h0, int64_t heads,
                      int64_t t0) {
  const Document& document = a.documents[number];
  const int64_t queries = std::clamp<int64_t>(document.queries - t0, 0, kBlock);
  const int64_t first = t0 + document.keys - document.queries, last = first + queries - 1;
  const int64_t end = std::clamp<int64_t>(last + a.right + 1, 0, queries ? document.keys : 0);
  const int64_t begin = std::clamp<int64_t>(first - a.left, 0, end);
  return {document, number, h0, heads, t0, queries, begin / 4 * 4, end};  // Philox draws fours
}

// Block `i` of key head hk: those with the most keys come last within a head.
inline Block block_of(const AttentionShape& a, int64_t number, int64_t hk, int64_t i) {
  const Document& document = a.documents[number];
  const int64_t h0 = hk * a.group();
  if (a.shared(document)) return block_at(a, number, h0, a.group(), 0);
  const int64_t per_head = (document.queries + kBlock - 1) / kBlock;
  return block_at(a, number, h0 + i / per_head, 1, i % per_head * kBlock);
}

// The rows of a block of a tensor with N features, padded with zeros, and rows of zeros up to
// `count`. Those that a given lse of infinity leaves out are 0.
template <class C>
inline void load_block(C* dst, const Heads& x, const Block& block, int64_t N, int64_t count,
                       const C* lse = nullptr) {
  const int64_t width = padded<C>(N);
  for (int64_t i = 0; i < count; ++i) {
    C* row = dst + i * width;
    const bool left_out = lse && lse[i] == std::numeric_limits<C>::infinity();
    const bool exists = i < block.rows() && !left_out;
    if (exists) load_row(row, query_rows(x, block.document, block.head(i)), block.query(i), N);
    std::fill(row + (exists ? N : 0), row + width, C{0});
  }
}

// What the rows of a block bring into their scores, along the lanes.
template <class C>
struct Lanes {
  alignas(64) C query[kBlock];     // counted from the block's first
  alignas(64) C slope[kBlock];     // of alibi
  alignas(64) uint32_t t[kBlock];  // of the counter of Philox
  alignas(64) uint32_t stream[kBlock];
  const char *bias[kBlock], *mask[kBlock];  // element of key 0
};

inline const char* element(const Elements& e, const Block& block, int64_t row) {
  return e.data + block.document.batch * e.batch + block.head(row) * e.head +
         block.query(row) * e.query;
}

template <class C>
inline void fill_lanes(Lanes<C>& lanes, const AttentionScores<C>& a, const Block& block) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = i < block.rows() ? i : 0, number = block.number * a.H + block.head(row);
    lanes.query[i] = static_cast<C>(block.query(row) - block.t0);
    lanes.slope[i] = a.alibi_slopes ? a.alibi_slopes[number] : C{0};
    lanes.t[i] = static_cast<uint32_t>(block.query(row));
    lanes.stream[i] = static_cast<uint32_t>(number);
    lanes.bias[i] = element(a.bias, block, row);
    lanes.mask[i] = element(a.mask, block, row);
  }
}

// Rows too few to fill half a vector, as in decoding: products then run along the features instead
// of the rows, and o is kept by rows. The question is asked of the forward's block of these rows,
// which holds all heads of a group if they share it.
template <class C>
inline bool is_narrow(const AttentionShape& a, const Block& block) {
  const Document& document = block.document;
  const int64_t rows = a.shared(document) ? a.group() * document.queries : block.rows();
  return rows <= kLanes<C> / 2;
}

// ---- scores ----

// q k^T of a narrow block. The backward takes them from here as well: sums in another order would
// differ by roundings, which exponentials of large scores turn into factors.
template <class C>
struct NarrowScores {
  C *k_buffer, *rows;

  NarrowScores(Scratch& scratch, int64_t D) {
    k_buffer = scratch.get<C>(kKeys * padded<C>(D));
    rows = scratch.get<C>(kLanes<C> * kKeys);
  }
  // Returns the scores of keys [s0, s0 + keys): each row of the block has kKeys of them.
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

// dst[i] = the element `i * stride` bytes from p. A mask gives 0 for True and -inf for False.
template <class C>
inline void load_elements(C* dst, const char* p, const Elements& e, int64_t n) {
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

// tile[s][row] = the element of each row and key s0 + s. `buffer` is as large as the tile.
template <class C>
inline void load_tile(C* tile, const Elements& e, const char* const* lanes, int64_t s0,
                      int64_t keys, int64_t rows, C* buffer) {
  constexpr int L = kLanes<C>;
  const int64_t width = padded<C>(rows), offset = s0 * e.key;
  bool same = true;  // in all rows
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
inline void mask_band(C* scores, const AttentionShape& a, const Block& block, const Lanes<C>& lanes,
                      int64_t s0, int64_t keys, int64_t width) {
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

// Whether the band hides any of the keys [s0, s0 + keys) from a row of the block.
inline bool band_hides(const AttentionShape& a, const Block& block, int64_t s0, int64_t keys) {
  const int64_t first = block.t0 + block.document.keys - block.document.queries - s0;
  return first + block.queries - 1 > a.left || first + a.right < keys - 1;
}

// Calls part(s, count, t) for parts of a tile of keys that hold all that its rows see: keys [s0 +
// s, s0 + s + count) and the rows from t on. Rows that see no key of the second half skip it.
template <class C, class F>
inline void seen_parts(const AttentionShape& a, const Block& block, int64_t s0, int64_t keys,
                       F part) {
  constexpr int64_t kHalf = kKeys / 2;
  const int64_t first = block.t0 + block.document.keys - block.document.queries;
  const int64_t unseeing = block.heads == 1 ? s0 + kHalf - a.right - first : 0;
  const int64_t t = std::clamp<int64_t>(unseeing, 0, block.rows()) / kLanes<C> * kLanes<C>;
  if (keys <= kHalf || t == 0) return part(0, keys, 0);
  part(0, kHalf, 0);
  part(kHalf, keys - kHalf, t);
}

// Whether nothing is done to q k^T but hiding some of it, and scaling it by a positive number. The
// factor may then wait until exponentials are taken.
template <class C>
inline bool scaled_late(const AttentionScores<C>& a) {
  return a.scale > 0 && a.softcap == 0 && !a.bias.data && !a.alibi_slopes;
}

// The factor that finish_scores leaves out.
template <class C>
inline C late_scale(const AttentionScores<C>& a) {
  return scaled_late(a) ? a.scale : C{1};
}

// Turns q k^T into the scores of keys [s0, s0 + keys), but for late_scale. With a softcap, its
// derivative goes to `slope`, unless that is null. `tile` and `buffer` are room for a tile each.
template <class C>
inline void finish_scores(C* scores, const AttentionScores<C>& a, const Block& block,
                          const Lanes<C>& lanes, int64_t s0, int64_t keys, C* tile, C* buffer,
                          C* slope = nullptr) {
  constexpr int L = kLanes<C>;
  const int64_t rows = block.rows(), width = padded<C>(rows);
  const int64_t first = block.t0 + block.document.keys - block.document.queries - s0;
  if (!scaled_late(a)) {
    const C scale = a.softcap > 0 ? a.scale / a.softcap : a.scale;
    for (int64_t s = 0; s < keys; ++s) {
      for (int64_t t = s * kBlock; t < s * kBlock + width; t += L) {
        const Vec<C> x = load(scores + t) * scale, y = a.softcap > 0 ? tanh(x) : x;
        store(scores + t, a.softcap > 0 ? y * a.softcap : y);
        if (slope) store(slope + t, 1 - y * y);
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

// keep[s][row] = 1 / (1 - p) where key s0 + s is kept, else 0. s0 is a multiple of 4, and keys come
// in fours: what takes them in pairs reads one past the last.
template <class C>
inline void dropout_tile(C* keep, const AttentionScores<C>& a, const Lanes<C>& lanes, int64_t s0,
                         int64_t keys, int64_t width) {
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
          store(p, draw[i] >= a.threshold ? broadcast(a.keep) : Vec<C>{});
        } else {
          for (int j = 0; j < L; ++j) p[j] = draw[i][j] >= a.threshold ? a.keep : C{0};
        }
      }
    }
  }
}

// keep[s][row] = weight[row], times what `keep` holds if that is set.
template <class C>
inline void weigh_tile(C* keep, const C* weight, bool set, int64_t width) {
  for (int64_t s = 0; s < kKeys; ++s) {
    for (int64_t t = 0; t < width; ++t) {
      C& x = keep[s * kBlock + t];
      x = set ? x * weight[t] : weight[t];
    }
  }
}
