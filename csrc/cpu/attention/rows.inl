// Fragment of attention.cpp, compiled once per instruction set: rows of q, k and v in memory, and
// their conversion to operands of products. It assumes vec.inl and product.inl.

// Rows of one head of a tensor, on pages if `pages` is not null.
struct HeadRows {
  char* data;
  int64_t stride;  // bytes from one row to the next
  Dtype dtype;
  const int64_t* pages = nullptr;
  int64_t page_size = 0, page_stride = 0;  // rows of a page; bytes from one page to the next

  char* at(int64_t i) const {
    if (!pages) return data + i * stride;
    return data + pages[i / page_size] * page_stride + i % page_size * stride;
  }
};

// The rows of a head from the first row of a document on.
inline HeadRows query_rows(const HeadView& t, const Document& document, int64_t h) {
  char* data = t.data + document.batch * t.batch + h * t.head;
  return {data + document.query0 * t.row, t.row, t.dtype};
}
inline HeadRows key_rows(const HeadView& t, const Document& document, int64_t hk) {
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

// Rows of one head of k or v in the computing type, for products that read them again and again by
// scalars. Rows of this type that lie side by side are used in place; others are copied (rows that
// lie a power of two apart, say, would fight for the same cache sets). Copies of the first `kept_`
// rows are kept for the blocks of queries that follow.
template <class C>
class WidenedRows {
 public:
  WidenedRows(Scratch& scratch, int64_t longest, int64_t N)
      : scratch_(&scratch), kept_(std::min(longest, kKept / std::max<int64_t>(N, 1))), N_(N) {}

  // Rows [begin, end), at most kKeys.
  BroadcastMatrix<C> get(const HeadRows& rows, int64_t begin, int64_t end) {
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
  static constexpr int64_t kKept = 1 << 20;  // elements that are kept: about the size of a cache

  bool in_place(const HeadRows& rows) const {
    return rows.dtype == kDtype<C> && !rows.pages && rows.stride == N_ * size(rows.dtype);
  }

  // Adds rows to the copies that are kept, which are always one range [begin_, end_) of one head.
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
  const char* data_ = nullptr;  // the head whose rows [begin_, end_) are kept
  const int64_t* pages_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
};

// Rows for products that read them once or twice. Rows that fill whole vectors are used in place,
// whatever their type and distance; others are copied in the computing type, with zeros past N.
// `matrix` turns the result into an operand.
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
inline BroadcastMatrix<T> matrix(const HeadRows& rows) {
  return {reinterpret_cast<const T*>(rows.data), rows.stride / static_cast<int64_t>(sizeof(T)), 1};
}

template <class C>
inline BroadcastMatrix<C> transposed(BroadcastMatrix<C> a) {
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
