// The law of dropout, which must agree to the bit wherever it is computed;
// tfkern/reference/dropout.py defines it.
#pragma once

#include <cmath>
#include <cstdint>

namespace tfkern {

// Every element has a draw of 32 random bits. If the draw is above `last_dropped`, the element is
// kept and multiplied by `factor`; otherwise it is dropped.
template <class C>
struct Dropout {
  uint32_t last_dropped = 0;
  C factor = 1;

  Dropout() = default;
  // With p = 0 the draw 0 would still be dropped, but callers then do not apply dropout at all.
  explicit Dropout(double p)
      : last_dropped(p > 0 ? static_cast<uint32_t>(std::ceil(std::ldexp(p, 32)) - 1) : 0),
        factor(p < 1 ? static_cast<C>(1 / (1 - p)) : C{0}) {}
};

}  // namespace tfkern
