"""The loop of training, as a generator."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfkern.train.objective import Batch, Objective
from tfkern.train.parallel.gradients import agree_on_overflow, clamp, clip, total_norm
from tfkern.train.parallel.model import ROWS, Parallel, Share
from tfkern.train.schedules import set_learning_rate


class Record(NamedTuple):
    """What one step did.

    Attributes:
        step: how many steps are done. It is the `start` with which a later run goes on.
        loss: of the batch, before the step.
        terms: the means that the loss is the sum of.
        norm: of all gradients together, before they are clipped.
        learning_rate: that of the first group of parameters.
        tokens: in the batch, or images, of all processes together.
        seconds: that the step took, without what the caller does between steps.
        skipped: whether gradients had overflowed in float16, so that no weight was changed.
    """

    step: int
    loss: float
    terms: tuple[float, ...]
    norm: float
    learning_rate: float
    tokens: int
    seconds: float
    skipped: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Batches(Protocol):
    """Batches by the number of the step, such as `tfkern.data.order` or a list."""

    def __getitem__(self, step: int, /) -> Batch: ...


def steps(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    *,
    start: int = 0,
    stop: int | None = None,
    schedule: Callable[[int], float] | None = None,
    accumulate: int = 1,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    seed: int = 0,
) -> Iterator[Record]:
    """Trains a model, and yields a record after each step.

        for record in steps(model, batches, CrossEntropy(), optimiser, stop=1000, clip_norm=1.0):
            if record.step % 100 == 0:
                print(record.step, record.loss)

    What else a run does, such as to evaluate and to save, the caller does between steps. Model,
    optimiser and the number of steps are all that a run has to keep: learning rates and random
    numbers depend on the number of the step alone. The states of torch's generators of the CPU and
    of the model's device are the caller's again whenever a record is yielded.

    A model that `tfkern.train.parallel.parallelise` has spread over processes is trained by all of
    them together: each runs this loop, on its part of the batches, and has the same records.

    Args:
        model: is called with all of a batch but its targets, in training mode, and compiled if it
            comes from `torch.compile`.
        batches: `batches[step]` is a dict of tensors whose first axis counts items; "targets" may
            be a tuple of them.
        objective: makes a loss of what the model returns.
        optimiser: of the model's parameters.
        start, stop: the first step, and the one before which training ends; without end if None.
        schedule: the factor of the learning rates at each step, as `tfkern.train.schedule` makes
            it; 1 if None.
        accumulate: into how many parts each batch is cut, one after the other in memory. The
            gradients are those of the whole batch, however targets are spread over its parts.
        precision: dtype of autocast, torch.bfloat16 or torch.float16; the weights stay as they are.
        scaler: needed for float16, which loses small gradients without it. Save it with the model.
        clip_norm: greatest norm of all gradients together (Pascanu et al. 2013).
        clip_value: greatest absolute value of a gradient.
        seed: of dropout, which also depends on the step.

    Raises:
        ValueError: arguments out of their range, before the first step.
        FloatingPointError: the loss or a gradient is infinite or NaN. It names the step, counted
            from 1 as in records, and the largest gradients. No weight has been changed by it. Also
            if gradients overflow float16 whatever the scale.
    """
    if not 0 <= start or stop is not None and stop < start:
        raise ValueError(f"need 0 <= start <= stop, got {start} and {stop}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be positive, got {accumulate}")
    for name, limit in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if limit is not None and not 0 < limit:
            raise ValueError(f"{name} must be positive, got {limit}")
    if precision not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"precision must be bfloat16, float16 or None, got {precision}")
    if (precision == torch.float16) != (scaler is not None):
        raise ValueError("float16 and a scaler need each other: torch.amp.GradScaler(device)")
    step = _Step(model, objective, optimiser, accumulate, precision, scaler, clip_norm, clip_value)
    return _run(step, batches, start, stop, schedule, seed)


def _run(
    step: "_Step",
    batches: Batches,
    start: int,
    stop: int | None,
    schedule: Callable[[int], float] | None,
    seed: int,
) -> Iterator[Record]:
    number = start
    while stop is None or number < stop:
        began = time.perf_counter()
        batch = batches[number]
        rate = set_learning_rate(step.optimiser, 1.0 if schedule is None else schedule(number))
        with _random_numbers(seed, number, step.model.random_rank, step.device):
            terms, norm, tokens, skipped = step(number, batch)
        number += 1
        yield Record(
            number, sum(terms), terms, norm, rate, tokens, time.perf_counter() - began, skipped
        )  # fmt: skip


class _Step:
    """One step: gradients of a batch, and what the optimiser makes of them."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimiser: torch.optim.Optimizer,
        accumulate: int,
        precision: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        clip_norm: float | None,
        clip_value: float | None,
    ) -> None:
        self.model, self.objective, self.optimiser = Parallel.of(model), objective, optimiser
        self.accumulate, self.precision, self.scaler = accumulate, precision, scaler
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        if not self.parameters:
            raise ValueError("the optimiser has no parameters")
        self.device = self.parameters[0].device

    def __call__(self, number: int, batch: Batch) -> tuple[tuple[float, ...], float, int, bool]:
        """The terms of the loss, the norm of the gradients, how many tokens the batch has, and
        whether the step was skipped."""
        if not self.model.module.training:
            self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        terms, tokens = self._backward(batch)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError("no parameter of the optimiser has a gradient")
        counted = [p for p in self.parameters if p not in self.model.borrowed]
        norms = (p.grad for p in counted if p.grad is not None)
        norm = total_norm(norms, self.model.stages).item()
        found = tuple(terms.tolist())
        finite = math.isfinite(norm)
        if not all(map(math.isfinite, found)) or not finite and self.scaler is None:
            raise FloatingPointError(self._diverged(number + 1, found, norm))
        if finite and self.clip_norm is not None and norm > self.clip_norm:
            clip(gradients, self.clip_norm, norm)
        if finite and self.clip_value is not None:
            clamp(gradients, self.clip_value)
        self._update(number + 1, not finite)
        return found, norm, int(tokens), not finite

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Adds up gradients over the parts of a batch. Returns the terms of its loss, and how many
        tokens it has: on all ranks."""
        cut = parts(batch, self.accumulate)
        counts = torch.stack([self.objective.count(part) for part in cut]).sum(0)
        counts = torch.cat([counts, counts.new_tensor([size(batch)])]).to(self.device)
        *_, tokens = counts = self.model.sum(counts, ROWS)
        share = Share(self.objective, counts[:-1], self._autocast)
        scale = _unscaled if self.scaler is None else self.scaler.scale
        terms = []
        for i, part in enumerate(cut):
            part = pytree.tree_map(self._moved, part)
            terms.append(self.model.backward(part, share, scale, last=i == len(cut) - 1))
        return self.model.sum(torch.stack(terms).sum(0)), tokens

    def _moved(self, x: Any) -> Any:
        return x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x

    def _autocast(self) -> Any:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def _update(self, number: int, skipped: bool) -> None:
        if self.scaler is None:
            self.optimiser.step()
            return
        if self.model.mesh is not None:
            agree_on_overflow(self.scaler, self.optimiser)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if skipped and self.scaler.get_scale() < _LEAST_SCALE:
            raise FloatingPointError(
                f"step {number}: gradients overflow float16 at a scale of "
                f"{self.scaler.get_scale():.3g}: use bfloat16, or a smaller learning rate"
            )

    def _diverged(self, number: int, terms: tuple[float, ...], norm: float) -> str:
        module = self.model.module
        inner = getattr(module, "_orig_mod", module)  # of a compiled model
        name_of = {id(p): name for name, p in inner.named_parameters()}
        sizes = [
            (math.inf if math.isnan(size) else size, name_of.get(id(p), "?"), size)
            for p in self.parameters
            if p.grad is not None
            for size in [total_norm([p.grad]).item()]
        ]
        first = sorted(sizes, reverse=True)[:_SHOWN]
        largest = ", ".join(f"{name} {size:.3g}" for _, name, size in first)
        shown = " + ".join(f"{term:.6g}" for term in terms)
        return (
            f"step {number}: the loss is {shown} and the norm of the gradients {norm:.3g}; the "
            f"largest: {largest}"
        )


_LEAST_SCALE = 2.0**-24
_SHOWN = 3  # gradients in an error


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def parts(batch: Batch, count: int) -> list[dict[str, Any]]:
    """A batch, cut along the first axis of its tensors into parts of about equal size."""
    if count == 1:
        return [dict(batch)]
    leaves, form = pytree.tree_flatten(dict(batch))
    sizes = {len(x) if x.dim() else 0 for x in leaves if isinstance(x, Tensor)}
    if len(sizes) != 1:
        raise ValueError(f"all tensors of a batch must have as many items, got {sorted(sizes)}")
    if min(sizes) < count:
        raise ValueError(f"a batch of {min(sizes)} items cannot be cut into {count} parts")
    pieces = [x.tensor_split(count) if isinstance(x, Tensor) else [x] * count for x in leaves]
    return [pytree.tree_unflatten(part, form) for part in zip(*pieces, strict=True)]


def size(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch has, or images."""
    found = [batch[name] for name in ("tokens", "source") if name in batch]
    return sum(len(x) if x.is_floating_point() else x.numel() for x in found)


@contextmanager
def _random_numbers(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Random numbers that a seed, a step and a process determine, from torch's own generators."""
    told = f"{seed} {step} {rank}" if rank else f"{seed} {step}"
    digest = hashlib.blake2b(told.encode(), digest_size=8).digest()
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(int.from_bytes(digest, "little"))
        yield
