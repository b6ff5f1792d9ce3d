// Compiles TFKERN_KERNEL once per instruction set, each in a namespace of its own.
//
// The whole body, vec.inl included, lies inside the target region: a template that is defined
// outside of it would compile every vector operation to a call. For the same reason lambdas in
// kernels handle no vectors themselves: their bodies may be compiled with the options in force
// where they are instantiated.
//
// Include all standard headers before this one. There is no include guard on purpose.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define TFKERN_VEC_BYTES 64
namespace tfkern::avx512 {
#include "vec.inl"
#include TFKERN_KERNEL
}  // namespace tfkern::avx512
#undef TFKERN_VEC_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define TFKERN_VEC_BYTES 32
namespace tfkern::avx2 {
#include "vec.inl"
#include TFKERN_KERNEL
}  // namespace tfkern::avx2
#undef TFKERN_VEC_BYTES
#pragma GCC pop_options
#endif

// Every compiler has 16-byte vectors: SSE2, NEON, or scalar code on processors with neither.
#define TFKERN_VEC_BYTES 16
namespace tfkern::baseline {
#include "vec.inl"
#include TFKERN_KERNEL
}  // namespace tfkern::baseline
#undef TFKERN_VEC_BYTES
#undef TFKERN_KERNEL
