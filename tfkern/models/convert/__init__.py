"""Models on disk: Hugging Face directories, and directories in tfkern's own names.

Both hold config.json and safetensors, in one file or in several with an index. Nothing is pickled,
and nothing is fetched from a network.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tfkern.files import read_object, shown
from tfkern.models.config import TransformerConfig
from tfkern.models.convert import store
from tfkern.models.convert.bart import BART, MARIAN, MBART, PEGASUS
from tfkern.models.convert.bert import BERT
from tfkern.models.convert.distilbert import DISTILBERT
from tfkern.models.convert.earlier import today
from tfkern.models.convert.family import Family
from tfkern.models.convert.gemma import GEMMA, GEMMA2, GEMMA3
from tfkern.models.convert.gpt import GPT1, GPT2
from tfkern.models.convert.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from tfkern.models.convert.neox import GPT_NEOX
from tfkern.models.convert.opt import OPT
from tfkern.models.convert.roberta import ROBERTA, XLM_ROBERTA
from tfkern.models.convert.store import FLOATING, State
from tfkern.models.convert.t5 import MT5, T5
from tfkern.models.convert.vit import VIT
from tfkern.models.transformer import Transformer
from tfkern.nn.lora import has_adapters

_ALL = (
    GPT1, GPT2, DISTILBERT, BERT, ROBERTA, XLM_ROBERTA, BART, MBART, MARIAN, PEGASUS, T5, MT5, VIT,
    LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA, GEMMA2, GEMMA3, PHI3, GPT_NEOX, OPT,
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _ALL}
_OWN = "tfkern"  # the model_type of tfkern's own directories
_SAME_VOCABULARY = ({"mlm", "pretraining"}, {"lm", "lm_classification"})
_SAME_CLASSIFIER = ({"pretraining", "next_sentence"}, {"classification", "lm_classification"})


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **changes: Any,
) -> Transformer:
    """A model from a directory that `save`, or save_pretrained of transformers, wrote.

    Args:
        directory: with config.json, and model.safetensors or model.safetensors.index.json. The
            tokens that begin and end a text are those of generation_config.json, if transformers
            wrote one; its rules of sampling are not used: `tfkern.generate.Sampling` has them.
        dtype: of the parameters; as in the file if None. Of a file with several it is the one that
            config.json names, or if that is none of them the one of most numbers.
        device: of the model.
        changes: fields of `TransformerConfig`: another head, for instance, whose weights are then
            as they are before training, dropout, or a shorter max_length.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: a directory without weights or in an unknown form, files that cannot be read or
            that different saves wrote, values in config.json that no model has, weights that lack,
            that are too many or do not fit, a dtype that is not floating, or changes that do not
            fit. All of it is found before any weights are read or any model is built.
    """
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"dtype must be floating, got {dtype}")
    directory = Path(directory)
    stored = store.read(directory)
    with _about(directory / "config.json"):
        family = _family(stored.description)
        config = _own(stored.description) if family is None else family.config(stored.description)
    with _about(directory):
        _check_depth(config, stored.like)
        if family is not None:
            config = family.fit(stored.description, stored.like)
        expected = _like(config)
        shapes = {name: x.shape for name, x in expected.items()}

        def ours(theirs: State) -> State:
            if family is None:
                return today(theirs, config)
            return family.load(theirs, config, shapes)

        like = ours(stored.like)
        _check(like, expected)
    changed, new = config, _changed_heads(config, config)
    if changes:
        changed = _changed(config, changes)
        _check_depth(changed, stored.like)
        new = _changed_heads(config, changed)
        _adopt(_like(changed), like, new)
    state = ours(stored.read())
    kind = dtype or _dtype(stored)
    model = Transformer(changed).to(kind)
    model.family = None if family is None else family.model_type
    _adopt(model.state_dict(), state, new)
    return model.to(device).eval()


def read_config(directory: str | Path) -> TransformerConfig:
    """The configuration in a directory, without its weights: as config.json alone tells it.

    Raises:
        ValueError: a config.json that cannot be read or has values that no model has.
    """
    path = Path(directory) / "config.json"
    description = read_object(path)
    description.pop(store.SAVE, None)
    with _about(path):
        family = _family(description)
        return _own(description) if family is None else family.config(description)


def save(
    model: Transformer,
    directory: str | Path,
    *,
    form: str = "huggingface",
    shard_bytes: int = 5_000_000_000,
    along: Mapping[str, Path | None] = MappingProxyType({}),
) -> None:
    """Writes config.json and the weights into a directory, which is made if need be.

    Several model types may compute the same, such as roberta and xlm-roberta. Then config.json has
    the one that the model was read with, or else the most common one.

    Whatever ends a save, `load` finds the whole model that was there or the whole new one, as it
    does while others save; of several that save at once, one waits for the other. A reader other
    than `load` may for a moment, or after a power cut at that moment, see the new weights beside
    the old config.json. Other files of the directory are left alone.

    Args:
        model: what is saved.
        directory: where to; files of these names, shards included, are replaced.
        form: "huggingface", which transformers reads, or "tfkern", which holds every model.
        shard_bytes: weights beyond this size are split into several files.
        along: files that belong to the model, such as those of its tokenizer: names in the
            directory, and the files to copy there, or None for what shall not be there.

    Raises:
        ValueError: another form, a model that no family of Hugging Face can express, or one with
            adapters.
        OSError: the files cannot be written; the directory is as it was.
    """
    if form not in ("huggingface", _OWN):
        raise ValueError(f"form must be huggingface or tfkern, got {form!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    if has_adapters(model):
        raise ValueError("the model has adapters: unload it, or save them with save_adapter")
    config, state = model.config, model.state_dict()
    if form == _OWN:
        description = {"model_type": _OWN, **asdict(config)}
    else:
        bare = replace(config, vocab_multiple=1)
        for name in ("embedding.weight", "vocabulary.weight"):
            if name in state:
                state[name] = state[name][: config.vocab_size]
        family, description = expressed(bare, model.family)
        dtype = next(iter(state.values())).dtype
        description["torch_dtype"] = str(dtype).removeprefix("torch.")
        state = family.save(state, bare)
    store.write(Path(directory), description, state, shard_bytes, along)


def _dtype(stored: store.Stored) -> torch.dtype:
    """The dtype of a model's weights, which are often kept in float32 in part."""
    numbers: Counter[torch.dtype] = Counter()
    for x in stored.like.values():
        if x.is_floating_point():
            numbers[x.dtype] += x.numel()
    for name in ("dtype", "torch_dtype"):  # transformers 5, and before
        for dtype in numbers:
            if stored.description.get(name) == str(dtype).removeprefix("torch."):
                return dtype
    return max(numbers, key=lambda dtype: numbers[dtype])


def expressed(config: TransformerConfig, first: str | None) -> tuple[Family, dict[str, Any]]:
    """A family that has this configuration, `first` if it does, and its config.json.

    Raises:
        ValueError: no family has it.
    """
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != first):
        description = family.describe(config)
        if description is not None:
            return family, description
    raise ValueError(
        f"none of {', '.join(FAMILIES)} has this configuration; form='tfkern' saves every model: "
        f"{config}"
    )


def _family(theirs: dict[str, Any]) -> Family | None:
    """That of a config.json, None for our own form."""
    kind = theirs.get("model_type")
    if kind == _OWN:
        return None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type {shown(kind)}, expected one of {', '.join(FAMILIES)}, {_OWN}")
    return FAMILIES[kind]


def _own(description: dict[str, Any]) -> TransformerConfig:
    given = {name: value for name, value in description.items() if name != "model_type"}
    known = {field.name for field in fields(TransformerConfig)}
    if unknown := given.keys() - known:
        raise ValueError(f"unknown field {shown(min(unknown))}")
    if lacking := [name for name in ("dim", "layers", "heads") if name not in given]:
        raise ValueError(f"it lacks {lacking[0]!r}")
    return TransformerConfig(**given)


def _changed(config: TransformerConfig, changes: dict[str, Any]) -> TransformerConfig:
    if changes.get("int8", config.int8) != config.int8:
        raise ValueError("int8 is no change: tfkern.models.quantize makes weights int8")
    try:
        return replace(config, **changes)
    except TypeError as error:
        raise ValueError(f"the changes do not fit: {error}") from None


def _check_depth(config: TransformerConfig, like: State) -> None:
    """Every block has a weight, so that this bounds what is built."""
    layers = config.layers + (config.encoder_layers or 0)
    if layers > len(like):
        raise ValueError(f"the weights lack those of {layers} layers, there are {len(like)} in all")


def _like(config: TransformerConfig) -> State:
    """The weights of a model, without values."""
    try:
        with torch.device("meta"):
            return Transformer(config).state_dict()
    except (RuntimeError, OverflowError):  # numbers of bytes beyond 64 bits
        raise ValueError("the sizes of the configuration are larger than any memory") from None


def _check(state: State, expected: State) -> None:
    if missing := sorted(set(expected) - set(state)):
        raise ValueError(f"the weights lack {', '.join(missing[:3])}")
    if excess := sorted(set(state) - set(expected)):
        raise ValueError(f"unexpected weights {', '.join(map(shown, excess[:3]))}")
    for name, x in state.items():
        if x.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected {tuple(expected[name].shape)}"
            )
        floating = expected[name].is_floating_point()
        if x.dtype not in FLOATING if floating else x.dtype != expected[name].dtype:
            raise ValueError(
                f"{name} has type {x.dtype}, expected "
                f"{'a floating one' if floating else expected[name].dtype}"
            )


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors begin with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _changed_heads(old: TransformerConfig, new: TransformerConfig) -> tuple[str, ...]:
    """The parts of a model that are not those of the file."""
    heads, parts = {old.head, new.head}, []
    if len(heads) > 1 and heads not in _SAME_VOCABULARY:
        parts.append("vocabulary.")
    if old.classes != new.classes or len(heads) > 1 and heads not in _SAME_CLASSIFIER:
        parts.append("classifier.")
    return (*parts, "pooler.") if old.pooler != new.pooler else tuple(parts)


@torch.no_grad()
def _adopt(into: State, state: State, new: tuple[str, ...]) -> None:
    """Copies the weights of a file into those of a model whose head may be another."""
    for name, x in into.items():
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
