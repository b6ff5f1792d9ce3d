"""Layer norm and RMS norm with fused dropout and residual: checks, autograd, public functions."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("layer_norm")

_unsafe_view = torch.ops.aten._unsafe_view.default


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
    return _apply(x, residual, args, axes, return_residual, backend)


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
    return _apply(x, residual, args, axes, return_residual, backend)


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
    """The public arguments, checked, as the positional arguments of an implementation's forward,
    but for leading axes."""
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a 0-d tensor")
    if axes != 1 and not 1 < axes <= x.dim():
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
    if axes > 1:
        x, weight, bias, residual = (
            t if t is None else t.flatten(-axes) for t in (x, weight, bias, residual)
        )
    return x, weight, bias, residual, seed, dropout_p, eps, rms


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


def _apply(x, residual, args, axes, return_residual: bool, backend: str | None) -> Any:
    backend = dispatch.select("layer_norm", args, backend)
    args = dispatch.distinct((x, *args[1:3], residual, *args[4:]))
    with dispatch.no_autocast(x.device):
        y, h, _, _ = autograd.apply(_LayerNorm, *args, axes, backend)
    y = y if x.dim() == 2 and axes == 1 else y.view(x.shape)
    if not return_residual:
        return y
    separate_h = residual is not None or args[4] is not None
    return y, h if separate_h else x


def _rows(x: Tensor, axes: int) -> Tensor:
    """x as a matrix whose rows are contiguous; a view where strides allow."""
    x = x.flatten(-axes) if axes > 1 else x
    if x.dim() != 2:
        x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class _LayerNorm(torch.autograd.Function):
    """Of tensors of any shape: what it saves and the gradients that it returns are the caller's own
    tensors and not views of them, so that autograd sees changes in place, and memory that two
    gradients share."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, seed, dropout_p, eps, rms, axes, backend):
        op = dispatch.implementation("layer_norm", backend)
        rows = None if residual is None else _rows(residual, axes)
        y, h, mean, rstd = op.forward(_rows(x, axes), weight, bias, rows, seed, dropout_p, eps, rms)
        if (x.dim() != 2 or axes > 1) and (residual is not None or seed is not None):
            # What autograd knows to be a view may not leave a function. The trace of torch.jit
            # would take the shape for a constant.
            h = h.view(x.shape) if torch.jit.is_tracing() else _unsafe_view(h, x.shape)
        return y, h, mean, rstd

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
        ctx.set_materialize_grads(False)  # dh is often absent, and as large as dy

    @staticmethod
    def backward(ctx, dy, dh, _mean, _rstd):
        h, weight, bias, mean, rstd, seed = ctx.saved_tensors
        shape, rows = h.shape, _rows(h, ctx.axes)
        dy = torch.zeros_like(rows, dtype=ctx.dtype) if dy is None else _rows(dy, 1)
        # Without dropout between them, and in the same dtype, dx and dresidual are one tensor, and
        # autograd copies it where two leaves would share it. Inductor hands out two views instead.
        separate_residual = ctx.residual_dtype is not None and (
            seed is not None
            or ctx.residual_dtype != dy.dtype
            or (torch.compiler.is_compiling() and shape != dy.shape)
        )
        with dispatch.no_autocast(dy.device):
            dx, dresidual, dweight, dbias = autograd.apply(
                _LayerNormBackward,
                dy,
                _rows(dh, ctx.axes) if ctx.separate_h and dh is not None else None,
                rows,
                weight,
                bias,
                mean,
                rstd,
                seed,
                ctx.dropout_p,
                separate_residual,
                ctx.backend,
            )
        dx = dx.view(shape)
        if ctx.residual_dtype is None:
            dresidual = None
        else:
            dresidual = dresidual.to(ctx.residual_dtype).view(shape) if separate_residual else dx
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, dweight, dbias, dresidual, *(None,) * 6


class _LayerNormBackward(torch.autograd.Function):
    """A function of its own, so that a second differentiation raises instead of losing terms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, separate_residual, backend):
        op = dispatch.implementation("layer_norm", backend)
        return op.backward(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, separate_residual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("layer_norm and rms_norm have no second derivative")
