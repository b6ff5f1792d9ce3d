"""What a child of a module computes, if it is of a plain kind and nothing is hung on it.

All of this may change between two calls, so the patched modules ask at every call.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tfkern import dispatch
from tfkern.nn.fusible import LINEAR, fusible, unadorned
from tfkern.ops.activation import FUNCTIONS

_PACKAGE = __name__.rpartition(".")[0]
STANDARD = frozenset(vars(nn.Module()))  # what every module has
_ACTIVATIONS: dict[Any, str | None] = {}


def ours(module: nn.Module) -> Any:
    """The forward that `patch` gave the module, or None."""
    forward = vars(module).get("forward")
    return forward if is_ours(forward) else None


def is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func.__module__.startswith(_PACKAGE)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that the module's class gave it, by name, without what every module has."""
    return {k: v for k, v in vars(module).items() if k not in STANDARD and k != "forward"}


def is_linear(kind: type) -> bool:
    return kind in LINEAR or _turned(kind)


def _turned(kind: type) -> bool:
    """Whether this is Conv1D of transformers, a linear layer with weights (in, out)."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a plain linear layer, None for all else."""
    kind = type(module)
    turned = _turned(kind)
    if not fusible(module, (kind,) if turned else LINEAR):
        return None
    own = module._parameters
    return own["weight"].t() if turned else own["weight"], own["bias"]


def alike(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether all have the dtype of x, or autocast makes it so."""
    return dispatch.autocasts(x.device) or all([w is None or w.dtype == x.dtype for w in weights])


def idle(dropout: Any) -> bool:
    """Whether a call of this dropout returns its input, and no more happens."""
    return (
        type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and unadorned(dropout)
    )


def activation(module: Any) -> str | None:
    """tfkern's name for an activation, None if it has none or if hooks are hung on the module."""
    if not isinstance(module, nn.Module) or not unadorned(module):
        return None
    return named_activation(module)


def named_activation(module: nn.Module) -> str | None:
    """`activation` for a module as its class made it, whatever is hung on it."""
    if module._parameters or module._buffers or module._modules:
        return None
    values = own_attributes(module).values()
    # A method of the module itself is equal for all modules of the class.
    key = type(module), type(module).forward, *(getattr(v, "__func__", v) for v in values)
    try:
        return _ACTIVATIONS[key]
    except KeyError:
        if torch.compiler.is_compiling():  # Dynamo cannot trace a probe, which `patch` has made
            return None
        return _ACTIVATIONS.setdefault(key, _compared(module))
    except TypeError:  # an attribute without a hash
        return None


def _compared(module: nn.Module) -> str | None:
    """The name of the function with the module's values and slopes, in training and evaluation."""
    module = copy.copy(module)
    # The caller may be in any mode; what is found must not depend on it.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=()),
    ):
        x = torch.linspace(-12, 12, 480, dtype=torch.float64, device="cpu")  # without 0, a kink
        x = torch.cat([1e3 * x, x, 1e-3 * x]).requires_grad_()
        for name, function in FUNCTIONS.items():
            expected = _with_slopes(function, x)
            try:
                for module.training in (False, True):
                    got = _with_slopes(partial(type(module).forward, module), x)
                    if not all(map(_near, got, expected)):
                        break
                else:
                    return name
            except Exception:  # a module of another form
                return None
    return None


def _with_slopes(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x.clone())
    return y, torch.autograd.grad(y.sum(), x)[0]


def _near(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-7)
