"""Rows of conversations."""

from collections.abc import Sequence

import numpy as np

from tfkern.data.packed import best_fit, side_by_side
from tfkern.data.sources import Item, positive, within


class Conversations:
    """Conversations as rows of one length: one in each, or several side by side.

    One alone has "mask", the number of its tokens. Several have "documents", the number of each
    token's conversation within the row, with which a model keeps them apart; the padding on the
    right is one more. Each goes to the fullest row that has room for it, the longest ones first.

    Args:
        items: "tokens" and "targets" (n,) of each, as `tfkern.data.Chat` makes them. What is beyond
            `length` is cut off.
        length: tokens of a row.
        pad: token at padding, which no other token sees.
        packed: whether rows have several.

    Raises:
        ValueError: there are none.
    """

    def __init__(
        self, items: Sequence[Item], length: int, pad: int = 0, *, packed: bool = False
    ) -> None:
        if not items:
            raise ValueError("there are no conversations")
        self.length, self.pad, self.packed = positive(length), pad, packed
        self._parts = [(item["tokens"][:length], item["targets"][:length]) for item in items]
        rows = np.arange(len(items))
        if packed:
            rows = best_fit(np.array([len(tokens) for tokens, _ in self._parts]), length)
        self._order = np.argsort(rows, kind="stable")
        self._first = np.searchsorted(rows[self._order], np.arange(rows.max() + 2))

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, i: int) -> Item:
        i = within(i, self)
        parts = [self._parts[k] for k in self._order[self._first[i] : self._first[i + 1]]]
        item = side_by_side(parts, self.length, self.pad)
        if not self.packed:  # a mask says the same of one conversation, and costs less
            del item["documents"]
            item["mask"] = np.array(len(parts[0][0]))
        return item
