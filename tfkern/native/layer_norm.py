"""Layer norm by csrc/cpu/layer_norm.cpp and csrc/cuda/layer_norm.cu."""

import torch

from tfkern.native import unavailable
from tfkern.reference.layer_norm import backward_outputs, forward_outputs

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


torch.library.register_fake("tfkern::layer_norm_forward", forward_outputs)
torch.library.register_fake("tfkern::layer_norm_backward", backward_outputs)
