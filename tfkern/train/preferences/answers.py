"""The log-probabilities of whole answers."""

from typing import Any, NamedTuple

from torch import Tensor

from tfkern.models import log_probs
from tfkern.models.heads import DeferredLogits
from tfkern.models.loss import IGNORED


class AnswerLogProbs(NamedTuple):
    """What a model thinks of the answers of some rows.

    Attributes:
        log_probs: (...), the sum over the tokens of each answer, in nats, float32 or wider.
        lengths: (...) int64, how many tokens each answer has.
    """

    log_probs: Tensor
    lengths: Tensor

    @property
    def per_token(self) -> Tensor:
        """(...), the mean over the tokens of each answer."""
        return self.log_probs / self.lengths.clamp(min=1)


def answers(output: Any, targets: Tensor) -> AnswerLogProbs:
    """The answers that targets (..., T) are, by the logits of a language model.

    Padding has no targets, so that no answer depends on it.

    Raises:
        ValueError: the output is that of another head.
    """
    if not isinstance(output, (Tensor, DeferredLogits)):
        raise ValueError(f'the model must have the head "lm", got {type(output).__name__}')
    return AnswerLogProbs(log_probs(output, targets).sum(-1), (targets != IGNORED).sum(-1))
