"""Layer norm by csrc/cpu/layer_norm.cpp and csrc/cuda/layer_norm.cu."""

import math

import torch

from tfkern.native import unavailable

forward = torch.ops.tfkern.layer_norm_forward.default
backward = torch.ops.tfkern.layer_norm_backward.default


def why_not(
    x, weight, bias, residual, seed, dropout_p, eps, rms, axes, *, needs_grad
) -> str | None:
    reason = unavailable(x)
    if x.is_cuda:
        for tensor in (weight, bias, residual):
            reason = reason or (unavailable(tensor) if tensor is not None else None)
    return reason


@torch.library.register_fake("tfkern::layer_norm_forward")
def _(x, weight, bias, residual, seed, dropout_p, eps, rms, axes):
    h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(h_dtype, torch.float32)
    separate_h = residual is not None or seed is not None
    h = x.new_empty(x.shape if separate_h else 0, dtype=h_dtype)
    M = math.prod(x.shape[:-axes])
    mean = x.new_empty(0 if rms else M, dtype=dtype)
    return x.new_empty(x.shape), h, mean, x.new_empty(M, dtype=dtype)


@torch.library.register_fake("tfkern::layer_norm_backward")
def _(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, separate_residual, axes):
    dresidual = h.new_empty(h.shape if separate_residual else 0)
    dweight = dy.new_empty(0) if weight is None else torch.empty_like(weight)
    dbias = dy.new_empty(0) if bias is None else torch.empty_like(bias)
    return dy.new_empty(dy.shape), dresidual, dweight, dbias
