"""Parts of documents, of which none has tokens of two documents."""

from typing import Any

import numpy as np

from tfkern.data import Shards
from tfkern.data.sources import within


class Parts:
    """Documents without their end token, cut into parts of `length` tokens.

    An item has "tokens", as many as there are, and "part", the number of the item.

    Args:
        shards: the stream. 8 bytes a document are kept in memory.
        length: tokens from the start of a part to that of the next one.
        least: the fewest tokens of a part. What is left of a document and shorter is no part.
        beyond: how many tokens of the next part a part also has.

    Raises:
        ValueError: no document has a part.
    """

    def __init__(self, shards: Shards, length: int, *, least: int = 1, beyond: int = 0) -> None:
        self.shards, self.length, self.reach = shards, length, length + beyond
        sizes = np.diff(shards.ends(), prepend=0) - 1
        counts = np.where(sizes >= least, (sizes - least) // length + 1, 0)
        self._first = np.append(0, np.cumsum(counts))
        if not len(self):
            raise ValueError(f"{shards.folder} has no document of {least} tokens or more")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        document = self._document(within(i, self))
        start, end = self.shards.span(document)
        start += (i - int(self._first[document])) * self.length
        return {"tokens": self.shards.read(start, min(start + self.reach, end - 1)), "part": i}

    def other(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """The tokens of a part of another document than that of part i. All are equally likely."""
        document = self._document(i)
        first, after = self._first[document], self._first[document + 1]
        drawn = int(rng.integers(len(self) - (after - first)))
        return self[drawn if drawn < first else drawn + int(after - first)]["tokens"]

    def check_others(self) -> None:
        """Raises ValueError if all parts are of one document."""
        if np.count_nonzero(np.diff(self._first)) < 2:
            raise ValueError(f"{self.shards.folder} must have two documents, and has one of use")

    def _document(self, i: int) -> int:
        return int(np.searchsorted(self._first, i, "right")) - 1
