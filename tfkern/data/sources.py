"""Items of one length, made of token shards: what a training step batches.

An item is a dict of int64 arrays. All its keys but "targets" are arguments of
`tfkern.models.Transformer`. The target of a token is the token that follows it, and `IGNORED` where
there is none.
"""

from collections.abc import Sized

import numpy as np

from tfkern.data.shards import Shards

IGNORED = -100  # target that the losses leave out
Item = dict[str, np.ndarray]


class Windows:
    """The whole stream, cut into windows wherever they end: no padding, and every token is used.

    Each window has `length` tokens, and the first one of the next window as its last target. So
    every token of the stream but the first is a target once. What does not fill a last window, less
    than `length` tokens, is left out.

    Args:
        shards: the stream.
        length: tokens of a window.
        separate: whether documents are kept apart, as Llama 3 does. If False, as for GPT-3, a token
            sees the documents before its own, and the end token is asked for the first token of the
            next document. If True, the target of each end token is ignored, and items have
            "documents", the number of each token's document within the window, with which a model
            keeps them apart.

    Raises:
        ValueError: the stream is too short for one window.
    """

    def __init__(self, shards: Shards, length: int, *, separate: bool = False) -> None:
        self.shards, self.length, self.separate = shards, positive(length), separate
        if shards.tokens <= length:
            raise ValueError(
                f"{shards.folder} has {shards.tokens} tokens: a window of {length} needs "
                f"{length + 1}"
            )

    def __len__(self) -> int:
        return (self.shards.tokens - 1) // self.length

    def __getitem__(self, i: int) -> Item:
        start = within(i, self) * self.length
        stream = self.shards.read(start, start + self.length + 1)
        item = {"tokens": stream[:-1], "targets": stream[1:]}
        if self.separate:
            numbers = self.shards.numbers(start, start + self.length + 1)
            item["targets"] = np.where(numbers[1:] == numbers[:-1], stream[1:], IGNORED)
            item["documents"] = numbers[:-1] - numbers[0]
        return item


class Documents:
    """One document a row, cut after `length` tokens, or padded on the right.

    "mask" is the number of tokens that there are. The end token has no target. The last token of a
    document that was cut has: the first token that was cut off.

    Args:
        shards: the stream.
        length: tokens of a row.
        pad: token at padding, which a model with the mask never reads.
    """

    def __init__(self, shards: Shards, length: int, pad: int = 0) -> None:
        self.shards, self.length, self.pad = shards, positive(length), pad

    def __len__(self) -> int:
        return self.shards.documents

    def __getitem__(self, i: int) -> Item:
        start, end = self.shards.span(within(i, self))
        tokens = self.shards.read(start, min(end, start + self.length + 1))
        return {
            "tokens": padded(tokens[: self.length], self.length, self.pad),
            "targets": padded(tokens[1:], self.length, IGNORED),
            "mask": np.array(min(end - start, self.length)),
        }


def padded(row: np.ndarray, length: int, value: int) -> np.ndarray:
    """A row with a value on its right, up to a length.

    Raises:
        ValueError: the row is longer.
    """
    if len(row) > length:
        raise ValueError(f"a row of {len(row)} does not fit into {length}")
    found = np.full(length, value, np.asarray(row).dtype)
    found[: len(row)] = row
    return found


def positive(length: int) -> int:
    """`length`, if it is a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length must be a positive integer, got {length!r}")
    return int(length)


def within(i: int, source: Sized) -> int:
    """`i`, if the source has such an item. The IndexError also ends a `for` over the source."""
    if not 0 <= i < len(source):
        raise IndexError(f"item {i} of {len(source)}")
    return int(i)
