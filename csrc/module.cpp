// The pybind11 module tfkern._C: facts about this build and this processor. The operators
// themselves live in the library beside it, which has no Python symbols.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/isa.h"

#define TFKERN_STRING(x) TFKERN_STRING_(x)
#define TFKERN_STRING_(x) #x

PYBIND11_MODULE(_C, m) {
#if defined(__clang__)
  m.attr("compiler") = "clang " TFKERN_STRING(__clang_major__) "." TFKERN_STRING(__clang_minor__);
#else
  m.attr("compiler") = "gcc " TFKERN_STRING(__GNUC__) "." TFKERN_STRING(__GNUC_MINOR__);
#endif
  m.attr("torch_version") = TFKERN_STRING(TFKERN_TORCH_VERSION);
  std::vector<const char*> levels;
  for (tfkern::Isa level : tfkern::kIsaLevels) {
    if (tfkern::has(level)) levels.push_back(tfkern::name(level));
  }
  m.attr("amd") = tfkern::is_amd();
  m.attr("cpu_levels") = pybind11::tuple(pybind11::cast(levels));
  const std::vector<const char*> architectures{TFKERN_CUDA_ARCHITECTURES};
  m.attr("cuda_architectures") = pybind11::tuple(pybind11::cast(architectures));
  const std::vector<const char*> kernels{TFKERN_CUDA_KERNELS};
  m.attr("cuda_kernels") = pybind11::tuple(pybind11::cast(kernels));
  m.attr("has_cuda") = !architectures.empty();
  m.def(
      "cpu_capability", [] { return tfkern::name(tfkern::isa()); },
      "Returns the level of vector instructions that the kernels use, one of cpu_levels.");
}
