"""Tables of angles for `tfkern.rotary`."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, D: int, base: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., T, D) of the angles at positions (..., T), in the dtype of x or
    float32.

    Position t turns the pair of features i and i + D / 2 by the angle t base^(-2i / D) (Su et al.
    2021), so that the product of a query and a key depends on their distance only. The angles are
    computed in float64: in float32 the error at position t would reach 6e-8 t.
    """
    even = torch.arange(0, D, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None] * base ** (-even / D)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (torch.cat([y, y], -1) for y in (angles.cos().to(dtype), angles.sin().to(dtype)))
    return cos, sin
