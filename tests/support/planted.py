"""A case whose variants fail in every way, for tests of the suite, whose worker imports it."""

import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass

from torch import Tensor

from tfkern.benchmarks import memory, timing
from tfkern.benchmarks.case import BOTH, FORWARD, Case, Variant

if multiprocessing.parent_process() is not None:  # skips slow measurements in workers
    timing.product_ceiling = lambda dtype, device: 1e11
    timing.copy_ceiling = lambda device: 1e10
    memory.peak = lambda case, variant: 1000 * case.length


def right(x: Tensor) -> Tensor:
    return 2 * x


def slower(x: Tensor) -> Tensor:
    return x + x


def refuses(x: Tensor) -> Tensor:
    raise ValueError("not\n  this size")


def has_no_kernel(x: Tensor) -> Tensor:
    for why in ("is off", "wants a GPU", "is off"):
        warnings.warn(f"Flash {why} (Triggered internally at x.cpp:3.)", stacklevel=1)
    raise RuntimeError("No available kernel.")


def wrong(x: Tensor) -> Tensor:
    assert x.shape[1] > 1, "timed" if x.shape[0] > 1 else ""
    return 2.01 * x


def leaks(x: Tensor) -> Tensor:
    """Right only where no other rows can leak in."""
    return 2 * x + x.flip(0).detach() * (x.shape[0] > 1)


def dies(x: Tensor) -> Tensor:
    os._exit(3)


VARIANTS = {f.__name__: f for f in (right, slower, refuses, has_no_kernel, wrong, leaks, dies)}


@dataclass(frozen=True, kw_only=True)
class Doubled(Case):
    """x (batch, length), times two."""

    op = "doubled"
    unit = "GB/s"

    batch: int = 4
    chosen: tuple[str, ...] = ("right",)
    backward: bool = True

    def small(self) -> "Doubled":
        return Doubled(length=1, chosen=self.chosen)

    def excerpt(self) -> "Doubled":
        return Doubled(length=self.length, batch=1, chosen=self.chosen)

    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.draw(self.batch, self.length)}

    def reference(self, x: Tensor) -> Tensor:
        return 2 * x

    def variants(self, backends=None) -> list[Variant]:
        made = [Variant(name, VARIANTS[name]) for name in self.chosen]
        return [*made, Variant("absent", right, unavailable="is not here")]

    def work(self, pass_: str) -> float:
        return {FORWARD: 2, BOTH: 4}.get(pass_, 2) * 4 * self.batch * self.length


def answer(number: int, tell) -> int:
    tell("multiplying")
    return 2 * number


def about(variable: str, tell) -> tuple[int, str | None]:
    """The number of the process, and a variable of its environment."""
    return os.getpid(), os.environ.get(variable)


def hang(tell) -> None:
    tell("sleeping")
    time.sleep(600)


def raises(tell) -> None:
    tell("computing")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def exits(tell) -> None:
    tell("leaving")
    os._exit(3)
