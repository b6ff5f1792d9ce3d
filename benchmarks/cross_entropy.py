"""Cross entropy of logits over the rows of a context: bound by memory, so its rate is in bytes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import tfkern

from .case import BACKWARD, BOTH, FORWARD, Case, Variant, backend_variants, compiled, liger_missing


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """Logits (batch, length, vocabulary) and a target for each row; the mean of their losses."""

    op = "cross_entropy"
    lengths = {
        "cpu": (128, 256, 512, 1024, 2048, 4096),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384),
    }
    unit = "GB/s"
    growth = 1.0

    batch: int = 1
    vocabulary: int = 32000

    def small(self) -> "OpCase":
        return replace(
            self, batch=1, length=min(self.length, 67), vocabulary=min(self.vocabulary, 4099)
        )

    def excerpt(self) -> "OpCase":
        return replace(self, batch=1, length=math.gcd(self.length, 64))

    def inputs(self) -> dict[str, Tensor]:
        return {
            "logits": self.draw(self.batch, self.length, self.vocabulary, std=3.0),
            "targets": self.targets(),
        }

    def targets(self) -> Tensor:
        return torch.randint(self.vocabulary, (self.batch, self.length), device=self.device)

    def floor_scale(self) -> dict[str, float]:
        # The error of a single number is luck, so its limit follows from the dtype of the logits.
        sums = torch.promote_types(self.torch_dtype, torch.float32)
        eps = torch.finfo(self.torch_dtype).eps
        return {"output": 4 * eps / torch.finfo(sums).eps}

    def reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss.to(torch.promote_types(logits.dtype, torch.float32))  # as ours

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        rows = self.batch * self.length * self.vocabulary * max(4, self.torch_dtype.itemsize)
        scratch = (3 if self.backward else 2) * rows
        cuda = self.device.startswith("cuda")
        return [
            Variant("torch", self.reference, scratch),
            compiled("torch.compile", self.reference, scratch),
            *([Variant("liger", self._liger, unavailable=liger_missing())] if cuda else []),
            *backend_variants(self, self._tfkern, backends, scratch),
        ]

    def work(self, pass_: str) -> float:
        """Bytes: forward reads the logits; backward reads them and writes their gradient."""
        tensors = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[pass_]
        return tensors * self.batch * self.length * self.vocabulary * self.torch_dtype.itemsize

    def _liger(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of Liger-Kernel (Hsu et al. 2024). It writes the gradient over its logits, so it
        gets a copy of them."""
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(logits.flatten(0, 1).clone(), targets.flatten()).float()

    def _tfkern(self, logits: Tensor, targets: Tensor, backend: str) -> Tensor:
        return tfkern.cross_entropy(logits, targets, backend=backend)
