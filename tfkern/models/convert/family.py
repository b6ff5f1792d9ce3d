"""How a family of Hugging Face models is told: its configuration, and the names of its weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from tfkern.files import shown
from tfkern.models.config import TransformerConfig, check_field
from tfkern.models.convert.store import FLOATING, State
from tfkern.models.positions import sinusoids

NEEDED = object()  # the default of a field that config.json must have
ABSENT = object()  # and of one whose absence `read` understands


@dataclass(frozen=True)
class Field:
    """A field of config.json: what it may hold, and what its absence means.

    Attributes:
        check: raises ValueError for any other value; takes the name of the field and the value.
    """

    check: Callable[[str, Any], None]
    default: Any = NEEDED


def like(ours: str, default: Any = NEEDED, null: bool = False) -> Field:
    """A field that holds what a field of `TransformerConfig` does; null if told or the default."""

    def check(name: str, value: Any) -> None:
        try:
            check_field(ours, value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if value is None and default is not None and not null:
            raise ValueError(f"{name} must not be null")

    return Field(check, default)


def among(names: Iterable[str], default: Any = NEEDED, null: bool = False) -> Field:
    """A field that holds one of these names, or null if told."""
    names = tuple(names)

    def check(name: str, value: Any) -> None:
        if value not in names and not (null and value is None):
            raise ValueError(f"{name}: {shown(value)} is not one of {', '.join(names)}")

    return Field(check, default)


def only(supported: Any) -> Field:
    """A field that holds nothing but this, or is absent."""

    def check(name: str, value: Any) -> None:
        if type(value) is not type(supported) or value != supported:
            raise ValueError(f"{name} = {shown(value)} is not supported, only {supported!r}")

    return Field(check, ABSENT)


def strings(kind: type) -> Field:
    """A field that holds a list or an object of strings, or null."""

    def check(name: str, value: Any) -> None:
        items = value.values() if isinstance(value, dict) else value
        if value is None or isinstance(value, kind) and all(isinstance(x, str) for x in items):
            return
        raise ValueError(f"{name} must be a {kind.__name__} of strings or null, got {shown(value)}")

    return Field(check, None)


# what all families have
_COMMON = {
    "architectures": strings(list),
    "id2label": strings(dict),
}


@dataclass(frozen=True)
class Rule:
    """Tensors of ours and of theirs that hold the same rows: those of one side, stacked, are those
    of the other. All of theirs have as many rows, but for grouped queries.

    With `heads`, each of ours has the rows of one kind (such as keys), or of several, head by head,
    where theirs have them kind by kind. Where a head of keys has more than three vectors, all but
    the last two of them are queries.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False  # theirs is (in, out), as the Conv1D of the GPTs
    shape: tuple[int, ...] = ()  # leading dimensions of 1 that theirs has besides
    heads: tuple[int, int] | None = None  # the number of key heads and the size of a head
    optional: bool = False  # theirs may be missing, and ours are 0 then

    def load(self, state: State, shapes: dict[str, torch.Size]) -> State:
        """Takes theirs out of `state` and returns ours, whose shapes are given."""
        dims = len(self.shape) + len(shapes[self.ours[0]])
        parts = [state.pop(name) for name in self.theirs]
        for name, x in zip(self.theirs, parts, strict=True):
            if x.dim() != dims or x.shape[: len(self.shape)] != self.shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {dims} dimensions")
            first = 1 if self.heads else 0  # rows of queries may be more than those of keys
            if x.shape[first:] != parts[0].shape[first:]:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, {self.theirs[0]} {tuple(parts[0].shape)}"
                )
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
        ours = whole.split(sizes)
        if self.heads:
            number, size = self.heads
            if len(parts) > 1:
                kinds = [rows for x in ours for rows in self._rows_of_kinds(x)]
                for name, part, rows in zip(self.theirs, parts, kinds, strict=False):
                    if len(part) != rows:
                        raise ValueError(f"{name} has {len(part)} rows, expected {rows}")
            ours = tuple(
                torch.cat(
                    [k.unflatten(0, (number, -1, size)) for k in x.split(self._rows_of_kinds(x))], 1
                ).flatten(0, 2)
                for x in ours
            )
        return dict(zip(self.ours, ours, strict=True))

    def save(self, state: State) -> State:
        """The inverse, which leaves `state` as it is."""
        ours = [state[name] for name in self.ours]
        if self.heads:
            number, size = self.heads
            kinds = []
            for x in ours:
                each = [rows // (number * size) for rows in self._rows_of_kinds(x)]
                by_head = x.unflatten(0, (number, -1, size))
                kinds += [k.flatten(0, 2) for k in by_head.split(each, 1)]
            ours = kinds
        if len(ours) == len(self.theirs):
            parts: Sequence[torch.Tensor] = ours
        else:
            parts = torch.cat(ours).chunk(len(self.theirs))
        if self.shape:
            parts = [x.reshape(self.shape + x.shape) for x in parts]
        if self.transposed:
            parts = tuple(x.t() for x in parts)
        return dict(zip(self.theirs, parts, strict=True))

    def _rows_of_kinds(self, x: torch.Tensor) -> list[int]:
        """How many of the rows are of each kind: queries, keys and values, the last two, or one."""
        assert self.heads is not None
        unit = self.heads[0] * self.heads[1]
        vectors = len(x) // unit
        return [(vectors - 2) * unit, unit, unit] if vectors > 2 else [unit] * vectors


def rule(ours: str | Sequence[str], theirs: str | Sequence[str], **options: Any) -> Rule:
    """A `Rule` of one name or several on each side."""
    a, b = ((x,) if isinstance(x, str) else tuple(x) for x in (ours, theirs))
    return Rule(a, b, **options)


def linear(
    ours: str,
    theirs: str | Sequence[str],
    bias: bool = True,
    transposed: bool = False,
    heads: tuple[int, int] | None = None,
) -> list[Rule]:
    """The rules of a layer's weight and bias, from the name of the layer."""
    names = [theirs] if isinstance(theirs, str) else theirs
    weights, biases = ([f"{name}.{kind}" for name in names] for kind in ("weight", "bias"))
    rules = [rule(f"{ours}.weight", weights, transposed=transposed, heads=heads)]
    if bias:
        rules.append(rule(f"{ours}.bias", biases, heads=heads))
    return rules


def heads_of(config: TransformerConfig) -> tuple[int, int]:
    """The number of key heads and the size of a head, as rules take them."""
    return config.kv_heads or config.heads, config.head_size


@dataclass(frozen=True)
class Family:
    """A family of models in the form that Hugging Face gives them.

    Attributes:
        model_type: as in config.json.
        prefix: of the names of weights that the bare model has, in a model with a head.
        heads: class in `architectures` -> the fields of a configuration that it means.
        fields: of config.json, those that matter.
        read: config.json, with its defaults and without other fields -> further fields.
        write: a configuration -> config.json without model_type and architectures.
        rules: a configuration -> which tensors are which; theirs begin with "<prefix>." where the
            bare model has them.
        aliases: a configuration -> other names of theirs for the same tensor, and that tensor.
        ignored: ends of names that are no weights.
        renamed: old endings of names -> those of today.
        vocabulary: weight of an lm head that is tied to the embedding if the file lacks it,
            whatever config.json says; None where config.json decides.
        sinusoids: names of the tables of sinusoidal positions, which files may have.
    """

    model_type: str
    prefix: str
    heads: dict[str, dict[str, Any]]
    fields: dict[str, Field]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    rules: Callable[[TransformerConfig], Iterator[Rule]]
    aliases: Callable[[TransformerConfig], dict[str, str]] = lambda config: {}
    ignored: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    vocabulary: str | None = None
    sinusoids: tuple[str, ...] = ()

    def config(self, theirs: dict[str, Any]) -> TransformerConfig:
        """The configuration that config.json describes."""
        theirs = self._checked(theirs)
        names = theirs["architectures"] or [next(iter(self.heads))]
        known = [name for name in names if name in self.heads]
        if not known:
            raise ValueError(
                f"architecture {_some(names)} of {self.model_type} is not one of "
                f"{', '.join(self.heads)}"
            )
        fields = self.read(theirs) | self.heads[known[0]]
        if fields["head"] == "none" and theirs.get("add_pooling_layer") is False:
            fields["pooler"] = False
        if fields["head"] in ("classification", "token"):
            fields["classes"] = len(theirs["id2label"] or range(2))
        if fields.get("architecture") == "encoder" and "encoder_layers" in fields:
            fields["layers"] = fields.pop("encoder_layers")
        # the defaults of transformers may lie beyond a model of few tokens
        size = fields.get("vocab_size") or 1
        for name in ("pad_token", "start_token", "forced_first", "forced_last"):
            if (fields.get(name) or 0) >= size:
                fields[name] = None
        ends = fields.get("end_token")
        if isinstance(ends, (list, tuple)):
            fields["end_token"] = tuple(end for end in ends if end < size) or None
        elif (ends or 0) >= size:
            fields["end_token"] = None
        return TransformerConfig(**fields)

    def _checked(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """The fields that matter, with their defaults."""
        found = {}
        theirs = {
            # transformers writes -1 for a token that there is none of
            name: None if name.endswith("_token_id") and value == -1 else value
            for name, value in theirs.items()
        }
        for name, known in (_COMMON | self.fields).items():
            if name in theirs:
                known.check(name, theirs[name])
                found[name] = theirs[name]
            elif known.default is NEEDED:
                raise ValueError(f"it lacks {name!r}, which {self.model_type} needs")
            elif known.default is not ABSENT:
                found[name] = known.default
        return found

    def fit(self, theirs: dict[str, Any], state: State) -> TransformerConfig:
        """`config`, but with what else of a model config.json does not tell.

        This is the head of another class, if that is the one whose weights are all there and no
        more: the published files of BERT have those of both of its heads, and a config.json that
        names one. A model without a head may have no pooler, and a vocabulary may be tied."""
        stated = self.config(theirs)
        if self.vocabulary is not None and self.vocabulary not in state:
            stated = replace(stated, tie_embeddings=True)
        needed, found = self._names(stated, state)
        others: list[dict[str, Any]] = []
        if needed < found and not self._unused(found - needed):
            others = [{"architectures": [name]} for name in self.heads]
        elif needed > found and "add_pooling_layer" in self.fields and stated.head == "none":
            others = [{"add_pooling_layer": False}]
        for other in others:
            config = self.config(theirs | other)
            needed, found = self._names(config, state)
            if needed == found:
                return config
        return stated

    def describe(self, config: TransformerConfig) -> dict[str, Any] | None:
        """config.json of a configuration, or None if this family cannot express it: if what it
        would write is not read as the same configuration."""
        for name in self.heads:
            try:
                theirs: dict[str, Any] = {"model_type": self.model_type, "architectures": [name]}
                theirs |= self.write(config)
                if "add_pooling_layer" in self.fields and config.head == "none":
                    theirs["add_pooling_layer"] = config.pooler
                if config.classes is not None:
                    labels = [f"LABEL_{i}" for i in range(config.classes)]
                    theirs["id2label"] = {str(i): label for i, label in enumerate(labels)}
                    theirs["label2id"] = {label: i for i, label in enumerate(labels)}
                told = self.config(theirs)
                if self.vocabulary is not None:
                    told = replace(told, tie_embeddings=config.tie_embeddings)
                if _plain(told) == _plain(config):
                    return theirs
            except (KeyError, ValueError, ArithmeticError):
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
        expected = {name for r in rules for name in r.theirs}
        expected |= {*self.aliases(config), *self.sinusoids}
        theirs = self._today(state, expected)
        for alias, name in self.aliases(config).items():
            if alias in theirs:
                if name in theirs and not _same(theirs[alias], theirs[name]):
                    raise ValueError(f"{alias} differs from {name}, of which it is a copy")
                theirs.setdefault(name, theirs[alias])
                del theirs[alias]
        for name in self.sinusoids:
            if (table := theirs.pop(name, None)) is not None:
                _check_sinusoids(name, table, config.dim)
        for name, x in theirs.items():
            if x.dtype not in FLOATING:
                raise ValueError(f"{_some([name])} has type {x.dtype}, expected a floating one")
        absent = [r for r in rules if r.optional and not theirs.keys() >= {*r.theirs}]
        rules = [r for r in rules if r not in absent]
        missing = [name for r in rules for name in r.theirs if name not in theirs]
        if missing:
            raise ValueError(f"the weights lack {_some(missing)}")
        kind = next(iter(theirs.values()))
        ours = {name: kind.new_zeros(shapes[name]) for r in absent for name in r.ours}
        for r in rules:
            ours |= r.load(theirs, shapes)
        if not self._unused(theirs):
            raise ValueError(f"unexpected weights {_some(theirs)}")
        return ours

    def save(self, state: State, config: TransformerConfig) -> State:
        """Our weights by their names, each once."""
        theirs: State = {}
        for r in self.rules(config):
            theirs |= r.save(state)
        for name in self.sinusoids:
            steps, kind = torch.arange(config.max_length or 0), next(iter(theirs.values()))
            theirs[name] = sinusoids(steps, config.dim, halves=True).to(kind)
        bare = config.head == "none"
        start = f"{self.prefix}."
        return {(n.removeprefix(start) if bare else n): x for n, x in theirs.items()}

    def _names(self, config: TransformerConfig, state: State) -> tuple[set[str], set[str]]:
        """Their weights that a configuration has, and those that there are, each tensor once.

        Of the former no more than one beyond the number of all that there are.
        """
        aliases = self.aliases(config)
        names = (name for r in self.rules(config) for name in r.theirs)
        needed = set(islice(names, len(state) + 1))
        found = self._today(state, {*needed, *aliases, *self.sinusoids})
        return needed, {aliases.get(name, name) for name in found} - {*self.sinusoids}

    def _unused(self, names: Iterable[str]) -> bool:
        """Whether these are weights of no more than a pooler, which published files of RoBERTa and
        of taggers have beside a head that does not use it."""
        return all(name.removeprefix(f"{self.prefix}.") in _POOLER for name in names)

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


_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


def activation_name(ours: str, names: dict[str, str] = ACTIVATIONS) -> str:
    """Of ours, the name that config.json has: KeyError if there is none."""
    return {b: a for a, b in reversed(names.items())}[ours]


def _plain(config: TransformerConfig) -> TransformerConfig:
    """The configuration with its defaults written out, less what no file tells.

    This is what all models of a family have in common: the weights that they begin with, the rows
    that are trained and the layers that are never float16."""
    both, windowed = config.architecture == "encoder_decoder", any(config.windows)
    local = config.window_rotary_base
    if local == config.rotary_base and config.rotary_scaling is None:
        local = None
    return replace(
        config,
        window=config.window if windowed else None,
        windowed=tuple(window is not None for window in config.windows) if windowed else None,
        window_rotary_base=local if windowed else None,
        attention_scale=config.score_scale,
        head_dim=config.head_size,
        hidden_dim=config.hidden_size,
        qkv_bias=config.qkv_biased,
        out_bias=config.out_biased,
        embedding_dropout=config.embedding_drop,
        kv_heads=config.kv_heads or config.heads,
        encoder_layers=(config.encoder_layers or config.layers) if both else None,
        init="normal",
        pad_trained=False,
        wide_output=False,
    )


def same_number(theirs: dict[str, Any], name: str, other: str) -> None:
    """Raises ValueError if config.json has the first field, and it is not equal to the second."""
    if theirs.get(name, theirs[other]) != theirs[other]:
        raise ValueError(f"{name} = {theirs[name]} is not supported, only {theirs[other]}")


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether tensors are equal, those without values in what they have."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return x.is_meta or torch.equal(x, y)


def _check_sinusoids(name: str, table: torch.Tensor, dim: int) -> None:
    """Raises ValueError if a table of positions is another than the one that we compute."""
    expected = sinusoids(torch.arange(len(table)), dim, halves=True) if table.dim() == 2 else None
    if expected is None or table.shape != expected.shape:
        raise ValueError(f"{name} has shape {tuple(table.shape)}, expected (positions, {dim})")
    if not table.is_meta and not torch.allclose(table.double().cpu(), expected, 0, 0.01):
        raise ValueError(f"{name} holds other values than sinusoids, which is not supported")


def _some(names: Any) -> str:
    names = list(names)
    first = (name if name.isprintable() and len(name) < 200 else shown(name) for name in names[:3])
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
