"""The linear layer with weights of eight bits."""

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import checks

dispatch.register("linear_int8")


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose weight is int8, with one scale for each row of it.

        y = x (scale * weight)^T + bias

    Args:
        x: (..., K), float32, float64, bfloat16 or float16.
        weight: (N, K) int8.
        scale: (N,) float32.
        bias: (N,) or None, of any floating dtype.

    Returns:
        y (..., N) in the dtype of x, or of autocast if it is on. Sums are float32 (float64 for
        float64). It is differentiable in x, scale and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a 0-d tensor")
    checks.dense("weight", weight)
    if weight.dtype != torch.int8:
        raise ValueError(f"weight must be int8, got {weight.dtype}")
    checks.columns("weight", weight, x.shape[-1], "the size of the last axis of x")
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None:
            checks.floating(name, t)
            checks.shape(name, t, (len(weight),), "the rows of weight")
            checks.same_device("x", x, name, t)
    args = (*checks.autocast(x), weight, scale, bias)
    backend = dispatch.find("linear_int8", args) or "reference"
    with dispatch.no_autocast(x.device):
        return dispatch.implementation("linear_int8", backend).forward(*args)
