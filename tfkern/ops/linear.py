"""The linear layer: torch's own, or a backend's where torch's is slow."""

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

    x86 CPUs without a matrix unit multiply float16 at half the rate of float32, or less; the same
    holds for bfloat16, except on AMD's with avx512_bf16. There, factors of many rows are widened
    to float32 for the call. On x86 CPUs with a matrix unit, the gradient of weight takes bfloat16
    factors in an order at which torch is fast. Everywhere else, for all other dtypes, and where a
    backend other than "native" is forced, this is torch's function.

    Args:
        x: (..., K).
        weight: (N, K), in the dtype of x unless autocast is on.
        bias: (N,) or None.

    Returns:
        y (..., N) in the dtype of x, or of autocast if it is on.

    Raises:
        RuntimeError: shapes, dtypes or devices that torch's function refuses.
    """
    dtype = checks.computed_dtype(x) if x.is_cpu else None
    if dtype in (torch.bfloat16, torch.float16) and _is_plain(x, weight, bias, dtype):
        backend = dispatch.find("linear", (x, weight, bias, dtype))
        if backend is not None:
            args = checks.autocast(x.flatten(0, -2), weight, bias)
            with dispatch.no_autocast(x.device):
                y = autograd.apply(_Linear, *dispatch.distinct(args), backend)
            return y.view(*x.shape[:-1], y.shape[1])
    return F.linear(x, weight, bias)


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> bool:
    """Whether `_Linear` can serve the call: dense, of one dtype, no vector, no forward mode."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    matrices = x.dim() > 1 and weight.dim() == 2 and (bias is None or bias.dim() == 1)
    alike = all(checks.computed_dtype(t) == dtype and _is_dense(t) for t in tensors)
    return matrices and alike and forward_ad._current_level < 0


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


class _Linear(torch.autograd.Function):
    """Linear for autograd. Its backward consists of differentiable operators, as torch's does."""

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
