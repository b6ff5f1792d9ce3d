"""The MLP, plain and gated, in plain PyTorch: the definition of the op.

    pre = x w1^T + b1
    h   = act(pre)                 gated: h = act(pre) up, up = x w_up^T + b_up
    y   = h w2^T + b2

    dh   = dy w2
    dpre = dh act'(pre)            gated: dpre = dh up act'(pre), dup = dh act(pre)
    dx   = dpre w1                 gated: dx = dpre w1 + dup w_up
    dw1  = dpre^T x,  db1 = sum(dpre)
    dw_up = dup^T x,  db_up = sum(dup)
    dw2  = dy^T h,    db2 = sum(dy)

x is (M, K), w1 and w_up are (F, K), and w2 is (N, F). An MLP without w_up is plain. Backward gets
pre and up in the dtype of x and computes h from them again. A gradient that is not wanted, or that
the call does not have, is an empty tensor of shape (0,).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tfkern.reference import rounded


def activate(pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(pre) and act'(pre).

    relu       max(x, 0)
    gelu       x Phi(x)         Phi + x phi, the normal distribution function and its density
    gelu_tanh  x sigma(2u)      sigma(2u) + x sigma'(2u) 2u', u = sqrt(2/pi) (x + 0.044715 x^3)
    silu       x sigma(x)       sigma(x) + x sigma'(x), sigma(x) = 1 / (1 + exp(-x))
    quick_gelu x sigma(c x)     sigma(c x) + x sigma'(c x) c, c = 1.702

    x sigma(2u) is x (1 + tanh(u)) / 2, and sigma'(x) = sigma(x) sigma(-x): nothing cancels.
    """
    x = pre
    if activation == "relu":
        return x.clamp(min=0), torch.where(x <= 0, 0.0, 1.0).to(x.dtype)
    if activation == "gelu":
        cdf = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        c = math.sqrt(8 / math.pi)
        near = x.clamp(-30, 30)  # beyond, sigma is 0 or 1, and the square could overflow
        u2 = c * near * (1 + 0.044715 * near * near)
        du2 = c * (1 + 3 * 0.044715 * near * near)
        sigma, dsigma = torch.sigmoid(u2), torch.sigmoid(u2) * torch.sigmoid(-u2)
        return x * sigma, sigma + x * (dsigma * du2)
    c = 1.702 if activation == "quick_gelu" else 1.0
    sigma, dsigma = torch.sigmoid(c * x), torch.sigmoid(c * x) * torch.sigmoid(-c * x)
    return x * sigma, sigma + x * (dsigma * c)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Returns y (M, N) and, if `keep`, pre (M, F) and, if gated, up (M, F) in the dtype of x."""
    wide = _widen(x.dtype)
    pre = F.linear(wide(x), wide(w1), wide(b1))
    h, kept = activate(pre, activation)[0], [pre]
    if w_up is not None:
        up = F.linear(wide(x), wide(w_up), wide(b_up))
        h, kept = h * up, [pre, up]
    y = rounded(F.linear(h, wide(w2), wide(b2)), x.dtype)
    return y, *(t.to(x.dtype) for t in kept if keep)


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    pre: Tensor,
    up: Tensor | None,
    activation: str,
    wanted: tuple[bool, ...] = (True,) * 7,
) -> tuple[Tensor, ...]:
    """Returns dx, dw1, db1, dw_up, db_up, dw2 and db2, empty where not wanted, in the dtype of
    x."""
    wide = _widen(x.dtype)
    dy, pre, up, x_wide = wide(dy), wide(pre), wide(up), wide(x)
    want_dx, want_dw1, want_db1, want_dw_up, want_db_up, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    # forward: y = h w2^T + b2
    dh = dy @ wide(w2)
    # forward: h = act(pre) up
    h, derivative = activate(pre, activation)
    dup = absent
    if up is not None:
        dh, dup, h = dh * up, dh * h, h * up
    dpre = dh * derivative
    # forward: pre = x w1^T + b1, up = x w_up^T + b_up
    dx = absent
    if want_dx:
        dx = dpre @ wide(w1) if up is None else dpre @ wide(w1) + dup @ wide(w_up)
    return (
        dx.to(x.dtype),
        (dpre.t() @ x_wide if want_dw1 else absent).to(x.dtype),
        (dpre.sum(0) if want_db1 and b1 is not None else absent).to(x.dtype),
        (dup.t() @ x_wide if want_dw_up and up is not None else absent).to(x.dtype),
        (dup.sum(0) if want_db_up and b_up is not None else absent).to(x.dtype),
        (dy.t() @ h if want_dw2 else absent).to(x.dtype),
        (dy.sum(0) if want_db2 and b2 is not None else absent).to(x.dtype),
    )


def activation_backward_outputs(
    dh: Tensor, pre: Tensor, up: Tensor | None, activation: str, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dpre with dup, h, and db with db_up, as kernels return them."""
    kinds = 1 if up is None else 2
    db = pre.new_empty((kinds, pre.shape[1]) if bias else 0)
    return dh.new_empty(kinds, *pre.shape), dh.new_empty(dh.shape), db


def why_not(*args, needs_grad: bool) -> str | None:
    return None


def _widen(dtype: torch.dtype):
    wide = torch.promote_types(dtype, torch.float32)
    return lambda x: None if x is None else x.to(wide)
