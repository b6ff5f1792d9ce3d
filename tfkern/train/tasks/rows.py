"""Tasks on files of JSON lines: pairs of texts, and texts with a label."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfkern import files, tokenize
from tfkern.data import IGNORED, padded
from tfkern.tokenize import Tokenizer
from tfkern.train.tasks import vocabulary
from tfkern.train.tasks.batches import (
    Item,
    Sizes,
    Task,
    batches_of,
    check_flags,
    check_number,
    encoder_decoder,
    sized,
)
from tfkern.train.tasks.changes import padded_source, padded_target

_TOGETHER = 1000  # texts that become tokens at a time


def pairs(
    data: Path, sizes: Sizes, *, tokenizer: str = "bpe:8192", validation: float = 0.1
) -> Task:
    """An encoder-decoder that writes the target of a source, such as its translation (Sutskever et
    al. 2014; Vaswani et al. 2017). The decoder reads the true target, shifted by one token.

    Rows of the file are {"source": text, "target": text}. Both end with the end token, and are
    padded to `length`.

    Args:
        tokenizer: "characters", one to train on both sides, such as "bpe:8192" (or wordpiece,
            unigram, words), or the path of a tokenizer.
        validation: the share of rows that is kept apart, chosen by a hash of their texts.

    Raises:
        ValueError: rows have other keys, or more than `length` tokens.
    """
    check_number("validation", validation, 0, 0.5)
    rows = _read(data, source=str, target=str)
    parts = divided(data, rows, validation)
    texts = [row["source"] for row in rows] + [row["target"] for row in rows]
    found = vocabulary.extended(_tokenizer(tokenizer, texts), "eos", "pad", "bos")
    found = vocabulary.with_template(found, [], ["eos"])
    encoded = _encoded(data, found, texts, sizes.length)
    start, pad = found.special_id("bos"), found.special_id("pad")
    sides = list(zip(encoded[: len(rows)], encoded[len(rows) :], strict=True))

    def make(part: Sequence[int]) -> tuple[Pairs, None]:
        return Pairs([sides[i] for i in part], sizes.length, start, pad), None

    config = encoder_decoder(found, sizes.length)
    return Task(*batches_of(make, *parts, sizes), config, found)


def classification(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str = "bpe:8192",
    validation: float = 0.1,
    architecture: str = "encoder",
    language_model: bool = False,
) -> Task:
    """A model that tells the class of a text (Devlin et al. 2019; Radford et al. 2018).

    Rows of the file are {"text": text, "label": text or integer}. The classes are the labels in
    their order. A text stands between the tokens cls and sep for an encoder, and in front of the
    end token for a decoder, and is padded to `length`.

    Args:
        tokenizer, validation: see `pairs`.
        architecture: "encoder" or "decoder".
        language_model: whether a decoder also tells the next token, as GPT-1 does in fine-tuning.
            The first targets are the tokens then, and the second ones the classes.

    Raises:
        ValueError: rows have other keys, more than `length` tokens, or all the same label.
    """
    check_number("validation", validation, 0, 0.5)
    check_flags(language_model=language_model)
    if architecture not in ("encoder", "decoder"):
        raise ValueError(f"architecture must be encoder or decoder, got {architecture!r}")
    if language_model and architecture == "encoder":
        raise ValueError("language_model needs architecture decoder, got encoder")
    rows = _read(data, text=str, label=(str, int))
    labels = _labels(data, [row["label"] for row in rows])
    parts = divided(data, rows, validation)
    texts = [row["text"] for row in rows]
    before, after = (["cls"], ["sep"]) if architecture == "encoder" else ([], ["eos"])
    found = vocabulary.extended(_tokenizer(tokenizer, texts), "eos", "pad", *before, *after)
    found = vocabulary.with_template(found, before, after)
    encoded = _encoded(data, found, texts, sizes.length)
    number = {label: i for i, label in enumerate(labels)}
    known = [(row, number[told["label"]]) for row, told in zip(encoded, rows, strict=True)]
    pad = found.special_id("pad")

    def make(part: Sequence[int]) -> tuple[Labelled, None]:
        return Labelled([known[i] for i in part], sizes.length, pad, language_model), None

    config = {
        "architecture": architecture,
        "head": "lm_classification" if language_model else "classification",
        "classes": len(labels),
        **sized(found, sizes.length),
        **vocabulary.padding(found),
    }
    if architecture == "decoder":
        config["end_token"] = found.special_id("eos")
    return Task(*batches_of(make, *parts, sizes), config, found, labels)


@dataclass(frozen=True)
class Pairs:
    """Sources and targets, each padded to one length.

    Attributes:
        rows: the tokens of both, with the end token.
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    length: int
    start: int
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        source, target = self.rows[i]
        read = padded_source(source, self.length, self.pad)
        return read | padded_target(target, self.length, self.start, self.pad)


@dataclass(frozen=True)
class Labelled:
    """Texts and their classes, padded to one length.

    Attributes:
        rows: the tokens and the class of each text.
        language_model: whether the token behind each token is a target, too.
    """

    rows: list[tuple[np.ndarray, int]]
    length: int
    pad: int
    language_model: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        tokens, label = self.rows[i]
        following = padded(tokens[1:], self.length, IGNORED)
        return {
            "tokens": padded(tokens, self.length, self.pad),
            "mask": np.array(len(tokens)),
            "targets": (following, np.array(label)) if self.language_model else np.array(label),
        }


def _read(path: Path, **kinds: Any) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        ValueError: a line is no object with values of these kinds, or there are no lines.
    """
    rows = []
    for number, line in enumerate(files.read(path).splitlines(), 1):
        if not line.strip():
            continue
        row = files.parse(line, f"{path}, line {number},")
        for name, kind in kinds.items():
            value = row.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                what = "a string" if kind is str else "a string or an integer"
                told = files.shown(value)
                raise ValueError(f"{path}, line {number}: {name} must be {what}, got {told}")
        rows.append({name: row[name] for name in kinds})
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _labels(path: Path, labels: list[str | int]) -> tuple[Any, ...]:
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


def _tokenizer(told: str, texts: list[str]) -> Tokenizer:
    """A tokenizer that is trained on texts, or read from a path."""
    from tfkern.data.prepare.tokens import parsed

    kind, size = parsed(told)
    if kind is None:
        return tokenize.load(told)
    if kind == "characters":
        return tokenize.characters(texts)
    if size is None:
        raise ValueError(f"tokenizer: {told!r} needs the size of a vocabulary, as in {kind}:8192")
    return tokenize.train(kind, texts, size)


def _encoded(
    path: Path,
    tokenizer: Tokenizer,
    texts: list[str],
    length: int,
) -> list[np.ndarray]:
    """The tokens of texts in the tokenizer's template.

    Raises:
        ValueError: texts have more than `length` tokens, or cannot be encoded.
    """
    rows = []
    for i in range(0, len(texts), _TOGETHER):
        found = tokenizer.batch(texts[i : i + _TOGETHER]).encodings
        rows += [np.array(e.ids, np.int64) for e in found]
    if long := [len(row) for row in rows if len(row) > length]:
        raise ValueError(
            f"{path}: {len(long)} of {len(rows)} texts have more than length = {length} tokens, up "
            f"to {max(long)}"
        )
    return rows
