// Fragment of attention.cpp, compiled once per instruction set: the blocks of rows that tasks work
// on. It assumes rows.inl.

// Queries [t0, t0 + queries) of heads [h0, h0 + heads), one head after the other. Several heads
// share a block if they share keys and all their queries fit: grouped heads then fill the lanes
// that the few queries of decoding leave, and keys are read once.
struct Block {
  const Document& document;
  int64_t number;  // index of the document
  int64_t h0, heads, t0, queries;
  int64_t begin, end;  // range of the keys that some row sees

  int64_t rows() const { return heads * queries; }
  // The head and the query of a row. Most blocks have one head, and then need no division.
  int64_t head(int64_t row) const { return heads == 1 ? h0 : h0 + row / queries; }
  int64_t query(int64_t row) const { return heads == 1 ? t0 + row : t0 + row % queries; }
};

// The block of the queries from t0 on, at most kBlock of each of `heads` heads.
inline Block block_at(const AttentionShape& a, int64_t number, int64_t h0, int64_t heads,
                      int64_t t0) {
  const Document& document = a.documents[number];
  const int64_t queries = std::clamp<int64_t>(document.queries - t0, 0, kBlock);
  const int64_t first = t0 + document.keys - document.queries, last = first + queries - 1;
  const int64_t end = std::clamp<int64_t>(last + a.right + 1, 0, queries ? document.keys : 0);
  const int64_t begin = std::clamp<int64_t>(first - a.left, 0, end);
  return {document, number, h0, heads, t0, queries, begin / 4 * 4, end};  // keys of whole draws
}

// Block `i` of key head hk. Within a head, the blocks with the most keys come last.
inline Block block_of(const AttentionShape& a, int64_t number, int64_t hk, int64_t i) {
  const Document& document = a.documents[number];
  const int64_t h0 = hk * a.group();
  if (a.shared(document)) return block_at(a, number, h0, a.group(), 0);
  const int64_t per_head = (document.queries + kBlock - 1) / kBlock;
  return block_at(a, number, h0 + i / per_head, 1, i % per_head * kBlock);
}

// Loads the rows of a block of a tensor with N features, padded with zeros to whole vectors, and
// adds rows of zeros up to `count`. If `lse` is given, rows whose lse is +inf become 0 too.
template <class C>
inline void load_block(C* dst, const HeadView& x, const Block& block, int64_t N, int64_t count,
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

// Inputs of the score computation for each row of a block, stored so that a vector load gives one
// row per lane.
template <class C>
struct RowInputs {
  alignas(64) C query[kBlock];              // query, counted from the first of the block
  alignas(64) C slope[kBlock];              // ALiBi slope
  alignas(64) uint32_t t[kBlock];           // query, as word 1 of the Philox counter
  alignas(64) uint32_t stream[kBlock];      // document H + head, as word 2 of the counter
  const char *bias[kBlock], *mask[kBlock];  // address of the element for key 0
};

// The address of the element for a row of the block and key 0.
inline const char* element(const ScoreTensor& e, const Block& block, int64_t row) {
  return e.data + block.document.batch * e.batch + block.head(row) * e.head +
         block.query(row) * e.query;
}

template <class C>
inline void fill_lanes(RowInputs<C>& lanes, const AttentionScores<C>& a, const Block& block) {
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

// Tells whether the rows fill at most half a vector, as in decoding. Products then run along the
// features instead of the rows, and o is stored by rows. The answer counts the rows that the block
// has in forward, where heads of a group may share it, so that backward forms the same scores.
template <class C>
inline bool is_narrow(const AttentionShape& a, const Block& block) {
  const Document& document = block.document;
  const int64_t rows = a.shared(document) ? a.group() * document.queries : block.rows();
  return rows <= kLanes<C> / 2;
}
