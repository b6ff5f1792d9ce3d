"""The MLP of a transformer over the rows of a context: two products and an activation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

import tfkern
from tfkern.ops.mlp import ACTIVATIONS
from tfkern.validation.mlp import torch_mlp

from .case import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Variant,
    backend_variants,
    compiled,
)


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """x (batch, length, hidden), an inner layer of `expansion` times hidden, and biases."""

    op = "mlp"
    lengths = {
        "cpu": (256, 512, 1024, 2048, 4096, 8192),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    }
    unit = "TFLOP/s"
    growth = 1.0

    batch: int = 1
    hidden: int = 512
    expansion: int = 4
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {self.activation!r}: expected one of {names}")

    def small(self) -> "OpCase":
        return replace(self, batch=1, length=min(self.length, 67))

    def excerpt(self) -> "OpCase":
        return replace(self, batch=1, length=math.gcd(self.length, 64))

    def inputs(self) -> dict[str, Tensor]:
        outer, inner = self.hidden, self.hidden * self.expansion
        return {
            "x": self.draw(self.batch, self.length, outer),
            "w1": self.draw(inner, outer, std=outer**-0.5),
            "b1": self.draw(inner),
            "w2": self.draw(outer, inner, std=inner**-0.5),
            "b2": self.draw(outer),
        }

    def floor_scale(self) -> dict[str, float]:
        # The gradients of the parameters are sums over all rows.
        return dict.fromkeys(("w1", "b1", "w2", "b2"), math.sqrt(self.batch * self.length))

    def reference(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch_mlp(x, w1, b1, w2, b2, activation=self.activation)

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        inner = self.batch * self.length * self.hidden * self.expansion * self.torch_dtype.itemsize
        scratch = (3 if self.backward else 2) * inner
        return [
            Variant("torch", self.reference, scratch),
            compiled("torch.compile", self.reference, scratch),
            *backend_variants(self, self._tfkern, backends, scratch),
        ]

    def work(self, pass_: str) -> float:
        """FLOPs of the two products, each of which has two in the backward."""
        factor = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[pass_]
        return factor * 4 * self.batch * self.length * self.hidden**2 * self.expansion

    def _tfkern(self, x, w1, b1, w2, b2, backend: str) -> Tensor:
        return tfkern.mlp(x, w1, b1, w2, b2, activation=self.activation, backend=backend)
