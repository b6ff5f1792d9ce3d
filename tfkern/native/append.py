"""New tokens in a cache of keys and values, by csrc/cpu/append.cpp."""

import torch

from tfkern.native import transformed, unavailable

forward = torch.ops.tfkern.append_.default


def why_not(k_cache, v_cache, lengths, k, v, counts, *, needs_grad) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses the reference into one kernel that writes in place"
    return transformed() or (unavailable(k) if k.is_cpu else "runs on the CPU")


@torch.library.register_fake("tfkern::append_")
def _(k_cache, v_cache, lengths, k, v, counts):
    return torch.empty_like(lengths)
