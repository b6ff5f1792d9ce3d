"""The linear layer: torch's own, or a backend's where torch's is slow."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("linear")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with products of our own where torch's are slow on a CPU.

        y = x weight^T + bias

    On x86 CPUs float16 is ours, and so is bfloat16 unless there is a matrix unit. With AVX-512, so
    are up to 8 rows of each dtype but float64, and on AMD's all of float32. Without AVX-512, a
    single row goes to torch. So do float32, and bfloat16 where the CPU has fast products of pairs,
    if gradients are needed and the product is small, and such bfloat16 with K < 64. On CPUs with a
    matrix unit, the gradient of weight takes bfloat16 factors in an order at which torch is fast.
    Everywhere else, for all other dtypes, and where a backend other than "native" is forced, this
    is torch's function.

    Where every number of rows is ours, and no gradient is needed, a row of y depends on its row of
    x alone, bit for bit, and not on how many rows there are. Our products do not depend on the
    number of threads.

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
    if dtype in _DTYPES and _is_plain(x, weight, bias, dtype):
        backend = dispatch.find("linear", (x, weight, bias, dtype))
        if backend is not None:
            args = checks.autocast(x, weight, bias)
            with dispatch.no_autocast(x.device):
                return autograd.apply(_Linear, *dispatch.distinct(args), backend)
    return F.linear(x, weight, bias)


def bind(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    """The arguments by which a backend is chosen, for `tfkern.explain`."""
    checks.columns("weight", weight, x.shape[-1], "the size of the last axis of x")
    return x, weight, bias, checks.computed_dtype(x)


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> bool:
    """Whether `_Linear` can serve the call: dense, of one dtype and of sizes that fit together, no
    vector, no forward mode."""
    return (
        x.dim() > 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and _is_like(x, x, dtype)
        and _is_like(weight, x, dtype)
        and (bias is None or (_is_like(bias, x, dtype) and bias.shape == weight.shape[:1]))
        and forward_ad._current_level < 0
    )


def _is_like(t: Tensor, x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether t is dense and computed in `dtype`, as x is."""
    alike = t.dtype == x.dtype or checks.computed_dtype(t) == dtype
    return alike and t.layout is torch.strided and not t.is_nested


class _Linear(torch.autograd.Function):
    """Linear for autograd. Its backward consists of linear layers, so that it has derivatives of
    every order, as torch's does."""

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
        (x, weight), backend = ctx.saved_tensors, ctx.backend
        dx = dweight = dbias = None
        with dispatch.no_autocast(dy.device):
            if weight is not None:
                dx = autograd.apply(_Linear, dy, weight.t(), None, backend)
            dy = dy.flatten(0, -2)
            if x is not None:
                dweight = autograd.apply(_Linear, dy.t(), x.flatten(0, -2).t(), None, backend)
            if ctx.needs_input_grad[2]:
                dbias = dy.sum(0)
        return dx, dweight, dbias, None
