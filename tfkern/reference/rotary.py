"""Rotary positions in plain PyTorch: the definition of the op.

A vector x of a head holds pairs (x_i, x_j): j = i + R / 2 for halves, and j = i + 1 with even i if
interleaved. Each pair is turned by the angle of its token; features from R on are copied.

    y_i = x_i cos_i - x_j sin_i          dx_i = dy_i cos_i + dy_j sin_j
    y_j = x_j cos_j + x_i sin_j          dx_j = dy_j cos_j - dy_i sin_i

The backward is the transposed map, which is the forward with `inverse`. So derivatives of any order
are calls of one function. Where cos_i = cos_j and sin_i = sin_j, it turns by the negative angle.
"""

import torch
from torch import Tensor

from tfkern.reference import rounded


def forward(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Turns q (B, H, T, D) and k (B, Hk, T, D) by cos and sin (B, T, R).

    Results are contiguous. With `inverse` they have the memory order (B, T, H, D) of projections:
    these are gradients, which go on to a product without a copy. Without k its result is an
    empty tensor of shape (0,).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (x.to(dtype)[:, None] for x in (cos, sin))
    turned_q = _turned(q, cos, sin, interleaved, inverse)
    if k is None:
        return turned_q, q.new_empty(0)
    return turned_q, _turned(k, cos, sin, interleaved, inverse)


def forward_(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> None:
    """`forward` that overwrites q and k with the results."""
    for x, y in zip((q, k), forward(q, k, cos, sin, interleaved, inverse), strict=True):
        if x is not None:
            x.copy_(y)


def why_not(*args, needs_grad: bool) -> str | None:
    return None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    R = cos.shape[-1]
    (xi, xj), (ci, cj), (si, sj) = (_pairs(y, interleaved) for y in (x[..., :R], cos, sin))
    xi, xj = xi.to(cos.dtype), xj.to(cos.dtype)
    if inverse:
        yi, yj = xi * ci + xj * sj, xj * cj - xi * si
    else:
        yi, yj = xi * ci - xj * si, xj * cj + xi * sj
    y = torch.stack([yi, yj], -1).flatten(-2) if interleaved else torch.cat([yi, yj], -1)
    y = torch.cat([rounded(y, x.dtype), x[..., R:]], -1)
    return y.transpose(1, 2).contiguous().transpose(1, 2) if inverse else y.contiguous()


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second elements of all pairs."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
