"""Beam search: likely continuations, found by following a few at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern.generate.request import Rows, request
from tfkern.generate.sampling import Sampling
from tfkern.generate.session import Session, pad
from tfkern.models import Transformer


@dataclass(frozen=True)
class Beam:
    """A continuation of a prompt.

    Attributes:
        tokens: 1-d int64, with the token that ended it.
        score: sum of the tokens' log probabilities, divided by their number ** length_penalty.
    """

    tokens: Tensor
    score: float


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompts: Rows | None = None,
    max_tokens: int = 64,
    *,
    source: Rows | None = None,
    beams: int = 4,
    best: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    sampling: Sampling | None = None,
    end_tokens: Sequence[int] | None = None,
    cache: str = "static",
) -> list[list[Beam]]:
    """The best continuations of every prompt, with the conventions of transformers.

    Args:
        model, prompts, max_tokens, source, end_tokens, cache: as in `generate`.
        beams: how many continuations are followed; 1 is greedy decoding.
        best: the most continuations to return for each prompt, from 1 to beams.
        length_penalty: exponent: a score is the log probability / length ** length_penalty, so that
            values above 0 favour longer texts.
        early_stopping: when the search for a prompt ends. True: once `beams` continuations have
            ended. False: once the best running one, scored at its present length, is worse than
            the worst of them. "never": once the best running one could not beat the worst of them
            at any length.
        sampling: penalties, bans, bias and min_tokens apply; nothing is drawn.

    Returns:
        For each prompt its continuations, the best first.

    Raises:
        ValueError: as `generate`, or numbers out of range.
    """
    if beams < 1 or not 1 <= best <= beams:
        raise ValueError(f"beams and best must fit 1 <= best <= beams, got {best} and {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")
    asked = request(model, prompts, max_tokens, source, sampling, end_tokens, copies=beams)
    if beams == 1:
        early_stopping = True
    B = len(asked.prompts) // beams
    session = Session(model, B * beams, asked.capacity, asked.sources, cache)
    device = session.device
    ends = torch.tensor(asked.ends, dtype=torch.int64, device=device)
    logits = session.feed(*pad(asked.prompts, device))
    # The search follows the model's whole distribution: nothing is cut off.
    rules = replace(
        asked.sampling, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None
    )

    kept = max(2, 1 + len(ends)) * beams  # enough to hold `beams` that have not ended
    running = torch.full((B, beams), -torch.inf, device=device)
    running[:, 0] = 0.0  # all beams begin with the same text, so only the first counts
    tokens = torch.zeros(B, beams, 0, dtype=torch.int64, device=device)
    finished = _Finished(B, beams, max_tokens, device)
    hopeful = torch.ones(B, 1, dtype=torch.bool, device=device)
    first = torch.arange(B, device=device)[:, None] * beams
    for n in range(1, max_tokens + 1):
        written = tokens.flatten(0, 1).tolist()
        texts = [[*prompt, *new] for prompt, new in zip(asked.prompts, written, strict=True)]
        logp = asked.logits(logits.float().log_softmax(-1), texts, n - 1, rules)
        V = logp.shape[-1]
        total = (running[..., None] + logp.view(B, beams, V)).flatten(1)
        top, index = total.topk(min(kept, total.shape[1]))
        parent, token = index // V, index % V
        ended = torch.isin(token, ends) | (n == max_tokens)
        candidates = torch.cat([_rows(tokens, parent), token[..., None]], -1)

        counts = ended & hopeful & ~(finished.full & (early_stopping is True))
        counts[:, beams:] = False  # an end counts only among the best `beams` candidates
        finished.add(candidates, torch.where(counts, top / n**length_penalty, -torch.inf))
        running, order = top.masked_fill(ended, -torch.inf).topk(beams)
        tokens, parent = _rows(candidates, order), parent.gather(1, order)
        reach = max_tokens if early_stopping == "never" and length_penalty > 0 else n
        hopeful = hopeful & (running[:, :1] / reach**length_penalty > finished.worst)
        done = early_stopping is True and finished.full.all()
        if ended.all() or done or not hopeful.any():
            break
        session.reorder((first + parent).flatten())
        logits = session.feed(tokens[..., -1].flatten()[:, None])
    results = [row[:best] for row in finished.beams()]
    if not all(results):
        raise ValueError("every continuation is excluded, or the logits are not finite")
    return results


class _Finished:
    """The best continuations of each prompt that have ended, the best first."""

    def __init__(self, B: int, beams: int, max_tokens: int, device: torch.device) -> None:
        self.scores = torch.full((B, beams), -torch.inf, device=device)
        self.lengths = torch.zeros(B, beams, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(B, beams, max_tokens, dtype=torch.int64, device=device)

    @property
    def full(self) -> Tensor:
        """(B, 1) bool: whether `beams` continuations have ended."""
        return (self.scores > -torch.inf).all(1, keepdim=True)

    @property
    def worst(self) -> Tensor:
        """(B, 1): the lowest of the `beams` scores, -inf while fewer have ended."""
        return self.scores[:, -1:]

    def add(self, candidates: Tensor, scores: Tensor) -> None:
        """Keeps the best of the present continuations and the candidates (B, K, n)."""
        n = candidates.shape[-1]
        padded = F.pad(candidates, (0, self.tokens.shape[-1] - n))
        lengths = torch.full_like(candidates[..., 0], n)
        self.scores, order = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        self.tokens = _rows(torch.cat([self.tokens, padded], 1), order)
        self.lengths = torch.cat([self.lengths, lengths], 1).gather(1, order)

    def beams(self) -> list[list[Beam]]:
        return [
            [
                Beam(row[:n].cpu(), score)
                for row, n, score in zip(*texts, strict=True)
                if score > -torch.inf
            ]
            for texts in zip(self.tokens, self.lengths.tolist(), self.scores.tolist(), strict=True)
        ]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """For each batch, the rows of x (B, K, n) that index (B, N) names."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
