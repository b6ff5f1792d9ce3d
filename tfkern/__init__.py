"""Fused transformer kernels: attention, layer norm and MLP, forward and backward."""

from importlib.metadata import version as _version

from tfkern.dispatch import Explanation, backends, use_backend
from tfkern.ops import attention, explain, gated_mlp, layer_norm, mlp, rms_norm

__version__ = _version("tfkern")
__all__ = [
    "Explanation",
    "attention",
    "backends",
    "explain",
    "gated_mlp",
    "layer_norm",
    "mlp",
    "rms_norm",
    "use_backend",
]
