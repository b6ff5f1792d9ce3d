"""The parts of every benchmark: a case (sizes and inputs) and the variants that compute it."""

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import tfkern
from tfkern.ops.flops import formulas

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
    """Sizes of one point of a sweep. Subclasses add sizes, and define the op."""

    op: ClassVar[str]
    lengths: ClassVar[dict[str, tuple[int, ...]]]  # of the default sweep, by device type
    unit: ClassVar[str]  # unit of the rate: "TFLOP/s" or "GB/s"
    growth: ClassVar[float]  # exponent of time over length, to predict the next point

    length: int
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = False

    @property
    def kernels(self) -> str:
        """The op whose kernels the case runs."""
        return self.op

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that are timed. A run with a backward gives the times of both halves, too."""
        return (FORWARD, BACKWARD, BOTH) if self.backward else (FORWARD,)

    def at(self, length: int) -> "Case":
        return replace(self, length=length)

    def small(self) -> "Case":
        """A case small enough to compare with float64; its length is no multiple of a tile."""
        raise NotImplementedError

    def excerpt(self) -> "Case":
        """A part of the case that float64 can compute: the same length, but fewer rows or heads.

        Repeating its inputs makes inputs of the whole case, whose outputs then repeat, too.
        """
        raise NotImplementedError

    def inputs(self) -> dict[str, Tensor]:
        """Fresh inputs by name, on the device, that need gradients if there is a backward."""
        raise NotImplementedError

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        """PyTorch's variants, then tfkern's for the named backends, or for all that can run."""
        raise NotImplementedError

    def reference(self, *args: Any, **inputs: Any) -> Any:
        """The op in plain PyTorch, in the dtype of its inputs."""
        raise NotImplementedError

    def fused(self, **inputs: Any) -> Any:
        """What a user of PyTorch would write, with its fused operators where there are any."""
        return self.reference(**inputs)

    def work(self, pass_: str) -> float:
        """The numerator of the rate: FLOPs or bytes of a pass by the usual convention."""
        raise NotImplementedError

    def floor_scale(self) -> dict[str, float]:
        """`floor_scale` of `tfkern.testing.validate`: inputs whose gradients sum many terms."""
        return {}

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        """Formulas from shapes to FLOPs for operators that `FlopCounterMode` does not know."""
        return formulas()

    def draw(self, *shape: int, std: float = 1.0) -> Tensor:
        """A normally distributed input."""
        x = std * torch.randn(shape, dtype=self.torch_dtype, device=self.device)
        return x.requires_grad_(self.backward)


def load(op: str) -> type[Case]:
    """The case of an op. Its module is imported only by this call."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(OPS)}")
    return importlib.import_module(f"tfkern.benchmarks.{op}").OpCase


def backend_variants(
    case: Case, call: Callable[..., Any], backends: Iterable[str] | None, scratch: int
) -> list[Variant]:
    """tfkern's variants of a case, one for each backend, by `call(backend=..., **inputs)`.

    `scratch` is for the backend "reference", which is plain PyTorch; the others need little.
    """
    available = tfkern.backends(case.kernels)
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


def liger_missing() -> str | None:
    """Why Liger-Kernel (Hsu et al. 2024) cannot run here, or None."""
    found = importlib.util.find_spec("liger_kernel") is not None
    return None if found else "liger-kernel is not installed"


def compiled(name: str, call: Callable[..., Any], scratch: int = 0) -> Variant:
    """A variant of `torch.compile(call)`, compiled for each length, which makes it fastest."""
    missing = None
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        missing = "torch.compile needs a C++ compiler"

    @functools.cache
    def build() -> Callable[..., Any]:
        # A sweep has more lengths than Dynamo compiles by default before it silently runs eagerly.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        return torch.compile(call, dynamic=False)

    def run(**inputs: Tensor) -> Any:
        return build()(**inputs)

    return Variant(name, run, scratch, unavailable=missing, eager=call)


def prepared(case: Case, variant: Variant, inputs: dict[str, Any], *, traced: bool = False) -> Step:
    """The variant on these inputs as a step to time or to measure; uncompiled if `traced`."""
    call = (variant.eager or variant.call) if traced else variant.call
    if not case.backward:

        def forward() -> Any:
            with torch.no_grad():
                return call(**inputs)

        return Step(forward)
    wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    incoming: list[Tensor] = []  # made in the first call, during the warm-up

    def backward(output: Any) -> Any:
        outputs = output if isinstance(output, tuple) else (output,)
        if not incoming:
            incoming.extend(torch.randn_like(o) for o in outputs)
        return torch.autograd.grad(outputs, wanted, incoming)

    return Step(lambda: call(**inputs), backward)
