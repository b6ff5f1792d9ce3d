"""A task on JSON lines: words with a label each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfkern import files
from tfkern.data import IGNORED, padded
from tfkern.train.tasks import vocabulary
from tfkern.train.tasks.batches import (
    Item,
    Sizes,
    Task,
    batches_of,
    check_flags,
    check_number,
    sized,
)
from tfkern.train.tasks.lines import divided, encodings, only, read_rows, sorted_labels


def tagging(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    validation: float = 0.1,
    truncate: bool = False,
) -> Task:
    """An encoder that tells the class of each word, such as the kind of name that it belongs to
    (Devlin et al. 2019).

    Rows of the file are {"words": [text, ...], "labels": [text or integer, ...]}. The words are
    joined by spaces. The target of the first token of a word is its label; other tokens have none.

    Args:
        tokenizer, validation, truncate: see `tfkern.train.tasks.rows.pairs`.

    Raises:
        ValueError: rows of another form, with more than `length` tokens, or all the same label.
    """
    check_number("validation", validation, 0, 0.5)
    check_flags(truncate=truncate)
    rows = read_rows(data, _checked)
    labels = sorted_labels(data, [label for row in rows for label in row["labels"]])
    parts = divided(data, rows, validation)
    texts = [" ".join(row["words"]) for row in rows]
    found = vocabulary.chosen(
        tokenizer, sizes.start, texts, "eos", "pad", before=["cls"], after=["sep"]
    )
    number = {label: i for i, label in enumerate(labels)}
    tagged = []
    for row, encoding in zip(
        rows, encodings(data, found, texts, sizes.length, truncate), strict=True
    ):
        targets = np.full(len(encoding.ids), IGNORED)
        firsts = _first_tokens(row["words"], encoding.offsets)
        for label, place in zip(row["labels"], firsts, strict=True):
            if place is not None:
                targets[place] = number[label]
        tagged.append((np.array(encoding.ids, np.int64), targets))
    pad = found.special_id("pad")

    def make(part: Sequence[int]) -> tuple["Tagged", None]:
        return Tagged([tagged[i] for i in part], sizes.length, pad), None

    config = {
        "architecture": "encoder", "head": "token", "classes": len(labels),
        **sized(found, sizes.length), **vocabulary.padding(found),
    }  # fmt: skip
    return Task(*batches_of(make, *parts, sizes), config, found, labels)


@dataclass(frozen=True)
class Tagged:
    """Tokens and their classes, padded to one length.

    Attributes:
        rows: the tokens and the targets of each text.
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        tokens, targets = self.rows[i]
        return {
            "tokens": padded(tokens, self.length, self.pad),
            "mask": np.array(len(tokens)),
            "targets": padded(targets, self.length, IGNORED),
        }


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    row = only(row, words=list, labels=list)
    for word in row["words"]:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"words must be strings that are not empty, got {files.shown(word)}")
    for label in row["labels"]:
        only({"each label": label}, **{"each label": (str, int)})
    if not row["words"] or len(row["words"]) != len(row["labels"]):
        count = f"{len(row['words'])} words and {len(row['labels'])} labels"
        raise ValueError(f"there must be a label for each word, and a word, got {count}")
    return row


def _first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The number of the first token of each word, None if the tokenizer has left the word out.

    Args:
        offsets: where each token begins and ends in the words joined by spaces. Tokens that are no
            part of it, such as those of a template, are empty.
    """
    found: list[int | None] = []
    start = place = 0
    for word in words:
        end = start + len(word)
        while place < len(offsets) and _is_before(offsets[place], start):
            place += 1
        inside = place < len(offsets) and offsets[place][0] < end
        found.append(place if inside else None)
        start = end + 1
    return found


def _is_before(span: tuple[int, int], start: int) -> bool:
    """Whether a token ends before a place, or stands for no letter."""
    return span[1] <= start or span[0] == span[1]
