"""The C++ part of the build; everything else stands in pyproject.toml.

TFKERN_NATIVE=0 leaves it out: the package is then pure Python. CUDA kernels are built where there
is a CUDA compiler (in CUDA_HOME, on the path, or in /usr/local/cuda), with or without a GPU.
TFKERN_CUDA=0 leaves them out, and TFKERN_CUDA=1 makes it an error if they cannot be built.
TFKERN_CUDA_ARCHITECTURES names architectures to build for, such as sm_80,sm_90a, or native for the
GPU of this machine (all architectures if it has none).
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import setup

# Kernels are built as code for these, and as PTX of the first for all later GPUs.
CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


def runtime(home):
    """The folder of the static CUDA runtime, or None."""
    machine = platform.machine()
    for folder in ("lib64", "lib", f"lib/{machine}-linux-gnu"):
        if (Path(home) / folder / "libcudart_static.a").exists():
            return str(Path(home) / folder)
    return None


def cuda_home(torch_cuda):
    """The folder of the CUDA toolkit to build with, or None; `torch_cuda` is torch's version."""
    wanted = os.environ.get("TFKERN_CUDA", "")
    if wanted == "0":
        return None
    path = shutil.which("nvcc")
    told = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(told)] if told else [Path("/usr/local/cuda"), Path("/usr")]
    if path and not told:
        homes.insert(0, Path(path).resolve().parents[1])
    home = next((h for h in homes if (h / "bin" / "nvcc").exists() and runtime(h)), None)
    problem = None
    if home is None:
        problem = f"no nvcc with libcudart_static.a in {' or '.join(map(str, homes))}"
    elif torch_cuda is not None:
        command = [home / "bin" / "nvcc", "--version"]
        printed = subprocess.run(command, capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)", printed)
        if version is None or version[1] != torch_cuda.split(".")[0]:
            problem = f"the nvcc of {home} is not of CUDA {torch_cuda}, which torch was built with"
    if problem is None:
        return str(home)
    if wanted == "1":
        raise SystemExit(f"tfkern cannot build its CUDA kernels (TFKERN_CUDA=1): {problem}")
    print(f"tfkern: no CUDA kernels in this build: {problem}")
    return None


def cuda_architectures(home, torch):
    """The architectures to build for, among those that nvcc knows (12.6 has no sm_100)."""
    command = [Path(home) / "bin" / "nvcc", "--list-gpu-code"]
    codes = subprocess.run(command, capture_output=True, text=True).stdout.split()
    known = [a for a in CUDA_ARCHITECTURES if a.removesuffix("a") in codes]
    wanted = os.environ.get("TFKERN_CUDA_ARCHITECTURES", "")
    if wanted == "native" and torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability()
        return [a for a in known if int(re.findall(r"\d+", a)[0]) // 10 == major] or known[:1]
    if wanted in ("", "native"):
        return known
    for architecture in wanted.split(","):
        if architecture not in known:
            raise SystemExit(
                f"TFKERN_CUDA_ARCHITECTURES names {architecture!r}: expected some of "
                f"{', '.join((*known, 'native'))}"
            )
    return wanted.split(",")


def cuda_flags(flags, architectures):
    """Arguments of nvcc. They contain a hash of the headers, so that ninja sees any change."""
    targets = ["--threads=0"]  # one thread per architecture
    for architecture in architectures:
        number = architecture.removeprefix("sm_")
        code = f"[{architecture},compute_{number}]" if number == "80" else architecture
        targets.append(f"-gencode=arch=compute_{number},code={code}")
    headers = sorted(glob("csrc/*.h") + glob("csrc/cuda/*.h"))
    hashed = hashlib.sha256(b"".join(Path(h).read_bytes() for h in headers)).hexdigest()
    host = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", "-Wno-psabi")]
    return [
        "-O3",
        "-std=c++20",
        "--expt-relaxed-constexpr",
        *host,
        *targets,
        f"-DTFKERN_HEADERS={hashed[:16]}",
        *(flag for flag in flags if flag.startswith("-D")),
    ]


def cuda_kernels():
    """The names of the CUDA kernels, each with its op in front, as a list in C++."""
    names = []
    for path in sorted(Path("csrc/cuda").glob("*.cu")):
        kernels = re.findall(r"__global__[^;]*?\b(\w+)_kernel\(", path.read_text())
        names += [f"{path.stem}_{k}_kernel" if k != path.stem else f"{k}_kernel" for k in kernels]
    return ",".join(f'"{name}"' for name in names)


def native():
    """Arguments of setup() for the operator library and the module of build facts."""
    try:
        import torch
        from torch.utils import cpp_extension
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
    home = cuda_home(torch.version.cuda)
    architectures = cuda_architectures(home, torch) if home else []
    headers = [path for kind in ("h", "inl") for path in glob(f"csrc/**/*.{kind}", recursive=True)]
    module = CppExtension(
        "tfkern._C",
        ["csrc/module.cpp"],
        depends=headers,
        extra_compile_args=[
            *flags,
            f"-DTFKERN_TORCH_VERSION={torch.__version__}",
            "-DTFKERN_CUDA_ARCHITECTURES=" + ",".join(f'"{a}"' for a in architectures),
            f"-DTFKERN_CUDA_KERNELS={cuda_kernels() if home else ''}",
        ],
    )
    # The library uses the stable ABI of torch 2.11 and no Python symbols, so that one build serves
    # every later torch and Python. It contains the CUDA runtime, so it loads where CUDA is missing.
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    sources = ["csrc/schema.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    link = []
    if home:
        cpp_extension.CUDA_HOME = home
        sources += sorted(glob("csrc/cuda/*.cu"))
        flags.append(f"-isystem{home}/include")
        link = [f"-L{runtime(home)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    operators = CppExtension(
        "tfkern._operators",
        sources,
        depends=headers,
        extra_compile_args={"cxx": flags, "nvcc": cuda_flags(flags, architectures)},
        extra_link_args=[*link, "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )

    class Build(BuildExtension):
        """Keeps the objects, even of an editable installation: nvcc takes minutes to make them."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = os.path.abspath("build/objects")

    return {"ext_modules": [module, operators], "cmdclass": {"build_ext": Build}}


setup(**native() if os.environ.get("TFKERN_NATIVE") != "0" else {})
