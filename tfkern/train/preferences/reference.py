"""The log-probabilities that a reference gives to answers, and batches that have them."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfkern import files
from tfkern.models.loss import IGNORED
from tfkern.train.evaluate import evaluating
from tfkern.train.freezing import frozen
from tfkern.train.objective import Batch
from tfkern.train.parallel.model import Parallel, inputs
from tfkern.train.preferences.answers import answers

Scores = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Extended(Sequence[Batch]):
    """Batches, each with what an objective needs beside.

    Attributes:
        batches: as the data give them.
        extend: makes a batch of each, whenever it is asked for.
    """

    batches: Any
    extend: Callable[[Batch], Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: Any) -> Any:
        return self.extend(self.batches[step])


class Reference:
    """The log-probabilities that a model gives to the answers of a batch, without a gradient and in
    evaluation mode.

        reference = Reference(model, without_adapters)  # the model that the adapters are added to
        batches = objective.extended(batches, model, reference=reference)

    Args:
        model: what `steps` takes.
        context: makes the context in which the model runs.
        precision: of autocast, see `steps`.

    Raises:
        ValueError: a model that is spread along tp, cp or pp.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        precision: torch.dtype | None = None,
    ) -> None:
        self.model, self.context, self.precision = model, context, precision
        ranks = Parallel.of(model)
        for axis in ("tp", "cp", "pp"):
            if ranks.size(axis) > 1:
                raise ValueError(
                    "log-probabilities need whole rows and the whole vocabulary, and the model is "
                    f"spread along {axis}: use dp or fsdp"
                )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """The log-probabilities, of the targets' shape but for the last axis, float32 or wider."""
        device = next(self.model.parameters()).device
        autocast = torch.autocast(device.type, self.precision) if self.precision else nullcontext()
        batch = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
        with evaluating(self.model, deferred=True), self.context(), autocast:
            targets = batch["targets"]
            targets = targets[0] if isinstance(targets, (tuple, list)) else targets
            return answers(self.model(**inputs(batch)), targets).log_probs


class Known:
    """Log-probabilities that are computed once for each row, and may be kept in a file.

        known = Known(Reference(frozen(model)))
        for batch in every_batch:
            known(batch)
        known.save("reference.npz")

        batches = objective.extended(batches, model, reference=Known.load("reference.npz"))

    Rows are known by their tokens and targets, so they may come in other batches, with other
    padding and in other processes.

    Args:
        reference: computes the rows that are not known yet.
        rows: the log-probability of each row that is known.
    """

    def __init__(
        self, reference: Scores | None = None, rows: dict[bytes, float] | None = None
    ) -> None:
        self.reference, self.rows = reference, rows or {}

    def __call__(self, batch: Batch) -> Tensor:
        """As `Reference`, float64.

        Raises:
            ValueError: there are new rows, and nothing that computes them.
        """
        targets = batch["targets"]
        targets = targets[0] if isinstance(targets, (tuple, list)) else targets
        keys = _keys(batch, targets)
        if new := [key for key in keys if key not in self.rows]:
            if self.reference is None:
                raise ValueError(
                    f"the reference's log-probabilities of {len(new)} of {len(keys)} rows are not "
                    "known: they are of other data"
                )
            self.rows.update(zip(keys, self.reference(batch).flatten().tolist(), strict=True))
        found = torch.tensor([self.rows[key] for key in keys], dtype=torch.float64)
        return found.view(targets.shape[:-1])

    def save(self, path: str | Path) -> None:
        """Writes the rows that are known.

        Raises:
            OSError: the file cannot be written.
        """
        keys = np.frombuffer(b"".join(self.rows), np.uint8).reshape(-1, _DIGEST)
        values = np.fromiter(self.rows.values(), np.float64, len(self.rows))
        with files.replacing(path) as new, open(new, "wb") as file:
            np.savez(file, keys=keys, values=values)

    @classmethod
    def load(cls, path: str | Path, reference: Scores | None = None) -> "Known":
        """What `save` wrote.

        Raises:
            ValueError: the file is another one.
        """
        path = files.regular(Path(path))
        try:
            with np.load(path, allow_pickle=False) as found:
                keys, values = found["keys"], found["values"].tolist()
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            told = files.one_line(error)
            raise ValueError(f"{path} holds no log-probabilities: {told}") from None
        return cls(reference, dict(zip(map(bytes, keys), values, strict=True)))


def scores_for(
    model: nn.Module, reference: nn.Module | Scores | None, precision: torch.dtype | None
) -> Scores:
    """What computes the log-probabilities of a reference: see `Referenced.extended`."""
    if reference is None:
        reference = frozen(model)
    if isinstance(reference, nn.Module):
        return Reference(reference, precision=precision)
    return reference


_DIGEST = 16  # bytes


def _keys(batch: Batch, targets: Tensor) -> list[bytes]:
    """A digest of each row up to its last target, on which nothing behind it has an influence."""
    rows = [batch["tokens"], targets, *([batch["source"]] if "source" in batch else [])]
    keys = []
    for tokens, target, *source in zip(*(x.flatten(0, -2).cpu() for x in rows), strict=True):
        places = (target != IGNORED).nonzero()
        end = int(places[-1]) + 1 if len(places) else len(target)
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for part in (tokens[:end], target[:end], *source):
            digest.update(part.long().numpy().tobytes() + b"|")
        keys.append(digest.digest())
    return keys
