"""How a family of Hugging Face models is told: its configuration, and the names of its weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tfkern.models.config import TransformerConfig

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """Tensors of ours and of theirs that hold the same rows: those of one side, stacked, are those
    of the other. All of theirs have as many rows."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False  # theirs is (in, out), as the Conv1D of the GPTs
    shape: tuple[int, ...] = ()  # leading dimensions of 1 that theirs has besides

    def load(self, state: State, shapes: dict[str, torch.Size]) -> State:
        """Takes theirs out of `state` and returns ours, whose shapes are given."""
        parts = [state.pop(name) for name in self.theirs]
        if self.transposed:
            parts = [x.t() for x in parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.shape:
            whole = whole.reshape(whole.shape[len(self.shape) :])
        sizes = [shapes[name][0] for name in self.ours]
        if whole.shape[0] != sum(sizes):
            raise ValueError(
                f"{', '.join(self.theirs)}: {whole.shape[0]} rows, expected {sum(sizes)}"
            )
        return dict(zip(self.ours, whole.split(sizes), strict=True))

    def save(self, state: State) -> State:
        """The inverse, which leaves `state` as it is."""
        whole = torch.cat([state[name] for name in self.ours])
        if self.shape:
            whole = whole.reshape(self.shape + whole.shape)
        parts = whole.chunk(len(self.theirs))
        if self.transposed:
            parts = tuple(x.t() for x in parts)
        return dict(zip(self.theirs, parts, strict=True))


def rule(ours: str | Sequence[str], theirs: str | Sequence[str], **options: Any) -> Rule:
    """A `Rule` of one name or several on each side."""
    a, b = ((x,) if isinstance(x, str) else tuple(x) for x in (ours, theirs))
    return Rule(a, b, **options)


def linear(ours: str, theirs: str | Sequence[str], bias: bool = True, **options: Any) -> list[Rule]:
    """The rules of a layer's weight and bias, from the name of the layer."""
    names = [theirs] if isinstance(theirs, str) else theirs
    rules = [rule(f"{ours}.weight", [f"{name}.weight" for name in names], **options)]
    if bias:
        rules.append(rule(f"{ours}.bias", [f"{name}.bias" for name in names]))
    return rules


@dataclass(frozen=True)
class Family:
    """A family of models in the form that Hugging Face gives them.

    Attributes:
        model_type: as in config.json.
        prefix: of the names of weights that the bare model has, in a model with a head.
        heads: class in `architectures` -> the fields of a configuration that it means.
        read: config.json -> further fields.
        write: a configuration -> config.json without model_type and architectures.
        rules: a configuration -> which tensors are which; theirs begin with "<prefix>." where the
            bare model has them.
        aliases: a configuration -> other names of theirs for the same tensor, and that tensor.
        ignored: ends of names that are no weights.
        renamed: old endings of names -> those of today.
    """

    model_type: str
    prefix: str
    heads: dict[str, dict[str, Any]]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    rules: Callable[[TransformerConfig], Iterator[Rule]]
    aliases: Callable[[TransformerConfig], dict[str, str]] = lambda config: {}
    ignored: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)

    def config(self, theirs: dict[str, Any]) -> TransformerConfig:
        """The configuration that config.json describes."""
        names = theirs.get("architectures") or [next(iter(self.heads))]
        known = [name for name in names if name in self.heads]
        if not known:
            raise ValueError(
                f"architecture {', '.join(names)} of {self.model_type} is not one of "
                f"{', '.join(self.heads)}"
            )
        try:
            fields = self.read(theirs) | self.heads[known[0]]
        except KeyError as error:
            raise ValueError(f"config.json of {self.model_type} lacks {error}") from None
        if fields["head"] in ("classification", "token"):
            fields["classes"] = len(theirs.get("id2label") or range(2))
        if fields.get("architecture") == "encoder" and "encoder_layers" in fields:
            fields["layers"] = fields.pop("encoder_layers")
        for token in ("pad_token", "start_token", "end_token"):
            given = fields.get(token)
            if isinstance(given, int) and given >= (fields.get("vocab_size") or 0):
                fields[token] = None  # the defaults of transformers in a model of fewer tokens
        return TransformerConfig(**fields)

    def fit(self, theirs: dict[str, Any], state: State) -> TransformerConfig:
        """`config`, but with the head of another class if that is the one whose weights are all
        there and no more: the published files of BERT have those of both of its heads, and a
        config.json that names one."""
        stated = self.config(theirs)
        needed, found = self._names(stated, state)
        if needed < found:
            for name in self.heads:
                config = self.config(theirs | {"architectures": [name]})
                needed, found = self._names(config, state)
                if needed == found:
                    return config
        return stated

    def describe(self, config: TransformerConfig) -> dict[str, Any] | None:
        """config.json of a configuration, or None if this family cannot express it: if what it
        would write is not read as the same configuration."""
        for name, fields in self.heads.items():
            if any(getattr(config, key) != value for key, value in fields.items()):
                continue
            try:
                theirs: dict[str, Any] = {"model_type": self.model_type, "architectures": [name]}
                theirs |= self.write(config)
                if config.classes is not None:
                    labels = [f"LABEL_{i}" for i in range(config.classes)]
                    theirs["id2label"] = {str(i): label for i, label in enumerate(labels)}
                    theirs["label2id"] = {label: i for i, label in enumerate(labels)}
                if _plain(self.config(theirs)) == _plain(config):
                    return theirs
            except (KeyError, ValueError):
                continue
        return None

    def load(self, state: State, config: TransformerConfig, shapes: dict[str, torch.Size]) -> State:
        """Their weights by our names.

        Args:
            state: by their names, with or without the prefix.
            shapes: those of our weights.

        Raises:
            ValueError: weights that lack, that are too many, or that have too few or many rows.
        """
        rules = list(self.rules(config))
        expected = {name for r in rules for name in r.theirs} | set(self.aliases(config))
        theirs = self._today(state, expected)
        for alias, name in self.aliases(config).items():
            if alias in theirs:
                if name in theirs and not torch.equal(theirs[alias], theirs[name]):
                    raise ValueError(f"{alias} differs from {name}, of which it is a copy")
                theirs.setdefault(name, theirs[alias])
                del theirs[alias]
        missing = [name for r in rules for name in r.theirs if name not in theirs]
        if missing:
            raise ValueError(f"the weights lack {_some(missing)}")
        ours: State = {}
        for r in rules:
            ours |= r.load(theirs, shapes)
        if theirs:
            raise ValueError(f"unexpected weights {_some(theirs)}")
        return ours

    def save(self, state: State, config: TransformerConfig) -> State:
        """Our weights by their names, each once."""
        theirs: State = {}
        for r in self.rules(config):
            theirs |= r.save(state)
        bare = config.head == "none"
        start = f"{self.prefix}."
        return {(n.removeprefix(start) if bare else n): x for n, x in theirs.items()}

    def _names(self, config: TransformerConfig, state: State) -> tuple[set[str], set[str]]:
        """Their weights that a configuration has, and those that there are, each tensor once."""
        aliases = self.aliases(config)
        needed = {name for r in self.rules(config) for name in r.theirs}
        found = self._today(state, needed | set(aliases))
        return needed, {aliases.get(name, name) for name in found}

    def _today(self, state: State, expected: set[str]) -> State:
        """The weights by the names of today, in the form of a model with a head."""
        theirs: State = {}
        for name, x in state.items():
            if name.endswith(self.ignored):
                continue
            for old, new in self.renamed.items():
                if name.endswith(old):
                    name = name.removesuffix(old) + new
            prefixed = f"{self.prefix}.{name}"
            theirs[prefixed if name not in expected and prefixed in expected else name] = x
        return theirs


def supported(theirs: dict[str, Any], **values: Any) -> None:
    """Raises ValueError where config.json has another value than the only one that is supported."""
    for name, value in values.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"{name} = {theirs[name]!r} is not supported, only {value!r}")


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str, names: dict[str, str] = ACTIVATIONS) -> str:
    """Ours, of the name that config.json has."""
    if name not in names:
        raise ValueError(f"activation {name!r} is not one of {', '.join(names)}")
    return names[name]


def activation_name(ours: str, names: dict[str, str] = ACTIVATIONS) -> str:
    """The inverse of `activation`: KeyError if there is none."""
    return {b: a for a, b in reversed(names.items())}[ours]


def _plain(config: TransformerConfig) -> TransformerConfig:
    """The configuration with its defaults written out, less what no file tells."""
    both = config.architecture == "encoder_decoder"
    return replace(
        config,
        head_dim=config.head_size,
        hidden_dim=config.hidden_size,
        kv_heads=config.kv_heads or config.heads,
        encoder_layers=(config.encoder_layers or config.layers) if both else None,
        init="normal",
    )


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
