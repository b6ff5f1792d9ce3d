"""The linear layer as a module."""

from torch import Tensor, nn

from tfkern.ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` by `tfkern.linear`: its constructor, parameters and state dict."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)
