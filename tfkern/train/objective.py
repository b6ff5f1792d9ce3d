"""Objectives: from what a model returns to a loss that parts of a batch can share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tfkern import models
from tfkern.models.heads import DeferredLogits
from tfkern.models.loss import IGNORED

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """The terms of a loss, each the mean over as many things as `count` says.

    The loss is the sum of the means. That of a batch follows from those of its parts, whatever
    their sizes: each mean counts as often as its part has things in it.

    Attributes:
        mean: (terms,) float32 or wider.
        count: (terms,) int64, of tokens, sequences or whatever the mean is over.
    """

    mean: Tensor
    count: Tensor

    def share(self, count: Tensor) -> Tensor:
        """What this part adds to the terms of a batch that has `count` things altogether."""
        return self.mean * (self.count.double() / count.clamp(min=1)).to(self.mean.dtype)


class Objective(Protocol):
    """A function of what a model returns for a batch, and of the batch.

    The keys of a batch are arguments of the model, and "targets".

    An objective may also have `right(output, batch)`, (terms,) integers: how many of the things
    that the loss is a mean over the model gets right. `evaluate` then tells their share. And it may
    have `extended(batches, model, **options)`, batches with what the loss needs beside the data,
    such as log-probabilities under the model as it is before the first step.
    """

    def __call__(self, output: Any, batch: Batch, /) -> Loss: ...

    def count(self, batch: Batch, /) -> Tensor:
        """The `count` of the loss, which is known before the model has run."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy of logits, for all heads of `tfkern.models`.

    Causal, masked and prefix language models, translation, spans and classes differ in their
    targets alone. A batch has "targets", or for a head with several results a tuple of them, as
    `tfkern.models.cross_entropy` takes them. Targets of -100 have no loss.

    Attributes:
        label_smoothing, z_loss: see `tfkern.cross_entropy`.
        weights: the factor of each result's mean; 1 if None. GPT-1 is fine-tuned with
            (0.5, 1) for the language model beside the classes (Radford et al. 2018).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    weights: Sequence[float] | None = None

    def __call__(self, output: Any, batch: Batch) -> Loss:
        targets = _several(batch["targets"])
        single = isinstance(output, (Tensor, DeferredLogits))
        outputs = (output,) if single else tuple(output)
        if len(outputs) != len(targets):
            raise ValueError(f"there are {len(outputs)} results and {len(targets)} targets")
        if self.weights is not None and len(self.weights) != len(outputs):
            raise ValueError(f"there are {len(outputs)} results and {len(self.weights)} weights")
        options = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        means = [
            models.cross_entropy(logits, target, **options)
            for logits, target in zip(outputs, targets, strict=True)
        ]
        if self.weights is not None:
            means = [w * mean for w, mean in zip(self.weights, means, strict=True)]
        return Loss(torch.stack(means), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        return torch.stack([(t != IGNORED).sum() for t in _several(batch["targets"])])

    def right(self, output: Any, batch: Batch) -> Tensor:
        """How many targets of each result are the likeliest class."""
        targets = _several(batch["targets"])
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([((x.argmax(-1) == t) & (t != IGNORED)).sum() for x, t in pairs])


def _several(targets: Any) -> tuple[Tensor, ...]:
    return tuple(targets) if isinstance(targets, (tuple, list)) else (targets,)
