// What CUDA C++ adds to C++, for a host compiler: the sources of csrc/cuda compile against this and
// run on the CPU.
//
// Blocks run one after the other, the threads of a block as fibers: one runs until it waits for
// others, at __syncthreads or in an operation of its warp. The order in which they get their turn
// is settable, and a kernel that is right gives the same bits under every order. A missing
// __syncthreads does not: the thread that runs first reads what was not written yet, or overwrites
// what is still needed. Shared memory is NaN before each block, and has margins that are checked
// after it; AddressSanitizer reports the very access. Only compute capability 8.0 is imitated, and
// only what the kernels use: grids and blocks have one dimension, shared memory is all dynamic, and
// loads and stores happen in program order.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));

namespace cuda_host {

struct Index {
  unsigned x = 0;
};

extern Index thread, block, block_size, grid_size;

// The order of turns: 0 ascending, 1 descending, n > 1 shuffled by n.
void set_order(int order);

// Runs body() for every thread of every block. Throws std::runtime_error on what a GPU would not
// forgive.
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body);

void* shared_memory();

// Ends the launch with an error.
[[noreturn]] void fail(const char* what);

// Fails unless a 16-byte access to shared memory is inside of it and aligned.
void check_shared(const void* p);

// Copies of 16 bytes to shared memory, or of zeros. One is made when its group is waited for, so
// that a missing wait is seen.
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(size_t groups);

void sync_block();

// Waits for the lanes of `mask`. The last one to arrive calls op(slots), slots[i] being what lane i
// gave; each must give the same op.
void sync_warp(uint32_t mask, void* slot, void (*op)(void* const* slots, uint32_t mask));

template <class T>
struct Exchange {
  T value;
  int from;
  T result;
};

template <class T>
T exchange(uint32_t mask, T value, int from) {
  Exchange<T> slot{value, from, value};
  sync_warp(mask, &slot, [](void* const* slots, uint32_t mask) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* mine = static_cast<Exchange<T>*>(slots[i]);
      if (!(mask >> mine->from & 1)) fail("a shuffle reads a lane outside of its mask");
      mine->result = static_cast<Exchange<T>*>(slots[mine->from])->value;
    }
  });
  return slot.result;
}

inline int lane() { return thread.x % 32; }

}  // namespace cuda_host

#define threadIdx ::cuda_host::thread
#define blockIdx ::cuda_host::block
#define blockDim ::cuda_host::block_size
#define gridDim ::cuda_host::grid_size

inline void __syncthreads() { cuda_host::sync_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffff) {
  cuda_host::sync_warp(mask, nullptr, [](void* const*, uint32_t) {});
}

template <class T>
T __shfl_sync(uint32_t mask, T x, int from) {
  return cuda_host::exchange(mask, x, from % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int lanes) {
  return cuda_host::exchange(mask, x, cuda_host::lane() ^ lanes);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, int lanes) {
  const int lane = cuda_host::lane();
  return cuda_host::exchange(mask, x, lane < lanes ? lane : lane - lanes);
}

inline uint32_t __ballot_sync(uint32_t mask, bool x) {
  struct Slot {
    bool vote;
    uint32_t bits;
  } slot{x, 0};
  cuda_host::sync_warp(mask, &slot, [](void* const* slots, uint32_t mask) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) bits |= uint32_t{static_cast<Slot*>(slots[i])->vote} << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) static_cast<Slot*>(slots[i])->bits = bits;
    }
  });
  return slot.bits;
}
inline bool __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(uint32_t mask, bool x) { return __ballot_sync(mask, !x) == 0; }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;
