"""Linear layers on CPUs where torch is slow at products of 16-bit numbers or their gradients.

    y = x w^T + b;   dx = dy w,  dw = dy^T x,  db = sum(dy)

x is (M, K), w (N, K). All products are torch's.
"""

import math

import torch
import torch.nn.functional as F

from tfkern.native import _C


def widened_from(level: str) -> dict[torch.dtype, int]:
    """For each dtype whose products are computed in float32, the fewest rows for which they are.

    x86 multiplies 16-bit numbers at half the rate of float32, or less, unless it has a matrix unit
    or, for bfloat16, fast instructions for pairs of numbers. The cost of widening the weights is
    made good from about 100 rows on (768 x 3072).
    """
    x86 = "avx2" in _C.cpu_levels
    if not x86 or level == "amx":
        return {}
    pairs = level == "avx512_bf16"
    return dict.fromkeys((torch.float16,) if pairs else (torch.bfloat16, torch.float16), 128)


_MATRIX_UNIT = _C.cpu_capability() == "amx"
_WIDENED_FROM = widened_from(_C.cpu_capability())


def forward(x, weight, bias):
    product = product_dtype(x, x.dtype)
    wide = (t if t is None else t.to(product) for t in (x, weight, bias))
    y = F.linear(*wide)
    return y if product == x.dtype else y.to(x.dtype)  # as in mlp.py


def backward(dy, x, weight, want_dbias):
    """dx, dweight and dbias. dx is None if weight is, and dweight if x is."""
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
    """The dtype for products with the rows of x, whose factors have or are cast to `dtype`."""
    rows = _WIDENED_FROM.get(dtype) if x.is_cpu else None
    return dtype if rows is None or math.prod(x.shape[:-1]) < rows else torch.float32


def weight_gradient(dy, x):
    """dy^T x. Where torch is slow at transposed views, the smaller factor is copied."""
    if not _slow_views(x, x.dtype):
        return dy.t() @ x
    if dy.shape[1] <= x.shape[1]:
        return dy.t().contiguous() @ x
    return (x.t().contiguous() @ dy).t().contiguous()


def _slow_views(x, dtype):
    """Whether torch is slow at products of transposed views, as it is on the matrix unit."""
    return _MATRIX_UNIT and x.is_cpu and dtype == torch.bfloat16
