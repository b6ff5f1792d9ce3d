"""Rotary positions by csrc/cpu/rotary.cpp and csrc/cuda/rotary.cu."""

import torch

from tfkern.native import unavailable

forward = torch.ops.tfkern.rotary.default
forward_ = torch.ops.tfkern.rotary_.default


def why_not(q, k, cos, sin, interleaved, inverse, *, needs_grad) -> str | None:
    reason = unavailable(q)
    if q.is_cuda:
        reason = reason or unavailable(cos) or unavailable(sin)
    return reason


@torch.library.register_fake("tfkern::rotary")
def _(q, k, cos, sin, interleaved, inverse):
    return _like(q, inverse), q.new_empty(0) if k is None else _like(k, inverse)


@torch.library.register_fake("tfkern::rotary_")
def _(q, k, cos, sin, interleaved, inverse):
    pass


def _like(x: torch.Tensor, inverse: bool) -> torch.Tensor:
    if not inverse:
        return x.new_empty(x.shape)
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)
