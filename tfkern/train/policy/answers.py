"""Answers that a policy has written, as targets of a batch, and their log-probabilities."""

from typing import NamedTuple

from torch import Tensor

from tfkern import models, ops
from tfkern.models.heads import DeferredLogits
from tfkern.models.loss import IGNORED, Logits


class Answers(NamedTuple):
    """The "targets" of a batch of `Rollouts`. Where no token of an answer follows, all is 0 but
    `tokens`.

    Attributes:
        tokens: (B, T) int64, the token that follows each token if it is one of the answer, and
            -100 if not.
        old: (B, T), log-probabilities of these tokens under the policy that wrote them.
        reference: (B, T), those under the reference; None if there is none.
        values: (B, T), what the critic expected before each token; None without a critic.
        rewards: (B,), of the answers.
        advantages: (B, T), of the tokens; or (B,), of the answers.
        returns: (B, T), what the critic is to expect; None without a critic.
    """

    tokens: Tensor
    old: Tensor
    reference: Tensor | None
    values: Tensor | None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None

    @property
    def exist(self) -> Tensor:
        """(B, T) bool: whether a token of the answer follows."""
        return self.tokens != IGNORED


def tempered_log_probs(logits: Logits, tokens: Tensor, temperature: float) -> Tensor:
    """The log-probabilities (B, T) of tokens that are drawn at a temperature, 0 at -100."""
    return models.log_probs(tempered(logits, temperature), tokens)


def tempered(logits: Logits, temperature: float) -> Logits:
    """Logits divided by a temperature."""
    if temperature == 1:
        return logits
    if not isinstance(logits, DeferredLogits):
        return logits / temperature
    if logits.softcap:  # the temperature divides what the cap has made, which is not linear
        return whole(logits) / temperature
    bias = None if logits.bias is None else logits.bias / temperature
    return logits._replace(x=logits.x / temperature, bias=bias)


def whole(logits: Logits) -> Tensor:
    """Logits (..., V), which may have been deferred."""
    if not isinstance(logits, DeferredLogits):
        return logits
    if logits.part is not None:
        raise ValueError("no process has all logits of a vocabulary that several share")
    x = ops.linear(logits.x, logits.weight, logits.bias)
    return x if not logits.softcap else (x / logits.softcap).tanh() * logits.softcap
