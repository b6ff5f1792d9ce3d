"""Positions of tokens in all forms but the rotary one (`tfkern.nn.rotary`)."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def sinusoids(positions: Tensor, dim: int, halves: bool = False) -> Tensor:
    """sin and cos of position / 10000^(2i / dim) (Vaswani et al. 2017), in float64.

    Args:
        positions: integers of any shape (...).
        dim: an even number.
        halves: all sines, then all cosines, rather than by turns.

    Returns:
        (..., dim) float64.
    """
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None] * 10000.0 ** (-even / dim)
    pair = (angles.sin(), angles.cos())
    return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)


def alibi_slopes(heads: int, device: Any = None) -> Tensor:
    """The slope of each head, (heads,) float32 (Press et al. 2022).

    The slopes are 2^(-8 i / heads), i from 1, if heads is a power of 2. Otherwise they are the
    slopes for the next lower power, then every second slope for the next higher one.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes, device=device)


def relative_bucket(distance: Tensor, causal: bool, buckets: int, furthest: int) -> Tensor:
    """The kind of a distance, in the manner of T5 (Raffel et al. 2020).

    Half of the kinds are for one distance each. The others are for ranges that have equal lengths
    in the logarithm of the distance. All distances from `furthest` on are of the last kind.

    Args:
        distance: position of the key minus position of the query, integers of any shape.
        causal: keys to the right do not occur; otherwise half of the kinds are for them.
        buckets: how many kinds there are.

    Returns:
        int64 in [0, buckets), in the shape of distance.
    """
    right = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        right = (distance > 0) * buckets
        distance = -distance.abs()
    back = (-distance).clamp(min=0)
    exact = buckets // 2
    # Computed in float32 and in this order, as T5 does: other roundings would move the borders.
    ratio = (back.clamp(min=1).float() / exact).log() / math.log(furthest / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return right + torch.where(back < exact, back, far)


class RelativeBias(nn.Embedding):
    """A number for each head and kind of distance, added to the scores of all blocks."""

    def __init__(self, heads: int, causal: bool, buckets: int, furthest: int) -> None:
        super().__init__(buckets, heads)
        self.causal, self.furthest = causal, furthest

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
        """Positions (B or 1, T) and (S,) to the bias (B or 1, H, T, S)."""
        distance = keys - queries[..., None]
        kind = relative_bucket(distance, self.causal, self.num_embeddings, self.furthest)
        return super().forward(kind).movedim(-1, -3)
