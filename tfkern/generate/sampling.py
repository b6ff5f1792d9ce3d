"""From logits to a token: rules that change the distribution, and the draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Everything applies in this order; the defaults change nothing.

    Args:
        repetition_penalty: logits of tokens that occurred are divided by it where positive, and
            multiplied by it where negative (Keskar et al. 2019).
        no_repeat_ngram: no sequence of this many tokens occurs twice; 0 for no limit.
        banned: sequences of tokens that never occur.
        bias: added to the logits of tokens.
        min_tokens: the fewest new tokens: before, no token that ends the text is drawn.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens (Fan et al. 2018).
        top_p: draw from the fewest tokens whose probabilities add up to p (Holtzman et al. 2020).
        min_p: draw from tokens at least min_p times as likely as the most likely (Nguyen et al.
            2024).
        typical_p: as top_p, but tokens whose information is nearest to its expectation come first
            (Meister et al. 2023).

    Raises:
        ValueError: a number out of range.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    banned: Sequence[Sequence[int]] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        for name in ("no_repeat_ngram", "min_tokens", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if any(not sequence for sequence in self.banned):
            raise ValueError("banned must hold no empty sequence")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be positive, got {self.top_k}")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {value}")

    def logits(
        self,
        logits: Tensor,
        history: Sequence[Sequence[int]],
        written: int = 0,
        end_tokens: Sequence[int] = (),
    ) -> Tensor:
        """The changed logits (B, V), in float32 or wider; -inf for what cannot be drawn.

        Args:
            logits: (B, V).
            history: the tokens of each row so far, prompt included.
            written: how many tokens of each row are new, not of the prompt.
            end_tokens: tokens that end the text.
        """
        x = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self.repetition_penalty != 1:
            x = repetition_penalty(x, history, self.repetition_penalty)
        if self.no_repeat_ngram:
            x = no_repeat_ngram(x, history, self.no_repeat_ngram)
        if self.banned:
            x = ban(x, history, self.banned)
        for token, value in self.bias.items():
            x[:, token] += value
        if written < self.min_tokens:
            x[:, list(end_tokens)] = -torch.inf
        if self.temperature not in (0, 1):
            x = x / self.temperature
        if self.top_k is not None:
            x = top_k(x, self.top_k)
        if self.top_p is not None:
            x = top_p(x, self.top_p)
        if self.min_p is not None:
            x = min_p(x, self.min_p)
        if self.typical_p is not None:
            x = typical_p(x, self.typical_p)
        return x

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probabilities (B, V) float64 of logits from `logits`; 0 or 1 with temperature 0.

        Raises:
            ValueError: a row of which every token is excluded, or whose logits are not finite.
        """
        _check_possible(logits)
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, best, 1.0)
        return logits.softmax(-1, dtype=torch.float64)

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One token for each row of logits from `logits`, as (B,) int64.

        With temperature 0 it is the likeliest token, and generators are not used. Otherwise each
        row takes one number from its generator, as in `draw`.

        Raises:
            ValueError: as `probabilities`.
        """
        if self.temperature == 0:
            _check_possible(logits)
            return logits.argmax(-1)
        return draw(self.probabilities(logits), generators)


def _check_possible(logits: Tensor) -> None:
    best = logits.amax(-1)
    if not best.isfinite().all():
        raise ValueError(
            f"no token can be drawn: the largest logit is {best[~best.isfinite()][0].item()} "
            "(-inf: every token is excluded)"
        )


GREEDY = Sampling(temperature=0.0)


def uniform(generator: torch.Generator) -> Tensor:
    """A number in [0, 1), on the generator's device."""
    return torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)


def draw(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of the probabilities (B, V), as (B,) int64.

    Each row takes one number from its own generator, so that no row depends on the others.
    """
    u = torch.stack([uniform(g) for g in generators])
    sums = p.cumsum(-1)
    # The first token whose sum exceeds u, which never has probability 0.
    return torch.searchsorted(sums, u.to(p.device)[:, None] * sums[:, -1:], right=True)[:, 0].clamp(
        max=p.shape[-1] - 1
    )


def repetition_penalty(x: Tensor, history: Sequence[Sequence[int]], penalty: float) -> Tensor:
    for row, tokens in zip(x, history, strict=True):
        seen = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=x.device)
        value = row[seen]
        row[seen] = torch.where(value < 0, value * penalty, value / penalty)
    return x


def no_repeat_ngram(x: Tensor, history: Sequence[Sequence[int]], n: int) -> Tensor:
    for row, tokens in zip(x, history, strict=True):
        tokens = list(tokens)
        last = tokens[len(tokens) - n + 1 :]
        for i in range(len(tokens) - n + 1):
            if tokens[i : i + n - 1] == last:
                row[tokens[i + n - 1]] = -torch.inf
    return x


def ban(x: Tensor, history: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]) -> Tensor:
    for row, tokens in zip(x, history, strict=True):
        for *first, last in sequences:
            if not first or list(tokens)[-len(first) :] == first:
                row[last] = -torch.inf
    return x


def top_k(x: Tensor, k: int) -> Tensor:
    least = x.topk(min(k, x.shape[-1])).values[:, -1:]
    return x.masked_fill(x < least, -torch.inf)


def top_p(x: Tensor, p: float) -> Tensor:
    return _likely(x, x.sort(descending=True, stable=True).indices, p)


def min_p(x: Tensor, p: float) -> Tensor:
    probabilities = x.softmax(-1)
    return x.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def typical_p(x: Tensor, p: float) -> Tensor:
    information = -x.log_softmax(-1)
    expected = (information * x.softmax(-1)).nansum(-1, keepdim=True)
    order = (information - expected).abs().sort(stable=True).indices
    return _likely(x, order, p)


def _likely(x: Tensor, order: Tensor, p: float) -> Tensor:
    """x (B, V), -inf but for the first tokens in `order` (B, V) that add up to p; at least one.

    The sums run over the tokens that are dropped, so that with p = 1 rounding drops none.
    """
    after = x.gather(-1, order).softmax(-1).flip(-1).cumsum(-1).flip(-1)
    dropped = after <= 1 - p
    dropped[:, 0] = False
    return x.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
