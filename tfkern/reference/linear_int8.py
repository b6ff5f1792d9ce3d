"""The linear layer with weights of eight bits, in plain PyTorch.

y = x (scale * weight)^T + bias
"""

import torch
import torch.nn.functional as F


def forward(x, weight, scale, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide)) * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def why_not(*args, needs_grad) -> str | None:
    return None
