// The functions of csrc/cuda/ptx.h on the host. Fragments are laid out as in the PTX manual, in the
// sections on ldmatrix and on mma.m16n8k16. With g = lane / 4 and t = lane % 4:
//
// clang-format off
//   8x8 matrix     row g, columns 2t and 2t + 1          transposed: column g, rows 2t and 2t + 1
//   a (16x16)      a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next
//   b (16x8)       b_i: rows 2t + 8 i and the next, column g
//   c (16x8)       c[i]: row g + 8 (i / 2), column 2t + i % 2
// clang-format on
#pragma once

#include "cuda_host.h"

namespace tfkern::cuda {

inline uint32_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_f16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

inline uint32_t pack_bf16(float low, float high) { return to_bf16(high) << 16 | to_bf16(low); }
inline uint32_t pack_f16(float low, float high) { return to_f16(high) << 16 | to_f16(low); }
inline float bf16_to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
inline float f16_to_float(uint32_t bits) {
  return std::bit_cast<_Float16>(static_cast<uint16_t>(bits));
}
inline float exp2_approx(float x) { return std::exp2(x); }

inline void copy_async(void* shared, const void* global, bool valid) {
  cuda_host::copy_async(shared, global, valid);
}
inline void copy_commit() { cuda_host::copy_commit(); }
template <int N>
inline void copy_wait() {
  cuda_host::copy_wait(N);
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

struct MatricesSlot {
  const uint16_t* row;
  uint32_t r[4];
};

template <bool transposed>
void load_matrices_of_warp(void* const* slots, uint32_t mask) {
  if (mask != 0xffffffff) cuda_host::fail("ldmatrix by a part of a warp");
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = transposed ? 2 * (lane % 4) + j : lane / 4;
        const int column = transposed ? lane / 4 : 2 * (lane % 4) + j;
        pair[j] = static_cast<MatricesSlot*>(slots[8 * i + row])->row[column];
      }
      static_cast<MatricesSlot*>(slots[lane])->r[i] = pair[1] << 16 | pair[0];
    }
  }
}

template <bool transposed>
void load_matrices_as(uint32_t (&r)[4], SharedAddress address) {
  const auto* row = reinterpret_cast<const uint16_t*>(address);
  cuda_host::check_shared(row);
  MatricesSlot slot{row, {}};
  cuda_host::sync_warp(0xffffffff, &slot, load_matrices_of_warp<transposed>);
  std::copy(slot.r, slot.r + 4, r);
}

inline void load_matrices(uint32_t (&r)[4], SharedAddress row) { load_matrices_as<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  load_matrices_as<true>(r, row);
}

struct MultiplySlot {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <float (*to_float)(uint32_t)>
void multiply_of_warp(void* const* slots, uint32_t mask) {
  if (mask != 0xffffffff) cuda_host::fail("mma by a part of a warp");
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& slot = *static_cast<MultiplySlot*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 2; ++j) {
      const int shift = 16 * j;
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = to_float(slot.a[i] >> shift & 0xffff);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + j][g] = to_float(slot.b[i] >> shift & 0xffff);
    }
  }
  float c[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<MultiplySlot*>(slots[lane])->c;
    for (int i = 0; i < 4; ++i) out[i] += c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  MultiplySlot slot{c, a, {b0, b1}};
  cuda_host::sync_warp(0xffffffff, &slot, multiply_of_warp<bf16_to_float>);
}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  MultiplySlot slot{c, a, {b0, b1}};
  cuda_host::sync_warp(0xffffffff, &slot, multiply_of_warp<f16_to_float>);
}

}  // namespace tfkern::cuda
