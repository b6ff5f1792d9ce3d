"""Speculative decoding: a small model drafts, the large one checks all of a draft at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfkern.generate.request import (
    Request,
    Rows,
    Seeds,
    check_context,
    check_writer,
    request,
    seeds_of,
)
from tfkern.generate.sampling import Sampling, draw, uniform
from tfkern.generate.session import Session
from tfkern.models import Transformer


@torch.no_grad()
def speculative(
    model: Transformer,
    draft: Transformer,
    prompts: Rows | None = None,
    max_tokens: int = 64,
    *,
    lookahead: int = 4,
    source: Rows | None = None,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    end_tokens: Sequence[int] | None = None,
) -> list[Tensor]:
    """Continues every prompt with the distribution of `model`, and fewer calls of it.

    Each token of a draft is kept with probability min(1, p / q), where p is its probability in
    `model` and q in `draft`. The first token that is not kept is replaced by one drawn from
    max(0, p - q), normalised. So the text follows p exactly, and with temperature 0 it is what
    `generate` writes (Leviathan et al. 2023; Chen et al. 2023). Prompts are continued one after
    the other.

    Args:
        model: the model whose distribution the text follows.
        draft: a smaller model with the same vocabulary.
        lookahead: number of tokens of a draft.
        prompts, max_tokens, source, sampling, seeds, end_tokens: as in `generate`.

    Returns:
        For each prompt the new tokens, 1-d int64.

    Raises:
        ValueError: as `generate`, models of different vocabularies or architectures, or a model
            whose rotary positions would depend on the length of the text.
    """
    if lookahead < 1:
        raise ValueError(f"lookahead must be positive, got {lookahead}")
    asked = request(model, prompts, max_tokens, source, sampling, end_tokens)
    check_writer(draft)
    for name in ("vocab_size", "architecture"):
        a, b = getattr(model.config, name), getattr(draft.config, name)
        if a != b:
            raise ValueError(f"the draft must have the model's {name}, {a}, got {b}")
    check_context(draft, asked.capacity)
    scaling = model.config.rotary_scaling
    if scaling is not None and scaling.by_length and asked.capacity > (scaling.length or 0):
        raise ValueError(
            f"the rotary positions of the model depend on the length of texts of more than "
            f"{scaling.length} tokens, which several tokens of a draft cannot have at once: take "
            f"generate, or at most {scaling.length} tokens, the prompt among them"
        )
    results = []
    for i, seed in enumerate(seeds_of(seeds, len(asked.prompts))):
        sources = None if asked.sources is None else [asked.sources[i]]
        # A window goes back over tokens that it has left when a draft is not kept.
        pair = [Session(m, 1, asked.capacity, sources, "growing") for m in (model, draft)]
        generator = torch.Generator().manual_seed(seed)
        new = _one(pair, asked.prompts[i], lookahead, asked, generator)
        results.append(torch.tensor(new, dtype=torch.int64, device="cpu"))
    return results


def _one(
    pair: list[Session],
    tokens: list[int],
    lookahead: int,
    asked: Request,
    generator: torch.Generator,
) -> list[int]:
    """The new tokens of one prompt. Before each draft the large session has read all tokens but the
    last, the small one the first `drafted_to`."""
    large, small = pair
    tokens, prompt, drafted_to = list(tokens), len(tokens), 0
    device = large.device
    if prompt > 1:
        large.feed(torch.tensor([tokens[:-1]], device=device))

    def distribution(logits: Tensor, text: list[int]) -> Tensor:
        changed = asked.logits(logits, [text], len(text) - prompt, asked.sampling)
        return asked.sampling.probabilities(changed)

    while True:
        room = asked.max_tokens - (len(tokens) - prompt)
        count = min(lookahead, room - 1)  # the large model adds one token
        text, q = list(tokens), []
        for _ in range(count):
            logits = small.feed(torch.tensor([text[drafted_to:]], device=device))
            drafted_to = len(text)
            q.append(distribution(logits, text))
            text.append(int(draw(q[-1], [generator])))
        logits = large.feed_all(torch.tensor([text[len(tokens) - 1 :]], device=device))[0]
        start = len(tokens)
        for j in range(count + 1):
            p = distribution(logits[j : j + 1], tokens)
            if j == count:
                tokens.append(int(draw(p, [generator])))
                break
            token = text[start + j]
            u = uniform(generator).item()
            if u * q[j][0, token].item() < p[0, token].item():
                tokens.append(token)
                if token in asked.ends:
                    break
            else:
                tokens.append(int(draw((p - q[j]).clamp(min=0), [generator])))
                break
        if tokens[-1] in asked.ends or len(tokens) - prompt >= asked.max_tokens:
            return tokens[prompt:]
        large.crop(len(tokens) - 1)
        drafted_to = min(drafted_to, len(tokens) - 1)
        small.crop(drafted_to)
