"""The linear layer as a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` by `tfkern.linear`: its constructor, parameters and state dict."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


class WideLinear(Linear):
    """A linear layer that stays in float32 when its model becomes float16, since what it returns
    may be larger than float16 can hold. It takes any dtype, and returns that of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device, torch.float32) if y.dtype == torch.float16 else y

        return super()._apply(wide, recurse)
