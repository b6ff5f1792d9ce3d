// Vectors of float or double, compiled once per instruction set: each_isa.h includes this file
// several times, each time in another namespace and target region, hence without a guard.
// TFKERN_VEC_BYTES is the width of a vector.
//
// The vectors are the compiler's own (GCC vector extension): + - * /, comparisons and ?: work on
// them, and a * b + c becomes a fused multiply-add.

typedef float VecFloat __attribute__((vector_size(TFKERN_VEC_BYTES)));
typedef double VecDouble __attribute__((vector_size(TFKERN_VEC_BYTES)));
typedef int32_t VecInt __attribute__((vector_size(TFKERN_VEC_BYTES)));
typedef uint32_t VecUint __attribute__((vector_size(TFKERN_VEC_BYTES)));
typedef int64_t VecLong __attribute__((vector_size(TFKERN_VEC_BYTES)));
typedef uint64_t VecUlong __attribute__((vector_size(TFKERN_VEC_BYTES)));
typedef uint16_t VecHalfBits __attribute__((vector_size(TFKERN_VEC_BYTES / 2)));

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecFloat type;
  typedef VecInt index;
};
template <>
struct VecOf<double> {
  typedef VecDouble type;
  typedef VecLong index;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
using VecIndex = typename VecOf<C>::index;  // indices of lanes, for __builtin_shuffle
template <class C>
constexpr int kLanes = TFKERN_VEC_BYTES / sizeof(C);

// n rounded up to whole vectors.
template <class C>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

template <class C>
inline Vec<C> broadcast(C value) {
  return Vec<C>{} + value;
}

// ---- memory: elements of any type are widened to the computing type on load, rounded on store
// ----

inline VecFloat load(const float* p) {
  VecFloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline VecDouble load(const double* p) {
  VecDouble v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, VecFloat v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, VecDouble v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(BFloat16* p, VecFloat v) {
  VecUint bits = (VecUint)v;
  bits += 0x7fffu + ((bits >> 16) & 1u);             // round to nearest, ties to even
  bits = v == v ? bits : (VecUint{} + 0x7fc00000u);  // the carry could turn a NaN into an infinity
#if TFKERN_VEC_BYTES == 64
  // One permutation takes the upper halves; GCC 12 would shift and then shuffle two vectors.
  static constexpr uint16_t kUpper[] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i upper = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)kUpper));
  const __m512i h = _mm512_permutexvar_epi16(upper, (__m512i)bits);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(h));
#else
  VecHalfBits h = __builtin_convertvector(bits >> 16, VecHalfBits);
  std::memcpy(p, &h, sizeof(h));
#endif
}

// Intrinsics, because GCC 12 would widen 16-bit integers in two halves and join them.
#if TFKERN_VEC_BYTES == 64
inline VecFloat load(const BFloat16* p) {
  return (VecFloat)((VecUint)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
}
inline VecFloat load(const Half* p) {
  return (VecFloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store(Half* p, VecFloat v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif TFKERN_VEC_BYTES == 32
inline VecFloat load(const BFloat16* p) {
  return (VecFloat)((VecUint)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
}
inline VecFloat load(const Half* p) {
  return (VecFloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline void store(Half* p, VecFloat v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline VecFloat load(const BFloat16* p) {
  VecHalfBits h;
  std::memcpy(&h, p, sizeof(h));
  return (VecFloat)(__builtin_convertvector(h, VecUint) << 16);
}
#if defined(__aarch64__)
typedef __fp16 NativeHalf;
#else
typedef _Float16 NativeHalf;
#endif
inline VecFloat load(const Half* p) {
  NativeHalf h[kLanes<float>];
  std::memcpy(h, p, sizeof(h));
  VecFloat v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(h[i]);
  return v;
}
inline void store(Half* p, VecFloat v) {
  NativeHalf h[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) h[i] = static_cast<NativeHalf>(v[i]);
  std::memcpy(p, h, sizeof(h));
}
#endif

// Loads or stores the first n elements only; memory past them is not touched. A load sets the other
// lanes to 0.
template <class T>
inline Vec<Compute<T>> load(const T* p, int n) {
  T part[kLanes<Compute<T>>] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store(T* p, Vec<Compute<T>> v, int n) {
  T part[kLanes<Compute<T>>];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

#if TFKERN_VEC_BYTES == 64
inline VecFloat load(const float* p, int n) {
  return (VecFloat)_mm512_maskz_loadu_ps((1u << n) - 1, p);
}
inline void store(float* p, VecFloat v, int n) {
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
}
inline VecFloat load(const BFloat16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
  return (VecFloat)((VecUint)_mm512_cvtepu16_epi32(half) << 16);
}
inline VecFloat load(const Half* p, int n) {
  return (VecFloat)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
#endif

// Loads or stores a vector, or only its first n elements if a row has no more left.
template <class T>
inline Vec<Compute<T>> load_left(const T* p, int64_t n) {
  return n >= kLanes<Compute<T>> ? load(p) : load(p, static_cast<int>(n));
}
template <class T>
inline void store_left(T* p, Vec<Compute<T>> v, int64_t n) {
  n >= kLanes<Compute<T>> ? store(p, v) : store(p, v, static_cast<int>(n));
}
// Stores the first n elements of v, or all if it has no more. The slow branch serves the rare case
// that just one of T and v is double.
template <class T, class V>
inline void store_as(T* p, V v, int64_t n) {
  constexpr int L = sizeof(V) / sizeof(v[0]);
  if constexpr (std::is_same_v<V, Vec<Compute<T>>>) {
    n >= L ? store(p, v) : store(p, v, static_cast<int>(n));
  } else {
    for (int i = 0; i < std::min<int64_t>(n, L); ++i) {
      store(p + i, Vec<Compute<T>>{static_cast<Compute<T>>(v[i])}, 1);
    }
  }
}

// dst[i] = src[i], widened or rounded.
template <class D, class S>
inline void convert(D* dst, const S* src, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_as(dst + i, load(src + i), L);
  if (i < n) store_as(dst + i, load(src + i, static_cast<int>(n - i)), n - i);
}

// ---- arithmetic ----

template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
}

// a * b, always rounded: the compiler may not fuse it with a sum that follows.
template <class V>
inline V rounded_product(V a, V b) {
  V product = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// Tells whether a comparison holds in some lane.
template <class M>
inline bool any(M mask) {
  bool result = false;
  for (size_t i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) result |= mask[i] != 0;
  return result;
}

// 0, 1, 2, ..., loaded from memory, since GCC 12 would build the vector lane by lane at run time.
template <class C>
inline VecIndex<C> iota() {
  static constexpr std::conditional_t<sizeof(C) == 4, int32_t, int64_t> kNumbers[] = {
      0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  VecIndex<C> v;
  std::memcpy(&v, kNumbers, sizeof(v));
  return v;
}

// The sum over the lanes, always in the same order: halves are added, then quarters, and so on.
template <class C>
inline C sum(Vec<C> v) {
#pragma GCC unroll 4
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    v = v + __builtin_shuffle(v, iota<C>() ^ width);
  }
  return v[0];
}

// The largest lane.
template <class C>
inline C max(Vec<C> v) {
#pragma GCC unroll 4
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    v = vmax(v, __builtin_shuffle(v, iota<C>() ^ width));
  }
  return v[0];
}

// e^x / 2^n, where n is the integer next to x / ln(2): the polynomial's relative error is 1e-8.
inline VecFloat exp_remainder(VecFloat x, VecFloat n) {
  VecFloat r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  VecFloat p = r * 0.001392618359f + 0.008363179053f;
  p = p * r + 0.04166655462f;
  p = p * r + 0.1666657699f;
  p = p * r + 0.5f;
  return p * (r * r) + r + 1.0f;
}

// e^x within 2 ulp.
inline VecFloat exp(VecFloat x) {
  x = vmin(broadcast(89.0f), vmax(broadcast(-104.0f), x));  // past these: inf or 0; NaN stays
  const VecFloat magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecFloat n = (x * 1.44269504f + magic) - magic;
  // 2^n in two factors, since n reaches from -150 to 128
  const VecInt k = __builtin_convertvector(n, VecInt);
  const VecInt half = k >> 1;
  return exp_remainder(x, n) * (VecFloat)((half + 127) << 23) * (VecFloat)((k - half + 127) << 23);
}
inline VecDouble exp(VecDouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// log2(x) as the sum of an integer and of a fraction from -0.59 to 0.42. x is a positive normal
// number; infinity and NaN give NaN. The error of the polynomial, as log2((1 + t) / (1 - t)), is
// less than 6e-9.
inline VecFloat log2_fraction(VecFloat x, VecFloat& integer) {
  // x = 2^n m, 2/3 <= m < 4/3
  const VecInt n = ((VecInt)x - 0x3f2aaaab) >> 23;
  const VecFloat m = (VecFloat)((VecInt)x - (n << 23));
  const VecFloat t = (m - 1) / (m + 1), square = t * t;
  VecFloat p = square * 0.320598898f + 0.412198583f;
  p = p * square + 0.577078016f;
  p = p * square + 0.961796694f;
  p = p * square + 2.885390082f;
  integer = __builtin_convertvector(n, VecFloat);
  return p * t + (x - x);
}
inline VecDouble log2_fraction(VecDouble x, VecDouble& integer) {
  integer = VecDouble{};
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log2(x[i]);
  return x;
}

// 2^x within 2 ulp for x <= 127. Results below 2^-126 become 0.
#if TFKERN_VEC_BYTES == 64
inline VecFloat exp2_flush(VecFloat x) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const VecFloat r = (VecFloat)_mm512_reduce_ps((__m512)x, kDown);  // x - floor(x)
  VecFloat p = r * 2.16129178e-4f + 1.24678458e-3f;
  p = p * r + 9.67545155e-3f;
  p = p * r + 5.54852821e-2f;
  p = p * r + 0.240229309f;
  p = p * r + 0.693147063f;
  p = p * r + 1.0f;
  const __mmask16 normal =
      _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(-126.0f), _CMP_NLT_UQ);  // true for NaN too
  return (VecFloat)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);       // p 2^floor(x)
}
#else
inline VecFloat exp2_flush(VecFloat x) {
  x = vmax(broadcast(-127.0f), x);  // 2^-127 becomes 0, whose exponent has the same bits
  const VecFloat magic = broadcast(12582912.0f + 127);  // leaves n + 127 in the lowest bits
  const VecFloat t = x + magic, r = x - (t - magic);
  VecFloat p = r * 1.5353362e-4f + 1.3398875e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 0.240226477f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  return p * (VecFloat)((VecInt)t << 23);
}
#endif
inline VecDouble exp2_flush(VecDouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

template <class V>
inline V abs(V x) {
  return x < 0 ? -x : x;
}

// Within 3 ulp, near 0 too.
inline VecFloat tanh(VecFloat x) {
  const VecFloat t = abs(x), square = x * x;
  // t < 0.625: tanh(x) = x + x^3 P(x^2)
  VecFloat p = square * -5.660780460e-3f + 2.060199915e-2f;
  p = p * square + -5.372922704e-2f;
  p = p * square + 0.1333132892f;
  p = p * square + -0.3333327831f;
  const VecFloat far = 1 - 2 / (1 + exp(t + t));
  return t < 0.625f ? x + x * square * p : x < 0 ? -far : far;
}
inline VecDouble tanh(VecDouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// 1 / x for 2^-126 < |x| < 2^126, within 1 ulp.
inline VecFloat reciprocal(VecFloat x) {
#if TFKERN_VEC_BYTES == 64  // where a division takes longer than an estimate and a Newton step
  const VecFloat r = (VecFloat)_mm512_rcp14_ps((__m512)x);
  return r + r * (1 - x * r);
#else
  return 1 / x;
#endif
}
inline VecDouble reciprocal(VecDouble x) { return 1 / x; }

// Returns sigma(x) = 1 / (1 + e^-x); `derivative` becomes its derivative. Both keep their digits in
// either tail, where their relative errors grow like that of e^-|x|: |x| half units in the last
// place.
template <class C>
inline Vec<C> sigmoid(Vec<C> x, Vec<C>& derivative) {
  const Vec<C> e = exp2_flush(abs(x) * C(-1.4426950408889634)), s = reciprocal(1 + e);
  derivative = e * s * s;
  return x < 0 ? e * s : s;
}

// Returns the normal distribution function, erfc(-x / sqrt(2)) / 2; `density` becomes its
// derivative. The relative error is 2e-6 down to x = -6 and 2e-5 at -13; below, the result is 0.
inline VecFloat normal_cdf(VecFloat x, VecFloat& density) {
  const VecFloat z = x * 0.707106781f, t = abs(z), zz = z * z;
  // t < 1: erf(z) = z P(z^2)
  VecFloat p = zz * -9.667044571e-6f + 1.126595903e-4f;
  p = p * zz + -8.484080406e-4f;
  p = p * zz + 5.221031808e-3f;
  p = p * zz + -2.686543073e-2f;
  p = p * zz + 0.112837825f;
  p = p * zz + -0.3761263847f;
  p = p * zz + 1.128379167f;
  // t >= 1: erfc(t) = e^(-t^2) s Q(s), s = 2 / (2 + t)
  const VecFloat s = reciprocal(1 + 0.5f * vmin(broadcast(16.0f), t));
  VecFloat q = s * 0.056395818877f + -0.103263144617f;
  q = q * s + -0.0900948831812f;
  q = q * s + 0.193743387468f;
  q = q * s + 0.118313155735f;
  q = q * s + 0.263276911053f;
  q = q * s + 0.2796254053f;
  q = q * s + 0.282249675888f;
  const VecFloat e = exp2_flush(x * x * -0.721347520f);
  density = e * 0.398942280f;
  q = e * s * q * 0.5f;
  return t < 1.0f ? 0.5f + 0.5f * z * p : x > 0.0f ? 1 - q : q;
}
inline VecDouble normal_cdf(VecDouble x, VecDouble& density) {
  for (int i = 0; i < kLanes<double>; ++i) {
    density[i] = 0.39894228040143268 * std::exp(-0.5 * x[i] * x[i]);
    x[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752);
  }
  return x;
}

// ---- order of lanes ----

// Transposes L rows of L elements. For W = L / 2, L / 4, ..., 1, rows i and i + W exchange their
// blocks of W elements off the diagonal.
template <class C>
inline void transpose(Vec<C>* rows) {
  constexpr int L = kLanes<C>;
#pragma GCC unroll 4
  for (int W = L / 2; W > 0; W /= 2) {
    const VecIndex<C> lane = iota<C>();
    const VecIndex<C> low = (lane & W) == 0 ? lane : lane - W + L;
    const VecIndex<C> high = low + W;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & W) continue;
      const Vec<C> a = rows[i], b = rows[i + W];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + W] = __builtin_shuffle(a, b, high);
    }
  }
}

#if TFKERN_VEC_BYTES == 64
// The same with instructions that move whole lanes of 128 bits, or stay inside of them: most
// processors run two of these at a time.
template <>
inline void transpose<float>(VecFloat* rows) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  // r[4 i + j]: columns j, j + 4, j + 8 and j + 12 of rows 4 i to 4 i + 3
  __m512 r[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = (__m512d)t[i], b = (__m512d)t[i + 1];
    const __m512d c = (__m512d)t[i + 2], d = (__m512d)t[i + 3];
    r[i] = (__m512)_mm512_unpacklo_pd(a, c);
    r[i + 1] = (__m512)_mm512_unpackhi_pd(a, c);
    r[i + 2] = (__m512)_mm512_unpacklo_pd(b, d);
    r[i + 3] = (__m512)_mm512_unpackhi_pd(b, d);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
    rows[j] = (VecFloat)_mm512_shuffle_f32x4(even, even2, 0x88);
    rows[j + 4] = (VecFloat)_mm512_shuffle_f32x4(odd, odd2, 0x88);
    rows[j + 8] = (VecFloat)_mm512_shuffle_f32x4(even, even2, 0xdd);
    rows[j + 12] = (VecFloat)_mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}
#endif

// ---- random numbers ----

// The high and low words of the product of each lane with b.
inline void multiply(VecUint a, uint32_t b, VecUint& high, VecUint& low) {
  const VecUlong even = (VecUlong)a & 0xffffffffu, odd = (VecUlong)a >> 32;
#if TFKERN_VEC_BYTES == 64
  const __m512i factor = _mm512_set1_epi64(b);
  const VecUlong p = (VecUlong)_mm512_mul_epu32((__m512i)even, factor);
  const VecUlong q = (VecUlong)_mm512_mul_epu32((__m512i)odd, factor);
#elif TFKERN_VEC_BYTES == 32
  const __m256i factor = _mm256_set1_epi64x(b);
  const VecUlong p = (VecUlong)_mm256_mul_epu32((__m256i)even, factor);
  const VecUlong q = (VecUlong)_mm256_mul_epu32((__m256i)odd, factor);
#else
  const VecUlong p = even * uint64_t{b}, q = odd * uint64_t{b};
#endif
  const VecUlong upper = VecUlong{} + 0xffffffff00000000u;
  high = (VecUint)((p >> 32) | (q & upper));
  low = (VecUint)((p & ~upper) | (q << 32));
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the
// counter-based generator of dropout masks. All backends use it, so that they draw the same masks.
// Each vector lane has its own counter of four words c[i], which become the four words of its draw.
inline void philox(uint64_t key, VecUint c[4]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    VecUint high0, low0, high1, low1;
    multiply(c[0], 0xD2511F53, high0, low0);
    multiply(c[2], 0xCD9E8D57, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}
