// How every CUDA kernel is launched, and what host code asks of a device.
//
// This file and its includes need no header or library of a CUDA build of torch, so that the same
// operator library also loads where torch has no CUDA. With TFKERN_CUDA_HOST, kernels run on the
// host instead, and their operators belong to the library tfkern_host, because the CPU kernels
// already take the names in tfkern.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "../tensor.h"

#ifdef TFKERN_CUDA_HOST
#include "cuda_host.h"
#define TFKERN_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(tfkern_host, CPU, m)
#else
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

#define TFKERN_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(tfkern, CUDA, m)
#endif

namespace tfkern::cuda {

// The dynamic shared memory, whose size the launch gives; kernels use no other.
template <class T>
__device__ inline T* shared_memory() {
#ifdef TFKERN_CUDA_HOST
  return reinterpret_cast<T*>(cuda_host::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// Raises an error if a tensor is float64.
template <class... T>
void check_no_float64(const T&... tensors) {
  const auto check = [](const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() != ScalarType::Double,
                    "tfkern: the CUDA kernels take no float64");
  };
  each_tensor(check, tensors...);
}

inline void check_grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "tfkern: a grid of ", blocks, " blocks is too large");
}

#ifdef TFKERN_CUDA_HOST

class Device {
 public:
  explicit Device(const Tensor&) {}
  int multiprocessors() const { return 4; }
  int64_t most_shared_bytes() const { return 163 << 10; }
};

template <class... P>
void launch(const Device&, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
            std::type_identity_t<P>... args) {
  check_grid(blocks);
  cuda_host::run(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

#else

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next check would see again
  STD_TORCH_CHECK(false, "tfkern: CUDA error: ", cudaGetErrorString(error));
}

// Makes the device of a tensor the current one as long as the object lives.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    // The function lies in libtorch_cuda.so, which CPU builds of torch lack: so this library does
    // not link to it. A CUDA build has loaded it already, but as Python does, without making its
    // symbols global, so that dlsym needs its handle.
    using Lookup = int32_t (*)(int32_t, void**);
    static const auto stream = reinterpret_cast<Lookup>(dlsym(
        dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(stream && stream(index_, &stream_) == 0,
                    "tfkern: this torch does not tell its current CUDA stream");
    check(cudaSetDevice(index_));  // this library has its own CUDA runtime
  }

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  int index() const { return index_; }

  // The bytes of shared memory that a block may have.
  int64_t most_shared_bytes() const {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_));
    return bytes;
  }

  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Lets a kernel have more shared memory than the 48 KiB that need no permission. The driver is
// asked again only if a kernel needs more on a device than before.
inline void allow_shared(const void* kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;  // bytes
  const std::lock_guard lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  most = bytes;
}

// Launches `kernel` on the current stream, unless the grid is empty.
template <class... P>
void launch(const Device& device, void (*kernel)(P...), int64_t blocks, int threads,
            int64_t shared_bytes, std::type_identity_t<P>... args) {
  if (blocks == 0) return;
  check_grid(blocks);
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {
    allow_shared(function, device.index(), static_cast<int>(shared_bytes));
  }
  void* pointers[] = {&args...};
  check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers,
                         static_cast<size_t>(shared_bytes), device.stream()));
}

#endif

}  // namespace tfkern::cuda
