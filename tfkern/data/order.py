"""The order in which training sees items, on the library `grain`."""

import bisect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


class Source(Protocol):
    """Items by their number, such as `Windows`: dicts of arrays, or of tuples of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...


def order(
    sources: Sequence[Source],
    batch: int,
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    change: Callable[[dict[str, Any], tuple[int, int]], dict[str, Any]] | None = None,
    rank: int = 0,
    world: int = 1,
) -> "Order":
    """Batches without end: `order(...)[step]` depends on its arguments and the step alone.

    So the step is all that a run keeps to resume. An epoch shows each item of a source once, and
    each epoch has another order. The batches of all ranks, one after the other, are the batch of a
    single rank, however many ranks there are.

        batches = order([Windows(Shards("shards"), 1024)], 32, seed=7)
        for batch in DataLoader(batches, None, sampler=range(step, steps), num_workers=2):
            loss = cross_entropy(model(batch["tokens"]), batch["targets"])

    Args:
        sources: what the items are taken from. All items have the same keys and shapes.
        batch: items of all ranks together: a multiple of world.
        seed: in [0, 2**32).
        weights: the share of each source in every stretch of items, in any unit, kept to within a
            hundredth of the least one. Each source then has epochs of its own. If None, the sources
            are joined: an epoch shows each item of each source once.
        change: function of an item and a seed, such as corruption, that gives a new item. The seed
            is the pair of `seed` and the place of the item in the order, so it is another one in
            each epoch. It must be one that pickle takes, for a `DataLoader` that starts processes.
        rank, world: this process, and how many there are.

    Returns:
        dicts of tensors by the number of the step, from 0; a tuple of arrays, such as the targets
        of a head with several results, is a tuple of tensors.

    Raises:
        ValueError: an argument out of its range, sources without items, or with other keys or
            shapes than the first one.
    """
    for name, value in (("batch", batch), ("seed", seed), ("rank", rank), ("world", world)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, world), got {rank} of {world}")
    if batch < 1 or batch % world:
        raise ValueError(f"batch must be a multiple of the {world} ranks, got {batch}")
    _check_sources(sources)
    # Grain orders numbers of items only: its bookkeeping for an item takes longer than to read it.
    starts = np.cumsum([0, *map(len, sources)]).tolist()
    MapDataset = _grain().MapDataset
    parts = [MapDataset.range(a, b) for a, b in itertools.pairwise(starts)]
    if weights is None:
        parts = [MapDataset.range(starts[-1])]
    else:
        _check_weights(weights, len(parts))
    # sources of equal length would go through equal orders if they had one seed
    seeds = np.random.SeedSequence(int(seed)).generate_state(len(parts)).tolist()
    parts = [part.shuffle(seed=s).repeat() for part, s in zip(parts, seeds, strict=True)]
    numbers = parts[0] if len(parts) == 1 else MapDataset.mix(parts, weights=weights)
    return Order(sources, starts, numbers, batch // world, change, int(seed), rank, world)


@dataclass(frozen=True)
class Order:
    """Batches by their step: what `order` returns."""

    sources: Sequence[Source]
    starts: list[int]
    numbers: Any
    size: int
    change: Callable[..., dict[str, Any]] | None
    seed: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step < 0:
            raise IndexError(f"batch {step}: the steps count from 0")
        # Ranks take whole parts of a batch: taking turns, they get unequal shares of the sources.
        first = (step * self.world + self.rank) * self.size
        return stack([self._item(place) for place in range(first, first + self.size)])

    def _item(self, place: int) -> dict[str, Any]:
        number = self.numbers[place]
        source = bisect.bisect_right(self.starts, number) - 1
        item = self.sources[source][number - self.starts[source]]
        return item if self.change is None else self.change(item, (self.seed, place))


def stack(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items as one batch: a tensor for each array, and a tuple of tensors for a tuple of arrays."""
    return {name: _stacked([item[name] for item in items]) for name in items[0]}


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*values, strict=True))
    return torch.from_numpy(np.stack(values))


def _check_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise ValueError("there are no sources")
    shapes = []
    for i, source in enumerate(sources):
        if not 0 < len(source) < 2**32:  # grain's permutations have 32 bits
            raise ValueError(f"source {i} must have 1 to 2**32 - 1 items, got {len(source)}")
        shapes.append({name: _shape(value) for name, value in source[0].items()})
        if shapes[i] != shapes[0]:
            raise ValueError(f"items of source {i} are {shapes[i]}, those of source 0 {shapes[0]}")
    if sum(map(len, sources)) >= 2**32:
        raise ValueError("the sources have 2**32 items or more together")


def _shape(value: Any) -> Any:
    return tuple(map(_shape, value)) if isinstance(value, tuple) else np.shape(value)


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise ValueError(f"there are {count} sources and {len(weights)} weights")
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")


def _grain() -> Any:
    """The module grain, without the warning that this machine has no jax."""
    log = logging.getLogger("absl")
    log.addFilter(_told)
    try:
        import grain
    finally:
        log.removeFilter(_told)
    return grain


def _told(record: logging.LogRecord) -> bool:
    return "jax profiler" not in record.getMessage()
