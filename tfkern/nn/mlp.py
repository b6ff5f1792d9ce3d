"""Feed-forward sublayers on the fused kernels."""

from typing import Any

from torch import Tensor, nn

from tfkern.ops import checks, gated_mlp, mlp
from tfkern.ops.mlp import ACTIVATIONS


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`, the feed-forward sublayer of Vaswani et al. 2017.

    fc1 (hidden_dim, dim) and fc2 (dim, hidden_dim) are `torch.nn.Linear`, initialised as there.

    Args:
        dim: size of the last axis of input and output.
        hidden_dim: 4 * dim if None.
        bias: whether fc1 and fc2 have one.
        activation: "gelu_tanh", "gelu" (exact), "relu" or "silu", as in `tfkern.mlp`.
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
        fc1, fc2 = self.fc1, self.fc2
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, the gated feed-forward sublayer of Shazeer 2020.

    The rows of gate_up (2 * hidden_dim, dim) are those of gate, then those of up; down is
    (dim, hidden_dim). Both are `torch.nn.Linear`, initialised as there. SiLU makes it SwiGLU, GELU
    GEGLU.

    Args:
        dim: size of the last axis of input and output.
        hidden_dim: size between the two products. At 8/3 * dim the module has as many weights as an
            `MLP` of 4 * dim.
        bias: whether gate_up and down have one.
        activation: "silu", "gelu_tanh", "gelu" (exact) or "relu", as in `tfkern.gated_mlp`.
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
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias, device, dtype)
        self.down = nn.Linear(hidden_dim, dim, bias, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in the dtype of x."""
        gate_up, down = self.gate_up, self.down
        return gated_mlp(
            x, gate_up.weight, gate_up.bias, down.weight, down.bias, activation=self.activation
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
