"""The linear layer as a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.ops import linear
from tfkern.ops.linear_int8 import linear_int8
from tfkern.ops.linear_packed import linear_packed, pack, unpack


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


class Int8Linear(nn.Module):
    """A linear layer for inference whose weight is int8, a quarter of float32's memory.

        y = x (scale * weight)^T + bias

    Each row of the weight has a scale, its largest absolute value / 127, so that no element is off
    by more than half a scale, and an output by no more than that times the sum of |x|. Gradients
    reach x and bias, and there are none for the weight.

    Attributes:
        weight: (out_features, in_features) int8.
        scale: (out_features,) float32, in models of 16 bits, too.
        bias: (out_features,) or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.float().abs().amax(1) / 127
        whole = weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("weight", whole.round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of input."""
        return linear_int8(input, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def apply(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if x is self.scale and y.dtype != x.dtype else y

        return super()._apply(apply, recurse)


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, whose weight lies in memory as kernels read it.

    A call saves the time to bring the weight into this order, which counts most where rows are few,
    and a row of the result depends on its row of the input alone, bit by bit, however many rows
    there are. Gradients reach the input and bias, at the cost of unpacking the weight, and there
    are none for the weight. The order is that of this processor, so there is no state dict.

    Attributes:
        packed: the weight, see `tfkern.ops.linear_packed.pack`.
        bias: (out_features,) or None.

    Raises:
        ValueError: weights of this dtype and device are not packed.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", self._pack(weight), persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))

    @property
    def weight(self) -> Tensor:
        """A copy of the weight (out_features, in_features)."""
        return unpack(self.packed, self.out_features, self.in_features)

    def forward(
        self, input: Tensor, activation: str = "", up: "PackedLinear | None" = None
    ) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of input.

        Args:
            activation: applied to the result; none if empty.
            up: a layer of the same sizes, whose result the activated one is multiplied with.
        """
        other = None if up is None else (up.packed, up.bias)
        return linear_packed(
            input, self.packed, self.bias, self.out_features, activation=activation, up=other
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"

    @staticmethod
    def _pack(weight: Tensor) -> Tensor:
        packed = pack(weight)
        if packed is None:
            told = f"{weight.dtype} on {weight.device.type}"
            raise ValueError(f"weights of {told} are not packed here: use a plain linear layer")
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        packed = self._pack(fn(self.weight))  # the order depends on the dtype
        return super()._apply(lambda x: packed if x is self.packed else fn(x), recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("weights that are packed for a processor have no state: save them before")
