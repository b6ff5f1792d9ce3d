"""Rotary positions (Su et al. 2021).

Position t turns the pair (x[i], x[i + D / 2]) by the angle t base^(-2i / D), so that the product
of a query and a key depends on their distance only. Pairs are D / 2 apart, as in GPT-NeoX, Llama.
"""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, D: int, base: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., T, D / 2) of the angles at positions (..., T), in the dtype of x or
    float32.

    The angles are computed in float64: in float32 the error at position t would reach 6e-8 t.
    """
    even = torch.arange(0, D, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None] * base ** (-even / D)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs of x (..., T, D), in float32 or wider; the result has the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
