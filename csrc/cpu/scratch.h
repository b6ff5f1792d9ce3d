// Temporary memory of a call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace tfkern {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Uninitialised arrays that live as long as the object and start at multiples of 64 bytes, the size
// of a cache line.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (auto& array : arrays_) {
      if (array->bytes >= kLarge && array->bytes <= kMost) {
        array.reset(spare_.exchange(array.release()));
      }
    }
  }
  template <class T>
  T* get(int64_t n) {
    const int64_t bytes = std::max<int64_t>(n, 1) * sizeof(T);
    std::unique_ptr<Array> array(bytes >= kLarge ? spare_.exchange(nullptr) : nullptr);
    if (!array || array->bytes < bytes) array = std::make_unique<Array>(bytes);
    arrays_.push_back(std::move(array));
    return static_cast<T*>(arrays_.back()->data);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Array {
    explicit Array(int64_t bytes) : bytes(bytes), data(::operator new(bytes, kLine)) {}
    ~Array() { ::operator delete(data, kLine); }
    int64_t bytes;
    void* data;
  };
  std::vector<std::unique_ptr<Array>> arrays_;

  // One large array is kept for the next call. If it were given back to the system, each of its
  // pages would be cleared again at its first use: this took 5 % of a backward of 2048 tokens and 4
  // heads of 128.
  static constexpr int64_t kLarge = 4 << 20, kMost = 64 << 20;  // bytes of an array to keep
  static inline std::atomic<Array*> spare_{nullptr};
};

// Memory for n elements that stays with this thread for the next call, until the thread ends. It is
// not initialised, and starts at a multiple of 64 bytes.
template <class T>
T* thread_scratch(int64_t n) {
  static thread_local std::unique_ptr<char[]> bytes;
  static thread_local int64_t size = 0;
  const int64_t needed = n * static_cast<int64_t>(sizeof(T)) + 63;
  if (size < needed) {
    size = 0;  // in case there is no memory
    bytes.reset();
    bytes.reset(new char[needed]);
    size = needed;
  }
  const auto address = reinterpret_cast<uintptr_t>(bytes.get());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

}  // namespace tfkern
