// Fragment of attention.cpp: pairs of bfloat16, which AVX512-BF16 multiplies and sums in float. The
// target of this namespace does not include these instructions, and functions of another target
// could not be inlined where vectors are in registers, hence the assembly.

// Two neighbours in a row, or the elements of two rows in one column.
struct Pair {
  BFloat16 first, second;
};

inline VecUint load(const Pair* p) {
  VecUint v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(Pair* p, VecUint v) { std::memcpy(p, &v, sizeof(v)); }

// sum + scalar.first * row.first + scalar.second * row.second
inline VecFloat multiply_add(Pair scalar, VecUint row, VecFloat sum) {
  uint32_t bits;
  std::memcpy(&bits, &scalar, sizeof(bits));
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(VecUint{} + bits), "v"(row));
  return sum;
}

// The elements of `first` and then those of `second`, rounded to nearest, ties to even.
inline __m512i narrow(VecFloat first, VecFloat second) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(second), "v"(first));
  return both;
}

// Pairs of elements of the two halves of `both`.
inline VecUint interleave(__m512i both) {
  static constexpr uint16_t kOrder[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (VecUint)_mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder), both);
}

// Stores the first half of `both` to `first` and the second one to `second`.
inline void store_halves(BFloat16* first, BFloat16* second, __m512i both) {
  _mm256_storeu_si256((__m256i*)first, _mm512_castsi512_si256(both));
  _mm256_storeu_si256((__m256i*)second, _mm512_extracti64x4_epi64(both, 1));
}
