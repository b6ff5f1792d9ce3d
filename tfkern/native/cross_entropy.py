"""Cross entropy by csrc/cpu/cross_entropy.cpp and csrc/cuda/cross_entropy.cu."""

import torch

from tfkern.native import unavailable
from tfkern.reference.cross_entropy import forward_outputs

forward = torch.ops.tfkern.cross_entropy_forward.default
backward = torch.ops.tfkern.cross_entropy_backward.default
backward_ = torch.ops.tfkern.cross_entropy_backward_.default  # writes over the logits


def why_not(logits, *args, needs_grad) -> str | None:
    return unavailable(logits)


torch.library.register_fake("tfkern::cross_entropy_forward", forward_outputs)


@torch.library.register_fake("tfkern::cross_entropy_backward")
def _(logits, *others):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("tfkern::cross_entropy_backward_")
def _(logits, *others):
    return None
