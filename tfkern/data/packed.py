"""Whole documents side by side in rows of one length."""

from collections.abc import Sequence

import numpy as np

from tfkern.data.shards import Shards
from tfkern.data.sources import IGNORED, Item, padded, positive, within


class Packed:
    """Documents packed into rows, none cut that fits into a row, and kept apart there.

    A longer document is cut into rows of its own and a last part, which is packed as a document is.
    Each part goes to the fullest row that has room for it, the longest parts first (best fit
    decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Every token of the
    stream is in one row, and every token but the first of its document is a target once.

    Items have "documents", the number of each token's document within the row, with which a model
    keeps them apart; the padding on the right is one more.

    Args:
        shards: the stream. Some 40 bytes a document are kept in memory.
        length: tokens of a row.
        pad: token at padding, which no other token sees.

    Raises:
        ValueError: there are no documents.
    """

    def __init__(self, shards: Shards, length: int, pad: int = 0) -> None:
        if not shards.documents:
            raise ValueError(f"{shards.folder} has no documents")
        self.shards, self.length, self.pad = shards, positive(length), pad
        ends = shards.ends()
        sizes = np.diff(ends, prepend=0)
        counts = -(-sizes // length)  # parts of each document
        part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(ends - sizes, counts) + part * length
        stops = np.minimum(starts + length, np.repeat(ends, counts))
        rows = best_fit(stops - starts, length)
        order = np.argsort(rows, kind="stable")  # within a row as in the stream
        self._starts, self._stops = starts[order], stops[order]
        self._first = np.searchsorted(rows[order], np.arange(rows.max() + 2))

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, i: int) -> Item:
        i = within(i, self)
        parts = slice(self._first[i], self._first[i + 1])
        spans = list(zip(self._starts[parts].tolist(), self._stops[parts].tolist(), strict=True))
        return side_by_side([self._part(*span) for span in spans], self.length, self.pad)

    def _part(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of a part. Only the last part of a document has no target behind."""
        after = min(stop + 1, self.shards.tokens)
        tokens, numbers = self.shards.read(start, after), self.shards.numbers(stop - 1, after)
        targets = np.full(stop - start, IGNORED)
        known = stop - start if numbers[0] == numbers[-1] and after > stop else stop - start - 1
        targets[:known] = tokens[1 : known + 1]
        return tokens[: stop - start], targets


def side_by_side(parts: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad: int) -> Item:
    """One row of several parts, each of which is a document, and padding, which is one more.

    Args:
        parts: the tokens and the targets of each.
        length: of the row.
        pad: token at padding.
    """
    tokens, targets = (np.concatenate(each) for each in zip(*parts, strict=True))
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part, _ in parts])
    return {
        "tokens": padded(tokens, length, pad),
        "targets": padded(targets, length, IGNORED),
        "documents": padded(numbers, length, len(parts)),
    }


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row (int64) of each part: the largest parts first, each to the fullest row with room.

    Parts of one size are equal, and so are rows with one amount of room. So this goes through sizes
    and amounts of room, and not through parts.

    Args:
        sizes: of the parts, in [1, length].
        length: of a row.
    """
    order = np.argsort(-sizes, kind="stable")
    rows = np.empty(len(sizes), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # rows by their room
    used = done = 0
    values, counts = np.unique(-sizes, return_counts=True)
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        placed = []
        for left in sorted(r for r in room if r >= size):
            each = left // size
            found = np.concatenate(room.pop(left))
            full = min(-(-count // each), len(found))
            if full < len(found):
                room.setdefault(left, []).append(found[full:])
            placed.append(_fill(found[:full], count, size, left, room))
            count -= len(placed[-1])
            if not count:
                break
        if count:
            new = np.arange(used, used + -(-count // (length // size)))
            used += len(new)
            placed.append(_fill(new, count, size, length, room))
        for found in placed:
            rows[order[done : done + len(found)]] = found
            done += len(found)
    return rows


def _fill(
    rows: np.ndarray, count: int, size: int, left: int, room: dict[int, list[np.ndarray]]
) -> np.ndarray:
    """Puts at most `count` parts of one size into rows with the room `left`, row by row, and notes
    the room that remains. Only the last row may get fewer than fit."""
    each = left // size
    count = min(count, each * len(rows))
    last = count - each * (len(rows) - 1)
    if len(rows) > 1:
        room.setdefault(left - each * size, []).append(rows[:-1])
    room.setdefault(left - last * size, []).append(rows[-1:])
    return np.repeat(rows, each)[:count]
