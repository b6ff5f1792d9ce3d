// Element types of tensors as the kernels see them; kernels know nothing of torch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tfkern {

enum class Dtype { f32, f64, bf16, f16 };

inline int64_t size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type in which a kernel computes: float, except for double.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace tfkern

// Evaluates the statement with `T` naming the element type of `dtype`.
#define TFKERN_DTYPE(dtype, ...)    \
  switch (dtype) {                  \
    case ::tfkern::Dtype::f32: {    \
      using T = float;              \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case ::tfkern::Dtype::f64: {    \
      using T = double;             \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case ::tfkern::Dtype::bf16: {   \
      using T = ::tfkern::BFloat16; \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case ::tfkern::Dtype::f16: {    \
      using T = ::tfkern::Half;     \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
  }

// Evaluates the statement as TFKERN_DTYPE does, if `dtype` is computed in C; otherwise does
// nothing.
#define TFKERN_COMPUTED(C, dtype, ...) \
  TFKERN_DTYPE(dtype, if constexpr (std::is_same_v<::tfkern::Compute<T>, C>) __VA_ARGS__)
