"""Beam search: the likeliest continuations, as far as a few at a time can tell."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern.generate.decode import ends_of, inputs
from tfkern.generate.sampling import Sampling
from tfkern.generate.session import Rows, Session, pad
from tfkern.models import Transformer

_NEVER = -1e9  # a score that none has


@dataclass(frozen=True)
class Beam:
    """A continuation.

    Attributes:
        tokens: 1-d int64, the one that ended it included.
        score: the sum of its log probabilities, divided by its length to the power of the penalty.
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
        best: how many are returned of each prompt, at most beams.
        length_penalty: power of the length that the log probability is divided by: more than 0
            favours longer ones.
        early_stopping: True ends when as many as beams have ended; False also when the best running
            one is worse than the worst of them at its present length; "never" when it could not
            become better at any length.
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
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    sampling = sampling or Sampling()
    if beams == 1:
        early_stopping = True
    prompt_rows, sources = inputs(model, prompts, source, beams)
    B, device = len(prompt_rows) // beams, next(model.parameters()).device
    ends = torch.tensor(ends_of(model, end_tokens), dtype=torch.int64, device=device)
    source_tokens, source_lengths = (None, None) if sources is None else pad(sources, device)
    capacity = max(map(len, prompt_rows)) + max_tokens
    session = Session(model, B * beams, capacity, source_tokens, source_lengths, cache)
    logits = session.feed(*pad(prompt_rows, device))

    kept = max(2, 1 + len(ends)) * beams  # enough that as many as beams have not ended
    within = torch.arange(kept, device=device) < beams
    running = torch.full((B, beams), _NEVER, device=device)
    running[:, 0] = 0.0  # the others are the same text
    tokens = torch.zeros(B, beams, 0, dtype=torch.int64, device=device)
    finished = torch.full((B, beams), _NEVER, device=device)
    finished_tokens = torch.zeros(B, beams, max_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(B, beams, dtype=torch.int64, device=device)
    hopeful = torch.ones(B, 1, dtype=torch.bool, device=device)
    for n in range(1, max_tokens + 1):
        history = [
            [*prompt, *row.tolist()]
            for prompt, row in zip(prompt_rows, tokens.flatten(0, 1), strict=True)
        ]
        logp = sampling.logits(logits.float().log_softmax(-1), history, n - 1, ends.tolist())
        V = logp.shape[-1]
        total = (running[..., None] + logp.view(B, beams, V)).flatten(1)
        top, index = total.topk(min(kept, total.shape[1]))
        parent, token = index // V, index % V
        ended = torch.isin(token, ends) | (n == max_tokens)
        candidates = torch.cat([_rows(tokens, parent), token[..., None]], -1)

        # those that end now, against those that ended before
        full = (finished > _NEVER).all(1, keepdim=True) & (early_stopping is True)
        counts = ended & within[: top.shape[1]] & hopeful & ~full
        score = torch.where(counts, top / n**length_penalty, _NEVER)
        padded = finished_tokens.new_zeros(*candidates.shape[:2], max_tokens)
        padded[..., :n] = candidates
        finished, order = torch.cat([finished, score], 1).topk(beams)
        finished_tokens = _rows(torch.cat([finished_tokens, padded], 1), order)
        new_lengths = torch.full_like(token, n)
        lengths = torch.cat([lengths, new_lengths], 1).gather(1, order)

        # the best that go on
        running, order = (top + ended * _NEVER).topk(beams)
        tokens, parent = _rows(candidates, order), parent.gather(1, order)
        reach = max_tokens if early_stopping == "never" and length_penalty > 0 else n
        worst = torch.where(finished > _NEVER, finished.amin(1, keepdim=True), _NEVER)
        possible = running[:, :1] / reach**length_penalty
        hopeful = hopeful & (possible > worst).any(1, keepdim=True)
        done = (finished > _NEVER).all() and early_stopping is True
        if ended.all() or done or not hopeful.any():
            break
        first = torch.arange(B, device=device)[:, None] * beams
        session.reorder((first + parent).flatten())
        logits = session.feed(tokens[..., -1].flatten()[:, None])
    return [
        [
            Beam(finished_tokens[b, i, : lengths[b, i]].cpu(), finished[b, i].item())
            for i in range(best)
        ]
        for b in range(B)
    ]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows index (B, N) of x (B, K, n)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
