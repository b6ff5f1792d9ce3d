"""The facts that every result must state: device, versions, commit, date, command."""

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tfkern


def facts(device: str) -> dict[str, str]:
    """The environment of a run as columns, all of them text."""
    return {
        "device": device_name(device),
        "instructions": instructions() if device == "cpu" else "",
        "torch_instructions": torch_instructions() if device == "cpu" else "",
        "threads": str(torch.get_num_threads()),
        "driver": driver() if device.startswith("cuda") else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "tfkern": tfkern.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name(device: str) -> str:
    """The model of the GPU or the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    facts = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        facts = {name.strip(): value.strip() for name, _, value in pairs}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    if not {"cpu family", "model"} <= facts.keys():
        return facts["model name"]
    # Virtual machines often hide the name: "AMD EPYC" may be Zen 4 (family 25) or Zen 5 (26).
    return f"{facts['model name']}, family {facts['cpu family']} model {facts['model']}"


def instructions() -> str:
    """The vector instructions that tfkern's kernels use; torch's if the kernels are not built."""
    try:
        from tfkern import _C

        return _C.cpu_capability()
    except ImportError:
        return f"{torch.backends.cpu.get_cpu_capability().lower()} (of torch)"


def torch_instructions() -> str:
    """The vector instructions that PyTorch uses, with amx if oneDNN or MKL may use it."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    mkl = os.environ.get("MKL_ENABLE_INSTRUCTIONS", "AVX512_E4").upper()
    allowed = onednn == "DEFAULT" or "AMX" in onednn
    allowed |= torch.backends.mkl.is_available() and mkl.startswith(("AVX512_E4", "AVX512_E5"))
    return f"{level}+amx" if allowed and torch.cpu._is_amx_tile_supported() else level


def driver() -> str:
    """The version of the NVIDIA driver, or torch's version of CUDA if the file is missing."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return f"CUDA {torch.version.cuda}"
    return next((w for w in words if w[0].isdigit() and "." in w), "")


def installed(package: str) -> str:
    """The version of an installed package, or ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of the checkout that tfkern is imported from, marked if files are changed, or "".

    TFKERN_COMMIT names the commit of a copy outside of a repository.
    """
    root = Path(tfkern.__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not (root / ".git").exists():  # an installed copy, perhaps within another checkout
            return os.environ.get("TFKERN_COMMIT", "")
        name = git("rev-parse", "--short=12", "HEAD")
        # Results from an earlier run are no change of code.
        files = "--", ".", ":(exclude)benchmarks/results"
        changed = git("status", "--porcelain", "--untracked-files=no", *files)
    except OSError:
        return ""
    return f"{name}+changes" if name and changed else name
