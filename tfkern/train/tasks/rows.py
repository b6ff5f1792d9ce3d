"""Tasks on files of JSON lines: pairs of texts, and texts with a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfkern.data import IGNORED, padded
from tfkern.models.convert import read_config
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
from tfkern.train.tasks.lines import divided, encodings, only, read_rows, sorted_labels


def pairs(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    validation: float = 0.1,
    truncate: bool = False,
) -> Task:
    """An encoder-decoder that writes the target of a source, such as its translation (Sutskever et
    al. 2014; Vaswani et al. 2017). The decoder reads the true target, shifted by one token.

    Rows of the file are {"source": text, "target": text}. Both end with the end token, and are
    padded to `length`.

    Args:
        tokenizer: "characters", one to train on the texts, such as "bpe:8192" (or wordpiece,
            unigram, words), or the path of a tokenizer; if None, that of the model that training
            goes on with, or "bpe:8192".
        validation: the share of rows that is kept apart, chosen by a hash of their texts.
        truncate: whether the end of a text that has more than `length` tokens is cut off; if False,
            such a text is an error.

    Raises:
        ValueError: rows have other keys, or more than `length` tokens.
    """
    check_number("validation", validation, 0, 0.5)
    check_flags(truncate=truncate)
    rows = read_rows(data, lambda row: only(row, source=str, target=str))
    parts = divided(data, rows, validation)
    texts = [row["source"] for row in rows] + [row["target"] for row in rows]
    found = vocabulary.chosen(tokenizer, sizes.start, texts, "pad", "bos", after=["eos"])
    encoded = [
        np.array(e.ids, np.int64) for e in encodings(data, found, texts, sizes.length, truncate)
    ]
    start, pad = _start(found, sizes.start), found.special_id("pad")
    sides = list(zip(encoded[: len(rows)], encoded[len(rows) :], strict=True))

    def make(part: Sequence[int]) -> tuple[Pairs, None]:
        return Pairs([sides[i] for i in part], sizes.length, start, pad), None

    config = encoder_decoder(found, sizes.length, start)
    return Task(*batches_of(make, *parts, sizes), config, found)


def classification(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    validation: float = 0.1,
    truncate: bool = False,
    architecture: str = "encoder",
    language_model: bool = False,
) -> Task:
    """A model that tells the class of a text (Devlin et al. 2019; Radford et al. 2018).

    Rows of the file are {"text": text, "label": text or integer}. The classes are the labels in
    their order. A text stands between the tokens cls and sep for an encoder, and in front of the
    end token for a decoder, and is padded to `length`.

    Args:
        tokenizer, validation, truncate: see `pairs`.
        architecture: "encoder" or "decoder".
        language_model: whether a decoder also tells the next token, as GPT-1 does in fine-tuning.
            The first targets are the tokens then, and the second ones the classes.

    Raises:
        ValueError: rows have other keys, more than `length` tokens, or all the same label.
    """
    check_number("validation", validation, 0, 0.5)
    check_flags(truncate=truncate, language_model=language_model)
    if architecture not in ("encoder", "decoder"):
        raise ValueError(f"architecture must be encoder or decoder, got {architecture!r}")
    if language_model and architecture == "encoder":
        raise ValueError("language_model needs architecture decoder, got encoder")
    rows = read_rows(data, lambda row: only(row, text=str, label=(str, int)))
    labels = sorted_labels(data, [row["label"] for row in rows])
    parts = divided(data, rows, validation)
    texts = [row["text"] for row in rows]
    before, after = (["cls"], ["sep"]) if architecture == "encoder" else ([], ["eos"])
    found = vocabulary.chosen(
        tokenizer, sizes.start, texts, "eos", "pad", before=before, after=after
    )
    encoded = [
        np.array(e.ids, np.int64) for e in encodings(data, found, texts, sizes.length, truncate)
    ]
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


def _start(tokenizer: Tokenizer, folder: Path | None) -> int:
    """The token that the decoder of an encoder-decoder begins with."""
    if folder is None:
        return tokenizer.special_id("bos")
    token = read_config(folder).start_token
    if token is None:
        raise ValueError(f"{folder}: its config.json has no decoder_start_token_id")
    return token
