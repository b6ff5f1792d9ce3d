"""Corruption of rows of tokens for the objectives of training.

Each function is pure: equal tokens and seeds give equal results, in every process. A seed is an
integer or several, as `order` gives them to its `change`:

    def masked(item, seed):
        inputs, targets = mask_tokens(item["tokens"], seed, mask=103, vocab_size=30522)
        return item | {"tokens": inputs, "targets": targets}

    order([Windows(shards, 512)], 32, seed=7, change=masked)
"""

import functools
import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from tfkern.data.sources import IGNORED

Seed = int | Sequence[int]
Rows = tuple[np.ndarray, np.ndarray]


def mask_tokens(
    tokens: np.ndarray,
    seed: Seed,
    *,
    mask: int,
    vocab_size: int,
    special: Collection[int] = (),
    rate: float = 0.15,
    words: np.ndarray | None = None,
) -> Rows:
    """BERT's masked tokens: 80 % of the chosen ones become the mask, 10 % any token, 10 % stay.

    Args:
        tokens: (n,) integers.
        mask: the mask token.
        vocab_size: ordinary tokens are those below, without the special ones.
        special: tokens that are never chosen, and that no other becomes, such as padding. The mask
            is one of them.
        rate: the share of tokens, or of words, that is chosen. Where it is no whole number, one
            more is chosen as often as the fraction says.
        words: (n,) the number of each token's word, to choose whole words.

    Returns:
        inputs and targets, (n,) int64. The targets are the tokens where one was chosen, and
        `IGNORED` elsewhere.
    """
    tokens, rng = int_row(tokens), generator(seed)
    _within("rate", rate, 0, 1)
    unit = np.arange(len(tokens))
    if words is not None:
        if np.shape(words) != tokens.shape:
            raise ValueError(f"words must have the shape {tokens.shape}, got {np.shape(words)}")
        unit = np.unique(words, return_inverse=True)[1]
    ordinary, is_special = _vocabulary(frozenset([*special, mask]), vocab_size)
    free = ~is_special.take(tokens + 1, mode="clip")
    left = np.zeros(len(tokens), bool)  # by unit, of which there are no more than tokens
    left[unit[free]] = True
    choice = np.flatnonzero(left)
    count = int(rate * len(choice) + rng.random())
    chosen = np.zeros(len(tokens), bool)
    chosen[rng.permutation(choice)[:count]] = True
    picked = free & chosen[unit]
    drawn = ordinary[(rng.random(len(tokens)) * len(ordinary)).astype(np.int64)]
    fate = np.where(picked, rng.random(len(tokens)), 1)
    inputs = np.where(fate < 0.8, mask, np.where(fate < 0.9, drawn, tokens))
    return inputs, np.where(picked, tokens, IGNORED)


@functools.lru_cache(maxsize=16)
def _vocabulary(special: frozenset[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The ordinary tokens, and whether token i - 1 is special, with one more entry at either end
    for tokens that are out of range."""
    control = np.array(sorted(special), np.int64)
    ordinary = np.setdiff1d(np.arange(vocab_size), control)
    if not len(ordinary):
        raise ValueError(f"a vocabulary of {vocab_size} has no ordinary tokens")
    is_special = np.zeros(max(vocab_size, int(control[-1]) + 1) + 2, bool)
    is_special[control[control >= 0] + 1] = True
    return ordinary, is_special


def corrupt_spans(
    tokens: np.ndarray,
    seed: Seed,
    *,
    sentinels: Sequence[int],
    end: int,
    rate: float = 0.15,
    mean: float = 3.0,
) -> Rows:
    """T5's span corruption: each span becomes a sentinel, and the targets are what it stood for.

        Thank you for inviting me to your party last week
        Thank you <0> me to your party <1> week </s>
        <0> for inviting <1> last </s>

    The numbers of lost tokens and spans are those of `span_lengths`, and all ways to cut them are
    equally likely. The first token is never lost.

    Args:
        tokens: (n,) integers, at least 2, without sentinels.
        sentinels: tokens that stand for the spans, in their order.
        end: token behind inputs and targets.
        rate: the share of tokens that is lost, in (0, 1).
        mean: the mean length of a span, at least 1.

    Returns:
        inputs and targets, int64, of the lengths that `span_lengths` tells.

    Raises:
        ValueError: there are fewer sentinels than spans.
    """
    tokens, rng = int_row(tokens), generator(seed)
    lost, spans = _spans(len(tokens), rate, mean)
    if len(sentinels) < spans:
        raise ValueError(f"{spans} spans need as many sentinels, got {len(sentinels)}")
    if np.isin(tokens, sentinels).any():
        raise ValueError("the tokens have sentinels already")
    sizes = np.empty(2 * spans, np.int64)
    sizes[0::2] = _segments(len(tokens) - lost, spans, rng)
    sizes[1::2] = _segments(lost, spans, rng)
    gone = np.repeat(np.tile([False, True], spans), sizes)
    inputs, targets = (_replaced(tokens, where, sentinels) for where in (gone, ~gone))
    return np.append(inputs, end), np.append(targets, end)


def span_lengths(length: int, rate: float = 0.15, mean: float = 3.0) -> tuple[int, int]:
    """The lengths of inputs and targets of `corrupt_spans`, as T5's code counts them."""
    lost, spans = _spans(length, rate, mean)
    return length - lost + spans + 1, lost + spans + 1


def span_window(inputs: int, rate: float = 0.15, mean: float = 3.0) -> int:
    """The largest number of tokens whose inputs fit: 568 for T5's 512.

    Raises:
        ValueError: no 2 tokens fit.
    """
    length = 1
    while span_lengths(length + 1, rate, mean)[0] <= inputs:
        length += 1
    if length < 2:
        raise ValueError(f"inputs must be at least 3, got {inputs}")
    return length


def infill(
    tokens: np.ndarray, seed: Seed, *, mask: int, rate: float = 0.3, mean: float = 3.0
) -> Rows:
    """BART's text infilling: each span becomes one mask, and the targets are the whole text.

    The lengths of spans are drawn from the Poisson distribution until they are the share of tokens
    that is lost; the last span is cut to fit. A span of no tokens inserts a mask. All places of the
    spans among the tokens that stay are equally likely.

    Args:
        tokens: (n,) integers.
        mask: the mask token.
        rate: the share of tokens that is lost, rounded up to whole tokens.
        mean: the mean length of a span, at least 1.

    Returns:
        inputs, as long as the tokens that stay and the spans are together, and the tokens, int64.
    """
    tokens, rng = int_row(tokens), generator(seed)
    _within("rate", rate, 0, 1)
    _within("mean", mean, 1, math.inf)
    left = lost = math.ceil(rate * len(tokens))
    drawn = []
    while left:
        drawn.append(min(int(rng.poisson(mean)), left))
        left -= drawn[-1]
    spans = rng.permutation(np.array(drawn, np.int64))  # the last one may be short
    inputs = np.full(len(tokens) - lost + len(spans), mask)
    slots = np.sort(rng.choice(len(inputs), len(spans), replace=False))
    starts = slots - np.arange(len(spans)) + np.cumsum(spans) - spans
    # a token stays if as many spans have ended before it as have started
    steps = np.zeros(len(tokens) + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + spans, -1)
    inputs[np.delete(np.arange(len(inputs)), slots)] = tokens[np.cumsum(steps[:-1]) == 0]
    return inputs, tokens


def delete_tokens(tokens: np.ndarray, seed: Seed, *, rate: float = 0.15) -> Rows:
    """BART's token deletion: each token is lost with the probability `rate`.

    Returns:
        what is left, and the tokens, int64.
    """
    tokens = int_row(tokens)
    _within("rate", rate, 0, 1)
    return tokens[generator(seed).random(len(tokens)) >= rate], tokens


def rotate(tokens: np.ndarray, seed: Seed) -> Rows:
    """BART's document rotation: any token becomes the first, and what stood before it the end.

    Returns:
        inputs and the tokens, (n,) int64.
    """
    tokens = int_row(tokens)
    return np.roll(tokens, -int(generator(seed).integers(max(len(tokens), 1)))), tokens


def permute_sentences(tokens: np.ndarray, ends: np.ndarray, seed: Seed) -> Rows:
    """BART's sentence permutation: all orders of the sentences are equally likely.

    Args:
        tokens: (n,) integers.
        ends: where each sentence ends, up to n.

    Returns:
        inputs and the tokens, (n,) int64.
    """
    tokens = int_row(tokens)
    sentences = np.split(tokens, sentence_ends(ends, len(tokens))[:-1])
    places = generator(seed).permutation(len(sentences))
    return np.concatenate([sentences[i] for i in places]), tokens


def prefix(targets: np.ndarray, seed: Seed) -> tuple[int, np.ndarray]:
    """Where the prefix of a prefix language model ends, and targets behind it alone.

    Each end that leaves a target is equally likely.

    Args:
        targets: (n,) integers, the token that follows each token: item["targets"].

    Returns:
        end: the number of tokens in the prefix, at least 1. The last of them has the first target.
        targets: (n,) int64.
    """
    targets = int_row(targets)
    counted = np.flatnonzero(targets != IGNORED)
    last = int(counted[-1]) + 1 if len(counted) else 1
    end = int(generator(seed).integers(1, last + 1))
    return end, np.where(np.arange(len(targets)) >= end - 1, targets, IGNORED)


def generator(seed: Seed) -> np.random.Generator:
    """A generator that a seed determines, apart from those of all other seeds.

    Raises:
        ValueError: the seed is not made of integers that are not negative.
    """
    numbers = np.atleast_1d(np.asarray(seed))
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1 or (numbers < 0).any():
        raise ValueError(f"a seed is an integer or several, not negative, got {seed!r}")
    state: Any = _Digest(numbers.astype("<u8").tobytes())
    return np.random.Generator(np.random.Philox(state))


class _Digest(ISeedSequence):
    """The state of a generator from bytes. Numpy's own sequences take twice as long, and some of
    them are equal, as those of (7,) and (7, 0)."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        size = n_words * np.dtype(dtype).itemsize
        return np.frombuffer(hashlib.blake2b(self.content, digest_size=size).digest(), dtype)


def sentence_ends(ends: np.ndarray, length: int) -> np.ndarray:
    """`ends` as int64, if they cut that many tokens into sentences.

    Raises:
        ValueError: they do not.
    """
    ends = int_row(ends, "ends")
    if not len(ends) or ends[-1] != length or ends[0] < 1 or (np.diff(ends) < 1).any():
        raise ValueError(f"ends must rise from 1 or more to {length}, got {ends.tolist()[:20]}")
    return ends


def int_row(tokens: np.ndarray, name: str = "tokens") -> np.ndarray:
    """`tokens` as int64, if they are one row of integers.

    Raises:
        ValueError: they are not.
    """
    found = np.asarray(tokens)
    if found.ndim != 1 or found.size and found.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers (n,), got {found.dtype} {found.shape}")
    return found.astype(np.int64)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def _spans(length: int, rate: float, mean: float) -> tuple[int, int]:
    """How many tokens are lost, in how many spans. One token at least is lost, and one stays."""
    if length < 2:
        raise ValueError(f"a span is cut out of 2 tokens or more, got {length}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    _within("mean", mean, 1, math.inf)
    lost = min(max(round(length * rate), 1), length - 1)
    return lost, min(max(round(lost / mean), 1), length - lost)


def _segments(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positive sizes with a sum. All are equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _replaced(tokens: np.ndarray, gone: np.ndarray, sentinels: Sequence[int]) -> np.ndarray:
    """The tokens, with one sentinel for each run of those that are gone."""
    first = gone & ~np.append(False, gone[:-1])
    number = np.maximum(np.cumsum(first) - 1, 0)
    return np.where(first, np.asarray(sentinels)[number], tokens)[first | ~gone]
