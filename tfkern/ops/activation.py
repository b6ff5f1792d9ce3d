"""The activations of the MLP as functions of PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """x sigma(1.702 x), the shorter approximation of Hendrycks, Gimpel 2016."""
    return x * torch.sigmoid(1.702 * x)


# Keys are the names in tfkern. Models are pickled with these functions, so none is a lambda.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": quick_gelu,
}
