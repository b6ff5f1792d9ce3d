"""Rewards of answers, by a reward model or by a function of texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tfkern.files import shown
from tfkern.generate.session import pad
from tfkern.models import Transformer
from tfkern.train.evaluate import evaluating

if TYPE_CHECKING:  # needs the library tokenizers, without which rewards are still functions
    from tfkern.tokenize import Tokenizer

Row = Sequence[int]
Reward = Callable[..., Any]
"""reward(prompts, answers, **columns): numbers (B,), as a tensor or a sequence.

Prompts and answers are lists of B lists of tokens. An answer includes the token that ended it.
Columns are what the prompts have beside, such as the true result of a problem: lists of B things.
"""


@dataclass(frozen=True)
class ModelReward:
    """The rewards of a reward model: its logit for each prompt with its answer.

    Attributes:
        model: has head "classification" with one class. It is read in evaluation mode.
        rows: the most answers that go through the model at once.

    Raises:
        ValueError: a model with another head, or rows that are not positive.
    """

    model: Transformer
    rows: int = 32

    def __post_init__(self) -> None:
        config = self.model.config
        if (config.head, config.classes) != ("classification", 1):
            raise ValueError(
                "a reward model must have head 'classification' with 1 class, got "
                f"{config.head!r} with {config.classes}"
            )
        if self.rows < 1:
            raise ValueError(f"rows must be positive, got {self.rows}")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Row], answers: Sequence[Row], **columns: Any) -> Tensor:
        weight = self.model.embedding.weight
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        found = []
        with evaluating(self.model):
            for i in range(0, len(texts), self.rows):
                tokens, lengths = pad(texts[i : i + self.rows], weight.device)
                found.append(self.model(tokens, mask=lengths).squeeze(-1))
        return torch.cat(found)


@dataclass(frozen=True)
class TextReward:
    """The rewards of a function of texts.

        reward = TextReward(lambda prompts, answers, **told: map(len, answers), tokenizer)

    Attributes:
        function: takes prompts and answers, lists of strings, and columns of the prompts by name.
            It returns a number for each answer.
        tokenizer: of the policy. Its control tokens are left out of the texts.
    """

    function: Callable[..., Any]
    tokenizer: "Tokenizer"

    def __call__(self, prompts: Sequence[Row], answers: Sequence[Row], **columns: Any) -> Tensor:
        texts = ([self.tokenizer.decode(row) for row in rows] for rows in (prompts, answers))
        return numbers(self.function(*texts, **columns))


def numbers(rewards: Any) -> Tensor:
    """Rewards as a tensor.

    Raises:
        ValueError: they are no numbers.
    """
    if isinstance(rewards, Tensor):
        return rewards
    try:
        return torch.tensor([float(x) for x in rewards], dtype=torch.float64)
    except (TypeError, ValueError):
        told = shown(rewards)
        raise ValueError(f"reward must give a number for each answer, got {told}") from None
