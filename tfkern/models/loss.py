"""From logits to a loss."""

import torch
from torch import Tensor

from tfkern import ops


def cross_entropy(
    logits: Tensor | tuple[Tensor, ...], targets: Tensor | tuple[Tensor, ...]
) -> Tensor:
    """The mean cross entropy in nats, float32 or wider; for several heads, the sum of their means.

    Args:
        logits: (..., classes), as a model returns them, or a tuple with the logits of each head.
        targets: (...) int64 or int32, -100 where there is none; for several heads, one tensor for
            each. For a language model (B, T): the token that follows each token.

    Raises:
        ValueError: what `tfkern.cross_entropy` refuses, and another number of targets than heads.
    """
    if isinstance(logits, tuple):
        if not isinstance(targets, (tuple, list)) or len(targets) != len(logits):
            raise ValueError(f"targets must be {len(logits)} tensors, one for each head")
        terms = [cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)]
        return torch.stack(terms).sum()
    if isinstance(targets, (tuple, list)):
        raise ValueError(f"targets must be one tensor, got {len(targets)}")
    return ops.cross_entropy(logits, targets)
