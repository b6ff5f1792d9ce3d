// Memory for the time of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace tfkern {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Uninitialised arrays that live as long as this, at the beginning of cache lines.
class Scratch {
 public:
  template <class T>
  T* get(int64_t n) {
    void* p = ::operator new(std::max<int64_t>(n, 1) * sizeof(T), kLine);
    arrays_.emplace_back(p);
    return static_cast<T*>(p);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kLine); }
  };
  std::vector<std::unique_ptr<void, Free>> arrays_;
};

}  // namespace tfkern
