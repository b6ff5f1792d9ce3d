"""The kernels of csrc/: loads their operators into torch.ops.tfkern and declares their outputs."""

import functools
from pathlib import Path

import torch
from torch.autograd import forward_ad

try:
    import tfkern._C as _C
except ModuleNotFoundError as error:
    raise ImportError(
        f"not part of this installation, built with TFKERN_NATIVE=0 ({error})"
    ) from None

_libraries = sorted(Path(_C.__file__).parent.glob("_operators*.so"))
if not _libraries:
    raise ImportError(f"the operator library is missing beside {_C.__file__}")
try:
    torch.ops.load_library(_libraries[0])
except OSError as error:
    raise ImportError(f"the operator library does not load: {error}") from error


_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_CUDA_DTYPES, torch.float64)


def unavailable(x: torch.Tensor) -> str | None:
    """Why no kernel here can take `x` (its device or its dtype), or None."""
    if x.is_cpu:
        if x.dtype not in _CPU_DTYPES:
            return f"takes float32, float64, bfloat16 and float16, got {x.dtype}"
    elif x.is_cuda:
        if not _C.has_cuda:
            return "has no CUDA kernels: no CUDA compiler was found when it was built"
        if (capability := _capability(x.device)) < (8, 0):
            return f"its CUDA kernels need compute capability 8.0, got {capability}"
        if x.dtype not in _CUDA_DTYPES:
            return f"takes float32, bfloat16 and float16 on CUDA, got {x.dtype}"
    else:
        return f"its kernels run on the CPU and on CUDA, got {x.device.type}"
    return None


def transformed() -> str | None:
    """Why an operator without rules for torch.func and forward mode cannot serve now, or None."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "has no rules for torch.func and forward mode"
    return None


def multiplied(dtype: torch.dtype, *, tiles: bool) -> str:
    """As what the CPU's kernels multiply numbers of a dtype, for `tfkern.explain`. Where the
    processor has tiles of bfloat16, only kernels with `tiles` use them, and others its pairs."""
    level = _C.cpu_capability()
    kind = "float64" if dtype == torch.float64 else "float32"
    if dtype == torch.bfloat16 and level in ("avx512_bf16", "amx"):
        kind = "tiles of bfloat16" if tiles and level == "amx" else "pairs of bfloat16"
    return f"products of {kind} ({level})"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
