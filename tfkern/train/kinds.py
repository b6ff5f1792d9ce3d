"""Objects that a recipe names by their kind and options, and the checks of numbers in them."""

import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tfkern.files import shown


def make(
    what: str, kinds: Mapping[str, Callable[..., Any]], kind: Any, /, *args: Any, **options: Any
) -> Any:
    """`kinds[kind](*args, **options)`, of which the options are keyword-only parameters.

    Raises:
        ValueError: an unknown kind or option, an option that is missing, or a value that the kind
            refuses. The message begins with `what`, such as "schedule".
    """
    check_choice(what, kind, kinds)
    parameters = inspect.signature(kinds[kind]).parameters.values()
    known = {p.name: p for p in parameters if p.kind == p.KEYWORD_ONLY}
    for name in options:
        if name not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"{what} {kind}: option {shown(name)} is not one of {has}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{what} {kind} needs {name}")
    return kinds[kind](*args, **options)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises a ValueError unless value is a finite number in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number {_range(low, high)}, got {shown(value)}")


def check_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Raises a ValueError unless value is an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer {_range(low, high)}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raises a ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises a ValueError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def _range(low: float, high: float) -> str:
    return f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
