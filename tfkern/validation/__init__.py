"""The cases that `tfkern validate` draws, each with its counterpart in torch's own operators."""

import itertools
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from tfkern.validation import attention, cross_entropy, layer_norm, mlp, rotary
from tfkern.validation.case import Case

_DRAWS = {
    "attention": attention.draws,
    "cross_entropy": cross_entropy.draws,
    "layer_norm": layer_norm.draws,
    "mlp": mlp.draws,
    "rotary": rotary.draws,
}


def cases(
    op: str, dtype: torch.dtype, device: str, backend: str | None, seed: int, count: int = 8
) -> Iterator[Case]:
    """`count` cases of an op of `tfkern.ops.OPS`, with sizes around tile edges.

    Raises:
        ValueError: an unknown op.
    """
    if op not in _DRAWS:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(_DRAWS)}")
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    yield from itertools.islice(_DRAWS[op](random.Random(seed), tensor, backend), count)
