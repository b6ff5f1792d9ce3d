"""Checks that public functions share. A ValueError says what it got and what it expected."""

import math
from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch

_STRIDED = torch.strided
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dense(name: str, x: Tensor) -> None:
    """Refuses tensors without strides (nested, sparse): torch would fail with an internal error."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise ValueError(
            f"{name} is a nested tensor: pad it, or take its values, and for attention "
            "attention_varlen with its offsets"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of {x.layout}")


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not _STRIDED:
        dense(name, x)  # raises
    if x.dtype not in _FLOATING:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def boolean(name: str, x: Tensor) -> None:
    dense(name, x)
    if x.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {x.dtype}")


def integers(name: str, x: Tensor, q: Tensor, q_name: str = "q") -> None:
    """Lengths, offsets or indices beside a tensor q."""
    dense(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be an int32 or int64 tensor, got {x.dtype}")
    same_device(q_name, q, name, x)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(f"{other_name} is on {other.device}, but {name} is on {x.device}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if other.dtype != x.dtype:
        raise ValueError(f"{other_name} is {other.dtype}, but {name} is {x.dtype}")


def shape(name: str, x: Tensor, expected: tuple, what: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)}, {what}")


def broadcastable(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    fits = x.dim() <= len(expected) and all(
        a in (1, b) for a, b in zip(reversed(x.shape), reversed(expected), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not broadcastable to {expected}")


def within(name: str, x: Tensor, low: int, high: int) -> None:
    """Checks that x lies in low to high, if its values are at hand."""
    if values_at_hand(x) and x.numel():
        least, most = int(x.min()), int(x.max())
        if least < low or most > high:
            got = least if least < low else most
            raise ValueError(f"{name} must lie in {low} to {high}, got {got}")


def columns(name: str, x: Tensor, expected: int, what: str) -> None:
    if x.dim() != 2 or x.shape[1] != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (*, {expected}), {what}")


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def number(name: str, x: Any) -> float:
    """x as a float. A size may be symbolic, or a tensor while torch.jit.trace runs."""
    if not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        if not isinstance(x, Tensor) or not torch.jit.is_tracing():
            raise ValueError(f"{name} must be a number, got {x!r}")
        x = x.item()
    if not torch.compiler.is_compiling() and not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}")
    return float(x)


def probability(name: str, p: Any) -> float:
    p = number(name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {p}")
    return p


def is_integer(x: object) -> bool:
    """Whether x is an integer, which torch.export and torch.compile may have made symbolic."""
    return isinstance(x, (int, torch.SymInt))


def autocast(*tensors: Tensor | None) -> tuple:
    """The tensors, cast to autocast's dtype if autocast is on for their device.

    float64 stays, as autocast leaves it for torch's own operators.
    """
    device = next(x for x in tensors if x is not None).device
    if not dispatch.autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch's own operators compute x: autocast's if it is on."""
    cast = x.is_floating_point() and x.dtype != torch.float64 and dispatch.autocasts(x.device)
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


def values_at_hand(x: Tensor) -> bool:
    """Whether the values of x can be read without waiting for a GPU and without a graph break."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    batched, x = _unwrapped(x)
    return not batched and type(x) in (Tensor, torch.nn.Parameter)  # no FakeTensor, for example


def is_batched(x: Tensor) -> bool:
    """Whether x stands for several tensors, under vmap or in a backward with is_grads_batched."""
    batched, x = _unwrapped(x)
    return batched or torch._C._dispatch_keys(x).has("Batched")


def _unwrapped(x: Tensor) -> tuple[bool, Tensor]:
    """Whether vmap has wrapped x, and what the transforms outside of vmap have wrapped."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True, x
        x = functorch.get_unwrapped(x)
    return False, x


def seed(value: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on the device; drawn from torch's generator if None."""
    if value is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(value, Tensor):
        if not is_integer(value) or not -(2**63) <= value < 2**63:
            raise ValueError(f"seed must be an int of 64 bits or a tensor, got {value!r}")
        return torch.full((), value, dtype=torch.int64, device=device)  # no copy to wait for
    if value.dtype != torch.int64 or value.dim() != 0 or value.device != device:
        raise ValueError(
            f"seed must be an int or a 0-d int64 tensor on {device}, got {value.dtype} of shape "
            f"{tuple(value.shape)} on {value.device}"
        )
    return value
