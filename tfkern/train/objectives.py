"""Objectives by their names in recipes."""

from collections.abc import Callable
from typing import Any

from tfkern.train.kinds import make
from tfkern.train.objective import CrossEntropy, Objective


def cross_entropy(*, label_smoothing: float = 0.0, z_loss: float = 0.0) -> CrossEntropy:
    """See `tfkern.train.CrossEntropy`."""
    return CrossEntropy(label_smoothing, z_loss)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"cross_entropy": cross_entropy}


def objective(kind: str, **options: Any) -> Objective:
    """The objective of a kind, one of `OBJECTIVES`.

    Args:
        options: the keyword arguments of the class or function of that name.

    Raises:
        ValueError: an unknown kind or option, or a value that the objective refuses.
    """
    return make("objective", OBJECTIVES, kind, **options)
