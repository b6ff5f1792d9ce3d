"""Objectives by their names in recipes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfkern.train.kinds import check_choice, make
from tfkern.train.objective import CrossEntropy, Objective
from tfkern.train.policy import OBJECTIVES as FROM_REWARDS
from tfkern.train.preferences import PREFERENCES


def cross_entropy(
    *, label_smoothing: float = 0.0, z_loss: float = 0.0, weights: Sequence[float] | None = None
) -> CrossEntropy:
    """See `tfkern.train.CrossEntropy`."""
    return CrossEntropy(label_smoothing, z_loss, weights)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "cross_entropy": cross_entropy, **PREFERENCES, **FROM_REWARDS,
}  # fmt: skip
# These are the objectives of tasks. All other tasks have the cross entropy.
_OF_TASK = {
    "preferences": ("dpo", "hinge", "ipo", "simpo", "orpo"),
    "rewards": ("rewards",),
    "unpaired": ("kto",),
    "prompts": tuple(FROM_REWARDS),
}
# A model that learns one of these tasks cannot be spread along these axes of a mesh: pairs are rows
# in groups, whose log-probabilities need the whole vocabulary, and a model that writes is whole.
_NOT_ALONG = {
    "preferences": ("tp", "cp", "pp"),
    "rewards": ("cp", "pp"),
    "unpaired": ("tp", "cp", "pp"),
    "prompts": ("fsdp", "tp", "cp", "pp"),
}


def objective(kind: str, **options: Any) -> Objective:
    """The objective of a kind, one of `OBJECTIVES`.

    Args:
        options: the keyword arguments of the class or function of that name.

    Raises:
        ValueError: an unknown kind or option, or a value that the objective refuses.
    """
    return make("objective", OBJECTIVES, kind, **options)


def check_objective(task: str, kind: Any) -> None:
    """Raises ValueError if a task has no objective of this kind."""
    check_choice("objective", kind, OBJECTIVES)
    check_choice(f"objective of the task {task}", kind, _OF_TASK.get(task, ("cross_entropy",)))


def check_axes(task: str, sizes: Mapping[str, int]) -> None:
    """Raises ValueError if no model that learns a task can be spread along axes of these sizes."""
    for axis in _NOT_ALONG.get(task, ()):
        if sizes.get(axis, 1) > 1:
            others = " or ".join(x for x in ("dp", "fsdp", "tp") if x not in _NOT_ALONG[task])
            raise ValueError(
                f"parallel: the task {task} takes {others}, got {axis} = {sizes[axis]}"
            )
