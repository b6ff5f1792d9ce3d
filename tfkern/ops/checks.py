"""The checks that public functions share: each raises ValueError with what it got and what it takes."""

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(f"{other_name} is on {other.device}, but {name} is on {x.device}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if other.dtype != x.dtype:
        raise ValueError(f"{other_name} is {other.dtype}, but {name} is {x.dtype}")


def shape(name: str, x: Tensor, expected: tuple, what: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)}, {what}")


def probability(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {p}")


def seed(value: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on the device; drawn from torch's generator if None."""
    if value is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.int64, device=device)
    if value.dtype != torch.int64 or value.dim() != 0 or value.device != device:
        raise ValueError(
            f"seed must be an int or a 0-d int64 tensor on {device}, got {value.dtype} of shape "
            f"{tuple(value.shape)} on {value.device}"
        )
    return value
