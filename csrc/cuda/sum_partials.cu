// The last step of gradients that are sums over rows: adds the partial sums, in float32, that the
// blocks of an earlier kernel left.
#include "elements.h"

namespace tfkern::cuda {

constexpr int kLanes = 32, kGroups = 8;  // columns of a block, and threads that share a column

// Sums each column: thread `group` takes every kGroups-th row, and the first adds their sums.
__global__ void sum_partials_kernel(const float* partial, int64_t G, int64_t N, Matrix out) {
  float* shared = shared_memory<float>();  // (kGroups, kLanes)
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  float sum = 0;
  if (n < N) {
    for (int64_t g = group; g < G; g += kGroups) sum += partial[g * N + n];
  }
  shared[group * kLanes + lane] = sum;
  __syncthreads();
  if (group != 0 || n >= N) return;
  for (int g = 1; g < kGroups; ++g) sum += shared[g * kLanes + lane];
  TFKERN_CUDA_DTYPE(out.dtype, reinterpret_cast<T*>(out.data)[n] = from_float<T>(sum));
}

void sum_partials(const Device& device, const Tensor& partial, int64_t G, const Tensor& out) {
  const int64_t N = out.numel();
  launch(device, sum_partials_kernel, (N + kLanes - 1) / kLanes, kLanes * kGroups,
         kLanes * kGroups * sizeof(float), static_cast<const float*>(partial.data_ptr()), G, N,
         Matrix{static_cast<char*>(out.data_ptr()), 0, dtype(out)});
}

}  // namespace tfkern::cuda
