"""Adapters in a model: put in place, left out for a while, merged, and taken out again."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from tfkern.nn.lora import LoRALinear, check_options, has_adapters, has_weight, is_linear

Model = TypeVar("Model", bound=nn.Module)
ALL_LINEAR = "all-linear"
UNTRAINED = "untrained"  # the child of a trained module that holds it as it was
_HEADS = ("classifier", "score", "qa_outputs")  # names of output layers
_SHOWN = 12


def adapt(
    model: Model,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    trained: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Model:
    """Puts adapters on linear layers of a model, in place, and freezes all else (LoRA, Hu et al.
    2021).

        model = adapt(load("gpt2"), ["qkv_by_head", "out"], rank=8)
        for record in steps(model, batches, CrossEntropy(), adamw(model, 1e-4), stop=1000): ...
        save_adapter(model, "adapter", base="gpt2")

    Outputs are the same bits as before, until the adapters are trained. A is drawn from torch's
    generator. The model may be a `Transformer`, one of transformers, before or after
    `tfkern.integrations.hf.patch`, or any other. Adapt it before it is compiled or spread over
    processes, and after its weights are made int8 (`tfkern.models.quantize`).

    Args:
        model: its layers are changed in place.
        targets: which layers. A list has names, each of which stands for the layers that have this
            name or one that ends in "." and it; a string is a regular expression for whole names;
            "all-linear" means all linear layers but the output head. These are the target_modules
            of peft.
        rank, alpha, dropout, rslora, dora, dtype: of the adapters, see `tfkern.nn.LoRALinear`.
        trained: names, as in a list of targets, of modules that are trained whole, such as a new
            classifier (modules_to_save of peft). Each keeps a copy of itself as it was, for
            `without_adapters`, as its child "untrained".

    Returns:
        The model.

    Raises:
        ValueError: options out of their range, names that fit no module, targets that are no linear
            layers or that are called by code that reads their weight, layers in several places of
            the model, or a model that has adapters already or is spread over processes. The model
            is then as it was.
    """
    check_options(rank, alpha, dropout, dtype)
    for flag, value in (("rslora", rslora), ("dora", dora)):
        if not isinstance(value, bool):
            raise ValueError(f"{flag} must be true or false, got {value!r}")
    check_free(model)
    whole = _trained_names(model, trained)
    names = [name for name in _targets(model, targets) if not _within(name, whole)]
    if not names:
        raise ValueError(f"targets {_told(targets)} fit no layer beside those in trained")
    for name in names:
        check_target(model, name, dora)
    model.requires_grad_(False)
    train_whole(model, whole)
    for name in names:
        base = model.get_submodule(name)
        options: dict[str, Any] = {"rslora": rslora, "dora": dora, "dtype": dtype}
        put(model, name, LoRALinear(base, rank, alpha, dropout=dropout, **options))
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters, and of modules that are trained whole, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in layers(model).items():
        found |= {f"{name}.{n}": p for n, p in layer.named_parameters(recurse=False)}
    for name in trained(model):
        module = model.get_submodule(name)
        ours = dict(module.named_parameters())
        found |= {
            f"{name}.{n}": p for n, p in ours.items() if not n.startswith(f"{UNTRAINED}.")
        }  # fmt: skip
    return found


def merge(model: Model) -> Model:
    """Merges all adapters into weights that calls then multiply with, and returns the model.

    These take memory beside the base, which stays as it is: `unmerge` brings back the very bits,
    and saving saves base and adapters apart. To have plain layers instead, `unload` the model.

    Raises:
        ValueError: layers without a weight of floating numbers, such as int8 ones, or weights that
            are spread over processes. Nothing is merged then.
    """
    found = _adapted(model)
    for name, layer in found.items():
        _check_mergeable(name, layer)
    for layer in found.values():
        layer.merge()
    return model


def unmerge(model: Model) -> Model:
    """Takes `merge` back, and returns the model."""
    for layer in _adapted(model).values():
        layer.unmerge()
    return model


def unload(model: Model, *, merge: bool = True) -> Model:
    """Puts plain layers back in the place of adapted ones, and returns the model.

    Parameters stay frozen: `model.requires_grad_()` makes them train again.

    Args:
        merge: whether the layers have the adapters in their weights, and modules that are trained
            whole what they have learnt. If False, the model is the one before `adapt`.

    Raises:
        ValueError: as `merge`, or a weight that another layer has, too. The model is then as it
            was.
    """
    found = _adapted(model)
    if merge:
        places = _places(model)
        for name, layer in found.items():
            _check_mergeable(name, layer)
            if shared := places[id(layer.base.weight)] - {f"{name}.base.weight"}:
                raise ValueError(
                    f"{name} has its weight in common with {min(shared)}, which a merged one would "
                    "part: unload with merge=False"
                )
    for name, layer in found.items():
        base: Any = layer.base
        if merge:
            layer.merge()
            assert layer.merged is not None
            base.weight = layer.merged.get_parameter("weight")
        put(model, name, base)
    for name in trained(model):
        module = model.get_submodule(name)
        before = module.get_submodule(UNTRAINED)
        delattr(module, UNTRAINED)
        put(model, name, module.requires_grad_(False) if merge else before)
    return model


@contextmanager
def without_adapters(model: Model) -> Iterator[Model]:
    """A context in which the model computes what it computed before `adapt`, such as the reference
    of DPO. No weight is copied, and contexts may be nested.

    Raises:
        ValueError: the model has no adapters.
    """
    found = list(_adapted(model).values())
    was = [layer.enabled for layer in found]
    swapped = {name: model.get_submodule(name) for name in trained(model)}
    try:
        for layer in found:
            layer.enabled = False
        for name, module in swapped.items():
            put(model, name, module.get_submodule(UNTRAINED))
        yield model
    finally:
        for layer, enabled in zip(found, was, strict=True):
            layer.enabled = enabled
        for name, module in swapped.items():
            put(model, name, module)


class Layout(NamedTuple):
    """Where a model, or a part of it, has which adapters.

    Attributes:
        layers: the options of each `LoRALinear`, by name.
        trained: the names of modules that are trained whole.
    """

    layers: dict[str, dict[str, Any]]
    trained: list[str]


def layout(model: nn.Module) -> Layout:
    """The layout of a model's adapters, which is empty if there are none. Names are without the
    marks that torch.compile leaves on modules."""
    found = {
        _unmarked(name): {
            "rank": m.rank, "alpha": m.alpha, "dropout": m.dropout, "rslora": m.rslora,
            "dora": m.magnitude is not None, "dtype": m.lora_A.dtype,
        }
        for name, m in layers(model).items()
    }  # fmt: skip
    return Layout(found, [_unmarked(name) for name in trained(model)])


def lay_out(model: nn.Module, *parts: Layout) -> None:
    """Gives a model without adapters fresh ones of these layouts, which those of its parts are."""
    if not any(part.layers for part in parts):
        return
    model.requires_grad_(False)
    for part in parts:
        train_whole(model, part.trained)
        for name, options in part.layers.items():
            put(model, name, LoRALinear(model.get_submodule(name), **options))


# The functions below are for the other files of this folder, too.


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trained(model: nn.Module) -> list[str]:
    """The names of modules that are trained whole."""
    return [name for name, m in model.named_modules() if UNTRAINED in m._modules]


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of that name."""
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._modules[own] = module


def train_whole(model: nn.Module, names: Sequence[str]) -> None:
    """Makes these modules train, and keeps copies of them as they are."""
    for name in names:
        module = model.get_submodule(name)
        before = copy.deepcopy(module)
        module.requires_grad_()
        module.add_module(UNTRAINED, before)


def check_free(model: nn.Module) -> None:
    """Raises ValueError if the model has adapters, or cannot have any."""
    if has_adapters(model) or trained(model):
        raise ValueError("the model has adapters already: unload it before")
    if any(hasattr(p, "placements") for p in model.parameters()):  # DTensors
        raise ValueError("the model is spread over processes: adapt it before")


def check_target(model: nn.Module, name: str, dora: bool) -> None:
    """Raises ValueError if no adapter can be put on the module of that name."""
    layer: Any = model.get_submodule(name)
    if not is_linear(layer):
        kind = type(layer).__name__
        raise ValueError(f"targets: {name} is no linear layer, but {kind}")
    if dora and not has_weight(layer):
        raise ValueError(f"dora needs weights of floating numbers, and those of {name} are not")
    parent = model.get_submodule(name.rpartition(".")[0])
    readers: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    for reader in readers:
        if isinstance(parent, reader) and type(parent).forward is reader.forward:
            raise ValueError(
                f"targets: the {reader.__name__} around {name} reads its weight without a call, so "
                "that an adapter would be left out"
            )
    every = dict(model.named_modules(remove_duplicate=False))
    if len(same := [n for n, m in every.items() if m is layer]) > 1:
        raise ValueError(f"targets: {' and '.join(same)} are one layer, which takes no adapter")


def _unmarked(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _trained_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    if not isinstance(names, list | tuple):
        raise ValueError(f"trained must be a list of names, got {names!r}")
    every = dict(model.named_modules())
    found = _named(list(every), names, "trained")
    places = _places(model)
    for name in found:
        if isinstance(every[name], nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"trained: {name} is a list of modules: give the names of these")
        if _within(name, [n for n in found if n != name]):
            raise ValueError(f"trained: {name} is within another one")
        for p in every[name].parameters():
            if others := [n for n in places[id(p)] if not n.startswith(f"{name}.")]:
                raise ValueError(f"trained: {name} has a parameter in common with {min(others)}")
    return found


def _targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the modules that targets mean."""
    every = [name for name, _ in model.named_modules() if name]
    linear = [name for name in every if is_linear(model.get_submodule(name))]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layers that can have adapters")
    if not isinstance(targets, str | list | tuple):
        raise ValueError(f"targets must be a string or a list of names, got {targets!r}")
    if not isinstance(targets, str):
        return _named(every, targets, "targets", linear)
    if targets == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [name for name in linear if model.get_submodule(name) is output]
        heads += [name for name in _HEADS if hasattr(model, name)]
        return [name for name in linear if name not in heads]
    try:
        found = [name for name in every if re.fullmatch(targets, name)]
    except re.error as error:
        raise ValueError(f"targets {targets!r} is no regular expression: {error}") from None
    if not found:
        raise ValueError(f"targets {targets!r} fits no module; {_layer_names(linear)}")
    return found


def _named(
    every: Sequence[str], names: Sequence[str], what: str, linear: Sequence[str] = ()
) -> list[str]:
    """The modules that have one of these names, or one that ends in "." and it.

    Raises:
        ValueError: a name without a module.
    """
    for name in names:
        if not isinstance(name, str) or not name or not any(fits(n, [name]) for n in every):
            told = _layer_names(linear or every)
            raise ValueError(f"{what} {_told(name)} fits no module; {told}")
    return [n for n in every if n and fits(n, names)]


def fits(name: str, names: Sequence[str]) -> bool:
    """Whether a module of this name is meant by one of the names of a list."""
    return any(name == n or name.endswith(f".{n}") for n in names)


def _within(name: str, outer: Sequence[str]) -> bool:
    return any(name == n or name.startswith(f"{n}.") for n in outer)


def _layer_names(names: Sequence[str]) -> str:
    """Last parts of names, as a sentence."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
    more = f" and {len(last) - _SHOWN} more" if len(last) > _SHOWN else ""
    return f"there are {', '.join(last[:_SHOWN])}{more}"


def _told(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else str(list(targets))


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, of which there must be some."""
    found = layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters")
    return found


def _check_mergeable(name: str, layer: LoRALinear) -> None:
    try:
        layer.check_mergeable()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _places(model: nn.Module) -> dict[int, set[str]]:
    """All names of each parameter, by its identity."""
    found: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), set()).add(name)
    return found
