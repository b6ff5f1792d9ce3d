// Kernels that each have one fault, which the emulation or its tests must report, and kernels that
// run the functions of ptx.h on their own.
#include <torch/csrc/stable/ops.h>

#include "launch.h"
#include "ptx.h"

namespace tfkern::cuda {
namespace {

enum Fault {
  none,
  no_sync,
  shared_store,
  global_store,
  unwritten,
  some_sync,
  half_warp,
  no_wait,
  early_copy
};

// Writes each block of x in reverse order to y, through shared memory. `fault` chooses a fault.
__global__ void reverse_kernel(const float* x, float* y, int n, int fault) {
  float* shared = shared_memory<float>();
  const int i = threadIdx.x, last = blockDim.x - 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x;
  if (fault == half_warp && i % 2) __syncwarp();
  if (fault == no_wait) {
    if (i % 4 == 0) copy_async(shared + i, x + first + i, true);
    copy_commit();
  } else {
    shared[i + (fault == shared_store && i == last)] = x[first + i];
  }
  if (fault == some_sync ? i < 32 : fault != no_sync) __syncthreads();
  if (fault == unwritten && i == last) return;
  if (fault == early_copy && i % 4 == 0) copy_async(shared + i, x + first + i, true);
  y[first + i + (fault == global_store && first + i == n - 1)] = shared[last - i];
  if (fault == early_copy) {
    copy_commit();
    __syncthreads();
    copy_wait<0>();
  }
}

Tensor reverse(Tensor x, int64_t fault) {
  Tensor y = empty(x, {x.numel()}, x.scalar_type());
  const int threads = 64, n = static_cast<int>(x.numel());
  launch(Device(x), reverse_kernel, n / threads, threads, threads * sizeof(float),
         static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), n,
         static_cast<int>(fault));
  return y;
}

// c = a b through shared memory and the tensor cores, where a has 16x16 elements and b has 16x8.
template <class T>
__global__ void product_kernel(const uint4* a, const uint4* b, float* c) {
  uint4* shared = shared_memory<uint4>();  // a: rows of two pieces; b: of one
  const int lane = threadIdx.x;
  copy_async(shared + lane, a + lane, true);
  copy_commit();
  copy_async(shared + 32 + lane, b + lane % 16, lane < 16);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  uint32_t fragment[4], other[4];
  load_matrices(fragment, shared_address(shared + lane % 16 * 2 + lane / 16));
  load_matrices_transposed(other, shared_address(shared + 32 + lane));  // rows 16 to 31 are 0
  float sum[4] = {0, 0, 0, 0};
  multiply(sum, fragment, other[0], other[1], T{});
  multiply(sum, fragment, other[2], other[3], T{});
  for (int i = 0; i < 4; ++i) {
    c[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
  }
}

Tensor product(Tensor a, Tensor b) {
  Tensor c = empty(a, {16, 8}, ScalarType::Float);
  launch(Device(a), dtype(a) == Dtype::bf16 ? product_kernel<BFloat16> : product_kernel<Half>, 1,
         32, 1024, static_cast<const uint4*>(a.data_ptr()), static_cast<const uint4*>(b.data_ptr()),
         static_cast<float*>(c.data_ptr()));
  return c;
}

// Writes the values that two shuffles give each lane of a warp.
__global__ void shuffle_kernel(const int64_t* x, int64_t* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_xor_sync(0xffffffff, x[lane], 3);
  out[32 + lane] = __shfl_sync(0xffffffff, x[lane], lane / 4);
}

Tensor shuffle(Tensor x) {
  Tensor out = empty(x, {2, 32}, ScalarType::Long);
  launch(Device(x), shuffle_kernel, 1, 32, 0, static_cast<const int64_t*>(x.data_ptr()),
         static_cast<int64_t*>(out.data_ptr()));
  return out;
}

// Writes the answers to three votes: of each warp, of the block, and of the block on nothing.
__global__ void vote_kernel(const int64_t* x, int64_t* out) {
  const int i = threadIdx.x, threads = blockDim.x;
  const bool given = x[i] != 0;
  out[i] = __any_sync(0xffffffff, given);
  out[threads + i] = __syncthreads_or(given);
  out[2 * threads + i] = __syncthreads_or(false);
}

Tensor vote(Tensor x) {
  Tensor out = empty(x, {3, x.numel()}, ScalarType::Long);
  launch(Device(x), vote_kernel, 1, static_cast<int>(x.numel()), 0,
         static_cast<const int64_t*>(x.data_ptr()), static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace tfkern::cuda

STABLE_TORCH_LIBRARY(tfkern_planted, m) {
  m.def("reverse(Tensor x, int fault) -> Tensor");
  m.def("product(Tensor a, Tensor b) -> Tensor");
  m.def("shuffle(Tensor x) -> Tensor");
  m.def("vote(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tfkern_planted, CPU, m) {
  m.impl("reverse", TORCH_BOX(&tfkern::cuda::reverse));
  m.impl("product", TORCH_BOX(&tfkern::cuda::product));
  m.impl("shuffle", TORCH_BOX(&tfkern::cuda::shuffle));
  m.impl("vote", TORCH_BOX(&tfkern::cuda::vote));
}
