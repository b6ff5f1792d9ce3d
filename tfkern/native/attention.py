"""Attention by csrc/attention.cpp and csrc/cuda/attention*.cu."""

import functools
from typing import Any

import torch

from tfkern.native import unavailable

forward = torch.ops.tfkern.attention_forward.default
backward = torch.ops.tfkern.attention_backward.default


def why_not(*args, needs_grad: bool) -> str | None:
    q, page_table = args[0], args[11]
    if page_table is not None and needs_grad:
        return "paged keys and values have no backward: detach the inputs, or use torch.no_grad()"
    return _unavailable_on_cuda(args, needs_grad) if q.is_cuda else unavailable(q)


def _unavailable_on_cuda(args: tuple, needs_grad: bool) -> str | None:
    q, _, v, bias, _, alibi_slopes, sink = args[:7]
    for tensor in (q, bias, alibi_slopes, sink):
        if tensor is not None and (reason := unavailable(tensor)):
            return reason
    size = max(q.shape[-1], v.shape[-1])
    if size > 256:
        return f"takes head sizes up to 256 on CUDA, got {size}"
    if q.dtype == torch.float32 and size > (64 if needs_grad else 128):
        tiles = (144 if size > 128 else 120) << 10
        if _shared_memory(q.device) < tiles:
            return f"needs {tiles} bytes of shared memory for float32 and head size {size}"
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


@torch.library.register_fake("tfkern::attention_forward")
def _(q, k, v, *options):
    lse = q.new_empty(2, *q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.register_fake("tfkern::attention_backward")
def _(do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sink, *options):
    bias_grad = options[-1]
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsink
