"""The MLP with products by torch and the activation by csrc/cpu/mlp.cpp and csrc/cuda/mlp.cu."""

import torch
import torch.nn.functional as F

from tfkern.native import unavailable
from tfkern.native.linear import product_dtype, weight_gradient

_activate = torch.ops.tfkern.mlp_activation_forward.default
_activate_backward = torch.ops.tfkern.mlp_activation_backward.default


def forward(x, w1, b1, w2, b2, activation, gated):
    dtype, product = x.dtype, product_dtype(x, x.dtype)
    x, w1, b1, w2, b2 = (t if t is None else t.to(product) for t in (x, w1, b1, w2, b2))
    total = F.linear(x, w1, b1)
    h, pre = _activate(total, activation, gated, dtype)
    y = F.linear(h, w2, b2)
    # Not y.to(dtype) for both: the Dynamo of torch 2.11 loses the gradient of what that hands on.
    return (y, total) if product == dtype else (y.to(dtype), pre)


def backward(dy, x, w1, b1, w2, b2, pre, activation, gated, wanted=(True,) * 5):
    want_dx, want_dw1, want_db1, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    dtype, product = x.dtype, product_dtype(x, x.dtype)
    want_db1 = want_db1 and b1 is not None
    db2 = dy.sum(0) if want_db2 and b2 is not None else absent
    dy, x, w1, w2 = (t.to(product) for t in (dy, x, w1, w2))
    dpre, h, db1 = _activate_backward(dy @ w2, pre, activation, gated, want_db1)
    return (
        (dpre @ w1).to(dtype) if want_dx else absent,
        weight_gradient(dpre, x).to(dtype) if want_dw1 else absent,
        db1,
        weight_gradient(dy, h).to(dtype) if want_dw2 else absent,
        db2,
    )


def why_not(x, w1, b1, w2, b2, activation, gated, *, needs_grad) -> str | None:
    return unavailable(x)


@torch.library.register_fake("tfkern::mlp_activation_forward")
def _(total, activation, gated, dtype):
    M, W = total.shape
    pre = total.new_empty(total.shape if total.dtype != dtype else 0, dtype=dtype)
    return total.new_empty(M, W // 2 if gated else W), pre


@torch.library.register_fake("tfkern::mlp_activation_backward")
def _(dh, pre, activation, gated, bias):
    return (
        dh.new_empty(pre.shape),
        dh.new_empty(dh.shape),
        pre.new_empty(pre.shape[1] if bias else 0),
    )
