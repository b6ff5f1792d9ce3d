"""Autoregression: each token is drawn given all before it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tfkern.generate.request import Request, Rows, Seeds, request, seeds_of
from tfkern.generate.sampling import Sampling
from tfkern.generate.session import Session, pad
from tfkern.models import Transformer


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

    Call eval() first if the model has dropout. Prompts may have unequal lengths. Each row is what
    it would be alone, up to rounding: products with another number of rows may round differently,
    which can turn a near tie between two tokens. In 16-bit dtypes this happens often. The tokens
    that the configuration forces come first and last, whatever `sampling` says.

    Args:
        model: a decoder, or an encoder-decoder, with head "lm".
        prompts: a tensor (B, T), or sequences of tokens; start_token if None.
        max_tokens: the most new tokens for each prompt.
        source: what the encoder of an encoder-decoder reads, in the form of prompts.
        samples: continuations of each prompt, one after the other in the result.
        sampling: how tokens are chosen; if None they are drawn from the model's distribution.
        seeds: one seed for each row, or the seed of the first row: the next ones count up from it.
            No row's draws depend on those of another.
        end_tokens: tokens that end a row; end_token of the configuration if None.
        cache: "static", "growing" or "none", see `Session`.
        stop: called with the row and each new token; True ends the row.

    Returns:
        For each row the new tokens, 1-d int64, including the one that ended it.

    Raises:
        ValueError: a model that does not write, prompts beyond its context, tokens that it lacks,
            or numbers out of range; also while writing, if every token is excluded or the logits
            are not finite.
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
    return [torch.tensor(row, dtype=torch.int64, device="cpu") for row in written]


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
    ended. To stop early, stop asking. Arguments are checked, and a source is read, by the call."""
    if samples < 1:
        raise ValueError(f"samples must be positive, got {samples}")
    asked = request(model, prompts, max_tokens, source, sampling, end_tokens, copies=samples)
    generators = [
        torch.Generator().manual_seed(seed) for seed in seeds_of(seeds, len(asked.prompts))
    ]
    session = Session(model, len(asked.prompts), asked.capacity, asked.sources, cache)
    return _steps(session, asked, max_tokens, generators, stop)


@torch.no_grad()
def _steps(
    session: Session,
    asked: Request,
    max_tokens: int,
    generators: list[torch.Generator],
    stop: Callable[[int, int], bool] | None,
) -> Iterator[list[int | None]]:
    sampling, device = asked.sampling, session.device
    history = [list(row) for row in asked.prompts]
    alive = list(range(len(history)))
    logits = session.feed(*pad(history, device))
    for written in range(max_tokens):
        texts = [history[i] for i in alive]
        allowed = asked.logits(logits[alive], texts, written, sampling)
        chosen = sampling.choose(allowed, [generators[i] for i in alive])
        step: list[int | None] = [None] * len(history)
        going = []
        for i, token in zip(alive, chosen.tolist(), strict=True):
            step[i] = token
            history[i].append(token)
            stopped = stop is not None and stop(i, token)
            if not stopped and token not in asked.ends:
                going.append(i)
        yield step
        alive = going
        if not alive or written == max_tokens - 1:
            return
        tokens = torch.tensor([[token or 0] for token in step], device=device)
        new = None  # how many tokens each row reads: 0 once it has ended; None: one each
        if len(alive) < len(history):
            new = torch.tensor([int(i in alive) for i in range(len(history))], device=device)
        logits = session.feed(tokens, new)
