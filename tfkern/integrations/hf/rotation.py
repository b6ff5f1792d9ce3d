"""tfkern's rotary positions in place of functions of transformers that compute the same."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfkern.ops import rotary

NAME = "apply_rotary_pos_emb"  # in the files of models a function (q, k, cos, sin)


@cache
def rotation(theirs: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function that computes with tfkern what theirs does, None if ours is another one."""
    for interleaved in (False, True):
        if _gives_ours(theirs, interleaved):
            return _rotation(theirs, interleaved)
    return None


def _gives_ours(theirs: Any, interleaved: bool) -> bool:
    """Whether a function gives what ours does. No two entries of the tables are equal, so that one
    that uses other entries is told apart."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)

    q, k, cos, sin = drawn(2, 3, 5, 8), drawn(2, 1, 5, 8), drawn(2, 5, 8), drawn(2, 5, 8)
    ours = rotary(q, k, cos, sin, interleaved=interleaved, backend="reference")
    try:
        with torch.no_grad():
            turned = theirs(q, k, cos, sin)
        return all(torch.allclose(x, y) for x, y in zip(turned, ours, strict=True))
    except Exception:  # a function of another signature or of other shapes
        return False


def _rotation(theirs: Callable[..., Any], interleaved: bool) -> Callable[..., Any]:
    """tfkern's rotation, for calls with ordinary arguments."""

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        ordinary = q.dim() == k.dim() == 4 and cos.dim() == 3 and not args and not kwargs
        ordinary = ordinary and q.dtype == k.dtype == cos.dtype and cos.shape[1] == q.shape[2]
        if not ordinary or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return rotary(q, k, cos, sin, interleaved=interleaved)

    return turned
