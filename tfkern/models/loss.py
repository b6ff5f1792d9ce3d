"""From logits to a loss."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    logits: Tensor | tuple[Tensor, ...], targets: Tensor | tuple[Tensor, ...]
) -> Tensor:
    """The mean cross entropy in nats, float32 or wider; for several heads, the sum of their means.

    Args:
        logits: (..., classes), as a model returns them, or a tuple with the logits of each head.
        targets: (...) int64, -100 where there is none; for several heads, one tensor for each. For
            a language model (B, T): the token that follows each token.

    Raises:
        ValueError: targets that are not int64, or of another shape than the logits without classes.
    """
    if isinstance(logits, tuple):
        if not isinstance(targets, (tuple, list)) or len(targets) != len(logits):
            raise ValueError(f"targets must be {len(logits)} tensors, one for each head")
        terms = [cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)]
        return torch.stack(terms).sum()
    if not isinstance(targets, Tensor) or targets.shape != logits.shape[:-1]:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets has shape {shape}, expected {tuple(logits.shape[:-1])}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.flatten())
