"""The kernels of csrc/: loads their operators into torch.ops.tfkern and declares their outputs."""

from pathlib import Path

import torch

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


def unavailable(x: torch.Tensor) -> str | None:
    """Why no kernel here can take `x`: its device or its dtype. None if it can."""
    if x.device.type != "cpu":
        return f"its kernels run on the CPU, got {x.device.type}"
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"takes float32, float64, bfloat16 and float16, got {x.dtype}"
    return None
