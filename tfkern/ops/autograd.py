"""Calls an `autograd.Function` in the `setup_context` form at the cost of a kernel call."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without what only torch.compile and functorch need of it.

    `Function.apply` binds its arguments to the signature of `forward` by inspection, which takes
    longer than a whole layer norm of a small input. Where nothing is differentiated, `forward` is
    all there is to do.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not _differentiated(args):
        return function.forward(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _differentiated(args: tuple) -> bool:
    """Whether a backward could be asked for, or an argument may have a forward-mode tangent."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)
