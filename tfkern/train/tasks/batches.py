"""From items to the batches of training and of validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tfkern.data import order
from tfkern.data.order import Source, stack
from tfkern.tokenize import Tokenizer
from tfkern.train.objective import Batch
from tfkern.train.steps import Batches

Item = dict[str, Any]
Change = Callable[[Any, tuple[int, int]], Item]


class Task(NamedTuple):
    """What a model is trained on.

    Attributes:
        batches: `batches[step]` is a dict of tensors, which depends on the seed and the step alone.
            Its keys are arguments of `Transformer.forward`, and "targets".
        validation: the batches of every evaluation, the same for all seeds. They are made when they
            are asked for.
        config: the fields of `TransformerConfig` that follow from the task and its data.
        tokenizer: made the tokens; None for images.
    """

    batches: Batches
    validation: Sequence[Batch]
    config: dict[str, Any]
    tokenizer: Tokenizer | None


class Sizes(NamedTuple):
    """What all tasks are told: see `task`."""

    length: int
    batch: int
    seed: int
    validation_batches: int


def check_sizes(length: int, batch: int, seed: int, validation_batches: int) -> Sizes:
    """The sizes, if they are integers in their ranges.

    Raises:
        ValueError: they are not.
    """
    found = Sizes(length, batch, seed, validation_batches)
    for name, value in found._asdict().items():
        least = 0 if name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
    return found


def divided(
    training: Source, validation: Source, sizes: Sizes, change: Change | None = None
) -> tuple[Batches, "Validation"]:
    """The batches of training and of validation, made of items by a change of each."""
    batches = order([training], sizes.batch, sizes.seed, change=change)
    return batches, Validation(validation, sizes.batch, sizes.validation_batches, change)


@dataclass(frozen=True)
class Validation(Sequence[Batch]):
    """The batches of an evaluation: whole ones, of items at equal distances.

    If there are fewer items than a batch has, they are one smaller batch.

    Attributes:
        source: the items.
        batch: items of a batch.
        most: the greatest number of batches.
        change: see `order`. Its seed is 0 and the number of the item in its source.
    """

    source: Source
    batch: int
    most: int
    change: Change | None = None

    def __len__(self) -> int:
        return min(max(len(self.source) // self.batch, 1), self.most)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        size = min(self.batch, len(self.source))
        places = np.arange(number * size, (number + 1) * size)
        places = places * len(self.source) // (size * len(self))
        return stack([self._item(int(place)) for place in places])

    def _item(self, place: int) -> Item:
        item = self.source[place]
        return item if self.change is None else self.change(item, (0, place))
