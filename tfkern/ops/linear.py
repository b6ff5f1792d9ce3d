"""The linear layer: torch's own, or that of a backend where torch's is slow."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` that is not slow at 16-bit numbers on a CPU.

        y = x weight^T + bias

    x86 CPUs without a matrix unit multiply float16, and but for AMD's with avx512_bf16 bfloat16,
    at half the rate of float32, or less. There, factors of many rows are widened for the call; on
    those with a matrix unit, the gradient of weight takes its factors in an order that torch is
    fast at. Everywhere else, for all other dtypes, and where a backend other than "native" is
    forced, this is torch's function.

    Args:
        x: (..., K).
        weight: (N, K), in the dtype of x unless autocast is on.
        bias: (N,) or None.

    Returns:
        y (..., N) in the dtype of x, or in that of autocast.

    Raises:
        RuntimeError: shapes, dtypes or devices that torch's function refuses.
    """
    dtype = _dtype(x) if x.is_cpu else None
    if dtype in (torch.bfloat16, torch.float16) and _is_plain(x, weight, bias, dtype):
        backend = dispatch.find("linear", (x, weight, bias, dtype))
        if backend is not None:
            args = checks.autocast(x.flatten(0, -2), weight, bias)
            with dispatch.no_autocast(x.device):
                y = autograd.apply(_Linear, *dispatch.distinct(args), backend)
            return y.view(*x.shape[:-1], y.shape[1])
    return F.linear(x, weight, bias)


def _dtype(x: Tensor) -> torch.dtype:
    """That in which autocast, if it is on, hands x to torch's function."""
    cast = x.is_floating_point() and x.dtype != torch.float64 and dispatch.autocasts(x.device)
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> bool:
    """Whether nothing is asked for that torch's function has and `_Linear` has not."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    matrices = x.dim() > 1 and weight.dim() == 2 and (bias is None or bias.dim() == 1)
    alike = all(_dtype(t) == dtype and _is_dense(t) for t in tensors)
    return matrices and alike and forward_ad._current_level < 0


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


class _Linear(torch.autograd.Function):
    """Its backward is made of differentiable operators, as that of torch's function is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, backend):
        return dispatch.implementation("linear", backend).forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.backend = inputs
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )

    @staticmethod
    def backward(ctx, dy):
        backward = dispatch.implementation("linear", ctx.backend).backward
        with dispatch.no_autocast(dy.device):
            return *backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[2]), None
