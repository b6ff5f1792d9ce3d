"""Options of a recipe for the functions that take them, checked against the types these declare."""

import inspect
import math
from collections.abc import Callable, Collection
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tfkern import files


def checked(
    where: str, told: Any, function: Callable[..., Any], ours: Collection[str] = ()
) -> dict[str, Any]:
    """The options with which a function or a class can be called.

    Args:
        where: what the options belong to, for messages.
        told: a mapping of names to values, as it stands in a recipe.
        function: what takes them. Lists become tuples where it declares these.
        ours: parameters that are not the recipe's to set.

    Raises:
        ValueError: no mapping, an unknown name, or a value of another type.
    """
    if not isinstance(told, dict):
        raise ValueError(f"{where}: options must be an object, got {files.shown(told)}")
    takes = inspect.signature(function, eval_str=True).parameters
    known = sorted(takes.keys() - set(ours))
    found = {}
    for name, value in told.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{where}: option {files.shown(name)} is not one of {names}")
        hint = takes[name].annotation
        try:
            found[name] = value if value is takes[name].default else _converted(value, hint)
        except TypeError:
            quoted = "; it may need quotes" if hint is str else ""
            got = f"must be {_name(hint)}, got {files.shown(value)}{quoted}"
            raise ValueError(f"{where}: {name} {got}") from None
    return found


def _converted(value: Any, hint: Any) -> Any:
    """The value in the type of the hint, or a TypeError."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for choice in inner:
            try:
                return _converted(value, choice)
            except TypeError:
                continue
    elif kind is Literal:
        if value in inner:
            return value
    elif kind in (list, tuple):
        # tuple[int, float] is a pair, while others have items of one type, as many as there are.
        pair = kind is tuple and len(inner) > 1 and inner[1] is not ...
        if isinstance(value, list | tuple) and (not pair or len(value) == len(inner)):
            hints = inner if pair else inner[:1] * len(value)
            return kind(map(_converted, value, hints))
    elif hint in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return value
    elif isinstance(value, hint):
        return value
    raise TypeError


def _name(hint: Any) -> str:
    """What a type hint asks for, in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_name, inner)))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind in (list, tuple):
        return "a list of strings" if inner[0] is str else "a list"
    names = {int: "a number", float: "a number", bool: "true or false", dict: "an object"}
    return {**names, NoneType: "null"}.get(hint, "a string")
