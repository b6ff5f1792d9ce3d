"""From items of a text to the rows of a task. Each class is a function of an item and a seed."""

from dataclasses import dataclass

import numpy as np

from tfkern.data import (
    IGNORED,
    corrupt_spans,
    delete_tokens,
    infill,
    mask_tokens,
    next_sentence,
    padded,
    permute_sentences,
    prefix,
    rotate,
    sentence_order,
)
from tfkern.data.corrupt import generator
from tfkern.train.tasks.batches import Item
from tfkern.train.tasks.parts import Parts

Seed = tuple[int, int]


@dataclass(frozen=True)
class Mask:
    """Masked tokens: see `tfkern.data.mask_tokens`.

    Attributes:
        starts: (vocab_size,) bool, the tokens that begin a word, to choose whole words.
    """

    mask: int
    vocab_size: int
    special: frozenset[int]
    rate: float
    starts: np.ndarray | None

    def __call__(self, item: Item, seed: Seed) -> Item:
        inputs, targets = self.rows(item["tokens"], seed)
        return {"tokens": inputs, "targets": targets}

    def rows(self, tokens: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return mask_tokens(
            tokens, seed, mask=self.mask, vocab_size=self.vocab_size, special=self.special,
            rate=self.rate, words=None if self.starts is None else np.cumsum(self.starts[tokens]),
        )  # fmt: skip


@dataclass(frozen=True)
class Pretrain:
    """Two texts in a row, with masked tokens. The first target is that of the tokens, the second
    that of the texts.

    Attributes:
        ends: (vocab_size,) bool, the tokens that end a sentence.
        parts: where texts of other documents come from; None for the order of sentences.
    """

    mask: Mask
    ends: np.ndarray
    length: int
    parts: Parts | None
    cls: int
    sep: int
    pad: int

    def __call__(self, item: Item, seed: Seed) -> Item:
        text = self._parted(item["tokens"])
        length, cls, sep = self.length, self.cls, self.sep
        if self.parts is None:
            pair = sentence_order(*text, (*seed, 0), length=length, cls=cls, sep=sep)
        else:
            other = self._parted(self.parts.other(item["part"], generator((*seed, 1))))
            pair = next_sentence(*text, *other, (*seed, 0), length=length, cls=cls, sep=sep)
        tokens, targets = self.mask.rows(pair.tokens, (*seed, 2))
        return {
            "tokens": padded(tokens, self.length, self.pad),
            "mask": np.array(len(tokens)),
            "token_types": padded(pair.types, self.length, 0),
            "targets": (padded(targets, self.length, IGNORED), np.array(pair.label)),
        }

    def _parted(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A text and the ends of its sentences, of which there are two at least."""
        ends = _sentences(tokens, self.ends)
        return tokens, ends if len(ends) > 1 else np.array([len(tokens) // 2, len(tokens)])


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """A corrupted text for the encoder, and the whole text for the decoder.

    Attributes:
        length: tokens of a row, with the end token.
        ends: (vocab_size,) bool, the tokens that end a sentence, if sentences change places.
    """

    length: int
    ends: np.ndarray | None
    rate: float
    mean: float
    deletion: float
    rotation: float
    mask: int
    start: int
    end: int
    pad: int

    def __call__(self, item: Item, seed: Seed) -> Item:
        text = source = item["tokens"]
        if self.ends is not None:
            source, _ = permute_sentences(source, _sentences(source, self.ends), (*seed, 0))
        if self.deletion:
            source, _ = delete_tokens(source, (*seed, 1), rate=self.deletion)
        source = self._infilled(source, seed)
        if self.rotation and generator((*seed, 3)).random() < self.rotation:
            source, _ = rotate(source, (*seed, 4))
        source = padded_source(np.append(source, self.end), self.length, self.pad)
        target = padded_target(np.append(text, self.end), self.length, self.start, self.pad)
        return source | target

    def _infilled(self, tokens: np.ndarray, seed: Seed, attempt: int = 0) -> np.ndarray:
        """Spans of no tokens insert masks. If there is no room for them, all spans are redrawn."""
        seeds = (*seed, 2, attempt)
        found, _ = infill(tokens, seeds, mask=self.mask, rate=self.rate, mean=self.mean)
        return found if len(found) < self.length else self._infilled(tokens, seed, attempt + 1)


@dataclass(frozen=True)
class Spans:
    """T5's span corruption: see `tfkern.data.corrupt_spans`."""

    sentinels: tuple[int, ...]
    rate: float
    mean: float
    start: int
    end: int

    def __call__(self, item: Item, seed: Seed) -> Item:
        source, targets = corrupt_spans(
            item["tokens"], seed, sentinels=self.sentinels, end=self.end, rate=self.rate,
            mean=self.mean,
        )  # fmt: skip
        return {"source": source, "tokens": shifted(targets, self.start), "targets": targets}


@dataclass(frozen=True)
class Split:
    """The start of a window for the encoder, and the rest for the decoder."""

    length: int
    start: int
    pad: int

    def __call__(self, item: Item, seed: Seed) -> Item:
        end, targets = prefix(item["targets"], seed)
        source = padded_source(item["tokens"][:end], self.length, self.pad)
        return source | padded_target(targets[end - 1 :], self.length, self.start, self.pad)


def padded_source(tokens: np.ndarray, length: int, pad: int) -> Item:
    """What the encoder of an encoder-decoder reads."""
    return {"source": padded(tokens, length, pad), "source_mask": np.array(len(tokens))}


def padded_target(targets: np.ndarray, length: int, start: int, pad: int) -> Item:
    """What the decoder of an encoder-decoder reads, and what it is to write."""
    return {
        "tokens": padded(shifted(targets, start), length, pad),
        "mask": np.array(len(targets)),
        "targets": padded(targets, length, IGNORED),
    }


def shifted(targets: np.ndarray, start: int) -> np.ndarray:
    """The tokens in front of the targets: the start, and all but the last one."""
    return np.append(start, targets[:-1])


def _sentences(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where each sentence of a text ends; the last one ends with the text."""
    found = np.flatnonzero(ends[tokens[:-1]]) + 1
    return np.append(found, len(tokens))
