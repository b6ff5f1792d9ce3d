"""Linear layers on CPUs where torch's product of 16-bit numbers, or its gradient, is slow.

    y = x w^T + b;   dx = dy w,  dw = dy^T x,  db = sum(dy)

x is (M, K), w (N, K). All products are torch's.
"""

import torch
import torch.nn.functional as F

from tfkern.native import _C

_MATRIX_UNIT = _C.cpu_capability() == "amx"
# x86 without one multiplies 16-bit numbers at half the rate of float32, or less: rows from which on
# products are widened. Widening the weights, too, pays for itself from about 100 (768 x 3072).
_WIDENED_FROM = 128 if "avx2" in _C.cpu_levels and not _MATRIX_UNIT else None


def forward(x, weight, bias):
    dtype, product = x.dtype, product_dtype(x)
    x, weight, bias = (t if t is None else t.to(product) for t in (x, weight, bias))
    y = F.linear(x, weight, bias)
    return y if product == dtype else y.to(dtype)  # see mlp.py


def backward(dy, x, weight, wanted):
    dtype, product = x.dtype, product_dtype(x)
    want_dx, want_dweight, want_dbias = wanted
    dbias = dy.sum(0) if want_dbias else None
    dy, x, weight = (t.to(product) for t in (dy, x, weight))
    dx = (dy @ weight).to(dtype) if want_dx else None
    return dx, weight_gradient(dy, x).to(dtype) if want_dweight else None, dbias


def why_not(x, weight, bias, *, needs_grad) -> str | None:
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return "takes one dtype for x, weight and bias"
    if product_dtype(x) != x.dtype or (needs_grad and _slow_views(x)):
        return None
    return "torch's own is as fast"


def product_dtype(x):
    """The dtype of the factors of products with rows of x (M, K)."""
    narrow = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)
    widened = narrow and _WIDENED_FROM is not None and x.shape[0] >= _WIDENED_FROM
    return torch.float32 if widened else x.dtype


def weight_gradient(dy, x):
    """dy^T x; where views are slow, of a copy of the smaller factor, which is cheaper."""
    if not _slow_views(x):
        return dy.t() @ x
    if dy.shape[1] <= x.shape[1]:
        return dy.t().contiguous() @ x
    return (x.t().contiguous() @ dy).t().contiguous()


def _slow_views(x):
    """Whether torch is slow at views with exchanged axes: on the matrix unit."""
    return _MATRIX_UNIT and x.is_cpu and x.dtype == torch.bfloat16
