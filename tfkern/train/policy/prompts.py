"""Batches of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfkern.data import order


class Columns(Sequence[dict[str, list[Any]]]):
    """Batches of rows that are kept as columns.

    Args:
        columns: something for each row, by name.
        numbers: batches of the numbers of rows, those of `Numbers`.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]], numbers: Any) -> None:
        self.columns, self._numbers = columns, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, step: Any) -> Any:
        rows = self._numbers[step]["row"].tolist()
        return {name: [column[i] for i in rows] for name, column in self.columns.items()}


class Prompts(Columns):
    """Batches of prompts without end, in an order that a seed and the step determine.

        prompts = Prompts([[5, 7], [3]], 2, answer=["12", "4"])
        prompts[0]  # {"prompt": [[3], [5, 7]], "answer": ["4", "12"]}

    Args:
        rows: the tokens of each prompt.
        batch: prompts of a batch, of all data ranks together.
        seed, rank, world: see `tfkern.data.order`.
        columns: what the reward is told beside: something for each prompt.

    Raises:
        ValueError: what `order` refuses, a prompt without tokens, or columns of another length.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        batch: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        **columns: Sequence[Any],
    ) -> None:
        for name, column in columns.items():
            if len(column) != len(rows):
                raise ValueError(f"{name} must have {len(rows)} values, got {len(column)}")
        if empty := [i for i, row in enumerate(rows) if not len(row)]:
            raise ValueError(f"prompt {empty[0]} has no tokens")
        numbers = order([Numbers(len(rows))], batch, seed, rank=rank, world=world)
        super().__init__({"prompt": rows, **columns}, numbers)


class Numbers:
    """The numbers of rows as items for `order`."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"row": np.array(i)}
