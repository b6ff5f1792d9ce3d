"""How well a model predicts a text."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern.generate.request import check_tokens, check_writer
from tfkern.models import Transformer


@torch.no_grad()
def perplexity(
    model: Transformer, tokens: Tensor | Sequence[int], *, window: int, stride: int | None = None
) -> float:
    """exp of the mean cross entropy of each token but the first, given those before it.

    The text is read in windows, each of which begins `stride` tokens after the one before. A token
    counts in the first window that predicts it. So each is predicted from at least window - stride
    tokens before it, except in the first window.

    Args:
        model: a decoder with head "lm".
        tokens: (n,), at least 2.
        window: tokens read at once, at least 2 and at most the model's context.
        stride: tokens from one window to the next, 1 to window - 1; window - 1 if None, which
            reads the text with the fewest windows.

    Raises:
        ValueError: numbers that do not fit, or a model that is no decoder.
    """
    check_writer(model)
    if model.encoder is not None:
        raise ValueError("perplexity needs a decoder-only model")
    text = torch.as_tensor(tokens, device="cpu")
    stride = window - 1 if stride is None else stride
    if text.dim() != 1 or len(text) < 2:
        raise ValueError(f"tokens must be (n,) with n >= 2, got {tuple(text.shape)}")
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"need 1 <= stride < window, got {stride} and {window}")
    context = model.config.max_length
    if context is not None and window > context:
        raise ValueError(f"window must be at most the model's context of {context}, got {window}")
    check_tokens(model, "tokens", text.tolist())
    text = text.to(next(model.parameters()).device)
    total, predicted = 0.0, 1  # the first token has no prediction
    for start in range(0, len(text), stride):
        part = text[start : start + window]
        new = start + len(part) - predicted
        if new > 0:
            logits = model(part[None, :-1])[0, -new:].double()
            total += F.cross_entropy(logits, part[-new:], reduction="sum").item()
            predicted += new
        if start + len(part) == len(text):
            break
    return math.exp(total / (len(text) - 1))
