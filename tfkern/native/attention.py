"""Attention by csrc/attention.cpp."""

import torch

from tfkern.native import unavailable

forward = torch.ops.tfkern.attention_forward.default
backward = torch.ops.tfkern.attention_backward.default


def why_not(q, k, v, query_lengths, key_lengths, causal, scale, *, needs_grad) -> str | None:
    return unavailable(q)


@torch.library.register_fake("tfkern::attention_forward")
def _(q, k, v, query_lengths, key_lengths, causal, scale):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.register_fake("tfkern::attention_backward")
def _(do, dlse, q, k, v, o, lse, query_lengths, key_lengths, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
