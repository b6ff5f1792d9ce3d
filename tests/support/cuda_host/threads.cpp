// Torch's parallel_for with std::thread, which ThreadSanitizer understands; it does not understand
// the threads of torch's OpenMP. All threads begin together, and each gets a part of the range,
// however small.
#include <torch/csrc/stable/c/shim.h>

#include <barrier>
#include <thread>
#include <vector>

constexpr int64_t kThreads = 4;

AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = kThreads;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc run,
                                  void* context) {
  std::barrier together(kThreads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    const int64_t from = begin + (end - begin) * i / kThreads;
    const int64_t to = begin + (end - begin) * (i + 1) / kThreads;
    threads.emplace_back([=, &together] {
      together.arrive_and_wait();
      if (from < to) run(from, to, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
