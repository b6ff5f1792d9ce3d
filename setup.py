"""The C++ part of the build; everything else stands in pyproject.toml.

TFKERN_NATIVE=0 leaves it out: the package is then pure Python.
"""

import os
import shutil
from glob import glob

from setuptools import setup


def native():
    """Arguments of setup() for the operator library and the module of build facts."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        raise SystemExit(
            "tfkern builds against the torch that you have installed, and there is none in this "
            "build environment. Install torch first and add --no-build-isolation, or set "
            "TFKERN_NATIVE=0 for an installation without C++ kernels."
        ) from None
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"tfkern needs a C++ compiler, and {compiler!r} cannot be found. Set CXX, or set "
            "TFKERN_NATIVE=0 for an installation without C++ kernels."
        )
    flags = [
        "-O3",
        "-std=c++20",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
    ]
    module = CppExtension(
        "tfkern._C",
        ["csrc/module.cpp"],
        depends=glob("csrc/*.h"),
        extra_compile_args=[*flags, f"-DTFKERN_TORCH_VERSION={torch.__version__}"],
    )
    # Stable ABI of torch 2.11, no Python symbols: one library for every torch and Python since.
    operators = CppExtension(
        "tfkern._operators",
        sorted(set(glob("csrc/*.cpp")) - {"csrc/module.cpp"}),
        depends=glob("csrc/*.h"),
        extra_compile_args=[*flags, "-DTORCH_TARGET_VERSION=0x020b000000000000"],
        py_limited_api=True,
    )
    return {"ext_modules": [module, operators], "cmdclass": {"build_ext": BuildExtension}}


setup(**native() if os.environ.get("TFKERN_NATIVE") != "0" else {})
