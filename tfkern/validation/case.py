"""One comparison of a public function with torch's own operators."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from tfkern.validation.compare import Report, validate


@dataclass(frozen=True)
class Case:
    """One call of a public function, to compare with torch's operators."""

    label: str
    fn: Callable
    reference: Callable
    inputs: dict[str, Tensor | None]
    floor_scale: dict[str, float] = field(default_factory=dict)
    gradients: bool = True

    def run(self, seed: int = 0) -> Report:
        return validate(
            self.fn,
            self.reference,
            self.inputs,
            gradients=self.gradients,
            floor_scale=self.floor_scale,
            seed=seed,
        )


def draw_size(rng: random.Random, least: int, most: int) -> int:
    """A size in least to most: at or next to a power of two, or any."""
    edge = 2 ** rng.randrange(most.bit_length()) + rng.choice((-1, 0, 1))
    return min(max(least, rng.choice((edge, rng.randint(least, most)))), most)
