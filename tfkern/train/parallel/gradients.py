"""The norm of gradients, and clipping, when some of them are spread over processes.

`torch.nn.utils.clip_grad_norm_` takes either plain gradients or DTensors of one mesh. A model may
have both, and the stages of a pipeline have other parameters each.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.tensor import DTensor

Key = tuple[object, tuple[int, ...]]


def total_norm(gradients: Iterable[Tensor], stages: ProcessGroup | None = None) -> Tensor:
    """The norm of all gradients together, the same on all processes.

    Each element counts once: squares are summed over the axes of a mesh along which a gradient is
    cut, and not over those that replicate it.

    Args:
        gradients: plain tensors and DTensors of any meshes.
        stages: processes that have other parameters each.

    Returns:
        0-d, in the dtype that `torch.nn.utils.get_total_norm` has for them.

    Raises:
        ValueError: a gradient that is still to be summed over processes.
    """
    groups: dict[Key, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(_key(gradient), []).append(local(gradient))
    squares = []
    dtype = torch.float32
    for (mesh, axes), parts in groups.items():
        # Squares of float32 would overflow for norms that float32 can hold.
        norm = torch.nn.utils.get_total_norm(parts)
        dtype, square = norm.dtype, norm.double().square()
        for axis in axes:
            distributed.all_reduce(square, group=mesh.get_group(axis))  # type: ignore[attr-defined]
        squares.append(square)
    total = torch.stack(squares).sum()
    if stages is not None:
        distributed.all_reduce(total, group=stages)
    return total.sqrt().to(dtype)


def clip(gradients: Iterable[Tensor], limit: float, norm: float) -> None:
    """Scales gradients of a norm above the limit down to it, as torch's `clip_grad_norm_` does."""
    torch._foreach_mul_(list(map(local, gradients)), limit / (norm + 1e-6))


def clamp(gradients: Iterable[Tensor], limit: float) -> None:
    """Limits the absolute value of each element, as torch's `clip_grad_value_` does."""
    parts = list(map(local, gradients))
    torch._foreach_clamp_min_(parts, -limit)
    torch._foreach_clamp_max_(parts, limit)


def agree_on_overflow(scaler: torch.amp.GradScaler, optimiser: torch.optim.Optimizer) -> None:
    """Makes all processes leave a step out if gradients have overflowed in one of them.

    Each process has found infinities in its own part of the gradients, and would go on alone.
    """
    for found in scaler._found_inf_per_device(optimiser).values():
        distributed.all_reduce(local(found), ReduceOp.MAX)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process has, which shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def _key(gradient: Tensor) -> Key:
    """The mesh of a DTensor, and the axes of the mesh along which it is cut."""
    if not isinstance(gradient, DTensor):
        return None, ()
    if any(p.is_partial() for p in gradient.placements):
        raise ValueError(f"a gradient is still to be summed: it is {gradient.placements}")
    cut = (axis for axis, p in enumerate(gradient.placements) if not p.is_replicate())
    return gradient.device_mesh, tuple(cut)
