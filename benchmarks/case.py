"""What every benchmark is made of: a case (sizes and inputs) and the variants that compute it."""

import functools
import importlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import tfkern

from . import OPS
from .timing import Step

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: `call(**case.inputs())` gives the output, or a tuple of them."""

    name: str
    call: Callable[..., Any]
    scratch: int = 0  # predicted bytes that are alive at once beside inputs, outputs and gradients
    unavailable: str | None = None  # why it cannot run here
    eager: Callable[..., Any] | None = None  # what a compiled `call` was compiled from


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one point of a sweep. Subclasses add their own, and say what the op is."""

    op: ClassVar[str]
    lengths: ClassVar[dict[str, tuple[int, ...]]]  # default sweep by the type of the device
    unit: ClassVar[str]  # of `rate`: "TFLOP/s" or "GB/s"
    growth: ClassVar[float]  # exponent of time over length, to predict the next point

    length: int
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed: with a backward, one run gives the times of its two halves as well."""
        return (FORWARD, BACKWARD, BOTH) if self.backward else (FORWARD,)

    def at(self, length: int) -> "Case":
        return replace(self, length=length)

    def small(self) -> "Case":
        """The same case, small enough to compare with float64, and no multiple of a tile."""
        raise NotImplementedError

    def excerpt(self) -> "Case":
        """A part that float64 can compute: few of the rows, or of the heads, of the same length.

        Repetitions of its inputs make the whole case, whose outputs are those of the parts.
        """
        raise NotImplementedError

    def inputs(self) -> dict[str, Tensor]:
        """Fresh inputs by name, on the device, that need gradients if there is a backward."""
        raise NotImplementedError

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        """PyTorch's ways, then tfkern's: the `backends` named, or all that run on the device."""
        raise NotImplementedError

    def reference(self, *args: Any, **inputs: Any) -> Any:
        """The op in plain PyTorch, in the dtype of its inputs."""
        raise NotImplementedError

    def fused(self, **inputs: Any) -> Any:
        """What a user of PyTorch would write: its fused operators where it has them."""
        return self.reference(**inputs)

    def work(self, which: str) -> float:
        """FLOPs or bytes of a pass by the usual convention: the numerator of the rate."""
        raise NotImplementedError

    def floor_scale(self) -> dict[str, float]:
        """Inputs whose gradients sum many terms, for `tfkern.testing.validate`."""
        return {}

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        """FLOPs of the operators that `FlopCounterMode` does not know, from their shapes."""
        return {}

    def draw(self, *shape: int, std: float = 1.0) -> Tensor:
        """A normally distributed input."""
        x = std * torch.randn(shape, dtype=self.torch_dtype, device=self.device)
        return x.requires_grad_(self.backward)


def load(op: str) -> type[Case]:
    """The case of an op, whose module is imported only now."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(OPS)}")
    return importlib.import_module(f"tfkern.benchmarks.{op}").OpCase


def backend_variants(
    case: Case, call: Callable[..., Any], backends: Iterable[str] | None, scratch: int
) -> list[Variant]:
    """tfkern's variants of a case: `call(backend=..., **inputs)` with every backend.

    `scratch` is what the backend "reference" needs, which is plain PyTorch; the others need little.
    """
    available = tfkern.backends(case.op)
    named = list(backends) if backends is not None else None
    for name in named or ():
        if name not in available:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(available)}")
    variants = []
    for name, reason in available.items():
        if named is not None and name not in named:
            continue
        if reason is None and name == "triton" and not case.device.startswith("cuda"):
            reason = "runs on CUDA devices; its interpreter is not worth timing"
        if named is None and reason is not None:
            continue
        variants.append(
            Variant(
                f"tfkern {name}",
                _bound(call, name),
                scratch=scratch if name == "reference" else 0,
                unavailable=reason,
            )
        )
    return variants


def _bound(call: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def bound(**inputs: Tensor) -> Any:
        return call(backend=backend, **inputs)

    return bound


def compiled(name: str, call: Callable[..., Any], scratch: int = 0) -> Variant:
    """`torch.compile(call)`, compiled for each length: the strongest form of it."""
    missing = None
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        missing = "torch.compile needs a C++ compiler"

    @functools.cache
    def build() -> Callable[..., Any]:
        # More lengths than Dynamo's default allows before it falls back to eager in silence.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        return torch.compile(call, dynamic=False)

    def run(**inputs: Tensor) -> Any:
        return build()(**inputs)

    return Variant(name, run, scratch, unavailable=missing, eager=call)


def prepared(case: Case, variant: Variant, inputs: dict[str, Any], *, traced: bool = False) -> Step:
    """The variant on these inputs as a step to time or to measure, or uncompiled to trace."""
    call = (variant.eager or variant.call) if traced else variant.call
    if not case.backward:

        def forward() -> Any:
            with torch.no_grad():
                return call(**inputs)

        return Step(forward)
    wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    incoming: list[Tensor] = []  # made by the first call, which belongs to the warm-up

    def backward(output: Any) -> Any:
        outputs = output if isinstance(output, tuple) else (output,)
        if not incoming:
            incoming.extend(torch.randn_like(o) for o in outputs)
        return torch.autograd.grad(outputs, wanted, incoming)

    return Step(lambda: call(**inputs), backward)
