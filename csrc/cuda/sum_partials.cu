// The last step of gradients that are sums over rows: adds the partial sums, in float32, that the
// blocks of an earlier kernel left.
#include "elements.h"

namespace tfkern::cuda {

constexpr int kLanes = 32, kGroups = 16;  // columns of a block, and threads that share a column

// Sums each column: thread `group` takes every kGroups-th row, and the first adds their sums. The
// first `blocks` blocks have the columns of `first`, all others those of `second`.
__global__ void __launch_bounds__(kLanes* kGroups)
    sum_partials_kernel(int64_t G, int64_t N, int64_t blocks, Partials first, Partials second) {
  float* shared = shared_memory<float>();  // (kGroups, kLanes)
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const bool is_first = blockIdx.x < blocks;
  const Partials a = is_first ? first : second;
  const int64_t n = (blockIdx.x - (is_first ? 0 : blocks)) * kLanes + lane;
  float sum = 0;
  if (n < N) {
    for (int64_t g = group; g < G; g += kGroups) sum += a.parts[g * N + n];
  }
  shared[group * kLanes + lane] = sum;
  __syncthreads();
  if (group != 0 || n >= N) return;
  for (int g = 1; g < kGroups; ++g) sum += shared[g * kLanes + lane];
  TFKERN_CUDA_DTYPE(a.out.dtype, reinterpret_cast<T*>(a.out.data)[n] = from_float<T>(sum));
}

void sum_partials(const Device& device, int64_t G, int64_t N, const Partials& first,
                  const Partials& second) {
  const int64_t blocks = (N + kLanes - 1) / kLanes;
  launch(device, sum_partials_kernel, second.out.data ? 2 * blocks : blocks, kLanes * kGroups,
         kLanes * kGroups * sizeof(float), G, N, blocks, first, second);
}

}  // namespace tfkern::cuda
