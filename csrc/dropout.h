// The law of dropout, which must agree to the bit wherever it is computed;
// tfkern/reference/dropout.py defines it.
#pragma once

#include <cmath>
#include <cstdint>

namespace tfkern {

// Every element has a draw of 32 bits. It is kept, times `factor`, if that is above `last_dropped`.
template <class C>
struct Dropout {
  uint32_t last_dropped = 0;
  C factor = 1;

  Dropout() = default;
  explicit Dropout(double p)  // of p = 0, where some draws would be dropped, nobody asks
      : last_dropped(p > 0 ? static_cast<uint32_t>(std::ceil(std::ldexp(p, 32)) - 1) : 0),
        factor(p < 1 ? static_cast<C>(1 / (1 - p)) : C{0}) {}
};

}  // namespace tfkern
