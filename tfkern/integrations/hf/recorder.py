"""Writes down what a method of a module computes: which children it calls, and what it does with
their results.

The method runs once, on tensors without memory and with a stand-in for the module. Whatever could
lead it another way in another call is either noted as a guard, to be compared with the module at
each call, or ends the recording: attributes that are no plain values, shapes, devices, functions
that are not in the list. All tensors are taken to have one dtype; calls have to see to this.
"""

import inspect
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name

from tfkern.integrations.hf import norms
from tfkern.integrations.hf.plain import is_linear, is_ours, named_activation, sizes

Path = tuple[str, ...]


class UnknownError(Exception):
    """The method does something that the recorder does not follow."""


class Ref(int):
    """The number of a value: first the inputs, then the results of the steps."""


class Step(NamedTuple):
    """One call: of the child at a path, which is of a kind, or of a function of torch."""

    kind: str  # "linear", "activation", "dropout", "norm", or the name of a function
    call: Any  # a path or a function
    args: tuple[Any, ...]  # Ref and plain values
    out: Ref


_METHOD = object()  # the value of a method that the module has from its class


class Guard(NamedTuple):
    """What the recording rests on: an attribute with this value, or if name is None a module of
    this type with children of these names."""

    path: Path
    name: str | None
    value: Any

    def holds(self, root: nn.Module) -> bool:
        module = at(root, self.path)
        if module is None:
            return False
        if self.name is None:
            return (type(module), type(module).forward, *module._modules) == self.value
        if self.value is _METHOD:
            own = vars(module).get(self.name)
            return own is None or is_ours(own)
        value = getattr(module, self.name, UnknownError)
        return value is self.value or (type(value) is type(self.value) and value == self.value)


class Recording(NamedTuple):
    inputs: int  # number of tensors that the method takes
    steps: tuple[Step, ...]
    result: Ref
    inlined: tuple[Path, ...]  # modules whose own forward is part of the recording


def at(root: nn.Module, path: Path) -> Any:
    """The module at a path, None if there is none."""
    module: Any = root
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def record(
    module: nn.Module, method: str, is_whole: Any
) -> tuple[Recording | None, tuple[Guard, ...]]:
    """What the method does, None if it is not followed, and on what this rests.

    Args:
        is_whole: tells whether a child is patched as a whole. A method that calls one is not
            followed, so that no module is patched twice.
    """
    guards: tuple[Guard, ...] = ()
    for width in dict.fromkeys(_widths(module)):
        recordings: list[Recording | None] = []
        for grad in (False, True):
            tape = _Tape(module, is_whole)
            try:
                with torch.set_grad_enabled(grad):
                    recordings.append(tape.run(getattr(type(module), method), width))
            except Exception:  # the method may raise whatever it likes on our stand-ins
                recordings.append(None)
            guards = tuple(dict.fromkeys((*guards, *tape.guards)))
        if recordings[0] is not None and recordings[0] == recordings[1]:
            return recordings[0], guards
    return None, guards


def _widths(root: nn.Module) -> list[int]:
    """Sizes that the last axis of an input may have."""
    layers = [m for m in root.modules() if is_linear(type(m))]
    return [sizes(m)[1] for m in layers if m._parameters.get("weight") is not None]


class _Tape:
    def __init__(self, root: nn.Module, is_whole: Any) -> None:
        self.root, self.is_whole = root, is_whole
        self.guards: dict[Guard, None] = {}
        self.inlined: dict[Path, None] = {}
        self.steps: list[Step] = []
        self.values = 0

    def run(self, method: Any, width: int) -> Recording:
        required = [
            p
            for p in list(inspect.signature(method).parameters.values())[1:]
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if not required or any(p.kind is p.KEYWORD_ONLY for p in required):
            raise UnknownError("no inputs that a call gives by position")
        inputs = [self.new(torch.empty(2, 3, width, device="meta")) for _ in required]
        if hasattr(method, "__wrapped__"):
            raise UnknownError("a method with something around it, such as checkpointing")
        result = method(_StandIn(self, self.root, ()), *inputs)
        if type(result) is not _Marked:
            raise UnknownError("the result is no tensor that the steps give")
        return Recording(len(inputs), tuple(self.steps), result.ref, tuple(self.inlined))

    def new(self, like: Tensor) -> "_Marked":
        marked = like.as_subclass(_Marked)
        marked.tape, marked.ref = self, Ref(self.values)
        self.values += 1
        return marked

    def step(self, kind: str, call: Any, args: tuple[Any, ...], like: Tensor) -> "_Marked":
        refs = tuple([self.ref(a) for a in args])
        out = self.new(like)
        self.steps.append(Step(kind, call, refs, out.ref))
        return out

    def ref(self, value: Any) -> Any:
        if type(value) is _Marked and value.tape is self:
            return value.ref
        if isinstance(value, int | float) or value is None:
            return value
        raise UnknownError(f"an argument {value!r}")

    def guard(self, path: Path, name: str | None, value: Any) -> None:
        self.guards[Guard(path, name, value)] = None


def _kind(module: nn.Module) -> str | None:
    """What a child is as its class made it, None for a module with children of its own."""
    if is_linear(type(module)):
        return "linear"
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "dropout"
    if module._modules:
        return None
    if named_activation(module) is not None:
        return "activation"
    return "norm" if norms.known(module) is not None else None


class _StandIn:
    """Stands in for a module. It also says that it is of the module's class."""

    def __init__(self, tape: _Tape, module: nn.Module, path: Path) -> None:
        vars(self).update(_tape=tape, _module=module, _path=path)
        tape.guard(path, None, (type(module), type(module).forward, *module._modules))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        tape, module, path = self._tape, self._module, self._path
        if name in module._modules:
            return self._child(name)
        if name in module._parameters:
            p = module._parameters[name]
            if p is None:
                raise UnknownError("a parameter that is absent")
            return torch.empty_like(p, dtype=torch.float32, device="meta", requires_grad=False)
        own = vars(module)
        if name in own and name not in ("_modules", "_parameters", "_buffers"):
            value = own[name]
            if is_ours(value):
                return MethodType(getattr(type(module), name), self)
            if isinstance(value, int | float | str | FunctionType | BuiltinFunctionType | None):
                tape.guard(path, name, value)
                return value
            raise UnknownError(f"the attribute {name}")
        value = inspect.getattr_static(type(module), name, None)
        if isinstance(value, FunctionType) and name not in vars(nn.Module):
            tape.guard(path, name, _METHOD)
            return MethodType(value, self)
        raise UnknownError(f"the attribute {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnknownError("a module that keeps something")

    def _child(self, name: str) -> Any:
        child = self._module._modules[name]
        if child is None:
            raise UnknownError("a child that is absent")
        return _StandIn(self._tape, child, (*self._path, name))

    def __iter__(self) -> Any:
        if type(self._module) not in (nn.Sequential, nn.ModuleList):
            raise UnknownError("a container of another kind")
        return (self._child(name) for name in self._module._modules)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, index: int) -> Any:
        return list(iter(self))[index]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, module, path = self._tape, self._module, self._path
        kind = _kind(module)
        if kind is None:
            if tape.is_whole(module):
                raise UnknownError("a module that is patched on its own")
            if hasattr(type(module).forward, "__wrapped__"):
                raise UnknownError("a forward with something around it, such as checkpointing")
            tape.inlined[path] = None
            return type(module).forward(self, *args, **kwargs)  # type: ignore[arg-type]
        if len(args) != 1 or kwargs or type(args[0]) is not _Marked:
            raise UnknownError("a layer with other arguments than one tensor")
        like = _plain(args[0])
        if kind == "linear":
            rows, columns = sizes(module)
            if columns != like.shape[-1]:
                raise UnknownError("an input of another size")
            like = like.new_empty(*like.shape[:-1], rows)
        return tape.step(kind, path, args, torch.empty_like(like))


_BINARY = {"add": "add", "__add__": "add", "__radd__": "add", "mul": "mul", "multiply": "mul",
           "__mul__": "mul", "__rmul__": "mul"}  # fmt: skip
_FUNCTIONS = {
    "torch.nn.functional.relu": F.relu, "torch.relu": F.relu, "torch.Tensor.relu": F.relu,
    "torch.nn.functional.silu": F.silu, "torch.nn.functional.gelu": F.gelu,
}  # fmt: skip
_OPERATIONS = {"add": torch.add, "mul": torch.mul}


class _Marked(torch.Tensor):
    """A tensor that knows which value it is, and on which tape functions of it are written."""

    tape: _Tape
    ref: Ref

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        tape = next(a for a in args if type(a) is _Marked).tape
        name = resolve_name(function) or ""
        short = name.rpartition(".")[2]
        plain = [_plain(a) if type(a) is _Marked else a for a in args]
        if name == "torch.Tensor.dtype.__get__":
            return plain[0].dtype
        if short in _BINARY and not kwargs:
            kind = _BINARY[short]
            function = _OPERATIONS[kind]
            return tape.step(kind, function, args, function(*plain))
        if name in _FUNCTIONS:
            function = _FUNCTIONS[name]
            approximate = kwargs.pop("approximate", "none")
            kwargs.pop("inplace", None)
            if kwargs or len(args) != 1 or approximate not in ("none", "tanh"):
                raise UnknownError(name)
            kind = function.__name__ + ("_tanh" if approximate == "tanh" else "")
            return tape.step(kind, kind, args, torch.empty_like(plain[0]))
        if name == "torch.nn.functional.dropout":
            bound = inspect.signature(F.dropout).bind(*args, **kwargs)
            bound.apply_defaults()
            x, p, training, _ = bound.arguments.values()
            if not (training and p):
                return x
            return tape.step("F.dropout", F.dropout, (x, p, training), torch.empty_like(plain[0]))
        if short in ("chunk", "split", "tensor_split"):
            return cls._halves(tape, function, args, plain, kwargs)
        raise UnknownError(name)

    @classmethod
    def _halves(cls, tape, function, args, plain, kwargs):  # type: ignore[no-untyped-def]
        parts = function(*plain, **kwargs)
        half = plain[0].shape[-1] / 2
        if len(parts) != 2 or any(p.shape != (*plain[0].shape[:-1], half) for p in parts):
            raise UnknownError("other parts than two halves of the last axis")
        return tuple(
            tape.step("half", _half, (args[0], i), torch.empty_like(p)) for i, p in enumerate(parts)
        )


def _half(x: Tensor, i: int) -> Tensor:
    return x.chunk(2, -1)[i]


def _plain(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)
