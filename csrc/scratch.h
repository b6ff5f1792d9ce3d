// Memory that nobody has written to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tfkern {

constexpr size_t kHugePage = size_t{1} << 21;

// Asks for huge pages under the array if it is large, since a fault for each small page costs more
// than what is computed on it.
inline void advise_huge(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage;
  madvise(reinterpret_cast<void*>(begin * kHugePage), (end - begin) * kHugePage, MADV_HUGEPAGE);
#endif
}

// Uninitialised arrays that live as long as this, at the beginning of cache lines.
class Scratch {
 public:
  template <class T>
  T* get(int64_t n) {
    const size_t bytes = std::max<int64_t>(n, 1) * sizeof(T);
    const std::align_val_t alignment{bytes < 2 * kHugePage ? 64 : kHugePage};
    void* p = ::operator new(bytes, alignment);
    arrays_.emplace_back(p, Free{alignment});
    advise_huge(p, bytes);
    return static_cast<T*>(p);
  }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(void* p) const { ::operator delete(p, alignment); }
  };
  std::vector<std::unique_ptr<void, Free>> arrays_;
};

}  // namespace tfkern
