"""Rotary positions in a config.json."""

import math
from typing import Any

from tfkern.files import shown
from tfkern.models.config import TransformerConfig, check_field
from tfkern.models.convert.family import Field, like
from tfkern.nn import RotaryScaling

_LENGTH = "original_max_position_embeddings"
# For each kind of scaling these are the names that transformers has for its numbers.
_NUMBERS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "length": _LENGTH},
    "llama3": {
        "factor": "factor",
        "length": _LENGTH,
        "low": "low_freq_factor",
        "high": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "length": _LENGTH,
        "low": "beta_slow",
        "high": "beta_fast",
        "amplitude": "attention_factor",
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "length": _LENGTH,
        "amplitude": "attention_factor",
        "short": "short_factor",
        "long": "long_factor",
    },
}
_KINDS = {kind: kind for kind in ("default", *_NUMBERS)}
_NEEDED = {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}


def _object(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be an object or null, got {shown(value)}")
    for kind, told in (value or {}).items():
        if isinstance(told, dict):
            raise ValueError(f"{name}: an object of its own for {shown(kind)} is not supported")


FIELDS = {
    "rope_theta": like("rotary_base", 10000.0),
    "partial_rotary_factor": like("rotary_fraction", 1.0),
    "rope_scaling": Field(_object, None),
    "rope_parameters": Field(_object, None),
    _LENGTH: like("max_length", None),
}


def read(
    theirs: dict[str, Any], partial: bool = False, kinds: dict[str, str] = _KINDS
) -> dict[str, Any]:
    """The fields of a configuration, from those of `FIELDS` and max_position_embeddings.

    Transformers 5 writes everything into rope_parameters. Before, base and fraction were fields of
    their own and the scaling was rope_scaling, which counts where there are both.

    Args:
        partial: whether models of the family may turn a part of the features of a head.
        kinds: of scaling, by the names that the family has for them.
    """
    name = "rope_scaling" if theirs["rope_scaling"] else "rope_parameters"
    told, length = theirs[name] or {}, theirs["max_position_embeddings"]
    base = told.get("rope_theta", theirs["rope_theta"])
    fraction = told.get("partial_rotary_factor", theirs["partial_rotary_factor"])
    try:
        check_field("rotary_base", base)
        check_field("rotary_fraction", fraction)
        if fraction != 1 and not partial:
            raise ValueError(f"partial_rotary_factor = {fraction} is not supported, only 1")
        kind = told.get("rope_type", told.get("type", "default"))
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"the scaling {shown(kind)} is not one of {', '.join(kinds)}")
        kind = kinds[kind]
        scaling = None if kind == "default" else _scaling(kind, told, length, theirs[_LENGTH])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {
        "positions": "rotary",
        "rotary_base": base,
        "rotary_fraction": fraction,
        "rotary_scaling": scaling,
        "max_length": None if kind == "dynamic" else length,  # whose texts may be of any length
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """The fields that transformers 5 and 4 read."""
    told: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    scaling = config.rotary_scaling
    if scaling is not None:
        numbers = {name: getattr(scaling, ours) for ours, name in _NUMBERS[scaling.kind].items()}
        if scaling.truncate:
            numbers.pop("truncate", None)  # which earlier readers do not know
        told |= {name: list(x) if isinstance(x, tuple) else x for name, x in numbers.items()}
        told = {name: x for name, x in told.items() if x is not None} | {"rope_type": scaling.kind}
    fields: dict[str, Any] = {"rope_theta": config.rotary_base, "rope_parameters": told}
    if config.rotary_fraction != 1:
        told["partial_rotary_factor"] = config.rotary_fraction
        fields["partial_rotary_factor"] = config.rotary_fraction
    fields["max_position_embeddings"] = config.max_length
    if scaling is not None:
        fields["rope_scaling"] = told
        if scaling.kind == "dynamic":
            fields["max_position_embeddings"] = scaling.length
    return fields


def _scaling(kind: str, told: dict[str, Any], longest: int, first: int | None) -> RotaryScaling:
    """For texts of up to `longest` tokens, behind a training with `first`, if that is known."""
    names = _NUMBERS[kind]
    told = {name: x for name, x in told.items() if x is not None or name == "truncate"}
    told[_LENGTH] = told.get(_LENGTH, longest) if first is None else first
    if kind == "dynamic":
        told[_LENGTH] = longest
    check_field("max_length", told[_LENGTH])
    if kind in ("yarn", "longrope"):
        told.setdefault("factor", longest / told[_LENGTH])
    if kind == "yarn":
        told = {name: x for name, x in told.items() if x or not name.startswith("beta_")}
        if "attention_factor" not in told and told.get("mscale") and told.get("mscale_all_dim"):
            told["attention_factor"] = _growth(told, "mscale") / _growth(told, "mscale_all_dim")
    for name in names.values():
        if name in _NEEDED and name not in told:
            raise ValueError(f"the scaling {kind!r} needs {name}")
    return RotaryScaling(kind=kind, **{x: told[name] for x, name in names.items() if name in told})


def _growth(told: dict[str, Any], name: str) -> float:
    """By how much the scores of yarn grow with the length of the text."""
    factor, weight = told["factor"], told[name]
    if not all(type(x) in (int, float) and 0 < x < 1e9 for x in (factor, weight)):
        raise ValueError(
            f"factor and {name} must be positive numbers, got {shown([factor, weight])}"
        )
    return 1 + 0.1 * weight * math.log(max(factor, 1))
