"""From items to the batches of training and of validation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkern.data import order
from tfkern.data.order import Source, stack
from tfkern.tokenize import Tokenizer
from tfkern.train.kinds import check_flag
from tfkern.train.objective import Batch
from tfkern.train.steps import Batches
from tfkern.train.tasks import vocabulary

Item = dict[str, Any]
Change = Callable[[Any, tuple[int, int]], Item]


class Task(NamedTuple):
    """What a model is trained on.

    Attributes:
        batches: `batches[step]` is a dict of tensors, which depends on the seed and the step alone.
            Its keys are arguments of `Transformer.forward`, and "targets".
        validation: the batches of every evaluation. They are made when they are asked for.
        config: the fields of `TransformerConfig` that follow from the task and its data.
        tokenizer: made the tokens; None for images.
        labels: the labels of the classes in their order, as the data have them.
        template: the chat template by which conversations became texts, if they did.
    """

    batches: Batches
    validation: Sequence[Batch]
    config: dict[str, Any]
    tokenizer: Tokenizer | None
    labels: tuple[str | int, ...] = ()
    template: str | None = None


class Sizes(NamedTuple):
    """What all tasks are told: see `task`."""

    length: int
    batch: int
    seed: int
    validation_batches: int
    rank: int = 0
    world: int = 1
    start: Path | None = None


def check_sizes(
    length: int,
    batch: int,
    seed: int,
    validation_batches: int,
    rank: int,
    world: int,
    start: str | Path | None = None,
) -> Sizes:
    """The sizes, if they are integers in their ranges.

    Raises:
        ValueError: they are not.
    """
    folder = None if start is None else Path(start)
    found = Sizes(length, batch, seed, validation_batches, rank, world, folder)
    for name, value in zip(found._fields[:-1], found[:-1], strict=True):
        least = 0 if name in ("seed", "rank") else 1
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
    if batch % world:
        raise ValueError(f"batch must be a multiple of the {world} data ranks, got {batch}")
    return found


def check_flags(**flags: Any) -> None:
    """Raises ValueError for options that are neither true nor false."""
    for name, value in flags.items():
        check_flag(name, value)


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises ValueError for an option that is no number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value!r}")


@dataclass(frozen=True)
class Changed:
    """Items of a source, each changed in one way for all times.

    Attributes:
        source: the items.
        change: see `order`. Its seed is `seed` and the number of the item.
    """

    source: Source
    change: Change
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Item:
        return self.change(self.source[i], (self.seed, i))


@dataclass(frozen=True)
class Validation(Sequence[Batch]):
    """The batches of an evaluation: whole ones, of items at equal distances.

    If there are fewer items than a batch has, they are one smaller batch.

    Attributes:
        source: the items.
        batch: items of a batch.
        most: the greatest number of batches.
        rank, world: which part of each batch this is, and how many there are.

    Raises:
        ValueError: fewer items than parts.
    """

    source: Source
    batch: int
    most: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if len(self.source) < self.world:
            raise ValueError(
                f"an evaluation needs an item for each of {self.world} data ranks, and there are "
                f"{len(self.source)}"
            )

    def __len__(self) -> int:
        return min(max(len(self.source) // self.batch, 1), self.most)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        size = min(self.batch, len(self.source))
        first = number * size
        places = range(
            first + size * self.rank // self.world, first + size * (self.rank + 1) // self.world
        )
        every = len(self.source) / (size * len(self))
        return stack([self.source[int(place * every)] for place in places])


def batches_of(
    make: Callable[[Any], tuple[Source, Change | None]],
    training: Any,
    validation: Any,
    sizes: Sizes,
    *,
    static: bool = False,
) -> tuple[Batches, Validation]:
    """The batches of training and of validation.

    Args:
        make: gives items, and their change, for each of the two parts of the data.
        static: whether an item is changed in the same way in all epochs.
    """
    source, change = make(training)
    if static and change is not None:
        source, change = Changed(source, change, sizes.seed), None
    part: dict[str, Any] = {"rank": sizes.rank, "world": sizes.world}
    batches = order([source], sizes.batch, sizes.seed, change=change, **part)
    held, change = make(validation)
    if change is not None:
        held = Changed(held, change, 0)  # evaluations of runs with other seeds compare
    return batches, Validation(held, sizes.batch, sizes.validation_batches, **part)


def decoder_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens that the rows of an encoder-decoder begin, end and are filled up with."""
    roles = {"start": "bos", "end": "eos", "pad": "pad"}
    return {name: tokenizer.special_id(role) for name, role in roles.items()}


def sized(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """The fields of a configuration that all models of texts have."""
    return {"vocab_size": tokenizer.vocab_size, "max_length": length}


def decoder(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """The fields of a decoder that writes texts."""
    end = tokenizer.special_id("eos")
    return {"architecture": "decoder", "head": "lm", "end_token": end, **sized(tokenizer, length)}


def encoder_decoder(tokenizer: Tokenizer, length: int, start: int | None = None) -> dict[str, Any]:
    """The fields of an encoder-decoder that writes texts, which begin with the token `start`, or
    with that of the role bos if None."""
    return {
        "architecture": "encoder_decoder",
        "head": "lm",
        "start_token": tokenizer.special_id("bos") if start is None else start,
        "end_token": tokenizer.special_id("eos"),
        **sized(tokenizer, length),
        **vocabulary.padding(tokenizer),
    }
