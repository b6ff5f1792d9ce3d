"""The MLP with products by torch and the activation by csrc/mlp.cpp."""

import torch
import torch.nn.functional as F

from tfkern.native import unavailable

_activate = torch.ops.tfkern.mlp_activation_forward.default
_activate_backward = torch.ops.tfkern.mlp_activation_backward.default


def forward(x, w1, b1, w2, b2, activation, gated):
    pre = F.linear(x, w1, b1)
    return F.linear(_activate(pre, activation, gated), w2, b2), pre


def backward(dy, x, w1, b1, w2, b2, pre, activation, gated, wanted=(True,) * 5):
    want_dx, want_dw1, want_db1, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    want_db1 = want_db1 and b1 is not None
    dpre, h, db1 = _activate_backward(dy @ w2, pre, activation, gated, want_db1)
    return (
        dpre @ w1 if want_dx else absent,
        dpre.t() @ x if want_dw1 else absent,
        db1,
        dy.t() @ h if want_dw2 else absent,
        dy.sum(0) if want_db2 and b2 is not None else absent,
    )


def why_not(x, w1, b1, w2, b2, activation, gated, *, needs_grad) -> str | None:
    return unavailable(x)


@torch.library.register_fake("tfkern::mlp_activation_forward")
def _(pre, activation, gated):
    return pre.new_empty(pre.shape[0], pre.shape[1] // 2 if gated else pre.shape[1])


@torch.library.register_fake("tfkern::mlp_activation_backward")
def _(dh, pre, activation, gated, bias):
    return (
        pre.new_empty(pre.shape),
        dh.new_empty(dh.shape),
        pre.new_empty(pre.shape[1] if bias else 0),
    )
