"""Models on disk: Hugging Face directories, and directories in tfkern's own names.

Both hold config.json and safetensors, in one file or in several with an index. Nothing is pickled,
and nothing is fetched from a network.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tfkern.models.config import TransformerConfig
from tfkern.models.convert.bart import BART
from tfkern.models.convert.bert import BERT
from tfkern.models.convert.family import Family, State
from tfkern.models.convert.gpt import GPT1, GPT2
from tfkern.models.convert.t5 import T5
from tfkern.models.convert.vit import VIT
from tfkern.models.transformer import Transformer

FAMILIES = {family.model_type: family for family in (GPT1, GPT2, BERT, BART, T5, VIT)}
_OWN = "tfkern"  # the model_type of tfkern's own directories
_WEIGHTS = "model.safetensors"
_NEXT_SENTENCE = {"pretraining", "next_sentence"}


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **changes: Any,
) -> Transformer:
    """A model from a directory that `save`, or save_pretrained of transformers, wrote.

    Args:
        directory: with config.json, and model.safetensors or model.safetensors.index.json.
        dtype: of the parameters; as in the file if None.
        device: of the model.
        changes: fields of `TransformerConfig`: another head, for instance, whose weights are then
            as they are before training, dropout, or a shorter max_length.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: a directory without weights or in an unknown form, weights that lack, that are
            too many or do not fit, a dtype that is not floating, or changes that do not fit.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    directory = Path(directory)
    theirs = _read_config(directory)
    family = None
    if theirs.get("model_type") == _OWN:
        fields = {k: v for k, v in theirs.items() if k != "model_type"}
        try:
            config = TransformerConfig(**fields)
        except TypeError as error:
            raise ValueError(f"{directory / 'config.json'}: {error}") from None
    else:
        family = _family(theirs, directory)
        config = family.config(theirs)
    state = _read_weights(directory)
    if family is not None:
        config = family.fit(theirs, state)
    changed = replace(config, **changes)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Transformer(config).state_dict().items()}
    if family is not None:
        state = family.load(state, config, shapes)
    _check(state, shapes, directory)
    kind = dtype or next(x.dtype for x in state.values() if x.is_floating_point())
    model = Transformer(changed).to(kind)
    _adopt(model, state, new=_changed_heads(config, changed))
    return model.to(device).eval()


def save(
    model: Transformer,
    directory: str | Path,
    *,
    form: str = "huggingface",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and the weights into a directory, which is made if need be.

    Args:
        model: what is saved.
        directory: where to; files of these names, shards included, are replaced.
        form: "huggingface", which transformers reads, or "tfkern", which holds every model.
        shard_bytes: weights beyond this size are split into several files.

    Raises:
        ValueError: another form, or a model that no family of Hugging Face can express.
    """
    if form not in ("huggingface", _OWN):
        raise ValueError(f"form must be huggingface or tfkern, got {form!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    config, state = model.config, model.state_dict()
    if form == _OWN:
        description = {"model_type": _OWN, **asdict(config)}
    else:
        bare = replace(config, vocab_multiple=1)
        for name in ("embedding.weight", "vocabulary.weight"):
            if name in state:
                state[name] = state[name][: config.vocab_size]
        family, description = _expressed(bare)
        dtype = next(iter(state.values())).dtype
        description["torch_dtype"] = str(dtype).removeprefix("torch.")
        state = family.save(state, bare)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(directory, state, shard_bytes)
    (directory / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _expressed(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    for family in FAMILIES.values():
        description = family.describe(config)
        if description is not None:
            return family, description
    raise ValueError(
        f"none of {', '.join(FAMILIES)} has this configuration; form='tfkern' saves every model: "
        f"{config}"
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json")
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"{path} must hold an object, got {type(theirs).__name__}")
    return theirs


def _family(theirs: dict[str, Any], directory: Path) -> Family:
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{directory / 'config.json'} has model_type {kind!r}, expected one of "
            f"{', '.join(FAMILIES)}, {_OWN}"
        )
    return FAMILIES[kind]


def _read_weights(directory: Path) -> State:
    index = directory / f"{_WEIGHTS}.index.json"
    if (directory / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is no JSON with a weight_map of names to files") from None
    else:
        raise ValueError(f"{directory} has neither {_WEIGHTS} nor {index.name}")
    state: State = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of that directory")
        try:
            state |= load_file(directory / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{directory / name}: {error}") from None
    return state


def _write_weights(directory: Path, state: State, shard_bytes: int) -> None:
    shards = list(_shards(state, shard_bytes))
    names = [_WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = directory / f"{_WEIGHTS}.index.json"
    shards_before = directory.glob("model-?????-of-?????.safetensors")
    for old in [directory / _WEIGHTS, *shards_before, index]:
        old.unlink(missing_ok=True)  # what another save left would be read with these
    for name, shard in zip(names, shards, strict=True):
        contiguous = {k: x.detach().contiguous().cpu() for k, x in shard.items()}
        save_file(contiguous, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        size = sum(x.nbytes for x in state.values())
        content = {"metadata": {"total_size": size}, "weight_map": where}
        index.write_text(json.dumps(content, indent=2) + "\n")


def _shards(state: State, limit: int) -> Iterator[State]:
    shard: State = {}
    size = 0
    for name, x in state.items():
        if shard and size + x.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = x
        size += x.nbytes
    yield shard


def _check(state: State, shapes: dict[str, torch.Size], directory: Path) -> None:
    if missing := sorted(set(shapes) - set(state)):
        raise ValueError(f"{directory}: the weights lack {', '.join(missing[:3])}")
    if excess := sorted(set(state) - set(shapes)):
        raise ValueError(f"{directory}: unexpected weights {', '.join(excess[:3])}")
    for name, x in state.items():
        if x.shape != shapes[name]:
            raise ValueError(
                f"{directory}: {name} has shape {tuple(x.shape)}, expected {tuple(shapes[name])}"
            )


def _changed_heads(old: TransformerConfig, new: TransformerConfig) -> tuple[str, ...]:
    """The parts of a model that are not those of the file."""
    heads, parts = {old.head, new.head}, []
    if len(heads) > 1 and not heads <= {"mlm", "pretraining"}:
        parts.append("vocabulary.")
    if old.classes != new.classes or len(heads) > 1 and not heads <= _NEXT_SENTENCE:
        parts.append("classifier.")
    return (*parts, "pooler.") if old.pooler != new.pooler else tuple(parts)


@torch.no_grad()
def _adopt(model: Transformer, state: State, new: tuple[str, ...]) -> None:
    """Copies the weights of a file into a model whose head may be another."""
    for name, x in model.state_dict().items():
        if name.startswith(new):
            continue
        if name not in state:
            raise ValueError(f"the changes need {name}, which is not in the file")
        theirs = state[name]
        if name in ("embedding.weight", "vocabulary.weight"):
            rows = min(len(x), len(theirs))  # one of them is padded
            x, theirs = x[:rows], theirs[:rows]
        elif name.endswith(".positions.weight") and len(x) < len(theirs):
            theirs = theirs[: len(x)]  # a shorter max_length
        if x.shape != theirs.shape:
            raise ValueError(
                f"the changes need {name} of shape {tuple(x.shape)}, the file has "
                f"{tuple(theirs.shape)}"
            )
        x.copy_(theirs)


__all__ = ["FAMILIES", "load", "save"]
