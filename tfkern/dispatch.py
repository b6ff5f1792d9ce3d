"""Chooses the backend that runs an op. No other file names a backend.

A backend is a package with one module per op, and each module has `forward`, `backward` and
`why_not`, which returns a sentence or None. It may have `way`, which tells how it serves a call.
Backends are imported before the first call that may use them, and kept in plain dicts:
torch.compile cannot trace an import or a context variable.
"""

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

_PACKAGE = {
    "native": "tfkern.native",
    "triton": "tfkern.kernels",
    "reference": "tfkern.reference",
}
_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}

_ops: list[str] = []
_missing: dict[
    str, str | None
] = {}  # backend -> why its package cannot be imported, None if it can
_implementations: dict[tuple[str, str], ModuleType] = {}  # (backend, op)
# A setting per thread would need a threading.local or a ContextVar. Dynamo does not trace a
# ContextVar, and does not notice when a threading.local changes.
_forced: str | None = None
_initial: str | None = None
_blocks: list[tuple] = []  # open use_backend blocks: thread, backend, identity


@dataclass(frozen=True)
class Explanation:
    """The backend that a call would use, and why the backends before it cannot serve.

    `way` tells how the backend computes the call where it has several ways.
    """

    op: str
    backend: str | None
    reasons: dict[str, str]
    way: str | None = None

    def __str__(self) -> str:
        way = "" if self.way is None else f", {self.way}"
        lines = [f"{self.op}: {self.backend or 'no backend'}{way}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.reasons.items()])


def check_backend(name: str) -> str:
    """Returns `name` if there is a backend of this name; raises ValueError otherwise."""
    if name not in _PACKAGE:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(_PACKAGE)}")
    return name


def load(backend: str) -> None:
    """Imports a backend for all ops. If the import fails, the reason is kept."""
    if backend not in _missing:
        try:
            importlib.import_module(_PACKAGE[backend])
            _missing[backend] = None
        except ImportError as error:
            _missing[backend] = str(error)
    if _missing[backend] is None:
        for op in _ops:
            name = f"{_PACKAGE[backend]}.{op}"
            if (backend, op) not in _implementations and importlib.util.find_spec(name):
                _implementations[backend, op] = module = importlib.import_module(name)
                for operator in vars(module).values():
                    if isinstance(operator, torch._ops.OpOverload):
                        refuse_derivatives(operator)


def refuse_derivatives(operator: torch._ops.OpOverload) -> None:
    """Makes traces that would differentiate a kernel fail: the derivative would silently be 0.

    Outside traces the callers of kernels prevent this, and a kernel for the Autograd key, written
    in Python, would cost as much as a small op. So this uses py_impl, which only traces look up.
    """

    def run(*args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise NotImplementedError(f"{operator} has no derivative here")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    operator.py_impl(torch._C.DispatchKey.Autograd)(run)


def register(op: str) -> None:
    """Makes `op` known and imports the backends that its calls can reach by default."""
    _ops.append(op)
    for backend in ("native", "reference"):
        load(backend)
    if torch.cuda.device_count() > 0:  # asks the driver without making a CUDA context
        load("triton")
    if _forced is not None:
        load(_forced)


def implementation(op: str, backend: str) -> ModuleType:
    return _implementations[backend, op]


def why_not(op: str, backend: str, args: tuple) -> str | None:
    """Why `backend` cannot run `op` on the normalised arguments, or None if it can."""
    if backend not in _missing:
        load(backend)
    implementation = _implementations.get((backend, op))
    if implementation is None:
        return _missing[backend] or f"does not implement {op}"
    needs_grad = torch.is_grad_enabled() and requires_grad(args)
    return implementation.why_not(*args, needs_grad=needs_grad)


def requires_grad(args: Iterable) -> bool:
    """Whether an argument, or what torch.func has wrapped in it, requires a gradient."""
    for a in args:  # any() of a generator takes longer
        if isinstance(a, torch.Tensor) and a.requires_grad:
            return True
    if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    wrapped = [t for t in tensors if functorch.is_functorch_wrapped_tensor(t)]
    return bool(wrapped) and requires_grad([functorch.get_unwrapped(t) for t in wrapped])


def _order(args: tuple, backend: str | None) -> tuple[str, ...]:
    forced = _forced if backend is None else check_backend(backend)
    return (forced,) if forced else _ORDER.get(args[0].device.type, ("reference",))


def is_forced() -> bool:
    """Whether `use_backend` or TFKERN_BACKEND has named the backend of all calls."""
    return _forced is not None


def explain(op: str, args: tuple, backend: str | None = None) -> Explanation:
    """Which backend serves the call: the forced one or none, else the first one that can."""
    reasons: dict[str, str] = {}
    for name in _order(args, backend):
        reason = why_not(op, name, args)
        if reason is None:
            way = getattr(_implementations[name, op], "way", None)
            return Explanation(op, name, reasons, None if way is None else way(*args))
        reasons[name] = reason
    return Explanation(op, None, reasons)


def find(op: str, args: tuple, backend: str | None = None) -> str | None:
    """Name of the backend for the call, or None if none serves."""
    for name in _order(args, backend):
        if why_not(op, name, args) is None:
            return name
    return None


def select(op: str, args: tuple, backend: str | None = None) -> str:
    """Name of the backend for the call; NotImplementedError with every reason if none serves."""
    name = find(op, args, backend)
    if name is not None:
        return name
    reasons = explain(op, args, backend).reasons.items()
    listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons)
    raise NotImplementedError(f"no backend runs this {op}:{listed}")


def backends(op: str) -> dict[str, str | None]:
    """For every backend, the reason why it cannot run `op` here at all, or None if it can."""
    if op not in _ops:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(_ops)}")
    for backend in _PACKAGE:
        load(backend)
    return {
        name: None
        if (name, op) in _implementations
        else _missing[name] or f"does not implement {op}"
        for name in _PACKAGE
    }


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a backend within a `with` block: "native", "triton" or "reference"; None lifts it.

    A forced backend never falls back: a call that it cannot serve raises NotImplementedError,
    except that `tfkern.linear` then runs torch's function. The backward of a call uses the backend
    of its forward. The setting holds for the whole process; TFKERN_BACKEND sets it from the start.
    Blocks of one thread nest. While a block is open, opening one in another thread raises
    RuntimeError; that thread may give `backend=` to its calls instead.
    """
    global _forced
    if name is not None:
        load(check_backend(name))
    if torch.compiler.is_compiling():  # traced code leaves the block before other threads run
        previous, _forced = _forced, name
        try:
            yield
        finally:
            _forced = previous
        return
    block = (threading.get_ident(), name, object())
    _blocks.append(block)  # before the check, so that of two threads at least one sees both
    try:
        if any(thread != block[0] for thread, *_ in _blocks):
            raise RuntimeError(
                "another thread is inside of use_backend, which holds for the whole process: give "
                "backend= to the calls of this thread"
            )
        _forced = name
        yield
    finally:
        _blocks.remove(block)
        _forced = _blocks[-1][1] if _blocks else _initial


_UNCHANGED = contextlib.nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    # is_autocast_enabled raises for "meta", and torch 2.11 cannot trace is_autocast_available.
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turns autocast off around an op whose inputs already have the dtype to compute in."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else _UNCHANGED


def distinct(args: tuple) -> tuple:
    """The arguments, with repeated tensors as views: torch.compile refuses a tensor given twice."""
    if not torch.compiler.is_compiling():
        return args
    out: list = []
    for a in args:
        repeated = isinstance(a, torch.Tensor) and any(a is b for b in out)
        out.append(a.view_as(a) if repeated else a)
    return tuple(out)


if os.environ.get("TFKERN_BACKEND"):
    _forced = _initial = check_backend(os.environ["TFKERN_BACKEND"])
