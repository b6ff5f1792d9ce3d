// The vector instructions that kernels may use, chosen once per process at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tfkern {

// avx512_bf16 and amx are avx512 with products of bfloat16 in hardware: of pairs (vdpbf16ps), and
// of tiles.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

constexpr Isa kIsaLevels[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

inline const char* name(Isa isa) {
  constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};
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

// Tells whether this processor has all instructions of a level.
inline bool has(Isa level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  switch (level) {
    case Isa::baseline:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return has(Isa::avx512) && has_amx();
#endif
    default:
      return false;
  }
}

inline bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Tells whether a level is the fastest choice where it exists. Only avx512_bf16 may not be: a core
// of AMD (from Zen 4 on) does twice as many multiplications of pairs as of floats a second, one of
// Intel half as many.
inline bool pays(Isa level) { return level != Isa::avx512_bf16 || is_amd(); }

// The level in use: the fastest of this processor, or the one that TFKERN_CPU_CAPABILITY names, as
// ATen's ATEN_CPU_CAPABILITY does, if the processor has it.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* wish = std::getenv("TFKERN_CPU_CAPABILITY");
    Isa best = Isa::baseline;
    for (Isa level : kIsaLevels) {
      if (!has(level)) continue;
      if (wish && std::strcmp(wish, name(level)) == 0) return level;
      if (pays(level)) best = level;
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
    case ::tfkern::Isa::avx512_bf16:                    \
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
