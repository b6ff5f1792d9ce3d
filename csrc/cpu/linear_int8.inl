// Fragment of linear_int8.cpp, compiled once per instruction set. It assumes vec.inl.

inline VecFloat load_widened(const int8_t* p) {
#if TFKERN_VEC_BYTES == 64
  return (VecFloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif TFKERN_VEC_BYTES == 32
  return (VecFloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  VecFloat v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = p[i];
  return v;
#endif
}

// part += the products of a vector of R rows, `stride` apart, and one of kColumns rows of w.
template <int R>
inline void int8_add(const float* x, int64_t stride, const VecFloat* w,
                     VecFloat (*part)[kColumns]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const VecFloat row = load(x + r * stride);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) part[r][j] += row * w[j];
  }
}

// The sums of R rows of x with kColumns rows of w, which may be the same row again.
template <int R>
void int8_sums(const LinearInt8& a, const float* x, const int8_t* const w[kColumns],
               float (*sums)[kColumns]) {
  constexpr int L = kLanes<float>;
  // The second level of cache gets what is 8 KB ahead, rounded up to whole groups of rows.
  const int64_t group = kColumns * a.K, ahead = group ? (8192 + group - 1) / group * group : 0;
  VecFloat part[R][kColumns] = {}, v[kColumns];
  int64_t k = 0;
  for (; k + L <= a.K; k += L) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      if (k % 64 == 0) __builtin_prefetch(w[j] + k + ahead, 0, 2);
      v[j] = load_widened(w[j] + k);
    }
    int8_add<R>(x + k, a.stride, v, part);
  }
  if (k < a.K) {
    for (int j = 0; j < kColumns; ++j) {
      int8_t rest[L] = {};
      std::memcpy(rest, w[j] + k, a.K - k);
      v[j] = load_widened(rest);
    }
    int8_add<R>(x + k, a.stride, v, part);
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kColumns; ++j) sums[r][j] = sum<float>(part[r][j]);
  }
}

// Computes the groups [begin, end) of kColumns columns of y.
template <class T>
void int8_columns(const LinearInt8& a, int64_t begin, int64_t end) {
  for (int64_t n = begin * kColumns; n < std::min(end * kColumns, a.N); n += kColumns) {
    const int64_t count = std::min(a.N - n, kColumns);
    const int8_t* w[kColumns];
    for (int64_t j = 0; j < kColumns; ++j) w[j] = a.w + std::min(n + j, a.N - 1) * a.K;
    for (int64_t m = 0; m < a.M; m += 4) {
      float sums[4][kColumns];
      const float* x = a.x + m * a.stride;
      switch (std::min<int64_t>(a.M - m, 4)) {
        case 1:
          int8_sums<1>(a, x, w, sums);
          break;
        case 2:
          int8_sums<2>(a, x, w, sums);
          break;
        case 3:
          int8_sums<3>(a, x, w, sums);
          break;
        default:
          int8_sums<4>(a, x, w, sums);
      }
      for (int64_t i = m; i < std::min(m + 4, a.M); ++i) {
        for (int64_t j = 0; j < count; ++j) {
          VecFloat value = broadcast(sums[i - m][j] * a.scale[n + j]);
          if (a.bias) value = value + load(static_cast<const T*>(a.bias) + n + j, 1);
          store(static_cast<T*>(a.y) + i * a.N + n + j, value, 1);
        }
      }
    }
  }
}

inline void linear_int8(const LinearInt8& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::bf16:
      return int8_columns<BFloat16>(a, begin, end);
    case Dtype::f16:
      return int8_columns<Half>(a, begin, end);
    default:
      return int8_columns<float>(a, begin, end);
  }
}
