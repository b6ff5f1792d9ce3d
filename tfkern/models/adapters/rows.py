"""Adapters of a `Transformer` as adapters of the model of Hugging Face, and back.

Layers of one side may be joined in the other: here one layer makes queries, keys and values, and in
Phi-3 one layer makes gate and up. Weights differ in the order of their rows alone, which the rules
of a family tell, and with an adapter they are

    weight + scaling * lora_B lora_A

So lora_B has the rows of the weight. Where a layer is cut, each part has all of its lora_A and some
rows of its lora_B. Where layers are joined, each has some rows of lora_A, and in its own rows of
lora_B the columns that belong to these; all other elements of lora_B are 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tfkern.models.adapters.numbers import LayerNumbers, Numbers
from tfkern.models.convert import expressed
from tfkern.models.convert.family import Family, Rule
from tfkern.models.convert.store import State
from tfkern.models.transformer import Transformer
from tfkern.nn.lora import LoRALinear, sizes


def to_huggingface(model: Transformer, numbers: Numbers) -> tuple[Numbers, bool]:
    """The adapters by the names of Hugging Face, and whether weights are (in, out) there.

    Raises:
        ValueError: a model of no family, or adapters that the model of its family cannot have.
    """
    family, rules = _rules(model)
    prefix = f"{family.prefix}." if model.config.head == "none" else ""
    layers: dict[str, LayerNumbers] = {}
    transposed = False
    left = dict(numbers.layers)
    for r in rules:
        parts = [left.pop(_layer(name), None) for name in r.ours]
        if any(parts):
            lengths = {name: _lengths(model, _layer(name)) for name in r.ours}
            found = _moved(numbers, r.ours, parts, lengths, _plain(r).save)
            layers |= {_layer(name).removeprefix(prefix): x for name, x in found.items()}
            transposed = transposed or r.transposed
    if left:
        raise ValueError(f"{min(left)} is no layer of Hugging Face's {family.model_type}")
    trained: dict[str, State] = {}
    state = _flat(numbers.trained)
    _check_table(model, state, "embedding.weight", "vocabulary.weight")
    for r in rules:
        if _all_or_none(r.ours, state):
            for name, x in r.save(state).items():
                module, _, own = name.removeprefix(prefix).rpartition(".")
                trained.setdefault(module, {})[own] = x
    _check_used(state, chain(*(r.ours for r in rules)), family)
    return replace(numbers, layers=layers, trained=trained), transposed


def from_huggingface(model: Transformer, numbers: Numbers) -> Numbers:
    """The adapters by the names of `model`.

    Raises:
        ValueError: a model of no family, or adapters that it cannot have.
    """
    family, rules = _rules(model)
    known = {part for r in rules for name in r.theirs for part in (name, _layer(name))}

    def full(name: str) -> str:
        prefixed = f"{family.prefix}.{name}"
        return prefixed if name not in known and prefixed in known else name

    layers: dict[str, LayerNumbers] = {}
    left = {full(name): x for name, x in numbers.layers.items()}
    for r in rules:
        parts = [left.pop(_layer(name), None) for name in r.theirs]
        if any(parts):
            ours = {name: _lengths(model, _layer(name)) for name in r.ours}
            rows = {name: len(x) for name, x in ours.items()}

            def load(state: State, r: Rule = r, rows: dict[str, int] = rows) -> State:
                shape = next(iter(state.values())).shape[1:]
                shapes = {name: torch.Size((n, *shape)) for name, n in rows.items()}
                return _plain(r).load(dict(state), shapes)

            found = _moved(numbers, r.theirs, parts, _plain(r).save(ours), load)
            layers |= {_layer(name): x for name, x in found.items()}
    if left:
        raise ValueError(
            f"{min(left)} is no layer of the model, nor of Hugging Face's {family.model_type}"
        )
    trained: dict[str, State] = {}
    state = {full(name): x for name, x in _flat(numbers.trained).items()}
    tables = [r.theirs[0] for r in rules if r.ours[0] in ("embedding.weight", "vocabulary.weight")]
    _check_table(model, state, *tables)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    _check_used(state, chain(*(r.theirs for r in rules)), family)
    for r in rules:
        if _all_or_none(r.theirs, state):
            for name, x in r.load(dict(state), shapes).items():
                module, _, own = name.rpartition(".")
                trained.setdefault(module, {})[own] = x
    return replace(numbers, layers=layers, trained=trained)


def _moved(
    numbers: Numbers,
    names: Sequence[str],
    parts: Sequence[LayerNumbers | None],
    lengths: State,
    move: Any,
) -> dict[str, LayerNumbers]:
    """The adapters of the layers of one rule on the other side of it, by names of weights.

    Args:
        names: of the weights on this side.
        parts: the adapters on this side; some are None.
        lengths: the norms of the rows of the weights on this side.
        move: takes tensors that have the rows of this side to those of the other.
    """
    present = [part for part in parts if part is not None]
    first, kind = present[0], present[0].b
    stacked: list[Tensor] = []  # each lora_A once
    columns = []
    for own in present:
        known = [i for i, a in enumerate(stacked) if torch.equal(a, own.a)]
        if not known:
            stacked.append(own.a)
        columns.append(known[0] if known else len(stacked) - 1)
    ranks = [len(a) for a in stacked]
    rank, scaling = sum(ranks), numbers.scaling(first)
    b: State = {}
    place = iter(columns)
    for name, part in zip(names, parts, strict=True):
        b[name] = kind.new_zeros(len(lengths[name]), rank)
        if part is not None:
            i = next(place)
            if part.b.shape != (len(b[name]), ranks[i]):
                raise ValueError(
                    f"lora_B of {_layer(name)} has shape {tuple(part.b.shape)}, expected "
                    f"{(len(b[name]), ranks[i])}"
                )
            start, factor = sum(ranks[:i]), numbers.scaling(part) / scaling
            b[name][:, start : start + ranks[i]] = part.b * factor
    alpha = first.alpha if rank == first.rank else numbers.alpha(scaling, rank)
    magnitudes: State = {}
    if numbers.dora:
        magnitudes = move(
            {
                name: lengths[name].to(kind) if part is None else part.magnitude
                for name, part in zip(names, parts, strict=True)
            }
        )
    # Each layer has a copy of lora_A, as a file takes no tensor twice.
    return {
        name: LayerNumbers(torch.cat(stacked), x.contiguous(), alpha, magnitudes.get(name))
        for name, x in move(b).items()
    }


def _rules(model: Transformer) -> tuple[Family, list[Rule]]:
    bare = replace(model.config, vocab_multiple=1, int8=False)
    try:
        family, _ = expressed(bare, model.family)
    except ValueError:
        raise ValueError(
            "no family of Hugging Face has the configuration of the model, so that its layers have "
            "no other names"
        ) from None
    return family, list(family.rules(bare))


def _plain(rule: Rule) -> Rule:
    """A rule for tensors (out, anything), which lie on both sides as ours do."""
    return replace(rule, transposed=False, shape=())


def _layer(name: str) -> str:
    """The name of the layer that has a weight; a bias is no layer's weight."""
    return name.removesuffix(".weight")


def _lengths(model: Transformer, name: str) -> Tensor:
    """The norms of the rows of a layer's weight, or as many zeros where they are not floating."""
    layer: Any = model.get_submodule(name)
    layer = layer.base if isinstance(layer, LoRALinear) else layer
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return torch.zeros(sizes(layer)[1])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach().to(dtype), dim=1)


def _flat(trained: dict[str, State]) -> State:
    return {f"{name}.{n}": x for name, state in trained.items() for n, x in state.items()}


def _all_or_none(names: Sequence[str], state: State) -> bool:
    """Whether all tensors of one side of a rule are there.

    Raises:
        ValueError: only some are.
    """
    there = [name for name in names if name in state]
    if there and len(there) < len(names):
        lacking = min(set(names) - set(there))
        raise ValueError(f"{there[0]} is trained whole, and {lacking}, which belongs to it, is not")
    return bool(there)


def _check_used(state: State, names: Any, family: Family) -> None:
    if others := state.keys() - set(names):
        raise ValueError(f"{min(others)} is not the same in Hugging Face's {family.model_type}")


def _check_table(model: Transformer, state: State, *names: str) -> None:
    """Raises ValueError for tables that the two sides would not have alike."""
    config = model.config
    for name in names:
        if name in state and (config.tie_embeddings or config.vocab_multiple > 1):
            told = "tied" if config.tie_embeddings else "padded"
            raise ValueError(f"{name} is trained whole, and the table of tokens is {told}")
