"""Adapters on disk, in the format of peft: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tfkern import files
from tfkern.files import shown
from tfkern.models.adapters import rows
from tfkern.models.adapters.numbers import LayerNumbers, Numbers, numbers_of, put_numbers
from tfkern.models.adapters.place import ALL_LINEAR, check_free, fits
from tfkern.models.convert import store
from tfkern.models.transformer import Transformer
from tfkern.nn.lora import LoRALinear

Model = TypeVar("Model", bound=nn.Module)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OWN, _HUGGINGFACE = "own", "huggingface"
_KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
_KINDS["lora_magnitude_vector.weight"] = "magnitude"  # as earlier versions of peft wrote it

# Fields that say how an adapter was made or where it was put, which the weights tell, too.
_ABOUT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Ways to begin that leave the base as it is. Others, such as PiSSA, are told by its weights alone.
_BEGINNINGS = (True, False, None, "gaussian", "eva")


def save_adapter(
    model: nn.Module, folder: str | Path, *, base: str | None = None, form: str = _OWN
) -> None:
    """Writes the adapters of a model, without its base, into a folder, which is made if need be.

    `peft.PeftModel.from_pretrained(base_model, folder)` and `load_adapter` read it. All processes
    of a model that is spread over many have to call this, and the first one writes.

    Args:
        model: with adapters, see `adapt`; merged or not.
        folder: where to. Files of these names are replaced.
        base: name or path of the base model, which is noted for readers.
        form: "own" for the names that the layers have in this model, which may be one of
            transformers; "huggingface" for a `Transformer`, with the names that the layers have in
            the model of its family that transformers makes.

    Raises:
        ValueError: a model without adapters, another form, or adapters that no model of Hugging
            Face can have.
        OSError: the files cannot be written.
    """
    if form not in (_OWN, _HUGGINGFACE):
        raise ValueError(f"form must be {_OWN} or {_HUGGINGFACE}, got {form!r}")
    numbers = numbers_of(model)
    transposed = any(m.transposed for m in model.modules() if isinstance(m, LoRALinear))
    if form == _HUGGINGFACE:
        if not isinstance(model, Transformer):
            told = type(model).__name__
            raise ValueError(f"form {form} needs a tfkern.models.Transformer, got {told}")
        numbers, transposed = rows.to_huggingface(model, numbers)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_rank() > 0:
            return
    config = _config(numbers, base, transposed)
    state: dict[str, Tensor] = {}
    for name, layer in numbers.layers.items():
        state[f"{_PREFIX}{name}.lora_A.weight"] = layer.a
        state[f"{_PREFIX}{name}.lora_B.weight"] = layer.b
        if layer.magnitude is not None:
            state[f"{_PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
    for name, own in numbers.trained.items():
        state |= {f"{_PREFIX}{name}.{n}": x for n, x in own.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.beside(folder) as new:
        store.write_file(state, new.folder / WEIGHTS, {"format": "pt"})
        (new.folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        new.settle()
        new.place(WEIGHTS, CONFIG)


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Puts the adapters of a folder on a model without any, in place, and freezes all else.

    Layers have the names of this model, or, if it is a `Transformer`, those of the model of its
    family that transformers makes. The layer that makes queries, keys and values here then gets one
    adapter that computes what those of the three layers there do, of at most the sum of their
    ranks.

    Args:
        model: the base that the adapters were trained on.
        folder: what `save_adapter`, or save_pretrained of peft, wrote.

    Returns:
        The model, ready to go on training. Call `merge` or `unload` for inference.

    Raises:
        ValueError: files that cannot be read or do not fit the model, another kind of adapter, or
            options that change what it computes and that `LoRALinear` does not have. The model is
            then as it was.
    """
    check_free(model)
    folder = Path(folder)
    config = files.read_object(folder / CONFIG)
    try:
        _check_config(config)
        numbers = _numbers(config, store.read_file(folder / WEIGHTS))
        names = {name for name, _ in model.named_modules()}
        there = numbers.layers.keys() | numbers.trained.keys()
        foreign = not there <= names
        if foreign and isinstance(model, Transformer):
            numbers = rows.from_huggingface(model, numbers)
        _check_layout(model, config, numbers, foreign)
        put_numbers(model, numbers)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model


def _config(numbers: Numbers, base: str | None, transposed: bool) -> dict[str, Any]:
    """What adapter_config.json says."""
    each = numbers.layers
    rank = Counter(layer.rank for layer in each.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in each.values()).most_common(1)[0][0]
    ranks = {name: layer.rank for name, layer in each.items()}
    alphas = {name: _plain(layer.alpha) for name, layer in each.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": numbers.dropout,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": list(each),
        "modules_to_save": list(numbers.trained) or None,
        "use_rslora": numbers.rslora,
        "use_dora": numbers.dora,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
    }


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Regular expressions for the names of layers that have another value than most. Each fits one
    name: without a "^" it would also fit those that end in this name."""
    return {f"^{re.escape(name)}": x for name, x in values.items() if x != default}


def _plain(x: float) -> float:
    """A whole number as an int, which is what peft declares."""
    return int(x) if x == int(x) else x


def _check_config(config: dict[str, Any]) -> None:
    """Raises ValueError for options that change what adapters compute."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {shown(config.get('peft_type'))}, expected LORA")
    for name, value in config.items():
        if name == "init_lora_weights":
            known = value in _BEGINNINGS
        elif name == "bias":
            known = value == "none"
        else:
            known = name in _ABOUT or not value
        if not known:
            raise ValueError(f"{name} = {shown(value)} is not supported")
    for name in ("r", "lora_alpha"):
        if type(config.get(name)) not in (int, float):
            raise ValueError(f"{name} must be a number, got {shown(config.get(name))}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or any(
            type(value) not in (int, float) for value in pattern.values()
        ):
            raise ValueError(f"{name} must have numbers by name, got {shown(pattern)}")


def _numbers(config: dict[str, Any], state: store.State) -> Numbers:
    """The numbers of adapters, by the names of the file."""
    found: dict[str, dict[str, Tensor]] = {}
    others: store.State = {}
    for name, x in state.items():
        if not name.startswith(_PREFIX):
            raise ValueError(f"{shown(name)} does not begin with {_PREFIX}")
        name = name.removeprefix(_PREFIX)
        kind = next((k for k in _KINDS if name.endswith(f".{k}")), None)
        if kind is not None:
            found.setdefault(name.removesuffix(f".{kind}"), {})[_KINDS[kind]] = x
        elif ".lora_" in name:
            raise ValueError(f"{shown(name)} is not supported: adapters are of linear layers")
        else:
            others[name] = x
    if not found:
        raise ValueError("there are no adapters of linear layers")
    dora = bool(config.get("use_dora"))
    layers = {}
    for name, parts in found.items():
        expected = {"a", "b", "magnitude"} if dora else {"a", "b"}
        if parts.keys() != expected:
            told = {ours: theirs for theirs, ours in reversed(_KINDS.items())}
            differing = min(told[kind] for kind in parts.keys() ^ expected)
            raise ValueError(f"{name} has no {differing}, or should not have one")
        rank = _by_pattern(config, "rank_pattern", "r", name)
        if parts["a"].dim() != 2 or parts["a"].shape[0] != rank:
            raise ValueError(
                f"lora_A of {name} has shape {tuple(parts['a'].shape)}, and its rank is {rank}"
            )
        if not _is_target(config.get("target_modules"), name):
            raise ValueError(f"target_modules do not name {name}, which has an adapter")
        layers[name] = LayerNumbers(
            alpha=_by_pattern(config, "alpha_pattern", "lora_alpha", name), **parts
        )
    trained: dict[str, store.State] = {}
    for name, x in others.items():
        parts_of = name.split(".")
        outer = (".".join(parts_of[:i]) for i in range(1, len(parts_of)))
        module = next((m for m in outer if fits(m, config.get("modules_to_save") or [])), None)
        if module is None:
            raise ValueError(f"{shown(name)} is neither of an adapter nor of modules_to_save")
        trained.setdefault(module, {})[name.removeprefix(f"{module}.")] = x
    dropout = config.get("lora_dropout") or 0.0
    return Numbers(layers, trained, bool(config.get("use_rslora")), dropout)


def _by_pattern(config: dict[str, Any], pattern: str, default: str, name: str) -> Any:
    """A number of a layer: the first in the pattern whose key fits the end of its name."""
    for key, value in (config.get(pattern) or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{pattern}: {shown(key)}: {error}") from None
    return config[default]


def _is_target(targets: Any, name: str) -> bool:
    if not isinstance(targets, str):
        return isinstance(targets, list) and fits(name, targets)
    try:
        return targets.lower() == ALL_LINEAR or re.fullmatch(targets, name) is not None
    except re.error as error:
        raise ValueError(f"target_modules {shown(targets)}: {error}") from None


def _check_layout(
    model: nn.Module, config: dict[str, Any], numbers: Numbers, foreign: bool
) -> None:
    """Raises ValueError if the file takes weights for (in, out), and those of the model are not.

    The opposite tells nothing: peft corrects it as it puts adapters in place.
    """
    if not config.get("fan_in_fan_out") or foreign:
        return
    if not any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in numbers.layers):
        raise ValueError("fan_in_fan_out is true, and no weight of the layers is (in, out)")
