"""The loss of answers that are labelled one by one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.train.kinds import check_number
from tfkern.train.objective import Batch, Loss
from tfkern.train.parallel.model import ROWS, Parallel
from tfkern.train.preferences.answers import answers
from tfkern.train.preferences.reference import Extended, Reference, Scores, scores_for
from tfkern.train.steps import Batches


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): with the log-ratio r of an answer to
    a reference, and the mean z of such a ratio, which the reward is compared with,

        desirable:    desirable (1 - sigmoid(beta (r - z)))
        undesirable:  undesirable (1 - sigmoid(beta (z - r)))

    The data give rows in groups of two: an answer, and behind the same prompt the answer of another
    item; "targets" are a tuple of (B, 2, T) and (B,) bool, whether an answer is desirable.
    `extended` makes z of the second rows, with the model as it is at the step: their mean log-ratio
    in the whole batch, on all ranks, or 0 if that is less. The batches that it returns have the
    first rows alone, and as targets (B, T), the labels, the reference's log-probabilities and z.

    Attributes:
        beta: how strongly the reference holds the model.
        desirable, undesirable: the weights of answers with these labels.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, 1e-6, 1e6)
        check_number("desirable", self.desirable, 0, 1e6)
        check_number("undesirable", self.undesirable, 0, 1e6)

    def __call__(self, output: Any, batch: Batch) -> Loss:
        advantage, labels = self._advantage(output, batch)
        value = torch.where(labels, advantage, -advantage)
        weight = torch.where(labels, self.desirable, self.undesirable).to(value.dtype)
        losses = weight * (1 - torch.sigmoid(self.beta * value))
        return Loss(losses.mean()[None], self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        targets, *_ = _parts(batch)
        return torch.full((1,), len(targets), device=targets.device)

    def right(self, output: Any, batch: Batch) -> Tensor:
        """The number of answers whose log-ratio is above z if they are desirable, and not if they
        are undesirable."""
        advantage, labels = self._advantage(output, batch)
        return ((advantage > 0) == labels).sum()[None]

    def _advantage(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """r - z (B,), and the labels (B,) bool."""
        targets, labels, reference, z = _parts(batch)
        found = answers(output, targets).log_probs
        return found - reference.to(found.dtype) - z.to(found.dtype), labels.bool()

    def extended(
        self,
        batches: Batches,
        model: nn.Module,
        *,
        reference: nn.Module | Scores | None = None,
        precision: torch.dtype | None = None,
    ) -> Extended:
        """Batches with the log-probabilities of a reference and with z. All data ranks have to ask
        for a batch at once.

        Args:
            batches: as the data give them. Those that have all targets stay as they are.
            model: is trained, and as it is at the start a copy of it is the reference if there is
                no other.
            reference, precision: see `tfkern.train.preferences.DPO.extended`.
        """
        score = scores_for(model, reference, precision)
        policy, ranks = Reference(model, precision=precision), Parallel.of(model)

        def extend(batch: Batch) -> Batch:
            if len(batch["targets"]) == 4:
                return batch
            targets, labels = batch["targets"]
            given = {name: x for name, x in batch.items() if name != "targets"}
            first, second = ({name: x[:, i] for name, x in given.items()} for i in (0, 1))
            known = score(batch)
            other = policy({**second, "targets": targets[:, 1]})
            ratios = (other - known[:, 1].to(other)).double()
            sums = torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
            total, count = ranks.sum(sums, ROWS)
            z = (total / count).clamp(min=0).expand(len(labels))
            beside = [x.to(targets.device) for x in (known[:, 0], z)]
            return {**first, "targets": (targets[:, 0], labels, *beside)}

        return Extended(batches, extend)


def _parts(batch: Batch) -> tuple[Tensor, ...]:
    targets = batch["targets"]
    if not isinstance(targets, (tuple, list)) or len(targets) != 4:
        raise ValueError("KTO needs batches with a reference and z, as `extended` makes them")
    return tuple(targets)
