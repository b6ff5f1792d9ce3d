"""Norms, recognised by what their forward computes from random inputs."""

import copy
import inspect
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfkern import dispatch
from tfkern.integrations.hf import worth
from tfkern.integrations.hf.plain import STANDARD, neutral, ours, own_attributes
from tfkern.nn.fusible import has_own_operators, unadorned
from tfkern.ops import layer_norm, rms_norm

_SIMPLE = (int, float, str, bool, type(None), tuple, torch.dtype)


class Form(NamedTuple):
    """A norm over the last axis, with names of the module's attributes or None for absent ones."""

    rms: bool
    plus_one: bool  # the factor is 1 + weight
    eps: str | float  # an attribute, or a number in the code
    weight: str | None
    bias: str | None
    casts: bool  # the code has a rule of its own for autocast

    def __call__(self, module: nn.Module, x: Tensor, **options: Any) -> Any:
        own = module._parameters
        w: Tensor | None = own[self.weight] if self.weight else None
        options["eps"] = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        if self.plus_one:
            assert w is not None
            w = 1 + (w if w.dtype == torch.float64 else w.float())
        if self.rms:
            return rms_norm(x, w, **options)
        return layer_norm(x, w, own[self.bias] if self.bias else None, **options)


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched norm."""
    if len(args) == 1 and not kwargs and _is_worth(module, args[0]):
        found = form(module, args[0])
        if found is not None:
            return found(module, args[0])
    return type(module).forward(module, *args, **kwargs)


def _is_worth(module: nn.Module, x: Any) -> bool:
    return isinstance(x, Tensor) and worth.norm(module, x)


def form(module: Any, x: Any) -> Form | None:
    """The form of a norm for this input, None where its own code decides: on inputs of another
    dtype than the weights', say."""
    found = known(module)
    if found is None or not isinstance(x, Tensor) or x.dim() == 0:
        return None
    own = module._parameters
    for name in (found.weight, found.bias):
        if name is not None:
            p = own[name]
            if p.dtype != x.dtype or p.shape[0] != x.shape[-1] or has_own_operators(p):
                return None
    wide = x.dtype in (torch.float32, torch.float64)
    if dispatch.autocasts(x.device) and (found.casts or not wide):
        return None
    return found


def plain(module: Any, x: Any) -> Form | None:
    """`form` of a norm that another module's code may compute without a call: no hooks."""
    if not isinstance(module, nn.Module) or not unadorned(module, ours(module)):
        return None
    return form(module, x)


# A class is entered with its forward, which other libraries replace.
_READ: dict[Any, tuple[str, ...]] = {}  # names of attributes that the forward of a class reads
_FORMS: dict[Any, Form | None] = {}  # by class, names of parameters, and values of these attributes


def known(module: Any) -> Form | None:
    """The form of a norm, None for all other modules."""
    own, kind = module._parameters, (type(module), type(module).forward)
    if module._modules or module._buffers or len(own) > 2:
        return None
    names = tuple([n for n, p in own.items() if p is not None])
    if kind not in _READ:
        if torch.compiler.is_compiling():  # Dynamo cannot trace a probe, which `patch` has made
            return None
        _probe(module, names)
    attributes = vars(module)
    key = kind, names, tuple([attributes.get(name) for name in _READ[kind]])
    try:
        found = _FORMS[key]
    except KeyError:
        if torch.compiler.is_compiling():
            return None
        _probe(module, names)
        return known(module)
    except TypeError:  # an attribute without a hash
        return None
    # None is an eps of torch's RMS norm only.
    if found is not None and isinstance(found.eps, str) and attributes[found.eps] is None:
        return found if kind[0] is nn.RMSNorm else None
    return found


def _probe(module: nn.Module, names: tuple[str, ...]) -> None:
    """Enters the module's form."""
    kind = type(module), type(module).forward
    read = set(_READ.get(kind, ()))
    with neutral():
        found = _recognised(module, names, read)
    values = vars(module)
    eps = {found.eps} if found else set()
    read -= eps
    if not all(isinstance(values.get(name), _SIMPLE) for name in read):
        found, read = None, set()  # what the forward does may change where we cannot see it
    _READ[kind] = tuple(sorted(set(_READ.get(kind, ())) | read))
    _FORMS[kind, names, tuple([values.get(name) for name in _READ[kind]])] = found


def _recognised(module: nn.Module, names: tuple[str, ...], read: set[str]) -> Form | None:
    parameters = [module._parameters[name] for name in names]
    if any(p is None or p.dim() != 1 or p.is_complex() for p in parameters):
        return None
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return None
    casts = any("autocast" in name for name in code.co_names)
    eps: list[str | float] = [
        k for k, v in own_attributes(module).items() if isinstance(v, float) or v is None
    ]
    eps += [v for v in code.co_consts if isinstance(v, float)]
    shape = getattr(module, "normalized_shape", (8,))
    if parameters:
        size = len(parameters[0])  # type: ignore[arg-type]
    else:
        size = shape[-1] if isinstance(shape, tuple) and shape else 8
    for number, order in product(eps, permutations(names)):
        weight, bias = (*order, None, None)[:2]
        for rms, plus_one in product((True, False), repeat=2):
            if (rms and bias) or (plus_one and not weight):
                continue
            candidate = Form(rms, plus_one, number, weight, bias, casts)
            if _same(module, candidate, size, read):
                return candidate
    return None


# Shapes but for the last axis, scales of the input, eps, and scales of the weights.
_DRAWN = (
    ((5,), 1e-3, 1e-6, 1.0),
    ((2, 3), 1.0, 0.03, 1.0),
    ((), 1.0, 1e-5, 30.0),
    ((2, 2, 3), 100.0, 1e-6, 1.0),
)


def _same(module: nn.Module, candidate: Form, size: int, read: set[str]) -> bool:
    """Whether the module's own forward gives values and gradients of the candidate, with other
    weights and other eps than the module's, in evaluation and training."""
    other = _double(module, read)
    try:
        for dtype, tolerance in (
            (torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 3e-2),
            (torch.float16, 1e-2),
        ):  # fmt: skip
            for shape, scale, eps, factor in _DRAWN:
                x = torch.randn(*shape, size, dtype=torch.float64, device="cpu") + 0.5
                x = (scale * x).to(dtype).requires_grad_()
                for name in (candidate.weight, candidate.bias):
                    if name is not None:
                        w = factor * torch.randn(size, dtype=torch.float64, device="cpu")
                        other._parameters[name] = nn.Parameter(w.to(dtype))
                if isinstance(candidate.eps, str):
                    other.__dict__[candidate.eps] = eps
                for training in (False, True):
                    other.__dict__["training"] = training
                    if not _equal(other, candidate, x, tolerance):
                        return False
    except Exception:  # a module of another form
        return False
    return True


def _equal(module: Any, candidate: Form, x: Tensor, tolerance: float) -> bool:
    inputs = [x, *module._parameters.values()]
    inputs = [t for t in inputs if t is not None]
    results = []
    for function in (type(module).forward, candidate):
        y = function(module, x)
        if type(y) is not Tensor or y.dtype != x.dtype or y.shape != x.shape:
            return False
        with torch.no_grad():
            if not torch.equal(function(module, x), y):
                return False
        dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device="cpu").view_as(y)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for a, b in zip(*results, strict=True):
        limit = tolerance * b.abs().max().item()
        if not torch.allclose(a, b, rtol=tolerance, atol=limit):
            return False
    return True


def _double(module: nn.Module, read: set[str]) -> Any:
    """A copy with parameters of its own, which enters into `read` the attributes that it is asked
    for."""
    kind = type(module)
    usual = {*STANDARD, *module._parameters}

    def spying(self: Any, name: str) -> Any:
        if name not in usual and not name.startswith("__"):
            read.add(name)
        return super(spied, self).__getattribute__(name)

    def refusing(self: Any, name: str, value: Any) -> None:
        raise AttributeError("a norm that keeps something")

    methods = {"__getattribute__": spying, "__setattr__": refusing}
    spied: Any = type(kind.__name__, (kind,), methods)
    double = object.__new__(spied)
    double.__dict__.update(copy.copy(vars(module)))
    double.__dict__.pop("forward", None)
    double.__dict__["_parameters"] = dict(module._parameters)
    return double
