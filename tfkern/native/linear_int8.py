"""The linear layer with weights of eight bits, by csrc/cpu/linear_int8.cpp where rows are few.

Many rows are multiplied with the weight as it is in a wider dtype, some rows of it at a time.
"""

import torch

from tfkern.native import transformed, unavailable
from tfkern.native.linear import forward as linear

_few = torch.ops.tfkern.linear_int8.default
_FEW = 16
_WIDENED = 1 << 20  # elements of the weight that are widened at a time


def forward(x, weight, scale, bias):
    rows, dtype = x.reshape(-1, x.shape[-1]), x.dtype
    shape = (*x.shape[:-1], weight.shape[0])
    if rows.shape[0] <= _FEW:
        return _few(rows, weight, scale, None if bias is None else bias.to(dtype)).view(shape)
    # bfloat16 holds these integers, and float16 could not hold the sums
    rows = rows.float() if dtype == torch.float16 else rows
    step = max(1, _WIDENED // max(1, weight.shape[1]))
    widened = weight.new_empty(min(step, len(weight)), weight.shape[1], dtype=rows.dtype)
    y = rows.new_empty(rows.shape[0], weight.shape[0], dtype=torch.float32)
    for n in range(0, len(weight), step):
        part = widened[: len(weight) - n].copy_(weight[n : n + step])
        torch.mul(linear(rows, part), scale[n : n + step], out=y[:, n : n + step])
    return (y if bias is None else y.add_(bias)).to(dtype).view(shape)


def why_not(x, weight, scale, bias, *, needs_grad) -> str | None:
    if needs_grad:
        return "has no gradients"
    if x.dtype == torch.float64 or scale.dtype != torch.float32:
        return "takes float32, bfloat16 and float16, with scales of float32"
    return transformed() or unavailable(x) if x.is_cpu else "runs on the CPU"


@torch.library.register_fake("tfkern::linear_int8")
def _(x, w, scale, bias):
    return x.new_empty(x.shape[0], w.shape[0])  # len would not be symbolic
