"""Attention by csrc/attention.cpp."""

import torch

from tfkern.native import unavailable

forward = torch.ops.tfkern.attention_forward.default
backward = torch.ops.tfkern.attention_backward.default


def why_not(*args, needs_grad: bool) -> str | None:
    q, page_table = args[0], args[11]
    if page_table is not None and needs_grad:
        return "paged keys and values have no backward: detach the inputs, or use torch.no_grad()"
    if q.is_cuda:
        return "has no CUDA kernel for attention"
    return unavailable(q)


@torch.library.register_fake("tfkern::attention_forward")
def _(q, k, v, *options):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.register_fake("tfkern::attention_backward")
def _(do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sink, *options):
    bias_grad = options[-1]
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsink
