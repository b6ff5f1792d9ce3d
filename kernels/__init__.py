"""Triton kernels, one file or folder per op. This folder is installed as `tfkern.kernels`.

Every launcher is an operator of the library `tfkern_triton`, so that torch.compile sees one call
with known outputs. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

if __name__ != "tfkern.kernels":
    raise ImportError(
        "this folder is tfkern.kernels, not a top-level package: run `pip install -e .`"
    )

import triton  # noqa: E402  an ImportError here is the reason that dispatch reports
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

_library = torch.library.Library("tfkern_triton", "DEF")
_INTERPRETED = triton.knobs.runtime.interpret  # as it stands when the kernels are defined


if _INTERPRETED:
    from . import interpreter

    interpreter.patch()


def register(schema: str, launcher: Callable, fake: Callable) -> Callable:
    """Defines the operator `schema` with its launcher and its fake, and returns it."""

    def on_device(x, *args):  # Triton launches on the current device, which may not be that of x
        with torch.cuda.device_of(x):
            return launcher(x, *args)

    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, on_device, "CUDA")
    if _INTERPRETED:
        _library.impl(name, launcher, "CPU")
    torch.library.register_fake(f"tfkern_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.tfkern_triton, name).default


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability as a number: 90 for sm_90, and 80 for the CPU, as an interpreter."""
    major, minor = (8, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Tiles(NamedTuple):
    """The tile that a program works on at once, and how it is launched.

    Attributes:
        rows, columns: size of the tile that a program owns or walks over, in the order of the
            result's axes.
        num_warps, num_stages: launch options of Triton.
        depth: number of terms of a tile's products that are loaded at a time; 0 if all are.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 3
    depth: int = 0


@functools.cache
def programs(device: torch.device, each: int, interpreted: int) -> int:
    """The number of programs that fill a GPU if a multiprocessor runs `each` of them.

    On the CPU it is `interpreted`, so few that in tests a program takes several turns.
    """
    if device.type != "cuda":
        return interpreted
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def describable(arch: int, *tensors: torch.Tensor) -> bool:
    """Tells whether the tensor memory accelerator (TMA) of a GPU can load tiles of `tensors`.

    It takes contiguous rows of 16-bit elements, whose addresses and strides are multiples of 16
    bytes, and no broadcast dimensions. Only the architectures that the tests compile for use it.
    """
    for x in tensors:
        if x.itemsize != 2 or x.numel() == 0 or x.data_ptr() % 16 or x.stride(-1) != 1:
            return False
        strides = [x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1]
        if any(s == 0 or s % 8 for s in strides):
            return False
    return arch in (90, 100, 103)


def descriptor(x: torch.Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A descriptor of the describable x, from which TMA loads tiles of shape `block`, with 0 past
    the ends of x. One thread orders a tile, so that no registers hold addresses."""
    strides = [x.stride(i) if x.shape[i] > 1 else 8 for i in range(x.dim() - 1)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block))


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 becomes TF32 only if torch's own switch allows it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def dropout(p: float) -> tuple[int, float]:
    """(last, factor): an element whose draw is above `last` is kept and multiplied by `factor`."""
    return math.ceil(p * 2**32) - 1, 1 / (1 - p) if p < 1 else 0.0


def unavailable(x: torch.Tensor) -> str | None:
    """The reason why no kernel here can take `x`, its device or its dtype. None if all can."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _INTERPRETED):
        return f"needs a CUDA device (or TRITON_INTERPRET=1 for the CPU), got {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return None
