"""Layer norm and RMS norm with fused dropout and residual: checks, autograd, public functions."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("layer_norm")


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    eps: float = 1e-5,
    axes: int = 1,
    return_residual: bool = False,
    backend: str | None = None,
) -> Any:
    """Normalises the last axis of `h = residual + dropout(x)`, in one pass over memory.

        y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

    Statistics and sums are float32 (float64 for float64 inputs) whatever the dtype of x. Autocast
    does not apply: y keeps the dtype of x.

    Args:
        x: (..., N), float32, float64, bfloat16 or float16.
        weight, bias: (N,), any floating dtype, often float32 beside a bfloat16 x.
        residual: the shape of x, any floating dtype. h has the promoted dtype of the two.
        dropout_p: probability that an element of x is zeroed; the others grow by 1 / (1 -
            dropout_p). Call with 0 outside training.
        seed: key of the dropout mask, a 0-d int64 tensor or an int; the same seed gives the same
            mask on every backend. None draws one from torch's generator of the device.
        eps: added to the variance.
        axes: how many of the last axes are normalised as if they were one; weight and bias have
            their sizes.
        return_residual: also return h, the residual stream for the next sublayer.
        backend: forces "native", "triton" or "reference" for this call.

    Returns:
        y (..., N) in the dtype of x, or (y, h). Without residual and dropout h is x itself.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit together.
        NotImplementedError: the forced backend cannot serve the call.

    Layer normalization: Ba, Kiros, Hinton 2016. Mask: Philox4x32-10, Salmon et al. 2011.
    """
    args = bind(
        x, weight, bias, residual=residual, dropout_p=dropout_p, seed=seed, eps=eps, axes=axes
    )
    return _apply(args, return_residual, backend)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    eps: float | None = None,
    axes: int = 1,
    return_residual: bool = False,
    backend: str | None = None,
) -> Any:
    """Scales the last axis of `h = residual + dropout(x)` to unit root mean square.

        y = h / sqrt(mean(h^2) + eps) * weight

    Arguments, results and errors are those of `layer_norm`. eps None is the machine epsilon of the
    dtype that sums are in (float32, or float64 for float64), as in torch.

    Root mean square layer normalization: Zhang, Sennrich 2019.
    """
    args = bind_rms(
        x, weight, residual=residual, dropout_p=dropout_p, seed=seed, eps=eps, axes=axes
    )
    return _apply(args, return_residual, backend)


def bind(
    x,
    weight=None,
    bias=None,
    *,
    residual=None,
    dropout_p=0.0,
    seed=None,
    eps=1e-5,
    axes=1,
    rms=False,
):
    """Checks the public arguments, and returns those of an implementation's forward, in order."""
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a 0-d tensor")
    if axes != 1 and not (checks.is_integer(axes) and 1 < axes <= x.dim()):
        raise ValueError(f"axes must lie in 1 to {x.dim()}, the axes of x, got {axes}")
    sizes = (x.shape[-1],) if axes == 1 else x.shape[-axes:]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.floating(name, parameter)
            checks.same_device("x", x, name, parameter)
            checks.shape(name, parameter, sizes, "the size of the last axis of x")
    if residual is not None:
        checks.floating("residual", residual)
        checks.same_device("x", x, "residual", residual)
        checks.shape("residual", residual, x.shape, "the shape of x")
    dropout_p, eps = checks.probability("dropout_p", dropout_p), checks.number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    seed = checks.seed(seed, x.device) if dropout_p > 0 else None
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return x, weight, bias, residual, seed, dropout_p, eps, rms, axes


def bind_rms(x, weight=None, *, residual=None, dropout_p=0.0, seed=None, eps=None, axes=1):
    """`bind` for RMS norm."""
    checks.floating("x", x)
    if eps is None:
        sums = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        eps = torch.finfo(torch.promote_types(sums, torch.float32)).eps
    return bind(
        x,
        weight,
        residual=residual,
        dropout_p=dropout_p,
        seed=seed,
        eps=eps,
        axes=axes,
        rms=True,
    )


def _apply(args: tuple, return_residual: bool, backend: str | None) -> Any:
    x, _, _, residual, seed, *_ = args
    backend = dispatch.select("layer_norm", args, backend)
    with dispatch.no_autocast(x.device):
        y, h, _, _ = autograd.apply(_LayerNorm, *dispatch.distinct(args), backend)
    if not return_residual:
        return y
    return y, x if residual is None and seed is None else h


_Backward = autograd.first_order("layer_norm")


class _LayerNorm(torch.autograd.Function):
    """Layer norm for autograd.

    It saves the caller's own tensors, and returns gradients that are no views, so that autograd
    notices changes in place, and copies a gradient that two leaves would share as their `.grad`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *arguments, backend = args
        return dispatch.implementation("layer_norm", backend).forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, seed, dropout_p, _, rms, axes, backend = inputs
        _, h, mean, rstd = output
        separate_h = residual is not None or seed is not None
        ctx.mark_non_differentiable(mean, rstd, *(() if separate_h else (h,)))
        ctx.save_for_backward(
            h if separate_h else x, weight, bias, None if rms else mean, rstd, seed
        )
        ctx.separate_h, ctx.dropout_p, ctx.axes, ctx.backend = separate_h, dropout_p, axes, backend
        ctx.dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)  # dh is often absent; zeros would cost as much as dy

    @staticmethod
    def backward(ctx, dy, dh, _mean, _rstd):
        h, weight, bias, mean, rstd, seed = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(h, dtype=ctx.dtype)
        # Without dropout and in the same dtype, dx and dresidual are equal and one tensor serves as
        # both. Autograd copies it where two leaves would share it.
        separate_residual = ctx.residual_dtype is not None and (
            seed is not None or ctx.residual_dtype != dy.dtype
        )
        with dispatch.no_autocast(dy.device):
            dx, dresidual, dweight, dbias = autograd.apply(
                _Backward,
                dy,
                dh if ctx.separate_h else None,
                h,
                weight,
                bias,
                mean,
                rstd,
                seed,
                ctx.dropout_p,
                separate_residual,
                ctx.axes,
                ctx.backend,
            )
        if ctx.residual_dtype is None:
            dresidual = None
        else:
            dresidual = dresidual.to(ctx.residual_dtype) if separate_residual else dx
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, dweight, dbias, dresidual, *(None,) * 6
