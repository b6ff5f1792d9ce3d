"""Layer norm and RMS norm over the last axes in plain PyTorch: the definition of the op.

    h     = residual + dropout(x)
    xhat  = (h - mean) rstd            rstd = (var + eps)^(-1/2)
    y     = xhat weight + bias

    g       = dy weight
    dh     += (g - c2 - xhat c1) rstd  c1 = mean(g xhat), c2 = mean(g)
    dx      = dropout'(dh),  dresidual = dh
    dweight = sum(dy xhat),  dbias = sum(dy)

RMS norm has mean = 0 and c2 = 0. Tensors have any number of axes. The last `axes` of these, with N
elements in all, are the axes of weight and bias; the other axes have M elements. An output that a
call does not have is an empty tensor of shape (0,).
"""

import math

import torch
from torch import Tensor

from tfkern.reference import rounded
from tfkern.reference.dropout import dropout, philox


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
    axes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y in the dtype of x, h (absent if it is x), mean (absent if rms) and rstd (M,)."""
    h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(h_dtype, torch.float32)
    h = x.to(dtype).contiguous()
    if seed is not None:
        h = dropout(h, _draws(seed, x, axes), dropout_p)
    if residual is not None:
        h = h + residual.to(dtype)

    last = tuple(range(-axes, 0))
    centred, mean = h, x.new_empty(0)
    if not rms:
        mean = h.mean(last, keepdim=True)
        # Corrects the rounding of the mean, which matters if the mean is large.
        mean = mean + (h - mean).mean(last, keepdim=True)
        centred = h - mean
    rstd = (centred.square().mean(last, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    separate_h = residual is not None or seed is not None
    h = rounded(h, h_dtype) if separate_h else x.new_empty(0)
    return rounded(y, x.dtype), h, mean.flatten(), rstd.flatten()


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    separate_residual: bool,
    axes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual in the dtype of h (absent unless asked for), dweight and dbias."""
    dtype, absent = rstd.dtype, dy.new_empty(0)
    last, sizes = tuple(range(-axes, 0)), h.shape[-axes:]
    of_rows = (*h.shape[:-axes], *(1,) * axes)
    g, xhat = dy.to(dtype).contiguous(), h.to(dtype).contiguous()
    rstd = rstd.view(of_rows)
    if mean is not None:
        xhat = xhat - mean.view(of_rows)
    xhat = xhat * rstd
    # forward: y = xhat * weight + bias
    dweight = absent if weight is None else (g * xhat).sum_to_size(sizes).to(weight.dtype)
    dbias = absent if bias is None else g.sum_to_size(sizes).to(bias.dtype)
    if weight is not None:
        g = g * weight.to(dtype)
    # forward: xhat = (h - mean) * rstd
    g = (
        g
        - xhat * (g * xhat).mean(last, keepdim=True)
        - (0 if mean is None else g.mean(last, keepdim=True))
    )
    g = g * rstd
    if dh is not None:
        g = g + dh.to(dtype)
    # forward: h = residual + dropout(x)
    dresidual = g.to(h.dtype, copy=True) if separate_residual else absent  # never dx itself
    if seed is not None:
        g = dropout(g, _draws(seed, g, axes), dropout_p)
    return g.to(dy.dtype), dresidual, dweight, dbias


def forward_outputs(
    x, weight, bias, residual, seed, dropout_p, eps, rms, axes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised y, h, mean and rstd, as kernels return them."""
    h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(h_dtype, torch.float32)
    separate_h = residual is not None or seed is not None
    h = x.new_empty(x.shape if separate_h else 0, dtype=h_dtype)
    M = math.prod(x.shape[:-axes])
    mean = x.new_empty(0 if rms else M, dtype=dtype)
    return x.new_empty(x.shape), h, mean, x.new_empty(M, dtype=dtype)


def backward_outputs(
    dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, separate_residual, axes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dx, dresidual, dweight and dbias, as kernels return them."""
    dresidual = h.new_empty(h.shape if separate_residual else 0)
    dweight = dy.new_empty(0) if weight is None else torch.empty_like(weight)
    dbias = dy.new_empty(0) if bias is None else torch.empty_like(bias)
    return dy.new_empty(dy.shape), dresidual, dweight, dbias


def why_not(*args, needs_grad: bool) -> str | None:
    return None


def _draws(seed: Tensor, x: Tensor, axes: int) -> Tensor:
    """Draws for the elements of x. Column n of row m takes lane n % 4 of the counter
    (n // 4, m, m >> 32, 1)."""
    M, N = math.prod(x.shape[:-axes]), math.prod(x.shape[-axes:])
    m = torch.arange(M, device=seed.device)[:, None]
    n = torch.arange((N + 3) // 4, device=seed.device)
    return philox(seed, n, m & 0xFFFFFFFF, m >> 32, 1).flatten(-2)[:, :N].reshape(x.shape)
