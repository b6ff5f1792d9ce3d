"""Losses on pairs of answers, of which one was preferred to the other.

Each has a score for either answer, and a loss of the margin: by how much the score of the chosen
answer is larger.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.loss import IGNORED
from tfkern.train.kinds import check_flag, check_number
from tfkern.train.objective import Batch, CrossEntropy, Loss
from tfkern.train.preferences.answers import AnswerLogProbs, answers
from tfkern.train.preferences.reference import Extended, Scores, scores_for
from tfkern.train.steps import Batches


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What losses on pairs share. The loss is a mean over pairs.

    Attributes:
        nll: the factor of a second loss, the negative log-likelihood of the chosen answers, a mean
            over their tokens (Pang et al. 2024). It is the first term then.
    """

    nll: float = 0.0

    def __post_init__(self) -> None:
        check_number("nll", self.nll, 0, 1e6)

    def score(self, found: AnswerLogProbs, batch: Batch) -> Tensor:
        """(B, 2), the scores of the chosen and of the rejected answers."""
        raise NotImplementedError

    def loss(self, margin: Tensor) -> Tensor:
        """(B,), the losses of margins (B,)."""
        raise NotImplementedError

    def __call__(self, output: Any, batch: Batch) -> Loss:
        found = answers(output, _targets(batch))
        means = [self.loss(_margin(self.score(found, batch))).mean()]
        if self.nll:
            chosen, tokens = found.log_probs[:, 0].sum(), found.lengths[:, 0].sum()
            means.insert(0, -self.nll * chosen / tokens.clamp(min=1))
        return Loss(torch.stack(means), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        targets = _targets(batch)
        pairs = torch.tensor(len(targets), device=targets.device)
        return torch.stack([*([(targets[:, 0] != IGNORED).sum()] if self.nll else []), pairs])

    def rewards(self, output: Any, batch: Batch) -> Tensor:
        """(B, 2), the implicit rewards of the chosen and of the rejected answers, to look at: the
        scores, without a gradient."""
        with torch.no_grad():
            return self.score(answers(output, _targets(batch)), batch)

    def right(self, output: Any, batch: Batch) -> Tensor:
        """The number of pairs whose chosen answer has the larger score, and in front of it, if
        there is a second loss, that of the chosen answers' tokens that are the likeliest."""
        pairs = (_margin(self.rewards(output, batch)) > 0).sum()
        if not self.nll:
            return pairs[None]
        chosen = CrossEntropy().right(output[:, 0], {"targets": _targets(batch)[:, 0]})
        return torch.cat([chosen, pairs[None]])


@dataclass(frozen=True, kw_only=True)
class Referenced(Pairs):
    """A loss whose scores are log-ratios of the model to a reference, times beta.

    "targets" of a batch are a tuple: the targets (B, 2, T), and the reference's log-probabilities
    (B, 2) of the answers. `extended` makes such batches.

    Attributes:
        beta: how strongly the reference holds the model.
        per_token: whether an answer's log-ratio is divided by the number of its tokens.
    """

    beta: float = 0.1
    per_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 1e-6, 1e6)
        check_flag("per_token", self.per_token)

    def score(self, found: AnswerLogProbs, batch: Batch) -> Tensor:
        reference = batch["targets"][1] if isinstance(batch["targets"], (tuple, list)) else None
        if reference is None or reference.shape != found.log_probs.shape:
            raise ValueError(
                f"{type(self).__name__} needs batches with a reference's log-probabilities "
                f"{tuple(found.log_probs.shape)}, as `extended` makes them"
            )
        ratios = found._replace(log_probs=found.log_probs - reference.to(found.log_probs.dtype))
        return self.beta * (ratios.per_token if self.per_token else ratios.log_probs)

    def extended(
        self,
        batches: Batches,
        model: nn.Module,
        *,
        reference: nn.Module | Scores | None = None,
        precision: torch.dtype | None = None,
    ) -> Extended:
        """Batches with the log-probabilities of a reference.

        Args:
            batches: with "targets" (B, 2, T). Those that have log-probabilities stay as they are.
            model: as it is at the start. A frozen copy of it is the reference if there is no other.
            reference: a model, or a function of a batch that returns the log-probabilities (B, 2)
                of its answers: `Reference` for the model itself without its adapters, `Known` for
                log-probabilities that have been computed before.
            precision: of autocast in the reference, see `steps`.
        """
        score = scores_for(model, reference, precision)

        def extend(batch: Batch) -> Batch:
            targets = batch["targets"]
            if isinstance(targets, (tuple, list)):
                return batch
            return {**batch, "targets": (targets, score(batch).to(targets.device))}

        return Extended(batches, extend)


@dataclass(frozen=True, kw_only=True)
class DPO(Referenced):
    """Direct preference optimisation: `-log sigmoid(margin)` (Rafailov et al. 2023).

    Attributes:
        label_smoothing: the share of pairs that are thought to be the wrong way round, in
            [0, 0.5). The loss is then that of the expected label (conservative DPO, Mitchell 2023).
        robust: whether the loss is, with that share, an unbiased estimate of that of the true
            labels (Chowdhury et al. 2024).
    """

    label_smoothing: float = 0.0
    robust: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self.label_smoothing)
        check_flag("robust", self.robust)

    def loss(self, margin: Tensor) -> Tensor:
        e = self.label_smoothing
        if self.robust:
            return ((1 - e) * -F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)
        return _smoothed(margin, e)


@dataclass(frozen=True, kw_only=True)
class Hinge(Referenced):
    """`max(0, 1 - margin)` (Zhao et al. 2023), on log-ratios in place of log-probabilities."""

    def loss(self, margin: Tensor) -> Tensor:
        return torch.relu(1 - margin)


@dataclass(frozen=True, kw_only=True)
class IPO(Referenced):
    """Identity preference optimisation: `(margin / beta - 1 / (2 beta))^2` (Azar et al. 2024).

    Log-ratios are divided by the number of tokens, as the authors do, unless per_token is False.
    """

    per_token: bool = True

    def loss(self, margin: Tensor) -> Tensor:
        return ((margin - 0.5) / self.beta).square()


@dataclass(frozen=True, kw_only=True)
class SimPO(Pairs):
    """`-log sigmoid(margin - gamma)` of log-probabilities per token, times beta, without a
    reference (Meng et al. 2024).

    Attributes:
        beta: the factor of the log-probabilities.
        gamma: the margin that is aimed at.
        label_smoothing: see `DPO`.
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 1e-6, 1e6)
        check_number("gamma", self.gamma, 0, 1e6)
        _check_smoothing(self.label_smoothing)

    def score(self, found: AnswerLogProbs, batch: Batch) -> Tensor:
        return self.beta * found.per_token

    def loss(self, margin: Tensor) -> Tensor:
        return _smoothed(margin - self.gamma, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class ORPO(Pairs):
    """The negative log-likelihood of the chosen answers, and `-weight log sigmoid(margin)` of
    log-odds, without a reference (Hong et al. 2024).

    The odds of an answer are p / (1 - p) with p the geometric mean of its tokens' probabilities.

    Attributes:
        weight: the factor of the second term, lambda in the paper.
    """

    nll: float = 1.0
    weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight", self.weight, 0, 1e6)

    def score(self, found: AnswerLogProbs, batch: Batch) -> Tensor:
        # an answer that is certain would have infinite odds
        p = found.per_token.clamp(max=-torch.finfo(found.log_probs.dtype).eps)
        return p - (-p.expm1()).log()

    def loss(self, margin: Tensor) -> Tensor:
        return -self.weight * F.logsigmoid(margin)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _margin(scores: Tensor) -> Tensor:
    return scores[:, 0] - scores[:, 1]


def _targets(batch: Batch) -> Tensor:
    """The targets (B, 2, T), without what else there is.

    Raises:
        ValueError: they are no pairs.
    """
    targets = batch["targets"]
    targets = targets[0] if isinstance(targets, (tuple, list)) else targets
    if targets.dim() != 3 or targets.shape[1] != 2:
        raise ValueError(f"targets must be pairs (B, 2, T), got {tuple(targets.shape)}")
    return targets


def _check_smoothing(value: Any) -> None:
    check_number("label_smoothing", value, 0, 0.5)
    if value == 0.5:
        raise ValueError("label_smoothing must be less than 0.5, where labels say nothing, got 0.5")
