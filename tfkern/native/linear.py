"""Linear layers by csrc/cpu/linear.cpp, where its products are faster than torch's.

    y = x w^T + b;   dx = dy w,  dw = dy^T x

x is (..., K), w (N, K). All three are products a b^T: of x and w, of dy and w^T, of dy^T and x^T.
"""

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tfkern.native import _C, multiplied, transformed

_product = torch.ops.tfkern.linear_product.default
product_into = torch.ops.tfkern.linear_product_.default

_FEW, _ALL = 8, sys.maxsize


def most_rows(levels: Sequence[str], level: str, amd: bool) -> dict[torch.dtype, int]:
    """For each dtype, the most rows of a result that is left to our own products, where `level` is
    in use of the `levels` that the processor has.

    These read weights at the speed of memory, which torch does not where rows are few. Many rows of
    float32 are slow in torch's library for AMD's processors, of which it uses AVX2 at most. Many
    rows of 16 bits are slow in torch, unless there is a matrix unit.
    """
    if "avx2" not in levels:
        return {}
    avx512 = level in ("avx512", "avx512_bf16", "amx")
    rows = {torch.float32: _ALL if amd and level != "default" else _FEW if avx512 else 0}
    narrow = _FEW if level == "amx" else _ALL
    return rows | {torch.bfloat16: narrow, torch.float16: narrow}


_MOST_ROWS = most_rows(_C.cpu_levels, _C.cpu_capability(), _C.amd)
_LEAST_ROWS = 2 if _C.cpu_capability() == "avx2" else 1  # one is slow to be packed there
_MATRIX_UNIT = _C.cpu_capability() == "amx"
# Calls with gradients and fewer multiplications are left to torch, whose autograd takes some 20
# microseconds less than ours.
_LEAST_TRAINED = {torch.float32: 1 << 22}
_LEAST_TERMS: dict[torch.dtype, int] = {}  # of a sum: with fewer, torch is as fast
if _C.cpu_capability() == "avx512_bf16":  # where torch's products are nearly as fast
    _LEAST_TRAINED[torch.bfloat16] = 1 << 27
    _LEAST_TERMS[torch.bfloat16] = 64


def forward(x, weight, bias=None):
    """x weight^T + bias"""
    if is_ours(x, x.dtype):
        return _product(x, weight, bias, None, None)
    if not _MATRIX_UNIT or x.is_contiguous() or not _slow_views(x, x.dtype):
        return F.linear(x, weight, bias)
    # The gradient of a weight: of its two factors, both transposed, the smaller one is copied.
    if x.shape[0] <= weight.shape[0]:
        return F.linear(x.contiguous(), weight, bias)
    return F.linear(weight.contiguous(), x).t().contiguous()


def forward_sum(x, weight, x2, weight2):
    """x weight^T + x2 weight2^T"""
    if is_ours(x, x.dtype):
        return _product(x, weight, None, x2, weight2)
    return torch.addmm(F.linear(x, weight), x2, weight2.t())


def why_not(x, weight, bias, dtype, *, needs_grad) -> str | None:
    if (reason := transformed()) is not None:
        return reason
    if needs_grad and _slow_views(x, dtype):
        return None
    if not is_ours(x, dtype):
        return "torch's own is as fast"
    if needs_grad and x.numel() * weight.shape[0] < _LEAST_TRAINED.get(dtype, 0):
        return "torch's own takes fewer steps to a gradient, which take longer than the products"
    return None


def way(x, weight, bias, dtype):
    """How a call multiplies, and whose products they are."""
    return multiplied(dtype, tiles=False) if is_ours(x, dtype) else "products of torch"


def is_ours(x, dtype):
    """Whether products with the rows of x, whose factors have or are cast to `dtype`, are ours."""
    rows, terms = _MOST_ROWS.get(dtype, -1), _LEAST_TERMS.get(dtype, 0)
    return x.is_cpu and _LEAST_ROWS <= math.prod(x.shape[:-1]) <= rows and x.shape[-1] >= terms


def packs(weight) -> bool:
    """Whether inference gains from packing a weight ahead: then its products are always ours."""
    most = _MOST_ROWS.get(weight.dtype, -1)
    return weight.is_cpu and (most == _ALL or weight.dtype == torch.float32 and most >= 0)


def _slow_views(x, dtype):
    """Whether torch is slow at products of transposed views, as it is on the matrix unit."""
    return _MATRIX_UNIT and x.is_cpu and dtype == torch.bfloat16


@torch.library.register_fake("tfkern::linear_product")
def _(a, b, bias, a2, b2):
    return a.new_empty(*a.shape[:-1], b.shape[0])


@torch.library.register_fake("tfkern::linear_product_")
def _(out, a, b, bias, add):
    pass
