// The parts of CUDA C++ that a host compiler lacks: the sources of csrc/cuda compile against this
// header and run on the CPU.
//
// Blocks run one after the other. The threads of a block are fibers: a fiber runs until it waits
// for others, at __syncthreads or in an operation of its warp. The order of their turns is
// settable. A correct kernel gives the same bits under every order, but a kernel that lacks a
// __syncthreads does not: the thread that runs first reads values that are not written yet, or
// overwrites values that are still needed. Shared memory is NaN before each block, and has margins
// on both sides that are checked after it; AddressSanitizer reports the access itself. Only compute
// capability 8.0 is imitated, and only the parts that the kernels use: grids and blocks have one
// dimension, shared memory is all dynamic, and loads and stores happen in program order.
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

// Sets the order of turns: 0 is ascending, 1 descending, and n > 1 shuffled with n as seed.
void set_order(int order);

// Runs body() for every thread of every block. Throws std::runtime_error if a kernel does anything
// that a GPU would not forgive.
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body);

void* shared_memory();

// Ends the launch with an error.
[[noreturn]] void fail(const char* what);

// Fails unless the 16 bytes at p lie inside shared memory and are aligned.
void check_shared(const void* p);

// Copies 16 bytes (zeros unless `valid`) to shared memory. From the call until its group is waited
// for, the destination is NaN. This reveals a missing wait, and a thread that still reads what the
// copy overwrites.
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(size_t groups);

// Waits for all threads of the block. Returns whether any of them gave true.
bool sync_block(bool given = false);

// Waits for the lanes of `mask`, which must all give the same op. The last lane to arrive calls
// op(slots, mask), where slots[i] is the slot that lane i gave.
void sync_warp(uint32_t mask, void* slot, void (*op)(void* const* slots, uint32_t mask));

}  // namespace cuda_host

#define threadIdx ::cuda_host::thread
#define blockIdx ::cuda_host::block
#define blockDim ::cuda_host::block_size
#define gridDim ::cuda_host::grid_size

inline void __syncthreads() { cuda_host::sync_block(); }
inline int __syncthreads_or(int predicate) { return cuda_host::sync_block(predicate != 0); }
inline void __syncwarp(uint32_t mask = 0xffffffff) {
  cuda_host::sync_warp(mask, nullptr, [](void* const*, uint32_t) {});
}

template <class T>
T __shfl_sync(uint32_t mask, T x, int from) {
  struct Slot {
    T given;
    int from;
    T got;
  } slot{x, from, x};
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

template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int lanes) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

// Whether `predicate` holds in any lane of `mask`.
inline int __any_sync(uint32_t mask, int predicate) {
  struct Slot {
    bool given, any;
  } slot{predicate != 0, false};
  cuda_host::sync_warp(mask, &slot, [](void* const* slots, uint32_t mask) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= (mask >> i & 1) && static_cast<Slot*>(slots[i])->given;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) static_cast<Slot*>(slots[i])->any = any;
    }
  });
  return slot.any;
}

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __fmul_rn(float x, float y) { return x * y; }  // built with -ffp-contract=off
using std::max;
using std::min;
