"""Calls an `autograd.Function` in the `setup_context` form at the cost of a kernel call."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from tfkern import dispatch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without the steps that only torch.compile and functorch need.

    `Function.apply` binds its arguments to the signature of `forward` by inspection, which takes
    longer than a whole layer norm of a small input. Where nothing is differentiated, calling
    `forward` is enough.
    """
    if torch.compiler.is_compiling():
        return _compiling(function, args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not _differentiated(args):
        return function.forward(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def may_need_backward(args: tuple) -> bool:
    """Whether a backward of `apply` to these arguments could be asked for."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and dispatch.requires_grad(args)
    return _differentiated(args)


def _compiling(function: type[torch.autograd.Function], args: tuple) -> Any:
    """`apply` while Dynamo traces it.

    Dynamo silently loses derivatives of a Function in two cases. Under transforms of torch.func it
    loses first derivatives where it does not see that a wrapped tensor requires a gradient, and
    all second derivatives; so `forward` itself is traced, which torch can differentiate unless it
    calls a kernel. Kernels refuse to be traced there (`dispatch.load`), and Dynamo leaves the call
    to eager mode. In forward mode it loses all derivatives; so forward mode raises.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError("there are no derivatives in forward mode under torch.compile")
    if torch._C._are_functorch_transforms_active():
        return function.forward(*args)
    if torch.is_grad_enabled() and dispatch.requires_grad(args):
        return function.apply(*args)
    return function.forward(*args)  # `apply` would also pass its context to a forward(*args)


def _differentiated(args: tuple) -> bool:
    """Whether a backward could be asked for, or an argument may have a forward-mode tangent.

    A graph that torch.jit.trace records may later be called with inputs that require a gradient.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (dispatch.requires_grad(args) or torch._C._is_tracing())


def first_order(op: str, function: Callable | None = None) -> type[torch.autograd.Function]:
    """The backward of an op as a Function of its own. It takes the arguments of `function`, or by
    default those of an implementation's backward, and the name of the backend. Its own backward
    raises, so that second derivatives fail instead of losing terms."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            if function is not None:
                return function(*args)
            *arguments, backend = args
            return dispatch.implementation(op, backend).backward(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"{op} has no second derivative")

    return Backward
