"""Attention by csrc/cpu/attention.cpp and csrc/cuda/attention*.cu."""

import functools
from typing import Any

import torch
from torch import Tensor

from tfkern.native import multiplied, unavailable
from tfkern.reference import attention as reference
from tfkern.reference.attention import Arguments, backward_outputs, forward_outputs

forward = torch.ops.tfkern.attention_forward.default
backward = torch.ops.tfkern.attention_backward.default


def why_not(*args, needs_grad: bool) -> str | None:
    a = Arguments(*args)
    if reason := reference.why_not(*args, needs_grad=needs_grad):
        return reason
    return _unavailable_on_cuda(a, needs_grad) if a.q.is_cuda else unavailable(a.q)


def way(*args) -> str | None:
    """How the CPU's kernels multiply the numbers of q, k and v."""
    q = Arguments(*args).q
    return multiplied(q.dtype, tiles=True) if q.is_cpu else None


def _unavailable_on_cuda(a: Arguments, needs_grad: bool) -> str | None:
    for tensor in (a.q, a.bias, a.alibi_slopes, a.sink):
        if tensor is not None and (reason := unavailable(tensor)):
            return reason
    size = max(a.q.shape[-1], a.v.shape[-1])
    if size > 256:
        return f"takes head sizes up to 256 on CUDA, got {size}"
    if a.q.dtype == torch.float32 and size > (64 if needs_grad else 128):
        tiles = 123904 if size <= 128 else 147968 if needs_grad else 147456
        if _shared_memory(a.q.device) < tiles:
            return f"needs {tiles} bytes of shared memory for float32 and head size {size}"
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a thread block can have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


@torch.library.register_fake("tfkern::attention_forward")
def _(q, k, v, *others):
    o, lse = forward_outputs(q, v)
    return _in_layout(q, o), lse


@torch.library.register_fake("tfkern::attention_backward")
def _(do, dlse, o, lse, *args):
    *arguments, bias_grad = args
    a = Arguments(*arguments)
    dq, dk, dv, *others = backward_outputs(a, bias_grad)
    return _in_layout(a.q, dq), _in_layout(a.k, dk), _in_layout(a.v, dv), *others


def _in_layout(x: Tensor, output: Tensor) -> Tensor:
    """`output` in the layout of x (B, heads, rows, size), as csrc/cpu/attention.cpp allocates it.

    On a GPU outputs are contiguous.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes long to import

    if x.device.type != "cpu" or not guard_or_false(x.stride(1) < x.stride(2)):
        return output
    B, heads, rows, size = output.shape
    return output.new_empty(B, rows, heads, size).transpose(1, 2)
