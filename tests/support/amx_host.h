// The instructions of Intel AMX that csrc/cpu uses, in plain C++: included in front of these
// sources, it makes a library whose level "amx" runs on any processor with AVX-512 and pairs of
// bfloat16.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_host {

struct Registers {
  bool configured = false;
  uint8_t tiles[8][16][64];
};
inline thread_local Registers registers;

inline uint8_t (&tile(int number))[16][64] {
  if (!registers.configured) std::abort();  // the processor would stop the program, too
  return registers.tiles[number];
}

// Only tiles of full size are supported.
inline void configure(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1) std::abort();
  for (int i = 0; i < 8; ++i) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, 2);
    if (width != 64 || bytes[48 + i] != 16) std::abort();
  }
  registers.configured = true;
  std::memset(registers.tiles, 0, sizeof(registers.tiles));
}
inline void load(int number, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    std::memcpy(tile(number)[i], static_cast<const char*>(from) + i * stride, 64);
  }
}
inline void store(int number, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tile(number)[i], 64);
}
inline float widened(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void multiply(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    float sums[16];
    std::memcpy(sums, tile(c)[m], 64);
    for (int k = 0; k < 16; ++k) {
      uint32_t left, right[16];
      std::memcpy(&left, tile(a)[m] + 4 * k, 4);
      std::memcpy(right, tile(b)[k], 64);
      for (int n = 0; n < 16; ++n) {
        sums[n] += widened(left << 16) * widened(right[n] << 16);
        sums[n] += widened(left & 0xffff0000u) * widened(right[n] & 0xffff0000u);
      }
    }
    std::memcpy(tile(c)[m], sums, 64);
  }
}

}  // namespace amx_host

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_host::configure(config)
#define _tile_release() (amx_host::registers.configured = false)
#define _tile_loadd(number, from, stride) amx_host::load(number, from, stride)
#define _tile_stored(number, to, stride) amx_host::store(number, to, stride)
#define _tile_zero(number) std::memset(amx_host::tile(number), 0, 1024)
#define _tile_dpbf16ps(c, a, b) amx_host::multiply(c, a, b)

// The processor has it, and Linux allows it.
#define __builtin_cpu_supports(feature) \
  (std::strcmp(feature, "amx-bf16") == 0 || __builtin_cpu_supports(feature))
#define syscall(...) 0L
