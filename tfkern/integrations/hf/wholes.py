"""Methods that compute an MLP, and perhaps a residual and a norm around it, recognised by their
recording: down(act(up(x))) or down(act(gate(x)) * up(x)), where one layer may give gate and up."""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.integrations.hf import worth
from tfkern.integrations.hf.plain import Activation, activation, alike, idle, linear, neutral, ours
from tfkern.integrations.hf.recorder import Guard, Path, Recording, Ref, Step, at, record
from tfkern.integrations.hf.residual import add_norm
from tfkern.nn.fusible import unadorned
from tfkern.ops import gated_mlp, mlp
from tfkern.ops.activation import FUNCTIONS

METHODS = ("forward", "feed_forward_chunk", "ff_chunk")
_MOST = 64  # recordings that are kept of a class


class Mlp(NamedTuple):
    """The layers of an MLP."""

    first: tuple[Path, ...]  # one layer; gate and up; or one that gives both
    swapped: bool  # the half of gate is the second one
    gated: bool
    act: Path | str  # a child, or the name of a function
    dropouts: tuple[Path, ...]  # children that act between the layers
    last: Path


class Plan(NamedTuple):
    """What a patched method does in place of its code."""

    inputs: int
    steps: tuple[Step, ...]  # with one of kind "mlp"
    result: Ref
    inlined: tuple[Path, ...]


def run(module: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """A patched method of the module."""
    found = None
    if args and not kwargs and isinstance(args[0], Tensor) and worth.mlp(args[0]):
        found = plan(module, method)
    if found is not None and found.inputs == len(args):
        ready = _ready(module, found, args)
        if ready is not None:
            return _computed(module, found, ready, args)
    return getattr(type(module), method)(module, *args, **kwargs)


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return run(module, "forward", *args, **kwargs)


def feed_forward_chunk(module: Any, *args: Any) -> Any:
    return run(module, "feed_forward_chunk", *args)


def ff_chunk(module: Any, *args: Any) -> Any:
    return run(module, "ff_chunk", *args)


FORWARDS = {"forward": forward, "feed_forward_chunk": feed_forward_chunk, "ff_chunk": ff_chunk}
_PLANS: dict[Any, list[tuple[tuple[Guard, ...], Plan | None]]] = {}
_LOCK = threading.RLock()


def plan(module: nn.Module, method: str) -> Plan | None:
    """What to do in place of the method in the module's present state, None to call it."""
    for guards, found in _PLANS.get(getattr(type(module), method), ()):
        if all([guard.holds(module) for guard in guards]):
            return found
    # Dynamo cannot trace a recording; `patch` has made those that a model needs.
    return None if torch.compiler.is_compiling() else _recorded(module, method)


def _recorded(module: nn.Module, method: str) -> Plan | None:
    with _LOCK:
        plans = _PLANS.setdefault(getattr(type(module), method), [])
        if len(plans) == _MOST:  # an attribute that has ever other values
            return None
        with neutral():
            recording, guards = record(module, method, is_whole)
        found = None if recording is None else _plan(recording)
        plans.append((guards, found))
        return found


def is_whole(module: nn.Module) -> bool:
    """Whether the module is patched as a whole, in training or evaluation."""
    return any(methods(module))


def methods(module: nn.Module) -> list[str]:
    """Names of the methods that compute an MLP."""
    found, training = [], module.training
    for method in METHODS:
        if hasattr(type(module), method):
            try:
                for module.training in (training, not training):
                    if plan(module, method) is not None:
                        found.append(method)
                        break
            finally:
                module.training = training
    return found


def _plan(recording: Recording) -> Plan | None:
    """The recording with its MLP in one step, None if there is no MLP."""
    steps = {step.out: step for step in recording.steps}
    uses: dict[Any, int] = {recording.result: 1}
    for step in recording.steps:
        for a in step.args:
            if type(a) is Ref:
                uses[a] = uses.get(a, 0) + 1
    if any(step.out not in uses for step in recording.steps):
        return None  # a call without a use in the result
    for step in recording.steps:
        found = _match(step, steps, uses) if step.kind == "linear" else None
        if found is None:
            continue
        layers, x, inside = found
        fused = Step("mlp", layers, (x,), step.out)
        rest = [fused if s is step else s for s in recording.steps if s is step or s not in inside]
        rest = _with_norms(rest, uses)
        return Plan(recording.inputs, tuple(rest), recording.result, recording.inlined)
    return None


def _match(last: Step, steps: dict[Any, Step], uses: dict[Any, int]) -> Any:
    inside: list[Step] = []

    def step(ref: Any, *kinds: str, used: int = 1) -> Step | None:
        found = steps.get(ref) if type(ref) is Ref else None
        if found is None or found.kind not in kinds or uses[ref] != used:
            return None
        inside.append(found)
        return found

    h, dropouts = last.args[0], []
    while drop := step(h, "dropout"):
        dropouts.append(drop.call)
        h = drop.args[0]
    activations = ("activation", *FUNCTIONS)
    act = step(h, *activations)
    product = None if act else step(h, "mul")
    up = None
    if product is not None:
        a, b = product.args
        act = step(a, *activations)
        up = b
        if act is None:
            act, up = step(b, *activations), a
    if act is None:
        return None
    common = {
        "act": act.call if act.kind == "activation" else act.kind,
        "dropouts": tuple(dropouts),
        "last": last.call,
        "gated": product is not None,
    }
    gate = act.args[0]
    if half := step(gate, "half"):
        other = step(up, "half")
        joined, index = half.args
        if other is None or other.args != (joined, 1 - index):
            return None
        both = step(joined, "linear", used=2)
        if both is None:
            return None
        return Mlp(first=(both.call,), swapped=index == 1, **common), both.args[0], inside
    first = step(gate, "linear")
    if first is None:
        return None
    layers = [first]
    if product is not None:
        second = step(up, "linear")
        if second is None or second.args != first.args:
            return None
        layers.append(second)
    return Mlp(first=tuple(x.call for x in layers), swapped=False, **common), first.args[0], inside


def _with_norms(steps: list[Step], uses: dict[Any, int]) -> list[Step]:
    """Steps where a norm takes the sum before it in."""
    result: list[Step] = []
    for step in steps:
        before = result[-1] if result else None
        if (
            step.kind == "norm"
            and before is not None
            and before.kind == "add"
            and step.args == (before.out,)
            and uses[before.out] == 1
        ):
            result[-1] = Step("add_norm", step.call, before.args, step.out)
        else:
            result.append(step)
    return result


def _ready(module: nn.Module, found: Plan, args: tuple[Any, ...]) -> Any:
    """Weights and activation of the MLP, None if a call has to run the module's own code."""
    for path in found.inlined:
        inner = at(module, path)
        if not unadorned(inner, ours(inner)):
            return None
    for a in args:
        if not isinstance(a, Tensor) or a.dim() == 0:
            return None
    step = next(s for s in found.steps if s.kind == "mlp")
    layers: Mlp = step.call
    by_name = isinstance(layers.act, str)
    act = Activation(layers.act) if by_name else activation(at(module, layers.act))  # type: ignore
    # Two weights save one more pass, the product with the gate. Where one weight gives gate and up,
    # its gradient is put together instead.
    separate = len(layers.first) - 1
    if act is None or not worth.mlp(args[0], act.operators - 1 + separate):
        return None
    for path in layers.dropouts:
        if not idle(at(module, path)):
            return None
    weights: list[Tensor | None] = []
    for path in (*layers.first, layers.last):
        pair = linear(at(module, path))
        if pair is None:
            return None
        weights += pair
    if not alike(args[0], *weights):
        return None
    if layers.gated and len(layers.first) == 1:
        w, b, *last = weights
        halves = w.chunk(2)  # type: ignore[union-attr]
        biases = (None, None) if b is None else b.chunk(2)
        if layers.swapped:
            halves, biases = halves[::-1], biases[::-1]
        weights = [halves[0], biases[0], halves[1], biases[1], *last]
    return weights, act.name


def _computed(module: nn.Module, found: Plan, ready: Any, args: tuple[Any, ...]) -> Any:
    values: dict[int, Any] = dict(enumerate(args))
    weights, act = ready
    for kind, call, refs, out in found.steps:
        given = [values[a] if type(a) is Ref else a for a in refs]
        if kind == "mlp":
            y = (gated_mlp if call.gated else mlp)(*given, *weights, activation=act)
        elif kind == "add_norm":
            y = add_norm(at(module, call), *given)[0]
        elif kind == "F.dropout":
            y = F.dropout(*given)
        elif isinstance(call, tuple):
            y = at(module, call)(*given)
        elif isinstance(call, str):
            y = FUNCTIONS[call](*given)
        else:
            y = call(*given)
        values[out] = y
    return values[found.result]
