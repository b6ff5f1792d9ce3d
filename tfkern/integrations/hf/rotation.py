"""tfkern's rotary positions in place of functions of transformers that compute the same."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfkern.ops import rotary

NAME = "apply_rotary_pos_emb"  # what the files of models call such a function


def _halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Llama, GPT-NeoX."""
    return rotary(q, k, cos, sin)


def _neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Cohere."""
    return rotary(q, k, cos, sin, interleaved=True)


def _neighbours_of_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """GLM, whose tables are those of Llama: each angle stands in both halves."""
    half = cos.shape[-1] // 2
    return rotary(q, k, _twice(cos[..., :half]), _twice(sin[..., :half]), interleaved=True)


def _neighbours_of_one(x: Tensor, sin: Tensor, cos: Tensor) -> Any:
    """GPT-J, with x (B, T, H, D) and one entry of the tables for each pair."""
    turned, _ = rotary(x.transpose(1, 2), None, _twice(cos), _twice(sin), interleaved=True)
    return turned.transpose(1, 2)


def _twice(table: Tensor) -> Tensor:
    return table.repeat_interleave(2, -1)


_OF_TWO = (_halves, _neighbours, _neighbours_of_half)


@cache
def rotation(theirs: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function that computes with tfkern what theirs does, None if ours is another one."""
    for ours in _OF_TWO:
        if _agree(ours, theirs, 8):
            return _rotation_of_two(ours, theirs, _agree(ours, theirs, 4))
    return _rotation_of_one(theirs) if _agree(_neighbours_of_one, theirs, 8) else None


def _agree(ours: Any, theirs: Any, turned: int) -> bool:
    """Whether two functions turn the first features of eight alike. No two entries of the tables
    are equal, so that one that uses other entries is told apart."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)

    inputs = [drawn(2, 3, 5, 8), drawn(2, 1, 5, 8), drawn(2, 5, turned), drawn(2, 5, turned)]
    if ours not in _OF_TWO:
        inputs = [drawn(2, 5, 3, turned), drawn(2, 5, turned // 2), drawn(2, 5, turned // 2)]
    try:
        with torch.no_grad():
            pairs = zip(ours(*inputs), theirs(*inputs), strict=True)
        return all(torch.allclose(x, y) for x, y in pairs)
    except Exception:  # a function of another signature or of other shapes
        return False


def _rotation_of_two(ours: Any, theirs: Any, in_part: bool) -> Callable[..., Any]:
    """Ours for calls with ordinary arguments, where `in_part` tells that heads may have more
    features than are turned."""

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        ordinary = q.dim() == k.dim() == 4 and cos.dim() == 3 and not args and not kwargs
        ordinary = ordinary and q.dtype == k.dtype == cos.dtype and cos.shape[1] == q.shape[2]
        ordinary = ordinary and (in_part or cos.shape[2] == q.shape[3])
        if not ordinary or _learned(cos, sin):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return ours(q, k, cos, sin)

    return turned


def _rotation_of_one(theirs: Any) -> Callable[..., Any]:
    def turned(tensor: Tensor, sin: Tensor, cos: Tensor) -> Any:
        ordinary = tensor.dim() == 4 and cos.dim() == 3 and tensor.dtype == cos.dtype == sin.dtype
        ordinary = ordinary and 2 * cos.shape[2] == tensor.shape[3]
        if not ordinary or cos.shape[1] != tensor.shape[1] or _learned(cos, sin):
            return theirs(tensor, sin, cos)
        return _neighbours_of_one(tensor, sin, cos)

    return turned


def _learned(cos: Tensor, sin: Tensor) -> bool:
    """Whether the tables need a gradient, which our op does not give."""
    return torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
