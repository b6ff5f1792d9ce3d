"""The head of a language model with its loss: three products around the cross entropy."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfkern

from . import cross_entropy
from .case import BACKWARD, BOTH, FORWARD, Variant, backend_variants, compiled, liger_missing


@dataclass(frozen=True, kw_only=True)
class OpCase(cross_entropy.OpCase):
    """x (batch, length, hidden), weight (vocabulary, hidden) and targets; the mean loss."""

    op = "linear_cross_entropy"
    unit = "TFLOP/s"

    hidden: int = 768

    @property
    def kernels(self) -> str:
        return "cross_entropy"

    def inputs(self) -> dict[str, Tensor]:
        return {
            "x": self.draw(self.batch, self.length, self.hidden),
            "weight": self.draw(self.vocabulary, self.hidden, std=3 * self.hidden**-0.5),
            "targets": self.targets(),
        }

    def floor_scale(self) -> dict[str, float]:
        # The gradient of weight sums over all rows, that of x over all classes.
        sums = {"weight": self.batch * self.length, "x": self.vocabulary}
        return super().floor_scale() | {name: math.sqrt(n) for name, n in sums.items()}

    def reference(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return super().reference(F.linear(x, weight), targets)

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        logits = self.batch * self.length * self.vocabulary * max(4, self.torch_dtype.itemsize)
        scratch = (3 if self.backward else 2) * logits
        cuda = self.device.startswith("cuda")
        missing = None if hasattr(nn, "LinearCrossEntropyOptions") else "torch 2.13 brings it"
        return [
            Variant("torch", self.reference, scratch),
            compiled("torch.compile", self.reference, scratch),
            Variant("torch chunked", self._chunked, unavailable=missing),
            *([Variant("liger", self._liger, unavailable=liger_missing())] if cuda else []),
            *backend_variants(self, self._tfkern, backends, logits // 8),
        ]

    def work(self, pass_: str) -> float:
        """FLOPs of the product, which has two in the backward."""
        factor = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[pass_]
        return factor * 2 * self.batch * self.length * self.hidden * self.vocabulary

    def _chunked(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """torch's own loss in chunks."""
        options = nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), options=options)
        return loss.to(torch.promote_types(x.dtype, torch.float32))

    def _liger(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss of Liger-Kernel (Hsu et al. 2024)."""
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten()).float()

    def _tfkern(self, x: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
        return tfkern.linear_cross_entropy(x, weight, targets, backend=backend)
