"""Softmax attention over context length: quadratic work, and memory that need not be."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import tfkern
from tfkern.ops.flops import Band, formulas, visible_pairs

from .case import BACKWARD, BOTH, FORWARD, Case, Variant, backend_variants, compiled

_SDPA = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    },
}


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """q, k, v of (batch, heads, length, head_dim)."""

    op = "attention"
    lengths = {
        "cpu": (256, 512, 1024, 2048, 4096, 8192),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    }
    unit = "TFLOP/s"
    growth = 2.0

    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    causal: bool = False
    window: int | None = None  # keys seen before the query, and unless causal also after it
    key_heads: int | None = None  # a divisor of heads; heads if None

    def small(self) -> "OpCase":
        return replace(self.excerpt(), length=min(self.length, 197))

    def excerpt(self) -> "OpCase":
        keys = self.key_heads or self.heads
        some = math.gcd(keys, 2)
        return replace(self, batch=1, heads=some * (self.heads // keys), key_heads=some)

    @property
    def queries(self) -> int:
        return self.length

    @property
    def band(self) -> Band:
        """The window (left, right) as `tfkern.attention` takes it."""
        return self.window, 0 if self.causal else self.window

    def inputs(self) -> dict[str, Tensor]:
        keys = (self.batch, self.key_heads or self.heads, self.length, self.head_dim)
        q = self.draw(self.batch, self.heads, self.queries, self.head_dim)
        return {"q": q, "k": self.draw(*keys), "v": self.draw(*keys)}

    def floor_scale(self) -> dict[str, float]:
        # The gradients of k and v are sums over all queries.
        return dict.fromkeys(("k", "v"), math.sqrt(self.length))

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, band=self.band)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, band=self.band)

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        # The numbers given to _scores are measured: how many matrices of scores are alive at once.
        return [
            Variant("plain", self.reference, self._scores(2, 3)),
            *(
                _sdpa(name, backend, self.band, self._scores(2.5, 3) if name == "math" else 0)
                for name, backend in _SDPA[self.device.partition(":")[0]].items()
                if self.window is None or name != "flash" or self.device == "cpu"  # no mask
            ),
            *([self._flex()] if self.device.startswith("cuda") else []),  # no CPU backward
            *backend_variants(self, self._tfkern, backends, self._scores(3, 5, torch.float32)),
        ]

    def work(self, pass_: str) -> float:
        factor = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}[pass_]
        pairs = self.length**2 / (2 if self.causal else 1)
        if self.window is not None:
            pairs = visible_pairs(self.length, self.length, self.band)
        return factor * 4 * self.batch * self.heads * pairs * self.head_dim

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        # With a window torch gets a mask, and its kernels compute all scores.
        return formulas(self.causal and self.window is None, self._triton_tile())

    def _tfkern(self, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Any:
        return tfkern.attention(q, k, v, window=self.band, backend=backend)

    def _flex(self) -> Variant:
        """FlexAttention (Dong et al. 2024), compiled for each length."""
        inner = compiled("flex", flex_attention)

        @functools.cache
        def mask() -> BlockMask | None:
            if self.band == (None, None):
                return None
            sizes = None, None, self.queries, self.length
            return create_block_mask(_seen(self.band), *sizes, device=self.device)

        def run(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            grouped = q.shape[1] != k.shape[1]
            return call(query=q, key=k, value=v, block_mask=mask(), enable_gqa=grouped)

        eager = functools.partial(run, flex_attention)
        return replace(inner, call=functools.partial(run, inner.call), eager=eager)

    def _triton_tile(self) -> tuple[int, int]:
        if not self.device.startswith("cuda") or tfkern.backends(self.op)["triton"] is not None:
            return 128, 64  # no Triton here: the value is unused
        from tfkern.kernels import architecture
        from tfkern.kernels import attention as kernel

        arch = architecture(torch.device(self.device))
        tiles = kernel.tiles_of("forward", self.head_dim, self.head_dim, self.torch_dtype, arch)
        return tiles.rows, tiles.columns

    def _scores(self, forward: float, both: float, at_least: torch.dtype | None = None) -> int:
        """Bytes of `forward` or `both` matrices of scores, in the inputs' dtype or a wider one."""
        dtype = torch.promote_types(self.torch_dtype, at_least or self.torch_dtype)
        pairs = self.batch * self.heads * self.queries * self.length
        return round((both if self.backward else forward) * pairs * dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class Decode(OpCase):
    """One new query for the keys of `length` tokens: bound by reading keys and values."""

    unit = "GB/s"

    @property
    def queries(self) -> int:
        return 1

    def work(self, pass_: str) -> float:
        """The bytes of keys and values, which the forward pass reads once."""
        pairs = self.batch * (self.key_heads or self.heads) * self.length
        return 2 * pairs * self.head_dim * self.torch_dtype.itemsize


def visible(T: int, S: int, band: Band, device: torch.device | None = None) -> Tensor:
    """(T, S) bool: which query sees which key."""
    left, right = band
    diagonal = torch.arange(T, device=device)[:, None] + S - T
    s = torch.arange(S, device=device)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    seen = seen if left is None else seen & (s >= diagonal - left)
    return seen if right is None else seen & (s <= diagonal + right)


def plain(q: Tensor, k: Tensor, v: Tensor, *, band: Band) -> Tensor:
    """Quadratic attention: the whole matrix of scores in memory."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if band != (None, None):
        s = s.masked_fill(~visible(*s.shape[-2:], band, s.device), -torch.inf)
    return s.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, band: Band) -> Tensor:
    """PyTorch's attention, with the kernel that it chooses."""
    causal = band == (None, 0)
    mask = None
    if band != (None, None) and not causal:  # torch has no windows: a mask, at full cost
        mask = visible(q.shape[2], k.shape[2], band, q.device)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def _seen(band: Band) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The band for equal numbers of queries and keys, as a mask function of FlexAttention."""
    left, right = band
    if left is None:
        return lambda b, h, t, s: s <= t + right
    return lambda b, h, t, s: (s <= t + right) & (t <= s + left)


def _sdpa(name: str, backend: SDPBackend, band: Band, scratch: int) -> Variant:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, band=band)

    return Variant(f"sdpa {name}", call, scratch)
