"""Linear layers whose weight is packed ahead, as csrc/cpu/linear.cpp reads it."""

import torch

from tfkern.native import transformed
from tfkern.native.linear import packs as packs

pack = torch.ops.tfkern.linear_pack.default
_product = torch.ops.tfkern.linear_packed.default


def forward(x, packed, bias, packed_up, bias_up, N, activation):
    return _product(x, packed, bias, packed_up, bias_up, N, activation)


def why_not(x, packed, *args, needs_grad) -> str | None:
    if needs_grad:
        return "has no gradients"
    if not x.is_cpu or x.dtype != packed.dtype:
        return f"takes {packed.dtype} on the CPU, got {x.dtype} on {x.device.type}"
    return transformed()


# No fake of linear_pack: traces take weights that are packed already.
@torch.library.register_fake("tfkern::linear_packed")
def _(x, w, b, w_up, b_up, N, activation):
    return x.new_empty(*x.shape[:-1], N)
