"""Files of JSON lines, with errors that name the line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tfkern import files

T = TypeVar("T")


def read(path: Path, change: Callable[[dict[str, Any]], T]) -> list[T]:
    """What a function makes of each row of a file, which is an object a line. Empty lines are none.

    Raises:
        ValueError: a line is no object, or the function refuses it, with the number of the line in
            front of what the function says; or there are no rows.
    """
    found = []
    for number, line in enumerate(files.read(path).splitlines(), 1):
        if line.strip():
            row = files.parse(line, f"{path}, line {number},")
            try:
                found.append(change(row))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no rows")
    return found


def taken(row: Mapping[str, Any], **kinds: Any) -> dict[str, Any]:
    """The values with these names.

    Raises:
        ValueError: a value is missing or of another type than its kind: str, or (str, int).
    """
    for name, kind in kinds.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "a string" if kind is str else "a string or an integer"
            raise ValueError(f"{name} must be {what}, got {files.shown(value)}")
    return {name: row[name] for name in kinds}
