"""The MLP with products by torch and the activation by csrc/cpu/mlp.cpp and csrc/cuda/mlp.cu."""

import torch
import torch.nn.functional as F

from tfkern.native import unavailable
from tfkern.native.linear import product_dtype, weight_gradient
from tfkern.reference.mlp import activation_backward_outputs

_activate = torch.ops.tfkern.mlp_activation_forward.default
_activate_backward = torch.ops.tfkern.mlp_activation_backward.default


def forward(x, w1, b1, w_up, b_up, w2, b2, activation):
    dtype, product = x.dtype, product_dtype(x, x.dtype)
    if product != dtype:
        x, w1, b1, w_up, b_up, w2, b2 = (
            t if t is None else t.to(product) for t in (x, w1, b1, w_up, b_up, w2, b2)
        )
    total = F.linear(x, w1, b1)
    up = None if w_up is None else F.linear(x, w_up, b_up)
    h, rounded = _activate(total, up, activation, dtype)
    y = F.linear(h, w2, b2)
    # No y.to(dtype) if y has that dtype: it returns y, whose gradient Dynamo of torch 2.11 loses.
    if product != dtype:
        return y.to(dtype), *rounded.unbind()
    return (y, total) if up is None else (y, total, up)


def backward(dy, x, w1, b1, w_up, b_up, w2, b2, pre, up, activation, wanted=(True,) * 7):
    want_dx, want_dw1, want_db1, want_dw_up, want_db_up, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    dtype, product = x.dtype, product_dtype(x, x.dtype)
    want_db1, want_db_up = want_db1 and b1 is not None, want_db_up and b_up is not None
    db2 = dy.sum(0) if want_db2 and b2 is not None else absent
    if product != dtype:
        dy, x, w1, w2 = (t.to(product) for t in (dy, x, w1, w2))
    dpre, h, db = _activate_backward(dy @ w2, pre, up, activation, want_db1 or want_db_up)
    dpre, *dup = dpre.unbind()
    dx = dpre @ w1 if want_dx else absent
    dw_up = absent
    if up is not None:
        if want_dx:
            dx = torch.addmm(dx, dup[0], w_up.to(product))
        if want_dw_up:
            dw_up = weight_gradient(dup[0], x).to(dtype)
    return (
        dx.to(dtype),
        weight_gradient(dpre, x).to(dtype) if want_dw1 else absent,
        db[0] if want_db1 else absent,
        dw_up,
        db[1] if want_db_up else absent,
        weight_gradient(dy, h).to(dtype) if want_dw2 else absent,
        db2,
    )


def why_not(x, *args, needs_grad) -> str | None:
    return unavailable(x)


@torch.library.register_fake("tfkern::mlp_activation_forward")
def _(total, up, activation, dtype):
    shape = (1 if up is None else 2, *total.shape)
    rounded = total.new_empty(shape if total.dtype != dtype else 0, dtype=dtype)
    return total.new_empty(total.shape), rounded


torch.library.register_fake("tfkern::mlp_activation_backward", activation_backward_outputs)
