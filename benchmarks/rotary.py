"""Rotary positions of queries and keys: bound by memory, so the rate is in bytes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import tfkern

from .case import BOTH, Case, Variant, backend_variants, compiled, liger_missing


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """q and k as views of one projection, and tables of angles in their dtype. The tables have no
    gradient."""

    op = "rotary"
    lengths = {
        "cpu": (256, 512, 1024, 2048, 4096, 8192),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    }
    unit = "GB/s"
    growth = 1.0

    batch: int = 1
    heads: int = 16
    key_heads: int = 16
    head_dim: int = 64
    interleaved: bool = False

    def small(self) -> "OpCase":
        return replace(self.excerpt(), length=min(self.length, 197))

    def excerpt(self) -> "OpCase":
        shared = self.heads % self.key_heads == 0  # both can be repeated equally often
        heads = (self.heads // self.key_heads, 1) if shared else (self.heads, self.key_heads)
        return replace(self, batch=1, heads=heads[0], key_heads=heads[1])

    def inputs(self) -> dict[str, Tensor]:
        heads, T, D = (self.heads, self.key_heads), self.length, self.head_dim
        drawn = replace(self, backward=False).draw(self.batch, T, sum(heads), D).transpose(1, 2)
        q, k = (x.requires_grad_(self.backward) for x in drawn.split(heads, 1))
        frequencies = 1e4 ** (-torch.arange(0, D, 2, device=self.device) / D)
        turns = torch.arange(T, device=self.device)[:, None] * frequencies
        if self.interleaved:
            turns = turns.repeat_interleave(2, -1)
        else:
            turns = torch.cat([turns, turns], -1)
        cos, sin = turns.cos().to(self.torch_dtype), turns.sin().to(self.torch_dtype)
        return {"q": q, "k": k, "cos": cos, "sin": sin}

    def reference(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """As the models of transformers do it."""
        cos, sin = cos.detach(), sin.detach()
        other = _every_two if self.interleaved else _halves
        return q * cos + other(q) * sin, k * cos + other(k) * sin

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        heads = self.batch * self.length * (self.heads + self.key_heads) * self.head_dim
        cuda = self.device.startswith("cuda")
        return [
            Variant("torch", self.reference),
            compiled("torch.compile", self.reference),
            *([Variant("liger", _liger, unavailable=self._liger_missing())] if cuda else []),
            *backend_variants(
                self, self._tfkern, backends, scratch=4 * heads * self.torch_dtype.itemsize
            ),
        ]

    def work(self, pass_: str) -> float:
        """Bytes: either pass reads and writes q and k, or their gradients, once."""
        heads = self.batch * self.length * (self.heads + self.key_heads) * self.head_dim
        return (4 if pass_ == BOTH else 2) * heads * self.torch_dtype.itemsize

    def _tfkern(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str | None = None
    ) -> Any:
        return tfkern.rotary(
            q, k, cos.detach(), sin.detach(), interleaved=self.interleaved, backend=backend
        )

    def _liger_missing(self) -> str | None:
        if self.interleaved:
            return "Liger's pairs are halves"
        return liger_missing()


def _halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _every_two(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Rotary positions of Liger-Kernel (Hsu et al. 2024), which overwrites what it is given."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q.clone(), k.clone(), cos.detach()[None], sin.detach()[None])
