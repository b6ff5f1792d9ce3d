"""Pairs of texts whose relation a model has to tell: BERT's and ALBERT's second objective."""

from typing import NamedTuple

import numpy as np

from tfkern.data.corrupt import Seed, generator, int_row, sentence_ends


class Pair(NamedTuple):
    """Two texts in one row.

    Attributes:
        tokens: (n,) int64: cls, the first text, sep, the second text, sep.
        types: (n,) int64: 0 up to the first sep, then 1.
        label: the relation of the texts.
    """

    tokens: np.ndarray
    types: np.ndarray
    label: int


def next_sentence(
    tokens: np.ndarray,
    ends: np.ndarray,
    other: np.ndarray,
    other_ends: np.ndarray,
    seed: Seed,
    *,
    length: int,
    cls: int,
    sep: int,
) -> Pair:
    """BERT's next sentence prediction. Half of the pairs have the label 0: the second text follows
    the first one in its document. The others have 1: it is from another document.

    The first text begins with any sentence of the document but the last. Whole sentences fill the
    row, and are parted between any two of them. A row that is too long loses tokens of the longer
    text, at its start or its end.

    Args:
        tokens: (n,) integers, the document.
        ends: where each of its sentences ends, up to n. If there is but one, the label is 1.
        other, other_ends: another document.
        length: most tokens of a row, at least 5.
        cls, sep: the special tokens.
    """
    rng, room = generator(seed), _room(length)
    other = int_row(other)
    bounds = sentence_ends(other_ends, len(other))
    first, second = _parted(tokens, ends, room, rng)
    if len(second) and rng.random() < 0.5:
        return _pair(first, second, 0, room, cls, sep, rng)
    start = int(rng.integers(len(bounds)))
    low, high = _filled(bounds, start, start + 1, max(room - len(first), 1))
    return _pair(first, other[low:high], 1, room, cls, sep, rng)


def sentence_order(
    tokens: np.ndarray, ends: np.ndarray, seed: Seed, *, length: int, cls: int, sep: int
) -> Pair:
    """ALBERT's sentence order prediction. Two texts follow each other in the document: half of the
    pairs have them in this order and the label 0, the others in reverse and the label 1.

    The texts are chosen and cut as by `next_sentence`, whose arguments these are.

    Raises:
        ValueError: the document has but one sentence.
    """
    rng, room = generator(seed), _room(length)
    first, second = _parted(tokens, ends, room, rng)
    if not len(second):
        raise ValueError("a document of one sentence has no order")
    swapped = int(rng.integers(2))
    texts = (second, first) if swapped else (first, second)
    return _pair(*texts, swapped, room, cls, sep, rng)


def _room(length: int) -> int:
    if length < 5:
        raise ValueError(f"length must be at least 5, got {length}")
    return length - 3


def _filled(ends: np.ndarray, start: int, least: int, room: int) -> tuple[int, int]:
    """The tokens from sentence `start` to the one that fills the room, `least` - 1 or a later."""
    low = int(ends[start - 1]) if start else 0
    last = max(int(np.searchsorted(ends, low + room)), least - 1)
    return low, int(ends[min(last, len(ends) - 1)])


def _parted(
    tokens: np.ndarray, ends: np.ndarray, room: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences that fill the room, parted in two. A single one has nothing behind it."""
    tokens = int_row(tokens)
    bounds = sentence_ends(ends, len(tokens))
    start = int(rng.integers(max(len(bounds) - 1, 1)))
    low, high = _filled(bounds, start, start + 2, room)
    cuts = bounds[(bounds > low) & (bounds < high)]
    cut = int(rng.choice(cuts)) if len(cuts) else high
    return tokens[low:cut], tokens[cut:high]


def _pair(
    first: np.ndarray,
    second: np.ndarray,
    label: int,
    room: int,
    cls: int,
    sep: int,
    rng: np.random.Generator,
) -> Pair:
    keep = min(len(second), max(room // 2, room - len(first)))
    a = _shortened(first, min(len(first), room - keep), rng)
    b = _shortened(second, keep, rng)
    tokens = np.concatenate([[cls], a, [sep], b, [sep]]).astype(np.int64)
    return Pair(tokens, np.repeat([0, 1], [len(a) + 2, len(b) + 1]), label)


def _shortened(text: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A stretch of a text: each token that it loses is the first or the last one equally often."""
    start = int(rng.binomial(len(text) - length, 0.5))
    return text[start : start + length]
