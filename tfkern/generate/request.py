"""The arguments of generation, checked before the model runs."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern.generate.sampling import Sampling
from tfkern.models import Transformer

Rows = Tensor | Sequence[Sequence[int] | Tensor]
Seeds = int | Sequence[int]


@dataclass(frozen=True)
class Request:
    """Texts to be continued, and how.

    Attributes:
        prompts: the tokens that each row begins with.
        sources: for an encoder-decoder, the tokens that the encoder reads for each row.
        capacity: the most tokens that a row will have, prompt included.
        sampling: how tokens are chosen.
        ends: tokens that end a row.
        max_tokens: the most new tokens of a row.
        first, last: the first new token behind a prompt of one token, and the last one of
            `max_tokens`, where the model's configuration forces them.
    """

    prompts: list[list[int]]
    sources: list[list[int]] | None
    capacity: int
    sampling: Sampling
    ends: list[int]
    max_tokens: int
    first: int | None
    last: int | None

    def logits(
        self, logits: Tensor, texts: Sequence[Sequence[int]], written: int, rules: Sampling
    ) -> Tensor:
        """The logits (B, V) by the rules, where a forced token has 0 and all others -inf.

        Args:
            logits, texts, written: as in `Sampling.logits`.
            rules: in most cases `sampling`.
        """
        x = rules.logits(logits, texts, written, self.ends)
        begins = [i for i, text in enumerate(texts) if len(text) == 1 and written == 0]
        if self.first is not None and begins:
            x[begins] = _only(x[begins], self.first)
        if self.last is not None and written == self.max_tokens - 1:
            x = _only(x, self.last)
        return x


def _only(x: Tensor, token: int) -> Tensor:
    """Logits like x of which only those of one token are possible."""
    return torch.full_like(x, -torch.inf).index_fill_(
        1, torch.tensor([token], device=x.device), 0.0
    )


def request(
    model: Transformer,
    prompts: Rows | None,
    max_tokens: int,
    source: Rows | None,
    sampling: Sampling | None,
    end_tokens: Sequence[int] | None,
    copies: int = 1,
) -> Request:
    """A request with the arguments of `generate`; each prompt makes `copies` rows.

    Raises:
        ValueError: as `generate`.
    """
    config = model.config
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    if (config.architecture == "encoder_decoder") != (source is not None):
        raise ValueError("encoder-decoders need source, and other models do not take one")
    sources = None if source is None else _rows(source, "source")
    if prompts is None:
        if config.start_token is None:
            raise ValueError("there is no prompt, and the model has no start_token")
        prompts = [[config.start_token]] * (1 if sources is None else len(sources))
    begun = _rows(prompts, "prompts")
    if sources is not None and len(sources) != len(begun):
        raise ValueError(f"there are {len(begun)} prompts and {len(sources)} sources")
    capacity = max(map(len, begun)) + max_tokens
    check_writer(model)
    check_context(model, capacity)
    sampling = sampling or Sampling()
    if end_tokens is None:
        end_tokens = config.end_tokens
    for name, lists in (
        ("prompts", begun), ("source", sources or []), ("end_tokens", [end_tokens]),
        ("banned", sampling.banned), ("bias", [list(sampling.bias)]),
    ):  # fmt: skip
        check_tokens(model, name, (token for row in lists for token in row))
    begun = [list(row) for row in begun for _ in range(copies)]
    if sources is not None:
        sources = [row for row in sources for _ in range(copies)]
    return Request(
        begun, sources, capacity, sampling, list(end_tokens), max_tokens, config.forced_first,
        config.forced_last,
    )  # fmt: skip


def check_writer(model: Transformer) -> None:
    """Raises ValueError if a model does not continue texts."""
    config = model.config
    if config.architecture == "encoder":
        raise ValueError(
            "an encoder-only model does not continue a text: `fill_mask` predicts masked tokens"
        )
    if config.head != "lm":
        raise ValueError(f"a model that writes needs head 'lm', this one has {config.head!r}")


def check_context(model: Transformer, capacity: int) -> None:
    """Raises ValueError if a text of `capacity` tokens is too long for a model."""
    context = model.config.max_length
    if context is not None and capacity > context:
        raise ValueError(
            f"{capacity} tokens, prompt and new ones together, are more than the context of "
            f"{context}"
        )


def check_tokens(model: Transformer, name: str, tokens: Iterable[int]) -> None:
    """Raises ValueError for a token that a model does not have."""
    size = model.config.vocab_size or 0
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(f"{name} must have tokens from 0 to {size - 1}, got {token}")


def seeds_of(seeds: Seeds, B: int) -> list[int]:
    """A seed for each row."""
    if isinstance(seeds, int):
        return [seeds + i for i in range(B)]
    if len(seeds) != B:
        raise ValueError(f"there are {len(seeds)} seeds for {B} rows")
    return list(seeds)


def _rows(given: Rows, name: str) -> list[list[int]]:
    """Lists of ids from a tensor (B, T) or a sequence of sequences."""
    try:
        lists = [[operator.index(token) for token in row] for row in given]  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be sequences of tokens, which are integers") from None
    if not lists or not all(lists):
        raise ValueError(f"{name} must be at least one sequence of at least one token")
    return lists
