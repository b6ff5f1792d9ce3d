"""Kinds of attention from before the scaled dot product of transformers, and beside it.

Global attention looks at all of a memory, local attention at a window of it (Luong et al. 2015).
Additive attention scores by a small network (Bahdanau et al. 2015). Soft attention takes a mean of
what it looks at, hard attention one thing, drawn at random (Xu et al. 2015).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfkern.ops import attention, attention_weights, checks

SCORES = ("dot", "general", "concat", "location")
REACHES = ("global", "local-m", "local-p")


def running_mean(x: Tensor) -> Tensor:
    """The mean of each token and those before it, (B, T, C) to (B, T, C).

    Causal attention computes this when all scores are equal, since all visible tokens then have the
    same weight.
    """
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return x.cumsum(1) / count[:, None]


class AdditiveScores(nn.Module):
    """`v tanh(W query + U memory)`, the scores of Bahdanau et al. 2015.

    Args:
        dim: size of the queries.
        memory_dim: size of the memory's vectors; dim if None.
        hidden_dim: inner size of the network that scores; dim if None.
    """

    def __init__(
        self, dim: int, memory_dim: int | None = None, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        hidden = hidden_dim or dim
        self.query = nn.Linear(dim, hidden)
        self.memory = nn.Linear(memory_dim or dim, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The scores (B, T, S), -inf beyond lengths. Arguments as in `AdditiveAttention`."""
        checks.dense("query", query)
        checks.dense("memory", memory)
        hidden = (self.query(query)[:, :, None] + self.memory(memory)[:, None]).tanh()
        return _within(self.score(hidden).squeeze(-1), lengths)


class AdditiveAttention(nn.Module):
    """`softmax(v tanh(W query + U memory))`, the attention of Bahdanau et al. 2015.

    Args:
        dim, memory_dim, hidden_dim: as in `AdditiveScores`.
    """

    def __init__(
        self, dim: int, memory_dim: int | None = None, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        self.scores = AdditiveScores(dim, memory_dim, hidden_dim)

    def forward(
        self, query: Tensor, memory: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The context of each query, and the weights.

        Args:
            query: (B, T, dim).
            memory: (B, S, memory_dim).
            lengths: (B,), how many vectors of the memory exist; all if None.

        Returns:
            The contexts (B, T, memory_dim) and the weights (B, T, S). A row of weights adds up to
            1, or to 0 for a memory of length 0.
        """
        weights = _softmax(self.scores(query, memory, lengths))
        return weights @ memory, weights


class LuongAttention(nn.Module):
    """`tanh(C [context; query])` with the contexts of Luong et al. 2015.

    Dot and general scores run on the fused op, also in windows; the weights are computed apart.

    Args:
        dim: size of the vectors of queries and memory.
        score: "dot": q m; "general": q W m; "concat": v tanh(W [q; m]); "location": W q, which
            depends on the index of a vector in the memory and not on the vector.
        reach: "global": all of the memory; "local-m": up to `window` tokens on either side of the
            index of the query; "local-p": up to `window` on either side of a place that the query
            predicts, where the weights fall off as a Gaussian of deviation window / 2.
        window: tokens on either side, needed by the local reaches.
        max_length: the longest memory, needed by the score "location".

    Raises:
        ValueError: an unknown name, or a number that is missing.
    """

    def __init__(
        self,
        dim: int,
        score: str = "general",
        reach: str = "global",
        window: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        checks.choice("score", score, SCORES)
        checks.choice("reach", reach, REACHES)
        if reach != "global" and (window is None or window < 1):
            raise ValueError(f"reach {reach!r} needs a positive window, got {window}")
        if score == "location" and max_length is None:
            raise ValueError("score 'location' needs max_length")
        self.kind, self.reach, self.window = score, reach, window
        if score == "general":
            self.general = nn.Linear(dim, dim, bias=False)
        elif score == "concat":
            self.additive = AdditiveScores(dim)
        elif score == "location":
            assert max_length is not None
            self.location = nn.Linear(dim, max_length)
        if reach == "local-p":
            self.place_hidden = nn.Linear(dim, dim, bias=False)
            self.place = nn.Linear(dim, 1, bias=False)
        self.combine = nn.Linear(2 * dim, dim, bias=False)

    def forward(
        self, query: Tensor, memory: Tensor, lengths: Tensor | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The attentional states, and the weights.

        Args:
            query: (B, T, dim).
            memory: (B, S, dim).
            lengths: (B,), how many vectors of the memory exist; all if None.
            first: index of the first query, for "local-m".

        Returns:
            The states (B, T, dim) and the weights (B, T, S). A row of weights adds up to 1, to less
            with "local-p", and to 0 where there is nothing to see.

        Raises:
            ValueError: with the score "location", a memory longer than max_length.
        """
        checks.dense("query", query)
        checks.dense("memory", memory)
        if self.kind == "location" and memory.shape[1] > self.location.out_features:
            raise ValueError(
                f"memory has length {memory.shape[1]}, more than max_length, "
                f"{self.location.out_features}"
            )
        mask, fall = self._band(query, memory, lengths, first)
        if self.kind in ("dot", "general"):
            q = self.general(query) if self.kind == "general" else query
            context, weights = self._fused(q[:, None], memory[:, None], mask, fall, lengths)
        else:
            if self.kind == "concat":
                scores = self.additive(query, memory, lengths)
            else:
                scores = _within(self.location(query)[..., : memory.shape[1]], lengths)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, 0], -torch.inf)
            weights = _softmax(scores)
            weights = weights if fall is None else weights * fall.exp()
            context = weights @ memory
        return self.combine(torch.cat([context, query], -1)).tanh(), weights

    def predicted_places(self, query: Tensor, size: int, lengths: Tensor | None = None) -> Tensor:
        """The centres (B, T) of the windows of "local-p", from 0 to lengths (size if None)."""
        ratio = self.place(self.place_hidden(query).tanh()).squeeze(-1).sigmoid()
        return ratio * (size if lengths is None else lengths[:, None])

    def _band(
        self, query: Tensor, memory: Tensor, lengths: Tensor | None, first: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The window as a mask (B or 1, 1, T, S), and the Gaussian's log (B, T, S), or None."""
        if self.reach == "global":
            return None, None
        assert self.window is not None
        S = memory.shape[1]
        place = torch.arange(S, device=query.device)
        if self.reach == "local-m":
            centre = (first + torch.arange(query.shape[1], device=query.device))[None]
            square = lengths is None and first == 0 and query.shape[1] == S
            if square and self.kind in ("dot", "general"):
                return None, None  # the fused op takes this window as an option
            return ((place - centre[..., None]).abs() <= self.window)[:, None], None
        distance = place - self.predicted_places(query, S, lengths)[..., None]
        return (distance.abs() <= self.window)[:, None], -2 * (distance / self.window) ** 2

    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        fall: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        options: dict = {"scale": 1.0, "mask": mask}
        if lengths is not None:
            options["key_lengths"] = lengths
        if self.reach == "local-m" and mask is None:
            options["window"] = (self.window, self.window)
        o, lse = attention(q, k, k, return_lse=True, **options)
        if fall is not None:
            # Weights p times a factor g are the softmax of scores + log g, times the ratio of the
            # sums of exponentials with and without log g.
            options["bias"] = fall[:, None].to(torch.promote_types(q.dtype, torch.float32))
            o, narrow = attention(q, k, k, return_lse=True, **options)
            ratio = torch.where(lse != -torch.inf, narrow - lse, -torch.inf).exp()
            o = o * ratio[..., None].to(o.dtype)
        weights = attention_weights(q, k, lse, **options)
        return o[:, 0], weights[:, 0].to(q.dtype)


class Choice(NamedTuple):
    """What hard attention chose.

    Attributes:
        context: (B, T, memory_dim).
        weights: (B, T, S), the distribution from which the place is drawn.
        place: (B, T) int64, index of the chosen vector of the memory.
        log_prob: (B, T), log probability of the place.
        entropy: (B, T), entropy of the distribution, in nats.
    """

    context: Tensor
    weights: Tensor
    place: Tensor
    log_prob: Tensor
    entropy: Tensor


class SoftAttention(AdditiveAttention):
    """The mean over patches of Xu et al. 2015, with a gate: `sigmoid(b query) sum(weights patch)`.

    It is differentiable, so that ordinary gradients train it.
    """

    def __init__(
        self, dim: int, memory_dim: int | None = None, hidden_dim: int | None = None
    ) -> None:
        super().__init__(dim, memory_dim, hidden_dim)
        self.gate = nn.Linear(dim, 1)

    def forward(
        self, query: Tensor, memory: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `AdditiveAttention.forward`."""
        context, weights = super().forward(query, memory, lengths)
        return self.gate(query).sigmoid() * context, weights


class HardAttention(nn.Module):
    """One patch for each query (Xu et al. 2015): in training a drawn one, else the likeliest.

    The draw has no gradient; `reinforce` trains the scores by the reward that followed.

    Args:
        dim, memory_dim, hidden_dim: as in `AdditiveScores`.
        soft_share: share of the batch that takes the mean instead in training, which steadies it.
        temperature: divides the scores.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int | None = None,
        hidden_dim: int | None = None,
        soft_share: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= soft_share <= 1 or not temperature > 0:
            raise ValueError(
                f"soft_share must lie in [0, 1] and temperature be positive, got {soft_share} and "
                f"{temperature}"
            )
        self.scores = AdditiveScores(dim, memory_dim, hidden_dim)
        self.soft_share, self.temperature = soft_share, temperature

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Choice:
        """Looks at one place of the memory for each query; arguments as in `AdditiveAttention`."""
        logp = (self.scores(query, memory, lengths) / self.temperature).log_softmax(-1)
        weights = logp.exp()
        if self.training:
            place = torch.multinomial(weights.detach().flatten(0, 1), 1).view(logp.shape[:2])
        else:
            place = logp.argmax(-1)
        batch = torch.arange(len(memory), device=memory.device)[:, None]
        context = memory[batch, place]
        if self.training and self.soft_share:
            soft = torch.rand(len(memory), 1, 1, device=memory.device) < self.soft_share
            context = torch.where(soft, weights @ memory, context)
        log_prob = logp.gather(-1, place[..., None]).squeeze(-1)
        entropy = -(weights * logp.masked_fill(weights == 0, 0)).sum(-1)
        return Choice(context, weights, place, log_prob, entropy)


class MovingBaseline(nn.Module):
    """The mean of past rewards: `b = momentum b + (1 - momentum) reward`."""

    value: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(()))

    def forward(self, reward: Tensor) -> Tensor:
        """The baseline before this batch of rewards, which then enters the mean."""
        before = self.value.clone()
        self.value.lerp_(reward.detach().mean().to(self.value.dtype), 1 - self.momentum)
        return before


def reinforce(
    choice: Choice, reward: Tensor, baseline: Tensor | float = 0.0, entropy: float = 0.002
) -> Tensor:
    """A loss whose gradient estimates the gradient of the negative expected reward (Williams 1992).

    The estimate is unbiased for every baseline that does not depend on the choice.

    Args:
        choice: the result of `HardAttention`.
        reward: (B, T), or (B,) for all of a row's choices, such as the log likelihood of the
            target. It gets no gradient here.
        baseline: subtracted from the reward.
        entropy: weight of the entropy, which keeps the choice from settling too soon.

    Returns:
        The loss, 0-d, a mean over choices.
    """
    reward = reward.detach() if reward.dim() == 2 else reward.detach()[:, None]
    return -((reward - baseline) * choice.log_prob + entropy * choice.entropy).mean()


def coverage_penalty(weights: Tensor) -> Tensor:
    """`sum_s (1 - sum_t weights)^2` of weights (B, T, S), the mean over the batch. It is least if
    all places are looked at equally in T steps (doubly stochastic attention, Xu et al. 2015)."""
    return (1 - weights.sum(1)).square().sum(-1).mean()


def _softmax(scores: Tensor) -> Tensor:
    """The softmax of the last axis. A row of -inf gives 0, with gradients of 0."""
    hidden = scores == -torch.inf
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) * ~hidden


def _within(scores: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return scores
    place = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((place >= lengths[:, None])[:, None], -torch.inf)
