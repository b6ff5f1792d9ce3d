"""Autoregression: each token is drawn given all before it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tfkern.generate.sampling import Sampling, draw
from tfkern.generate.session import Rows, Session, pad, rows
from tfkern.models import Transformer

Seeds = int | Sequence[int]


def generate(
    model: Transformer,
    prompts: Rows | None = None,
    max_tokens: int = 64,
    *,
    source: Rows | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    end_tokens: Sequence[int] | None = None,
    cache: str = "static",
    stop: Callable[[int, int], bool] | None = None,
) -> list[Tensor]:
    """Continues every prompt.

    Call eval() first if the model has dropout. Prompts may have unequal lengths; each row is what
    it would be alone.

    Args:
        model: a decoder, or an encoder-decoder, with head "lm".
        prompts: a tensor (B, T), or sequences of tokens; start_token if None.
        max_tokens: the most to be written for each.
        source: what the encoder of an encoder-decoder reads, in the form of prompts.
        samples: continuations of each prompt, one after the other in the result.
        sampling: how tokens are chosen; drawn from the model's distribution if None.
        seeds: of each row, or that of the first, which the others count up from. A row depends on
            its prompt and its seed only.
        end_tokens: those that end a row; end_token of the configuration if None.
        cache: "static", "growing" or "none", see `Session`.
        stop: called with the row and each new token; True ends the row.

    Returns:
        For each row the new tokens, 1-d int64, the one that ended it included.

    Raises:
        ValueError: a model that does not write, prompts beyond its context, or numbers out of
            range.
    """
    written: list[list[int]] = []
    for step in stream(
        model, prompts, max_tokens, source=source, samples=samples, sampling=sampling, seeds=seeds,
        end_tokens=end_tokens, cache=cache, stop=stop,
    ):  # fmt: skip
        written = written or [[] for _ in step]
        for row, token in zip(written, step, strict=True):
            if token is not None:
                row.append(token)
    return [torch.tensor(row, dtype=torch.int64) for row in written]


@torch.no_grad()
def stream(
    model: Transformer,
    prompts: Rows | None = None,
    max_tokens: int = 64,
    *,
    source: Rows | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    end_tokens: Sequence[int] | None = None,
    cache: str = "static",
    stop: Callable[[int, int], bool] | None = None,
) -> Iterator[list[int | None]]:
    """The tokens of `generate` as they come: at each step one for each row, None where a row has
    ended. To stop early, stop asking."""
    sampling = sampling or Sampling()
    history, sources = inputs(model, prompts, source, samples)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    B, device = len(history), next(model.parameters()).device
    ends = ends_of(model, end_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds_of(seeds, B)]
    source_tokens, lengths = (None, None) if sources is None else pad(sources, device)
    capacity = max(map(len, history)) + max_tokens
    session = Session(model, B, capacity, source_tokens, lengths, cache)
    logits = session.feed(*pad(history, device))
    alive = [True] * B
    for written in range(max_tokens):
        p = sampling.probabilities(sampling.logits(logits, history, written, ends))
        tokens = draw(p, generators).tolist()
        step = [token if a else None for token, a in zip(tokens, alive, strict=True)]
        for i, token in enumerate(step):
            if token is not None:
                history[i].append(token)
                ended = stop is not None and stop(i, token)
                alive[i] = not (token in ends or ended)
        yield step
        if not any(alive) or written == max_tokens - 1:
            return
        # rows that ended read nothing more
        new = None if all(alive) else torch.tensor(alive, device=device).long()
        logits = session.feed(torch.tensor(tokens, device=device)[:, None], new)


def inputs(
    model: Transformer, prompts: Rows | None, source: Rows | None, samples: int = 1
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Prompts and sources as lists, each as often as samples says."""
    if samples < 1:
        raise ValueError(f"samples must be positive, got {samples}")
    sources = None if source is None else rows(source, "source")
    if prompts is None:
        start = model.config.start_token
        if start is None:
            raise ValueError("there is no prompt, and the model has no start_token")
        prompts = [[start]] * (1 if sources is None else len(sources))
    history = rows(prompts, "prompts")
    if sources is not None and len(sources) != len(history):
        raise ValueError(f"there are {len(history)} prompts and {len(sources)} sources")
    size = model.config.vocab_size or 0
    for name, lists in (("prompts", history), ("source", sources or [])):
        worst = max((t for row in lists for t in row if not 0 <= t < size), default=None)
        if worst is not None:
            raise ValueError(f"{name} have the token {worst}, expected 0 to {size - 1}")
    history = [list(row) for row in history for _ in range(samples)]
    if sources is not None:
        sources = [row for row in sources for _ in range(samples)]
    return history, sources


def ends_of(model: Transformer, end_tokens: Sequence[int] | None) -> list[int]:
    """The tokens that end a text."""
    if end_tokens is not None:
        return list(end_tokens)
    return [] if model.config.end_token is None else [model.config.end_token]


def seeds_of(seeds: Seeds, B: int) -> list[int]:
    """A seed for each row."""
    if isinstance(seeds, int):
        return [seeds + i for i in range(B)]
    if len(seeds) != B:
        raise ValueError(f"there are {len(seeds)} seeds for {B} rows")
    return list(seeds)
