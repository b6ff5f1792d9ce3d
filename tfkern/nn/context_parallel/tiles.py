"""Attention over parts of a sequence, as calls of `tfkern.attention` on rectangles of its scores.

A batch is made of segments: queries and keys that see each other within a band, and nothing else.
Where a segment's rows and columns of the scores are cut by the chunks that two ranks have, the
rectangle that is left is attention of its own, in which the band has moved.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from tfkern.ops.packing import cu_seqlens


class Segment(NamedTuple):
    """Batches with the same queries and keys of the whole sequence, aligned to the lower right."""

    batch: slice
    queries: range
    keys: range


class Tile(NamedTuple):
    """A rectangle of the scores, which `tfkern.attention` computes with the window (left, right).

    Attributes:
        rows: of the queries that this rank has.
        keys: of the block of keys that has arrived.
        columns: the same keys in the whole sequence.
        shift: what must be added to the distance of a query and a key within the rectangle, which
            is aligned to the lower right, to have their distance in the sequence.
    """

    batch: slice
    rows: slice
    keys: slice
    columns: slice
    left: int | None
    right: int | None
    shift: int


def segments(
    batch: int,
    queries: int,
    keys: int,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    documents: Tensor | None,
) -> list[Segment]:
    """The segments of a batch. This reads the values of lengths and documents."""
    if documents is not None:
        found = []
        for i, j in itertools.pairwise(cu_seqlens(documents).tolist()):
            b, first = divmod(i, queries)
            t = range(first, first + j - i)
            found.append(Segment(slice(b, b + 1), t, t))
        return found
    if query_lengths is None and key_lengths is None:
        return [Segment(slice(0, batch), range(queries), range(keys))]
    rows = [queries] * batch if query_lengths is None else query_lengths.tolist()
    columns = [keys] * batch if key_lengths is None else key_lengths.tolist()
    found, b = [], 0
    for (i, j), equal in itertools.groupby(zip(rows, columns, strict=True)):
        count = len(list(equal))
        found.append(Segment(slice(b, b + count), range(i), range(j)))
        b += count
    return found


def tiles(
    segments: Iterable[Segment],
    queries: list[range],
    keys: list[range],
    left: int | None,
    right: int | None,
) -> Iterator[Tile]:
    """The rectangles that some query sees, of the chunks of queries and keys of two ranks."""
    for batch, rows, columns in segments:
        for (first_row, t), (first_key, s) in itertools.product(_placed(queries), _placed(keys)):
            t0, t1 = max(t.start, rows.start), min(t.stop, rows.stop)
            s0, s1 = max(s.start, columns.start), min(s.stop, columns.stop)
            if t0 >= t1 or s0 >= s1:
                continue
            shift = (columns.stop - s1) - (rows.stop - t1)
            # Keys at the end that no query sees, or queries that see no key, are dropped. Then no
            # limit of the window is negative.
            if right is not None and right + shift < 0:
                s1 += right + shift
                shift = -right
            elif left is not None and left - shift < 0:
                t1 += left - shift
                shift = left
            if t0 >= t1 or s0 >= s1:
                continue
            yield Tile(
                batch,
                slice(first_row + t0 - t.start, first_row + t1 - t.start),
                slice(first_key + s0 - s.start, first_key + s1 - s.start),
                slice(s0, s1),
                _limit(left, -shift, s1 - s0),
                _limit(right, shift, t1 - t0),
                shift,
            )


def _placed(chunks: list[range]) -> Iterator[tuple[int, range]]:
    """Chunks, and where they begin in the part of their rank."""
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += len(chunk)


def _limit(limit: int | None, shift: int, size: int) -> int | None:
    """A limit of the window in a rectangle, None if it hides nothing there."""
    return None if limit is None or limit + shift >= size - 1 else limit + shift
