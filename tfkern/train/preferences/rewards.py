"""The loss of a reward model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern.train.kinds import check_number
from tfkern.train.objective import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """`-log sigmoid(r_chosen - r_rejected - m)` of the rewards r that a model with the head
    "classification" of one class gives to pairs (Bradley and Terry 1952; Ouyang et al. 2022).

    "targets" (B,) of a batch are the margins m by which the chosen answers are better (Touvron et
    al. 2023), 0 for pairs of which no more is known. The loss is a mean over pairs.

    Attributes:
        centre: the factor of a second term, `(r_chosen + r_rejected)^2`, which holds rewards around
            0 (Eisenstein et al. 2023).
    """

    centre: float = 0.0

    def __post_init__(self) -> None:
        check_number("centre", self.centre, 0, 1e6)

    def __call__(self, output: Any, batch: Batch) -> Loss:
        rewards = self.rewards(output)
        chosen, rejected = rewards.unbind(1)
        margins = batch["targets"].to(rewards.dtype)
        means = [-F.logsigmoid(chosen - rejected - margins).mean()]
        if self.centre:
            means.append(self.centre * (chosen + rejected).square().mean())
        return Loss(torch.stack(means), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        targets = batch["targets"]
        if targets.dim() != 1:
            raise ValueError(f"targets must be margins (B,), got {tuple(targets.shape)}")
        return torch.full((2 if self.centre else 1,), len(targets), device=targets.device)

    def right(self, output: Any, batch: Batch) -> Tensor:
        """The number of pairs whose chosen answer has the larger reward, for each term."""
        chosen, rejected = self.rewards(output).unbind(1)
        return (chosen > rejected).sum().expand(2 if self.centre else 1)

    def rewards(self, output: Any) -> Tensor:
        """(B, 2), float32 or wider, of what the model returns.

        Raises:
            ValueError: that is not one number for each row of a pair.
        """
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[1:] != (2, 1):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the model must return one reward for each row (B, 2, 1), got {got}")
        found = output.squeeze(-1)
        return found.float() if found.dtype.itemsize == 2 else found
