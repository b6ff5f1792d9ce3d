"""The numbers of a model's adapters, apart from the model."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tfkern.models.adapters.place import (
    UNTRAINED,
    check_target,
    layers,
    put,
    train_whole,
    trained,
)
from tfkern.models.convert.store import FLOATING, State
from tfkern.nn.lora import LoRALinear, check_options, sizes


@dataclass
class LayerNumbers:
    """The adapter of one layer, see `LoRALinear`.

    Attributes:
        a: lora_A (rank, in).
        b: lora_B (out, rank).
        alpha: numerator of the scaling.
        magnitude: (out,), or None without DoRA.
    """

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class Numbers:
    """All adapters of a model.

    Attributes:
        layers: by name of the layer.
        trained: the state dicts of modules that are trained whole, by name of the module.
        rslora, dropout: of all layers.
    """

    layers: dict[str, LayerNumbers]
    trained: dict[str, State] = field(default_factory=dict)
    rslora: bool = False
    dropout: float = 0.0

    @property
    def dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers.values())

    def scaling(self, layer: LayerNumbers) -> float:
        return layer.alpha / (math.sqrt(layer.rank) if self.rslora else layer.rank)

    def alpha(self, scaling: float, rank: int) -> float:
        """The alpha with which an adapter of this rank has the scaling."""
        return scaling * (math.sqrt(rank) if self.rslora else rank)


def numbers_of(model: nn.Module) -> Numbers:
    """The numbers of the adapters in a model, whole on each process if they are spread over many.

    Raises:
        ValueError: no adapters, or layers whose options differ in more than rank and alpha.
    """
    model = _inner(model)
    found = layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters")
    kinds = {(m.rslora, m.magnitude is not None, m.dropout) for m in found.values()}
    if len(kinds) > 1:
        raise ValueError("adapters of one model must agree in rslora, dora and dropout")
    ((rslora, _, dropout),) = kinds
    each = {
        name: LayerNumbers(
            _whole(m.lora_A), _whole(m.lora_B), m.alpha,
            None if m.magnitude is None else _whole(m.magnitude),
        )
        for name, m in found.items()
    }  # fmt: skip
    own: dict[str, State] = {}
    for name in trained(model):
        state = model.get_submodule(name).state_dict()
        inner = f"{UNTRAINED}."
        own[name] = {n: _whole(x) for n, x in state.items() if not n.startswith(inner)}
    return Numbers(each, own, rslora, dropout)


def put_numbers(model: nn.Module, numbers: Numbers) -> None:
    """Puts adapters with these numbers into a model without any, and freezes all else.

    Raises:
        ValueError: numbers that do not fit the model, which is then as it was.
    """
    _check(model, numbers)
    model.requires_grad_(False)
    train_whole(model, list(numbers.trained))
    for name, theirs in numbers.layers.items():
        layer = LoRALinear(
            model.get_submodule(name), theirs.rank, theirs.alpha, dropout=numbers.dropout,
            rslora=numbers.rslora, dora=theirs.magnitude is not None,
        )  # fmt: skip
        for own, x in (("lora_A", theirs.a), ("lora_B", theirs.b), ("magnitude", theirs.magnitude)):
            if x is not None:
                like = layer._parameters[own]
                assert like is not None
                dtype = torch.promote_types(like.dtype, x.dtype)  # it holds all bits of the file
                new = x.to(like.device, dtype, copy=True).contiguous()
                layer._parameters[own] = nn.Parameter(new)
        put(model, name, layer)
    with torch.no_grad():
        for name, state in numbers.trained.items():
            module = model.get_submodule(name)
            for n, x in module.state_dict().items():
                if n in state:
                    x.copy_(state[n])


def _check(model: nn.Module, numbers: Numbers) -> None:
    every = dict(model.named_modules())
    for name, theirs in numbers.layers.items():
        if name not in every:
            raise ValueError(f"{name} is no layer of the {type(model).__name__}")
        check_target(model, name, theirs.magnitude is not None)
        layer = every[name]
        check_options(theirs.rank, theirs.alpha, numbers.dropout)
        columns, rows = sizes(layer)
        expected = {
            "lora_A": (theirs.rank, columns),
            "lora_B": (rows, theirs.rank),
            "lora_magnitude_vector": (rows,),
        }
        got = {"lora_A": theirs.a, "lora_B": theirs.b, "lora_magnitude_vector": theirs.magnitude}
        for kind, x in got.items():
            if x is None:
                continue
            if x.dtype not in FLOATING:
                raise ValueError(f"{kind} of {name} has type {x.dtype}, expected a floating one")
            if x.shape != expected[kind]:
                raise ValueError(
                    f"{kind} of {name} has shape {tuple(x.shape)}, expected {expected[kind]}"
                )
    for name, state in numbers.trained.items():
        if name not in every:
            raise ValueError(f"{name} is no module of the {type(model).__name__}")
        ours = every[name].state_dict()
        if differing := state.keys() ^ ours.keys():
            raise ValueError(f"{min(differing)} of {name} is only in one of model and file")
        for n, x in state.items():
            if x.shape != ours[n].shape:
                raise ValueError(
                    f"{n} of {name} has shape {tuple(x.shape)}, expected {tuple(ours[n].shape)}"
                )


def _inner(model: nn.Module) -> nn.Module:
    """The model within what torch.compile, DDP or `parallelise` has put around it."""
    children = model._modules
    while len(children) == 1 and children.keys() <= {"_orig_mod", "module"}:
        model = next(iter(model.children()))
        children = model._modules
    return model


def _whole(x: Tensor) -> Tensor:
    whole = getattr(x, "full_tensor", None)  # of a DTensor
    return (x if whole is None else whole()).detach()
