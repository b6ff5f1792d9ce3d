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

// Copies of 16 bytes to shared memory, or of zeros. From the call until its group is waited for,
// NaN is there, so that a missing wait is seen, and a reader of what the copy overwrites.
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(size_t groups);

void sync_block();

// Waits for the lanes of `mask`. The last one to arrive calls op(slots), slots[i] being what lane i
// gave; each must give the same op.
void sync_warp(uint32_t mask, void* slot, void (*op)(void* const* slots, uint32_t mask));

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
T __shfl_xor_sync(uint32_t mask, T x, int lanes) {
  struct Slot {
    T given;
    int from;
    T got;
  } slot{x, static_cast<int>(threadIdx.x % 32) ^ lanes, x};
  cuda_host::sync_warp(mask, &slot, [](void* const* slots, uint32_t mask) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* mine = static_cast<Slot*>(slots[i]);
      if (!(mask >> mine->from & 1)) cuda_host::fail("a shuffle reads a lane outside of its mask");
      mine->got = static_cast<Slot*>(slots[mine->from])->given;
    }
  });
  return slot.got;
}

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __fmul_rn(float x, float y) { return x * y; }  // built with -ffp-contract=off
using std::max;
using std::min;
