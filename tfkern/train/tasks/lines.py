"""Files of JSON lines: rows that are checked, parted and encoded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Encoding

from tfkern import files
from tfkern.tokenize import Tokenizer

T = TypeVar("T")
_TOGETHER = 1000  # texts that become tokens at a time
_KINDS: Mapping[Any, str] = {
    str: "a string",
    int: "an integer",
    list: "a list",
    dict: "an object",
    (str, int): "a string or an integer",
}


def read_rows(path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """What a function makes of each row of a file.

    Raises:
        ValueError: there are no rows, a line is no object, or the function refuses it. The message
            then begins with the path and the number of the line.
    """
    found = []
    for number, line in enumerate(files.read(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = files.parse(line, f"{where},")
        try:
            found.append(make(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no rows")
    return found


def only(row: Mapping[str, Any], **kinds: Any) -> dict[str, Any]:
    """The values of a row with these names, if they are of these types.

    Raises:
        ValueError: they are not.
    """
    for name, kind in kinds.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be {_KINDS[kind]}, got {files.shown(value)}")
    return {name: row[name] for name in kinds}


def sorted_labels(path: Path, labels: list[str | int]) -> tuple[Any, ...]:
    """The different labels in their order.

    Raises:
        ValueError: they are of two types, or all the same.
    """
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"{path}: labels must be all strings or all integers, got both")
    found: list[Any] = sorted(set(labels))
    if len(found) < 2:
        raise ValueError(f"{path}: there must be two labels at least, got {found[0]!r} alone")
    return tuple(found)


def divided(path: Path, rows: list[Any], validation: float) -> tuple[list[int], list[int]]:
    """The numbers of the rows for training and for validation. Equal rows go together."""
    from tfkern.data.prepare.tokens import share

    held = [share(json.dumps(row, sort_keys=True)) < validation for row in rows]
    parts = [[i for i, held_out in enumerate(held) if held_out == part] for part in (False, True)]
    for name, part in zip(("training", "validation"), parts, strict=True):
        if not part:
            raise ValueError(
                f"{path}: none of {len(rows)} rows is for {name}: give more rows, or another share "
                f"than validation = {validation}"
            )
    return parts[0], parts[1]


def encodings(
    path: Path, tokenizer: Tokenizer, texts: list[str], length: int, truncate: bool
) -> list[Encoding]:
    """The encodings of texts in the tokenizer's template.

    Args:
        truncate: whether what is beyond `length` is cut off, within the template.

    Raises:
        ValueError: texts have more than `length` tokens, or cannot be encoded.
    """
    found = []
    limit: dict[str, Any] = {"length": length, "truncate": True} if truncate else {}
    for i in range(0, len(texts), _TOGETHER):
        found += tokenizer.batch(texts[i : i + _TOGETHER], **limit).encodings
    check_lengths(path, [len(e.ids) for e in found], length)
    return found


def check_lengths(path: Path, lengths: list[int], length: int) -> None:
    """Raises ValueError if texts have more than `length` tokens."""
    if long := [n for n in lengths if n > length]:
        raise ValueError(
            f"{path}: {len(long)} of {len(lengths)} texts have more than length = {length} tokens, "
            f"up to {max(long)}"
        )
