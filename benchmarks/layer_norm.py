"""Layer norm over the rows of a context: bound by memory, so its rate is in bytes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import tfkern

from .case import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Variant,
    backend_variants,
    compiled,
    liger_missing,
)


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """x (batch, length, hidden), weight and bias; with `residual` also an addition in front."""

    op = "layer_norm"
    lengths = {
        "cpu": (256, 512, 1024, 2048, 4096, 8192),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    }
    unit = "GB/s"
    growth = 1.0

    batch: int = 1
    hidden: int = 1024
    residual: bool = False

    def small(self) -> "OpCase":
        return replace(self, batch=1, length=min(self.length, 197))

    def excerpt(self) -> "OpCase":
        return replace(self, batch=1, length=math.gcd(self.length, 64))

    def inputs(self) -> dict[str, Tensor]:
        x = (self.batch, self.length, self.hidden)
        inputs = {
            "x": self.draw(*x),
            "weight": self.draw(self.hidden),
            "bias": self.draw(self.hidden),
        }
        return inputs | {"residual": self.draw(*x)} if self.residual else inputs

    def floor_scale(self) -> dict[str, float]:
        # The gradients of the parameters are sums over all rows.
        return dict.fromkeys(("weight", "bias"), math.sqrt(self.batch * self.length))

    def reference(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
    ) -> Any:
        h = x if residual is None else x + residual
        y = F.layer_norm(h, (self.hidden,), weight, bias)
        return y if residual is None else (y, h)

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        rows = self.batch * self.length * self.hidden * self.torch_dtype.itemsize
        cuda = self.device.startswith("cuda")
        return [
            Variant("torch", self.reference),
            compiled("torch.compile", self.reference),
            *([Variant("liger", self._liger, unavailable=liger_missing())] if cuda else []),
            *backend_variants(self, self._tfkern, backends, scratch=4 * rows),
        ]

    def work(self, pass_: str) -> float:
        """Bytes: forward reads x and writes y; backward reads dy and x and writes dx.

        With an addition in front, forward also reads the residual and writes the sum, and backward
        also reads the gradient of the sum.
        """
        forward, backward = (4, 4) if self.residual else (2, 3)
        tensors = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[pass_]
        return tensors * self.batch * self.length * self.hidden * self.torch_dtype.itemsize

    def _liger(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
    ) -> Any:
        """The layer norm of Liger-Kernel (Hsu et al. 2024), which has none with an addition."""
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        h = x if residual is None else x + residual
        y = LigerLayerNormFunction.apply(h, weight, bias, 1e-5)
        return y if residual is None else (y, h)

    def _tfkern(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        backend: str | None = None,
    ) -> Any:
        return tfkern.layer_norm(
            x,
            weight,
            bias,
            residual=residual,
            return_residual=residual is not None,
            backend=backend,
        )
