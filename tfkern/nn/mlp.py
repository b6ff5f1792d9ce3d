"""Feed-forward sublayers on the fused kernels."""

from typing import Any

from torch import Tensor, nn

from tfkern.nn.fusible import acting, fusible, unadorned
from tfkern.nn.linear import PackedLinear
from tfkern.ops import checks, gated_mlp, mlp
from tfkern.ops.activation import FUNCTIONS
from tfkern.ops.mlp import ACTIVATIONS


def _fusible(*layers: nn.Module) -> bool:
    """Whether one kernel may replace the layers, all of which it takes in one dtype."""
    return all(map(fusible, layers)) and len({layer.weight.dtype for layer in layers}) == 1


def _packed(*layers: nn.Module) -> bool:
    """Whether the layers are packed, so that the first takes the activation."""
    return all(type(layer) is PackedLinear and unadorned(layer) for layer in layers)


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`, the feed-forward sublayer of Vaswani et al. 2017.

    fc1 (hidden_dim, dim) and fc2 (dim, hidden_dim) are `torch.nn.Linear`, initialised as in torch.
    If one of them has hooks or has been replaced by another layer, they are called one by one.

    Args:
        dim: size of the last axis of input and output.
        hidden_dim: 4 * dim if None.
        bias: whether fc1 and fc2 have a bias.
        activation: "gelu_tanh", "gelu" (exact), "quick_gelu", "relu" or "silu", as in `tfkern.mlp`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        bias: bool = True,
        activation: str = "gelu_tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.fc1 = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, bias, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in the dtype of x."""
        fc1, fc2 = acting(self.fc1), acting(self.fc2)
        if _packed(fc1):
            return fc2(fc1(x, self.activation))
        if not _fusible(fc1, fc2):
            return fc2(FUNCTIONS[self.activation](fc1(x)))
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)

    @property
    def output(self) -> nn.Module:
        """The layer that writes to the residual stream."""
        return self.fc2

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, the gated feed-forward sublayer of Shazeer 2020.

    gate and up (hidden_dim, dim) and down (dim, hidden_dim) are `torch.nn.Linear`, initialised as
    in torch. If one of them has hooks or has been replaced by another layer, they are called one
    by one. SiLU makes it SwiGLU, GELU GEGLU.

    Args:
        dim: size of the last axis of input and output.
        hidden_dim: size between the two products. At 8/3 * dim the module has as many weights as an
            `MLP` of 4 * dim.
        bias: whether gate, up and down have a bias.
        activation: "silu", "gelu_tanh", "gelu" (exact), "quick_gelu" or "relu", as in
            `tfkern.gated_mlp`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        bias: bool = False,
        activation: str = "silu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS)
        self.gate = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.up = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.down = nn.Linear(hidden_dim, dim, bias, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in the dtype of x."""
        gate, up, down = acting(self.gate), acting(self.up), acting(self.down)
        if _packed(gate, up):
            return down(gate(x, self.activation, up))
        if not _fusible(gate, up, down):
            return down(FUNCTIONS[self.activation](gate(x)) * up(x))
        return gated_mlp(
            x, gate.weight, gate.bias, up.weight, up.bias, down.weight, down.bias,
            activation=self.activation,
        )  # fmt: skip

    @property
    def output(self) -> nn.Module:
        """The layer that writes to the residual stream."""
        return self.down

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
