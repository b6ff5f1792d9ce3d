"""Philox4x32-10 in plain PyTorch: the dropout masks that every backend draws, bit for bit.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math

import torch

_MASK = 0xFFFFFFFF


def philox(seed: torch.Tensor, *counter: torch.Tensor | int) -> torch.Tensor:
    """Draws of 32 bits, as int64.

    Args:
        seed: 0-d int64, the key.
        counter: four words below 2^32, integers or int64 tensors that broadcast together.

    Returns:
        (..., 4) int64: the four lanes of every counter.
    """
    words = [torch.as_tensor(c, dtype=torch.int64, device=seed.device) for c in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32-bit product, in steps that stay inside int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    carry = (low >> 16) + high
    return carry >> 16, ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout(x: torch.Tensor, draws: torch.Tensor, p: float) -> torch.Tensor:
    """x / (1 - p) where an element is kept (draw >= p 2^32), 0 where it is dropped."""
    kept = draws >= math.ceil(p * 2**32)  # an integer: float32 would round the draws
    return torch.where(kept, x / (1 - p) if p < 1 else x, 0)
