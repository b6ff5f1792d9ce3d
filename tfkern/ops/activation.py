"""The activations of the MLP as functions of PyTorch."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

# By our names. A model is pickled with its functions, which lambdas cannot be.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
