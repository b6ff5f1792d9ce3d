"""PPO, GRPO and RLOO: what answers and their rewards are worth, and the losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tfkern.models.loss import Logits
from tfkern.train.kinds import check_choice, check_flag, check_number
from tfkern.train.objective import Batch, Loss
from tfkern.train.policy.advantages import (
    KL_KINDS,
    Total,
    at_last,
    gae,
    group_relative,
    kl_estimate,
    leave_one_out,
    whiten,
)
from tfkern.train.policy.answers import Answers, tempered, tempered_log_probs, whole


@dataclass(frozen=True, kw_only=True)
class FromRewards:
    """What PPO, GRPO and RLOO share. `Rollouts` makes their batches.

    Attributes:
        kl: factor of the KL divergence from the reference; with 0 there need not be one.
        clip: how far the ratio of probabilities under the policy and under the one that wrote the
            answers is followed: to 1 - clip and 1 + clip (Schulman et al. 2017).
        temperature: at which answers are drawn. All log-probabilities are those at it.
        critic: whether the model is an `ActorCritic`.
        samples: the fewest answers to a prompt.
    """

    kl: float = 0.0
    clip: float = 0.2
    temperature: float = 1.0
    critic: ClassVar[bool] = False
    samples: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("kl", self.kl, 0, math.inf)
        check_number("clip", self.clip, 0, math.inf)
        check_number("temperature", self.temperature, 1e-6, math.inf)

    def credited(self, answers: Answers, samples: int, total: Total) -> Answers:
        """The answers of a round, with advantages and returns.

        Args:
            answers: of this process, `samples` of each prompt, one after the other.
            total: sums a tensor over all data ranks.
        """
        raise NotImplementedError

    def __call__(self, output: Any, batch: Batch) -> Loss:
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def _new(self, logits: Logits, answers: Answers) -> Tensor:
        return tempered_log_probs(logits, answers.tokens, self.temperature)

    def _clipped(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """The clipped loss of each token or answer."""
        ratio = log_ratio.exp()
        near = ratio.clamp(1 - self.clip, 1 + self.clip)
        return -torch.minimum(ratio * advantages, near * advantages)


@dataclass(frozen=True, kw_only=True)
class PPO(FromRewards):
    """Proximal policy optimisation (Schulman et al. 2017) of language models (Ziegler et al. 2019;
    Ouyang et al. 2022).

    The reward of an answer comes with its last token, and each token costs `kl` times the estimate
    of its KL divergence. The model is an `ActorCritic`, whose critic is trained beside the policy.

        loss = mean of -min(r A, clip(r) A)
             + value * mean of max((V - R)^2, (clip(V) - R)^2) / 2 - entropy * mean entropy

    with r the ratio of probabilities, A the advantages by `gae`, V the values and R the returns;
    means are over the tokens of answers. The terms are those of policy, value and, if `entropy` is
    not 0, entropy.

    Attributes:
        kl_kind: the estimate, see `kl_estimate`: "k1" or "k3".
        gamma, lam: see `gae`.
        clip_value: how far values may go from the old ones; None for any distance.
        value, entropy: factors of these terms.
        whiten: whether advantages get mean 0 and variance 1 over all tokens of a round.
        whiten_rewards: whether rewards of tokens get variance 1.

    Raises:
        ValueError: a value out of its range.
    """

    kl: float = 0.05
    kl_kind: str = "k1"
    gamma: float = 1.0
    lam: float = 0.95
    clip_value: float | None = 0.2
    value: float = 0.1
    entropy: float = 0.0
    whiten: bool = True
    whiten_rewards: bool = False
    critic: ClassVar[bool] = True
    samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kl_kind", self.kl_kind, KL_KINDS)
        for name in ("gamma", "lam"):
            check_number(name, getattr(self, name), 0, 1)
        if self.clip_value is not None:
            check_number("clip_value", self.clip_value, 0, math.inf)
        for name in ("value", "entropy"):
            check_number(name, getattr(self, name), 0, math.inf)
        for name in ("whiten", "whiten_rewards"):
            check_flag(name, getattr(self, name))

    def credited(self, answers: Answers, samples: int, total: Total) -> Answers:
        exist, values = answers.exist, answers.values
        assert values is not None
        rewards = at_last(answers.rewards, exist)
        if self.kl:
            assert answers.reference is not None
            rewards = rewards - self.kl * kl_estimate(answers.old, answers.reference, self.kl_kind)
        if self.whiten_rewards:
            rewards = whiten(rewards, exist, total, shift=False)
        advantages = gae(rewards, values, exist, self.gamma, self.lam)
        returns = advantages + values
        if self.whiten:
            advantages = whiten(advantages, exist, total)
        return answers._replace(advantages=advantages, returns=returns)

    def __call__(self, output: Any, batch: Batch) -> Loss:
        (logits, values), answers = output, batch["targets"]
        exist = answers.exist
        policy = self._clipped(self._new(logits, answers) - answers.old, answers.advantages)
        values = torch.where(exist, values.to(answers.old.dtype), 0)
        error = (values - answers.returns).square()
        if self.clip_value is not None:
            change = (values - answers.values).clamp(-self.clip_value, self.clip_value)
            error = torch.maximum(error, (answers.values + change - answers.returns).square())
        terms = [policy, self.value / 2 * error]
        if self.entropy:
            terms.append(-self.entropy * _entropy(tempered(logits, self.temperature), exist))
        means = [_mean(term, exist) for term in terms]
        return Loss(torch.stack(means), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        return batch["targets"].exist.sum().expand(3 if self.entropy else 2)


@dataclass(frozen=True, kw_only=True)
class GRPO(FromRewards):
    """Group relative policy optimisation (Shao et al. 2024).

    The advantage of all tokens of an answer is its reward, compared with those of the other answers
    to the same prompt.

        loss = mean of -min(r A, clip(r) A) + kl * mean of the estimate k3 of the KL divergence

    The terms are these two, or the first one if `kl` is 0.

    Attributes:
        scale: whether advantages are divided by the standard deviation of a group's rewards. Dr.
            GRPO (Liu et al. 2025) does not, and takes the mean "token".
        mean: "sequence", over answers of the means over their tokens, as Shao et al. have it, or
            "token", over the tokens of all answers (Yu et al. 2025), where long answers weigh more.

    Raises:
        ValueError: a value out of its range.
    """

    kl: float = 0.04
    scale: bool = True
    mean: str = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("scale", self.scale)
        check_choice("mean", self.mean, tuple(_MEANS))

    def credited(self, answers: Answers, samples: int, total: Total) -> Answers:
        found = group_relative(answers.rewards.unflatten(0, (-1, samples)), self.scale)
        return answers._replace(advantages=found.flatten())

    def __call__(self, output: Any, batch: Batch) -> Loss:
        answers, mean = batch["targets"], _MEANS[self.mean]
        new = self._new(output, answers)
        policy = self._clipped(new - answers.old, answers.advantages[:, None])
        terms = [mean(policy, answers.exist)]
        if self.kl:
            divergence = kl_estimate(new, answers.reference, "k3")
            terms.append(self.kl * mean(divergence, answers.exist))
        return Loss(torch.stack(terms), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        exist = batch["targets"].exist
        count = exist.sum() if self.mean == "token" else exist.any(1).sum()
        return count.expand(2 if self.kl else 1)


@dataclass(frozen=True, kw_only=True)
class RLOO(FromRewards):
    """REINFORCE with leave-one-out (Ahmadian et al. 2024).

    An answer is one action. Its reward less `kl` times the estimate of its KL divergence is
    compared with the mean of the other answers to the same prompt.

        loss = mean over answers of -min(r A, clip(r) A)

    with r the ratio of probabilities of whole answers. In the first step on an answer, r is 1 and
    the gradient that of REINFORCE, -A times that of the log-probability.

    Attributes:
        kl_kind: the estimate, see `kl_estimate`: "k1" or "k3".

    Raises:
        ValueError: a value out of its range.
    """

    kl: float = 0.05
    kl_kind: str = "k1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kl_kind", self.kl_kind, KL_KINDS)

    def credited(self, answers: Answers, samples: int, total: Total) -> Answers:
        rewards = answers.rewards
        if self.kl:
            assert answers.reference is not None
            cost = kl_estimate(answers.old, answers.reference, self.kl_kind)
            rewards = rewards - self.kl * cost.sum(1)
        found = leave_one_out(rewards.unflatten(0, (-1, samples)))
        return answers._replace(advantages=found.flatten())

    def __call__(self, output: Any, batch: Batch) -> Loss:
        answers = batch["targets"]
        log_ratio = (self._new(output, answers) - answers.old).sum(1)
        each = self._clipped(log_ratio, answers.advantages)
        return Loss(_mean(each, answers.exist.any(1))[None], self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        return batch["targets"].exist.any(1).sum()[None]


def _mean(x: Tensor, exist: Tensor) -> Tensor:
    """The mean of what exists."""
    return torch.where(exist, x, 0).sum() / exist.sum().clamp(min=1)


def _mean_of_means(x: Tensor, exist: Tensor) -> Tensor:
    """The mean over rows of the means of what exists in them."""
    rows = torch.where(exist, x, 0).sum(1) / exist.sum(1).clamp(min=1)
    return _mean(rows, exist.any(1))


_MEANS = {"sequence": _mean_of_means, "token": _mean}


def _entropy(logits: Logits, exist: Tensor) -> Tensor:
    """The entropy (B, T) in nats of the next token, where one of an answer follows, else 0."""
    if not isinstance(logits, Tensor):
        logits = logits._replace(x=logits.x[exist])  # whole logits of these rows only
        found = whole(logits)
    else:
        found = logits[exist]
    found = found.to(torch.promote_types(found.dtype, torch.float32)).log_softmax(-1)
    entropies = -(found.exp() * found).sum(-1)
    return entropies.new_zeros(exist.shape).masked_scatter(exist, entropies)


OBJECTIVES: dict[str, Callable[..., FromRewards]] = {"ppo": PPO, "grpo": GRPO, "rloo": RLOO}
