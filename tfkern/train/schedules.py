"""Schedules of the learning rate: pure functions from the step to a factor of it.

The factor rises over the `warmup` steps from 0 to 1, and then does what the name of the schedule
says. It depends on nothing but the step, so a run that resumes needs no state of its schedule.

    follow = schedule("cosine", steps=1000, warmup=100, floor=0.1)
    for step in range(1000):
        set_learning_rate(optimiser, follow(step))
        ...
        optimiser.step()
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tfkern.train.kinds import check_choice, check_integer, check_number, make

# The factor of step s in a warm-up of W steps is (s + a) / (W + b). These are a and b.
_STARTS = {"nanogpt": (1, 1), "torchtitan": (1, 0), "transformers": (0, 0)}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A warm-up, and then a factor that subclasses define. Schedules can be compared and pickled.

    Args:
        warmup: number of steps of the warm-up, W.
        start: the factor in step s = 0, 1, ... of the warm-up. "nanogpt" (s + 1) / (W + 1): all W
            steps lie between 0 and 1, and the step behind them is the first with 1. "torchtitan"
            (s + 1) / W: the last of the W steps has 1 already. "transformers" s / W: the first step
            has 0 and changes no weight.

    Raises:
        ValueError: a value out of its range.
    """

    warmup: int = 0
    start: str = "nanogpt"

    def __post_init__(self) -> None:
        check_integer("warmup", self.warmup, 0)
        check_choice("start", self.start, _STARTS)

    def __call__(self, step: int) -> float:
        """The factor in a step, which is 0 or more."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if step < self.warmup:
            a, b = _STARTS[self.start]
            return (step + a) / (self.warmup + b)
        return self.after(step)

    def after(self, step: int) -> float:
        """The factor in a step behind the warm-up."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The factor stays 1."""

    def after(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Schedule):
    """The factor is sqrt(timescale / step) from step `timescale` on, and 1 before (Raffel et al.
    2020). T5 has timescale 10 000, no warm-up and a learning rate of 0.01.

    Args:
        timescale: `warmup` if None. No less than warmup, and 1 or more.
    """

    timescale: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is None and not self.warmup:
            raise ValueError("inverse_sqrt needs a warmup or a timescale of at least 1")
        if self.timescale is not None:
            check_integer("timescale", self.timescale, max(1, self.warmup))

    def after(self, step: int) -> float:
        scale = self.warmup if self.timescale is None else self.timescale
        return math.sqrt(scale / max(step, scale))


@dataclass(frozen=True, kw_only=True)
class Falling(Schedule):
    """The factor falls from 1 to `floor` between the warm-up and step `steps`, and stays there.

    Args:
        steps: number of steps of the whole run, the warm-up among them.
        floor: the factor at the end, in [0, 1].
    """

    steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("steps", self.steps, 1)
        check_number("floor", self.floor, 0, 1)
        if self.warmup > self.steps:
            raise ValueError(
                f"warmup must be no longer than the {self.steps} steps, got {self.warmup}"
            )

    def done(self, step: int) -> float:
        """The share of the fall that lies behind a step, from 0 to 1."""
        begin = self.begin()
        if begin < step < self.steps:
            return (step - begin) / (self.steps - begin)
        return float(step >= self.steps)

    def begin(self) -> int:
        """The last step with factor 1."""
        return self.warmup

    def between(self, left: float) -> float:
        """The factor when `left`, from 1 to 0, is left of the way to the floor."""
        return self.floor + (1 - self.floor) * left


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": _cosine,
    "1-sqrt": lambda done: 1 - math.sqrt(done),
}


@dataclass(frozen=True, kw_only=True)
class Linear(Falling):
    """The factor falls in a straight line."""

    def after(self, step: int) -> float:
        return self.between(1 - self.done(step))


@dataclass(frozen=True, kw_only=True)
class Cosine(Falling):
    """The factor falls as half a wave of a cosine (Loshchilov, Hutter 2017)."""

    def after(self, step: int) -> float:
        return self.between(_cosine(self.done(step)))


@dataclass(frozen=True, kw_only=True)
class Exponential(Falling):
    """The factor falls by the same ratio in each step, and so needs a floor above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor == 0:
            raise ValueError(f"floor of exponential must be above 0, got {self.floor}")

    def after(self, step: int) -> float:
        return self.floor ** self.done(step)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Falling):
    """The factor stays 1 behind the warm-up, and falls in the last `decay` steps (Hu et al. 2024).

    Args:
        decay: number of steps in which the factor falls.
        shape: "linear"; "cosine"; or "1-sqrt", which falls fast at first (Hägele et al. 2024).
    """

    decay: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("decay", self.decay, 0, self.steps - self.warmup)
        check_choice("shape", self.shape, _SHAPES)

    def begin(self) -> int:
        return self.steps - self.decay

    def after(self, step: int) -> float:
        return self.between(_SHAPES[self.shape](self.done(step)))


@dataclass(frozen=True, kw_only=True)
class Noam:
    """dim^-0.5 min(n^-0.5, n warmup^-1.5) in step n = 1, 2, ... (Vaswani et al. 2017).

    This is no share of a learning rate but the rate itself: the optimiser has a learning rate of 1.

    Args:
        dim: size of the residual stream.
        warmup: number of steps in which the rate rises.

    Raises:
        ValueError: a value out of its range.
    """

    dim: int
    warmup: int

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, 1)
        check_integer("warmup", self.warmup, 1)

    def __call__(self, step: int) -> float:
        """The rate in a step, which is 0 or more: the paper's step n is step + 1."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        n = step + 1
        return self.dim**-0.5 * min(n**-0.5, n * self.warmup**-1.5)


SCHEDULES: dict[str, type[Schedule] | type[Noam]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "inverse_sqrt": InverseSquareRoot,
    "noam": Noam,
    "wsd": WarmupStableDecay,
}


def schedule(kind: str, steps: int | None = None, **options: Any) -> Schedule | Noam:
    """The schedule of a kind: a function from the step to the factor of the learning rate.

    Args:
        kind: "constant", "linear", "cosine", "exponential", "inverse_sqrt", "noam" or "wsd".
        steps: number of steps of the run. Kinds that do not depend on it take no notice of it.
        options: the fields of the class in `SCHEDULES`, such as warmup and floor.

    Raises:
        ValueError: an unknown kind or option, an option that is missing, or a value out of its
            range.
    """
    ends = isinstance(kind, str) and issubclass(SCHEDULES.get(kind, Noam), Falling)
    if ends and steps is not None:
        options["steps"] = steps
    return make("schedule", SCHEDULES, kind, **options)


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> float:
    """Sets the learning rate of each group of parameters to its initial one times a factor.

    The group keeps the initial one as `initial_lr`, also in the state of the optimiser. A tensor is
    filled in place, so that a captured CUDA graph sees the new value.

    Returns:
        The learning rate of the first group.

    Raises:
        ValueError: a factor that is negative or not finite.
    """
    check_number("factor", factor, 0, math.inf)
    for group in optimiser.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
    # All groups may share one tensor, so none is filled before the initial rates are known.
    for group in optimiser.param_groups:
        lr = group["initial_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return optimiser.param_groups[0]["initial_lr"] * factor
