"""Linear layers on CPUs where torch's product of 16-bit numbers, or its gradient, is slow.

    y = x w^T + b;   dx = dy w,  dw = dy^T x,  db = sum(dy)

x is (M, K), w (N, K). All products are torch's.
"""

import math

import torch
import torch.nn.functional as F

from tfkern.native import _C

_MATRIX_UNIT = _C.cpu_capability() == "amx"
# x86 without one multiplies 16-bit numbers at half the rate of float32, or less: rows from which on
# products are widened. Widening the weights, too, pays for itself from about 100 (768 x 3072).
_WIDENED_FROM = 128 if "avx2" in _C.cpu_levels and not _MATRIX_UNIT else None


def forward(x, weight, bias):
    product = product_dtype(x, x.dtype)
    wide = (t if t is None else t.to(product) for t in (x, weight, bias))
    y = F.linear(*wide)
    return y if product == x.dtype else y.to(x.dtype)  # see mlp.py


def backward(dy, x, weight, want_dbias):
    """Without weight no dx, without x no dweight."""
    dtype, product = dy.dtype, product_dtype(dy, dy.dtype)
    wide = dy.to(product)
    dx = None if weight is None else (wide @ weight.to(product)).to(dtype)
    dweight = None if x is None else weight_gradient(wide, x.to(product)).to(dtype)
    return dx, dweight, dy.sum(0) if want_dbias else None


def why_not(x, weight, bias, dtype, *, needs_grad) -> str | None:
    if product_dtype(x, dtype) != dtype or (needs_grad and _slow_views(x, dtype)):
        return None
    return "torch's own is as fast"


def product_dtype(x, dtype):
    """The dtype of the factors of products with the rows of x, where that is cast to `dtype`."""
    if x.is_cpu and dtype in (torch.bfloat16, torch.float16) and _WIDENED_FROM is not None:
        return torch.float32 if math.prod(x.shape[:-1]) >= _WIDENED_FROM else dtype
    return dtype


def weight_gradient(dy, x):
    """dy^T x; where views are slow, of a copy of the smaller factor, which is cheaper."""
    if not _slow_views(x, x.dtype):
        return dy.t() @ x
    if dy.shape[1] <= x.shape[1]:
        return dy.t().contiguous() @ x
    return (x.t().contiguous() @ dy).t().contiguous()


def _slow_views(x, dtype):
    """Whether torch is slow at views with exchanged axes: on the matrix unit."""
    return _MATRIX_UNIT and x.is_cpu and dtype == torch.bfloat16
