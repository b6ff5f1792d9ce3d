"""Calls an `autograd.Function` in the `setup_context` form at the cost of a kernel call."""

from typing import Any

import torch
from torch.autograd import forward_ad

from tfkern import dispatch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without what only torch.compile and functorch need of it.

    `Function.apply` binds its arguments to the signature of `forward` by inspection, which takes
    longer than a whole layer norm of a small input. Where nothing is differentiated, `forward` is
    all there is to do.
    """
    if torch.compiler.is_compiling():
        return _compiling(function, args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not _differentiated(args):
        return function.forward(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _compiling(function: type[torch.autograd.Function], args: tuple) -> Any:
    """`apply` where Dynamo traces it.

    Under transforms of torch.func and in forward mode it would lose derivatives of a Function
    without a word: the first where it does not see that a wrapped tensor requires one, the second
    and those of forward mode always. Of `forward` it traces what torch can differentiate. Kernels
    refuse to be (`dispatch.load`), and Dynamo leaves the call to eager mode then.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError("there are no derivatives in forward mode under torch.compile")
    if torch._C._are_functorch_transforms_active():
        return function.forward(*args)
    if torch.is_grad_enabled() and dispatch.requires_grad(args):
        return function.apply(*args)
    return function.forward(*args)  # `apply` would hand its context, too, to a `forward` of *args


def _differentiated(args: tuple) -> bool:
    """Whether a backward could be asked for, or an argument may have a forward-mode tangent.

    What torch.jit.trace records may be given others, which require a gradient.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (dispatch.requires_grad(args) or torch._C._is_tracing())


def first_order(op: str) -> type[torch.autograd.Function]:
    """The backward of an op, as a function of its own: a second differentiation raises, where it
    would lose terms otherwise. It takes the arguments of an implementation's backward, and the name
    of the backend."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            *arguments, backend = args
            return dispatch.implementation(op, backend).backward(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"{op} has no second derivative")

    return Backward
