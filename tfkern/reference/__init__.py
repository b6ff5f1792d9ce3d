"""Every op in plain PyTorch: its definition, and the fallback where no kernel can run."""

import torch
from torch import Tensor


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, or x itself if it has that dtype: where `x.to` returns x, the Dynamo of torch
    2.11 loses the gradient of an output."""
    return x if x.dtype == dtype else x.to(dtype)
