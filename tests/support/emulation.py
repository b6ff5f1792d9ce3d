"""Builds csrc/cuda for the host, on the emulation in cuda_host/, for `native` to run.

The library registers its operators as torch.ops.tfkern_host. TFKERN_CUDA_HOST=plain or =sanitized
in the environment makes conftest call `patch`: the tests of `native` then run the CUDA kernels.
`sanitized` has AddressSanitizer and UndefinedBehaviorSanitizer; it works in processes that preload
AddressSanitizer, which `pytest` starts. `threads` has ThreadSanitizer, for the kernels of the CPU.
`amx` gives these the instructions of a processor with AMX, in plain C++.
"""

import fcntl
import functools
import hashlib
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parent / "cuda_host"
ORDERS = (0, 1, 7)  # orders of the threads' turns: ascending, descending, shuffled

_FLAGS = {
    "plain": [],
    "sanitized": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-g1", "-fsanitize=thread"],
    "amx": ["-include", str(HOST.parent / "amx_host.h")],
}


def build(sources: list[Path], flavour: str = "plain") -> Path:
    """A shared library of .cu files with the emulation, or of .cpp files for the CPU. The library
    is built unless it is in the cache."""
    include = Path(torch.__file__).parent / "include"
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-Wall", "-Wno-psabi",
        "-Wno-unknown-pragmas", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-isystem{include}", *_FLAGS[flavour],
    ]  # fmt: skip
    if sources[0].suffix == ".cu":
        command += ["-O2", "-ffp-contract=off", "-DTFKERN_CUDA_HOST"]
        command += [f"-I{HOST}", f"-I{ROOT / 'csrc' / 'cuda'}"]
        sources = [*sources, HOST / "cuda_host.cpp"]
    else:
        command += ["-O1", "-ffp-contract=fast", "-w"]  # the ordinary build shows warnings
    folders = (HOST.parent.glob("**/*.h"), ROOT.glob("csrc/**/*.h"), ROOT.glob("csrc/**/*.inl"))
    headers = sorted(path for folder in folders for path in folder)
    contents = b"".join(path.read_bytes() for path in [*sources, *headers])
    identity = contents + " ".join([*command, torch.__version__]).encode()
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{flavour}-{sources[0].stem}-{hashlib.sha256(identity).hexdigest()[:16]}"
    library = stem.with_suffix(".so")
    with open(stem.with_suffix(".lock"), "w") as lock:  # of several processes only one builds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        objects = [f"{stem}-{source.stem}.o" for source in sources]

        def compiled(source, out):
            subprocess.run([*command, "-x", "c++", "-c", source, "-o", out], check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compiled, sources, objects))
        lib = include.parent / "lib"
        link = [
            "-shared",
            "-Wl,-Bsymbolic",
            f"-L{lib}",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{lib}",
        ]
        subprocess.run([*command, *objects, *link, "-o", library], check=True)
        for path in objects:
            os.remove(path)
    return library


def _library(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def load():
    """torch.ops.tfkern_host: the operators of csrc/cuda, with the schemas of tfkern."""
    import tfkern
    from tfkern.ops import OPS

    flavour = os.environ.get("TFKERN_CUDA_HOST", "plain")
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    torch.ops.load_library(build(sources, flavour))
    library = torch.library.Library("tfkern_host", "DEF")
    load.library = library  # the definitions live only as long as this object
    assert tfkern.backends(OPS[0])["native"] is None
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("tfkern::"):
            schema = str(getattr(torch.ops.tfkern, name[8:]).default._schema)
            library.define(schema.removeprefix("tfkern::"))
    return torch.ops.tfkern_host


def patch() -> None:
    """Makes the native backend run CUDA kernels on the host, for the operators that have them."""
    from tfkern.ops import OPS

    ops = load()
    importlib.import_module("tfkern.native.linear")._MOST_ROWS = {}  # as on a GPU
    for op in OPS:
        native = importlib.import_module(f"tfkern.native.{op}")
        for name, value in list(vars(native).items()):
            if isinstance(value, torch._ops.OpOverload):
                operator = value._schema.name.partition("::")[2]
                if torch._C._dispatch_has_kernel_for_dispatch_key(
                    f"tfkern_host::{operator}", "CPU"
                ):
                    setattr(native, name, _or_double(getattr(ops, operator).default, value))


def _or_double(operator, of_cpu):
    """The operator, or the CPU's operator for float64, which the CUDA kernels do not take."""

    def call(*args):
        doubles = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.float64]
        return (of_cpu if doubles else operator)(*args)

    return call


def load_cpu() -> None:
    """Makes `import tfkern` load the CPU's operators from a library of another flavour."""
    flavour = os.environ["TFKERN_CPU_FLAVOUR"]
    sources = [ROOT / "csrc" / "schema.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    if flavour == "threads":
        sources.append(HOST / "threads.cpp")
    library, load_library = build(sources, flavour), torch.ops.load_library
    torch.ops.load_library = lambda path: load_library(
        library if Path(path).name.startswith("_operators") else path
    )


_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys")


def pytest(*arguments, flavour: str, order: int = 0, **environment) -> subprocess.CompletedProcess:
    """Runs pytest in a process in which `native` means the CUDA kernels on the host."""
    environment |= {"TFKERN_CUDA_HOST": flavour, "TFKERN_CUDA_ORDER": str(order)}
    return python(*_PYTEST, *arguments, flavour=flavour, **environment)


def pytest_on_cpu(*arguments, flavour: str, **environment) -> subprocess.CompletedProcess:
    """Runs pytest in a process whose kernels of the CPU are of a flavour."""
    environment |= {"TFKERN_CPU_FLAVOUR": flavour}
    return python(*_PYTEST, *arguments, flavour=flavour, **environment)


def python(*arguments, flavour: str, **environment) -> subprocess.CompletedProcess:
    """Runs python without a GPU, in an environment that can load libraries of this flavour."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    if flavour == "sanitized":
        # libstdc++ is preloaded, too: exceptions out of torch need it, and ASan looks for it early.
        environment["LD_PRELOAD"] = ":".join(map(_library, ("libasan.so", "libstdc++.so.6")))
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
        environment["UBSAN_OPTIONS"] = "print_stacktrace=0"
    command = [sys.executable, *arguments]
    if flavour == "threads":
        # ThreadSanitizer expects addresses that are not randomised.
        command = ["setarch", "--addr-no-randomize", *command]
        environment["LD_PRELOAD"] = ":".join(map(_library, ("libtsan.so", "libstdc++.so.6")))
        environment["TSAN_OPTIONS"] = "halt_on_error=1"
        environment["OMP_NUM_THREADS"] = "1"  # for torch's own kernels
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
