"""Fused transformer kernels: attention, norms, MLPs, rotary positions and cross entropy, each with
its backward."""

from importlib.metadata import version as _version

from tfkern.dispatch import Explanation, backends, use_backend
from tfkern.memory import keep_memory
from tfkern.ops import (
    attention,
    attention_varlen,
    attention_weights,
    cross_entropy,
    explain,
    gated_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
    mlp,
    pad,
    rms_norm,
    rotary,
    unpad,
)

__version__ = _version("tfkern")
__all__ = [
    "Explanation",
    "attention",
    "attention_varlen",
    "attention_weights",
    "backends",
    "cross_entropy",
    "explain",
    "gated_mlp",
    "keep_memory",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "pad",
    "rms_norm",
    "rotary",
    "unpad",
    "use_backend",
]
