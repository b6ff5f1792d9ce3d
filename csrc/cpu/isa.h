// The vector instructions that kernels may use, chosen once per process at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tfkern {

enum class Isa { baseline, avx2, avx512, amx };  // amx: avx512 plus AMX

inline const char* name(Isa isa) {
  constexpr const char* kNames[] = {"default", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(isa)];
}

// Tells whether the processor has AMX for bfloat16 and Linux lets this process use it.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best level of this processor, lowered by TFKERN_CPU_CAPABILITY=default|avx2|avx512|amx (the
// counterpart of ATen's ATEN_CPU_CAPABILITY; a level that the processor lacks is never chosen).
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      best = Isa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        best = has_amx() ? Isa::amx : Isa::avx512;
      }
    }
#endif
    const char* wish = std::getenv("TFKERN_CPU_CAPABILITY");
    for (Isa lower : {Isa::avx512, Isa::avx2, Isa::baseline}) {
      if (wish && std::strcmp(wish, name(lower)) == 0 && lower < best) best = lower;
    }
    return best;
  }();
  return chosen;
}

}  // namespace tfkern

// Calls `function` in the namespace of the level that is in use.
#if defined(__x86_64__)
#define TFKERN_ISA_CALL(function, ...)                  \
  switch (::tfkern::isa()) {                            \
    case ::tfkern::Isa::amx:                            \
    case ::tfkern::Isa::avx512:                         \
      return ::tfkern::avx512::function(__VA_ARGS__);   \
    case ::tfkern::Isa::avx2:                           \
      return ::tfkern::avx2::function(__VA_ARGS__);     \
    default:                                            \
      return ::tfkern::baseline::function(__VA_ARGS__); \
  }
#else
#define TFKERN_ISA_CALL(function, ...) return ::tfkern::baseline::function(__VA_ARGS__)
#endif
