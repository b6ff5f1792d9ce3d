"""The MLP, plain and gated, in plain PyTorch: the definition of the op.

    pre = x w1^T + b1
    h   = act(pre)                 gated: h = act(gate) up, pre = [gate, up]
    y   = h w2^T + b2

    dh   = dy w2
    dpre = dh act'(pre)            gated: dgate = dh up act'(gate), dup = dh act(gate)
    dx   = dpre w1
    dw1  = dpre^T x,  db1 = sum(dpre)
    dw2  = dy^T h,    db2 = sum(dy)

x is (M, K), w1 (F, K), gated (2F, K) with the rows of the gate first, and w2 (N, F). Backward gets
pre in the dtype of x and computes h from it again. A gradient that is not wanted, or that the call
does not have, is an empty tensor of shape (0,).
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
    sigma, dsigma = torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)
    return x * sigma, sigma + x * dsigma


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y (M, N) and pre (M, F or 2F) in the dtype of x."""
    wide = _widen(x.dtype)
    pre = F.linear(wide(x), wide(w1), wide(b1))
    if gated:
        gate, up = pre.chunk(2, -1)
        h = activate(gate, activation)[0] * up
    else:
        h = activate(pre, activation)[0]
    return rounded(F.linear(h, wide(w2), wide(b2)), x.dtype), pre.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    pre: Tensor,
    activation: str,
    gated: bool,
    wanted: tuple[bool, ...] = (True,) * 5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns those of dx, dw1, db1, dw2 and db2 that are wanted, in the dtype of x."""
    wide = _widen(x.dtype)
    dy, pre = wide(dy), wide(pre)
    # forward: y = h w2^T + b2
    dh = dy @ wide(w2)
    # forward: h = act(gate) up
    if gated:
        gate, up = pre.chunk(2, -1)
        value, slope = activate(gate, activation)
        h = value * up
        dpre = torch.cat([dh * up * slope, dh * value], -1)
    else:
        h, slope = activate(pre, activation)
        dpre = dh * slope
    # forward: pre = x w1^T + b1
    want_dx, want_dw1, want_db1, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    return (
        (dpre @ wide(w1) if want_dx else absent).to(x.dtype),
        (dpre.t() @ wide(x) if want_dw1 else absent).to(x.dtype),
        (dpre.sum(0) if want_db1 and b1 is not None else absent).to(x.dtype),
        (dy.t() @ h if want_dw2 else absent).to(x.dtype),
        (dy.sum(0) if want_db2 and b2 is not None else absent).to(x.dtype),
    )


def why_not(*args, needs_grad: bool) -> str | None:
    return None


def _widen(dtype: torch.dtype):
    wide = torch.promote_types(dtype, torch.float32)
    return lambda x: None if x is None else x.to(wide)
