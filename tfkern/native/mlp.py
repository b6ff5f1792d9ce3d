"""The MLP. On the CPU, csrc/cpu/linear.cpp multiplies where it is faster than torch, and applies
the activation as it does. Otherwise torch multiplies, and csrc/cpu/mlp.cpp or csrc/cuda/mlp.cu has
the activation."""

import torch

from tfkern.native import unavailable
from tfkern.native.linear import forward as linear
from tfkern.native.linear import forward_sum as linear_sum
from tfkern.native.linear import is_ours
from tfkern.native.linear import way as linear_way
from tfkern.reference.mlp import activation_backward_outputs

_hidden = torch.ops.tfkern.mlp_hidden.default
_activate = torch.ops.tfkern.mlp_activation_forward.default
_activate_backward = torch.ops.tfkern.mlp_activation_backward.default


def forward(x, w1, b1, w_up, b_up, w2, b2, activation, keep):
    if is_ours(x, x.dtype):
        h, kept = _hidden(x, w1, b1, w_up, b_up, activation, keep)
        return linear(h, w2, b2), *(kept.unbind() if keep else ())
    pre = linear(x, w1, b1)
    up = None if w_up is None else linear(x, w_up, b_up)
    y = linear(_activate(pre, up, activation), w2, b2)
    return (y, pre) if up is None else (y, pre, up)


def backward(dy, x, w1, b1, w_up, b_up, w2, b2, pre, up, activation, wanted=(True,) * 7):
    want_dx, want_dw1, want_db1, want_dw_up, want_db_up, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    want_db1, want_db_up = want_db1 and b1 is not None, want_db_up and b_up is not None
    db2 = dy.sum(0) if want_db2 and b2 is not None else absent
    dh = linear(dy, w2.t())
    dpre, h, db = _activate_backward(dh, pre, up, activation, want_db1 or want_db_up)
    dpre, *dup = dpre.unbind()
    dx = dw_up = absent
    if want_dx:
        dx = linear(dpre, w1.t()) if up is None else linear_sum(dpre, w1.t(), dup[0], w_up.t())
    if up is not None and want_dw_up:
        dw_up = linear(dup[0].t(), x.t())
    return (
        dx,
        linear(dpre.t(), x.t()) if want_dw1 else absent,
        db[0] if want_db1 else absent,
        dw_up,
        db[1] if want_db_up else absent,
        linear(dy.t(), h.t()) if want_dw2 else absent,
        db2,
    )


def way(x, *args):
    """How forward multiplies, and whose products they are."""
    return linear_way(x, None, None, x.dtype) if x.is_cpu else None


def why_not(x, *args, needs_grad) -> str | None:
    return unavailable(x)


@torch.library.register_fake("tfkern::mlp_hidden")
def _(x, w, b, w_up, b_up, activation, keep):
    shape = x.shape[0], w.shape[0]  # len would not be symbolic
    kept = (1 if w_up is None else 2, *shape) if keep else 0
    return x.new_empty(shape), x.new_empty(kept)


@torch.library.register_fake("tfkern::mlp_activation_forward")
def _(pre, up, activation):
    return pre.new_empty(pre.shape)


torch.library.register_fake("tfkern::mlp_activation_backward", activation_backward_outputs)
