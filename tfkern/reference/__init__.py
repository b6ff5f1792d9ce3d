"""Every op in plain PyTorch: its definition, and what serves where no kernel does."""

import torch
from torch import Tensor


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An output in its dtype. The Dynamo of torch 2.11 loses the gradient of one that `x.to` only
    hands on."""
    return x if x.dtype == dtype else x.to(dtype)
