"""The model that a recipe trains: fresh, or from a folder, with adapters and frozen parts."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfkern import files, models
from tfkern.models import Transformer, TransformerConfig
from tfkern.models.adapters import adapt, unload
from tfkern.nn.lora import LoRALinear, has_adapters
from tfkern.train.freezing import freeze
from tfkern.train.parallel import gather
from tfkern.train.parallel.model import Parallel
from tfkern.train.policy import ActorCritic, critic_of
from tfkern.train.recipe import Recipe
from tfkern.train.tasks import Task

_TOKENS = ("pad_token", "start_token", "end_token", "forced_first", "forced_last")
_HEADS = ("head", "classes")  # what a task changes in a model that is there already
_SIZE = 2**24  # tokens of a vocabulary that is not known yet


def model_for(recipe: Recipe, found: Task, device: torch.device, critic: bool) -> Any:
    """The model that a recipe trains, on a device.

    Args:
        found: the task of the recipe.
        critic: whether the objective trains a critic beside it. The critic has the weights of the
            reward model, if there is one.

    Raises:
        ValueError: fields of a model, of adapters or names of parameters that do not fit.
    """
    folder = recipe.model.get("folder")
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        if folder is None:
            model = Transformer(_config(recipe, found))
        else:
            model = _loaded(Path(folder), recipe, found)
        model.recompute = recipe.recompute
        if model.vocabulary is not None:  # its logits would take most of the memory
            model.vocabulary.deferred = True
        beside = critic_of(_judge(recipe, model)) if critic else None
        if recipe.lora is not None:
            model = _adapted(model, recipe)
    freeze(model, recipe.freeze)
    whole = model if beside is None else ActorCritic(model, beside)
    return whole.to(device)


def policy_of(model: nn.Module) -> Any:
    """The model that writes, of one that may have a critic beside it or be on many processes."""
    inner = model.module if isinstance(model, Parallel) else model
    return inner.policy if isinstance(inner, ActorCritic) else inner


def gathered_policy(model: nn.Module) -> Any:
    """`policy_of` a model with the weights that it has now, in the first process."""
    inner = model.module if isinstance(model, Parallel) else model
    # A model with a critic is whole in each process.
    return inner.policy if isinstance(inner, ActorCritic) else gather(model)


def unadapted(model: Transformer) -> Transformer:
    """A model without adapters that computes the same: itself if it has none."""
    return unload(copy.deepcopy(model)) if has_adapters(model) else model


def check_model(recipe: Recipe) -> None:
    """Raises ValueError for fields of a model that are wrong whatever the data are."""
    # The task has its say on the architecture, and on the number of tokens.
    found = {"max_length": recipe.length, "vocab_size": _SIZE}
    if "folder" in recipe.model:
        models.convert.read_config(recipe.model["folder"])
        return
    if "preset" in recipe.model or "patch_size" in recipe.model:
        found = {}
    told = {**found, **recipe.model, "head": "none"}
    errors = []
    for architecture in ("decoder", "encoder", "encoder_decoder"):
        try:
            _built({"architecture": architecture, **told})
            return
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _adapted(model: Transformer, recipe: Recipe) -> Transformer:
    """The model with adapters. A classifier that the folder does not have is trained whole, unless
    the recipe says what is: as it was drawn it would tell nothing."""
    told = dict(recipe.lora or {})
    if model.classifier is not None and "folder" in recipe.model:
        before = models.convert.read_config(recipe.model["folder"])
        if (before.head, before.classes) != (model.config.head, model.config.classes):
            told.setdefault("trained", ["classifier"])
    try:
        adapted = adapt(model, **told)
        for module in adapted.modules():  # the model that is saved has adapters in its weights
            if isinstance(module, LoRALinear):
                module.check_mergeable()
        return adapted
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {files.one_line(error)}") from None


def _judge(recipe: Recipe, policy: Transformer) -> Transformer:
    """The model whose weights a critic begins with."""
    reward = recipe.rollouts.get("reward")
    if not isinstance(reward, str) or not Path(reward).is_dir():
        return policy
    return models.load(reward, dtype=torch.float32)


def _config(recipe: Recipe, found: Task) -> TransformerConfig:
    """The configuration of the model: that of the task, with the recipe's fields."""
    ours = recipe.model
    least, size = found.config.get("vocab_size") or 0, ours.get("vocab_size")
    if isinstance(size, int) and size < least:
        raise ValueError(f"model: vocab_size is {size}, and the tokenizer has {least} tokens")
    needed = {key: found.config[key] for key in ("architecture", "head") if key in found.config}
    for key, value in needed.items():
        if ours.get(key, value) != value:
            raise ValueError(
                f"model: {recipe.task} needs {key} {value!r}, got {files.shown(ours[key])}"
            )
    name = ours.get("preset")
    if name in models.presets():
        architecture = models.preset(name).architecture
        if needed.get("architecture", architecture) != architecture:
            raise ValueError(
                f"model: {recipe.task} needs architecture {needed['architecture']!r}, and {name} "
                f"is {architecture!r}"
            )
    # The tokens of a preset are those of its own tokenizer.
    tokens = dict.fromkeys(_TOKENS if name is not None else ())
    return _built({**tokens, **found.config, **ours})


def _built(told: dict[str, Any]) -> TransformerConfig:
    """The configuration with these fields, or that of a preset with these changes."""
    told = dict(told)
    name = told.pop("preset", None)
    known = {f.name for f in fields(TransformerConfig)}
    if unknown := told.keys() - known:
        raise ValueError(f"model: {files.shown(min(unknown))} is no field of TransformerConfig")
    missing = [] if name is not None else sorted({"dim", "layers", "heads"} - told.keys())
    if missing:
        raise ValueError(f"model needs {', '.join(missing)}, or a preset")
    try:
        return TransformerConfig(**told) if name is None else models.preset(name, **told)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {files.one_line(error)}") from None


def _loaded(folder: Path, recipe: Recipe, found: Task) -> Transformer:
    """The model of a folder, with the head that the task needs."""
    changes = {name: found.config[name] for name in _HEADS if name in found.config}
    changes |= {name: value for name, value in recipe.model.items() if name != "folder"}
    config = models.convert.read_config(folder)
    needed = found.config.get("architecture", config.architecture)
    if config.architecture != needed:
        raise ValueError(
            f"model: {recipe.task} needs architecture {needed!r}, and {folder} is "
            f"{config.architecture!r}"
        )
    size, context = found.config.get("vocab_size") or 0, config.max_length
    if size > (config.vocab_size or 0):
        changes["vocab_size"] = size  # the vectors of new tokens are drawn
    if context is not None and recipe.length > context and "max_length" not in changes:
        raise ValueError(f"length = {recipe.length} is more than {folder} takes: {context}")
    try:
        return models.load(folder, dtype=torch.float32, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {files.one_line(error)}") from None
