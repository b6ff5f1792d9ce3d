"""The activations of the MLP as functions of PyTorch."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

# Keys are the names in tfkern. Models are pickled with these functions, so none is a lambda.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
