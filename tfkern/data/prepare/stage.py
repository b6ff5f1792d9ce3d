"""Stages: what runs on every file before the next stage begins on any."""

from dataclasses import dataclass, field
from typing import Any

from datatrove.utils.stats import Stats


@dataclass(frozen=True)
class Stage:
    """Steps that run as so many ranks.

    Attributes:
        name: what it does, in two words.
        steps: steps of datatrove; each takes the documents of the one before it.
        ranks: how many there are. They know nothing of each other.
        number: its place among the stages of a run.
    """

    name: str
    steps: list[Any] = field(repr=False)
    ranks: int
    number: int = 0

    @property
    def log(self) -> str:
        """The folder of its logs. Sorted, these have the order of the stages."""
        return f"{self.number:02d}_{self.name.replace(' ', '_')}"


def named(step: Any, name: str) -> Any:
    """The step with another name, under which its counts appear in reports."""
    step.name = name
    step.stats = Stats(str(step))
    return step
