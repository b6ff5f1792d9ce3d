"""The public functions."""

from collections.abc import Callable
from typing import Any

from tfkern import dispatch
from tfkern.ops import attention as _attention
from tfkern.ops import cross_entropy as _cross_entropy
from tfkern.ops import layer_norm as _layer_norm
from tfkern.ops import linear as _linear
from tfkern.ops import linear_cross_entropy as _linear_cross_entropy
from tfkern.ops import mlp as _mlp
from tfkern.ops import rotary as _rotary
from tfkern.ops.attention import attention, attention_varlen
from tfkern.ops.attention_weights import attention_weights
from tfkern.ops.cross_entropy import cross_entropy
from tfkern.ops.layer_norm import layer_norm, rms_norm
from tfkern.ops.linear import linear
from tfkern.ops.linear_cross_entropy import linear_cross_entropy
from tfkern.ops.mlp import gated_mlp, mlp
from tfkern.ops.packing import pad, unpad
from tfkern.ops.rotary import rotary

__all__ = [
    "attention",
    "attention_varlen",
    "attention_weights",
    "cross_entropy",
    "explain",
    "gated_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "pad",
    "rms_norm",
    "rotary",
    "unpad",
]

OPS = (
    "attention",
    "cross_entropy",
    "layer_norm",
    "mlp",
    "rotary",
)  # ops with kernels in every backend

_BIND: dict[str, tuple[str, Callable]] = {  # public function -> op and normaliser of its arguments
    "attention": ("attention", _attention.bind),
    "attention_varlen": ("attention", _attention.bind_varlen),
    "cross_entropy": ("cross_entropy", _cross_entropy.bind),
    "gated_mlp": ("mlp", _mlp.bind_gated),
    "layer_norm": ("layer_norm", _layer_norm.bind),
    "linear": ("linear", _linear.bind),
    "linear_cross_entropy": ("cross_entropy", _linear_cross_entropy.bind_kernels),
    "mlp": ("mlp", _mlp.bind),
    "rms_norm": ("layer_norm", _layer_norm.bind_rms),
    "rotary": ("rotary", _rotary.bind),
}


def explain(function: str, *args: Any, backend: str | None = None, **options: Any):
    """Which backend `tfkern.<function>(*args, **options)` would use, and why not the others.

    Args:
        function: name of a public function, such as "layer_norm".
        *args, **options: the arguments of the call.

    Returns:
        An `Explanation` with `backend` (None if none serves) and `reasons`; str() gives a
        paragraph. Where none serves, `tfkern.linear` calls torch's function.

    Raises:
        ValueError: an unknown function, or arguments that the function itself would refuse.
    """
    if function not in _BIND:
        raise ValueError(f"unknown function {function!r}: expected one of {', '.join(_BIND)}")
    op, bind = _BIND[function]
    options = {name: x for name, x in options.items() if not name.startswith("return_")}
    if options.get("dropout_p"):
        options.setdefault("seed", 0)  # a drawn seed would advance torch's generator
    return dispatch.explain(op, bind(*args, **options), backend)
