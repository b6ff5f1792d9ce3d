"""Whether a call has so much work that a fused op is worth it.

On a CPU a call of a fused op takes more Python than one of torch's operators, so what does little
work is left to the module's own code. On other devices, and where a backend is forced, the op is
always called. Rotary positions always are: their own code calls some ten operators.

The limits are sizes from which on the op was not slower than models of transformers, forward and
with backward, in float32 and bfloat16 (AMD EPYC Zen 4, torch 2.13).
"""

import torch
from torch import Tensor, nn

from tfkern import dispatch
from tfkern.ops import checks

NORM = 1 << 15  # numbers in the input, where the module's own code goes over them several times
LAYER_NORM = 1 << 19  # the same for torch's own op, whose backward is never slower
MLP = 1 << 18  # numbers in the input, times the passes over the hidden layer that are saved
ATTENTION = 1 << 16  # scores in float32; torch is slower at 16-bit numbers
MOST_PASSES = 8  # no activation has more


def _costs(x: Tensor) -> bool:
    """Whether a call of an op costs more than one of torch's operators."""
    return x.is_cpu and not dispatch.is_forced()


def norm(module: nn.Module, x: Tensor, residual: bool = False) -> bool:
    """For a norm, perhaps of a sum with a residual."""
    if not _costs(x):
        return True
    if isinstance(module, nn.LayerNorm):
        return x.numel() >= LAYER_NORM and not (residual or torch.is_grad_enabled())
    return x.numel() >= NORM


def mlp(x: Tensor, passes: int = MOST_PASSES) -> bool:
    """For an MLP: its products are torch's, so it saves time at the activation, or where torch is
    slow at products of this dtype."""
    if not _costs(x) or x.numel() * passes >= MLP:
        return True
    dtype = checks.computed_dtype(x)
    if dtype == torch.float32 or x.numel() * MOST_PASSES < MLP:
        return False
    return dispatch.find("linear", (x, None, None, dtype)) is not None


def attention(query: Tensor, key: Tensor) -> bool:
    """For attention without a mask."""
    if not _costs(query) or query.dtype != torch.float32 or query.shape[1] != key.shape[1]:
        return True
    return query.shape[:3].numel() * key.shape[2] >= ATTENTION
