"""What a child of a module computes, if it is of a plain kind and nothing is hung on it.

All of this may change between two calls, so the patched modules ask at every call.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tfkern import dispatch
from tfkern.nn.fusible import LINEAR, fusible, unadorned
from tfkern.ops.activation import FUNCTIONS

_PACKAGE = __name__.rpartition(".")[0]
STANDARD = frozenset(vars(nn.Module()))  # what every module has
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Activation(NamedTuple):
    name: str  # what tfkern calls the function
    operators: int = 1  # how many of torch's the module calls for it


_ACTIVATIONS: dict[Any, Activation | None] = {}


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
    return kind in LINEAR or _layout(kind) is not None


def linear(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a plain linear layer, None for all else."""
    kind = type(module)
    layout = "out, in" if kind in LINEAR else _layout(kind)
    if layout is None or not fusible(module, (kind,)):
        return None
    own = module._parameters
    return own["weight"].t() if layout == "in, out" else own["weight"], own["bias"]


def sizes(layer: Any) -> tuple[int, int]:
    """Sizes of the output and the input of a linear layer."""
    rows, columns = layer._parameters["weight"].shape
    return (columns, rows) if _layout(type(layer)) == "in, out" else (rows, columns)


_LAYOUTS: dict[Any, str | None] = {}


def _layout(kind: Any) -> str | None:
    """How the weight of a class of linear layers lies in memory, None for other classes."""
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return "in, out"
    if not issubclass(kind, nn.Linear):
        return None
    key = kind, kind.forward
    if key not in _LAYOUTS:
        if torch.compiler.is_compiling():  # Dynamo cannot trace a probe, which `patch` has made
            return None
        _LAYOUTS[key] = "out, in" if _multiplies(kind) else None
    return _LAYOUTS[key]


def _multiplies(kind: Any) -> bool:
    """Whether the forward of a subclass of nn.Linear computes what nn.Linear does, and asks for
    nothing that nn.Linear does not have. Such layers may do more: adapters, quantised layers."""
    layer = object.__new__(kind)
    nn.Linear.__init__(layer, 3, 5, dtype=torch.float64, device="cpu")
    usual = {*dir(layer)} & {*dir(nn.Linear(3, 5, device="meta"))}
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None or any(name in {*dir(kind)} - usual for name in code.co_names):
        return False
    with neutral():
        for outer in ((4,), (2, 3)):
            x = torch.randn(*outer, 3, dtype=torch.float64, device="cpu")
            for bias in (layer.bias, None):
                layer.bias = bias
                expected = nn.functional.linear(x, layer.weight, bias)
                try:
                    for layer.training in (False, True):
                        if not torch.allclose(kind.forward(layer, x), expected):
                            return False
                except Exception:  # the class needs more than it got
                    return False
            layer.bias = nn.Parameter(torch.ones(5, dtype=torch.float64, device="cpu"))
    return True


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """The modes of a probe, whatever those of the caller are, and random numbers of its own."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=()),
    ):
        torch.manual_seed(0)
        yield


def alike(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether all have the dtype of x, or autocast makes it so."""
    dtypes = [w.dtype for w in weights if w is not None]
    if dispatch.autocasts(x.device):
        return all([dtype in _FLOATING for dtype in dtypes])
    return all([dtype == x.dtype for dtype in dtypes])


def idle(dropout: Any) -> bool:
    """Whether a call of this dropout returns its input, and no more happens."""
    return (
        type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and unadorned(dropout)
    )


def activation(module: Any) -> Activation | None:
    """The function of an activation, None if tfkern has none or if hooks are hung on the module."""
    if not isinstance(module, nn.Module) or not unadorned(module):
        return None
    return named_activation(module)


def named_activation(module: nn.Module) -> Activation | None:
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


def _compared(module: nn.Module) -> Activation | None:
    """The function with the module's values and slopes, in training and evaluation."""
    module = copy.copy(module)
    with neutral():
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
                    counted = _Counter()
                    with counted, torch.no_grad():
                        type(module).forward(module, x)
                    return Activation(name, counted.operators)
            except Exception:  # a module of another form
                return None
    return None


class _Counter(TorchDispatchMode):
    """Counts calls of torch's operators."""

    operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operators += 1
        return function(*args, **(kwargs or {}))


def _with_slopes(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x.clone())
    return y, torch.autograd.grad(y.sum(), x)[0]


def _near(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-7)
