// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the
// counter-based generator of dropout masks. All backends use it, so that they draw the same masks.
#pragma once

#include <cstdint>

namespace tfkern {

struct Philox {
  uint32_t lane[4];

  constexpr Philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3)
      : lane{c0, c1, c2, c3} {
    uint32_t k0 = static_cast<uint32_t>(key);
    uint32_t k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * lane[0];
      const uint64_t b = uint64_t{0xCD9E8D57} * lane[2];
      lane[0] = static_cast<uint32_t>(b >> 32) ^ lane[1] ^ k0;
      lane[1] = static_cast<uint32_t>(b);
      lane[2] = static_cast<uint32_t>(a >> 32) ^ lane[3] ^ k1;
      lane[3] = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }
};

}  // namespace tfkern
