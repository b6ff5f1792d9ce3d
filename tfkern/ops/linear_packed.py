"""The linear layer with a weight that is packed ahead, for inference on a CPU."""

import torch.nn.functional as F
from torch import Tensor

from tfkern import dispatch
from tfkern.ops.activation import FUNCTIONS

dispatch.register("linear_packed")


def pack(weight: Tensor) -> Tensor | None:
    """A copy of a weight (N, K) in the order in which this processor's kernels read it: panels of
    some columns of y, (panels, units of K, columns, elements of a unit), and zeros behind the last
    row and the last column.

    None where this does not pay, or where there are no such kernels: on a GPU, in float64, in
    16 bits on CPUs with a matrix unit, and on CPUs without AVX2.
    """
    weight = weight.detach()
    if dispatch.find("linear_packed", (weight, weight)) is None:
        return None
    native = dispatch.implementation("linear_packed", "native")
    return native.pack(weight) if native.packs(weight) else None


def unpack(packed: Tensor, N: int, K: int) -> Tensor:
    """A copy of the weight (N, K) that `pack` was given."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :K].contiguous()


def linear_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    N: int,
    *,
    activation: str = "",
    up: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """`act(x w^T + bias)`, or with `up` `act(x w^T + bias) (x w_up^T + bias_up)`.

    Where the kernels cannot serve, such as with gradients or under autocast, the weights are
    unpacked in the call.

    Args:
        x: (..., K).
        packed: what `pack` returned for w (N, K), in the dtype of x.
        bias: (N,) or None.
        activation: as in `tfkern.mlp`; none if empty.
        up: the second weight, packed, and its bias.

    Returns:
        (..., N) in the dtype of x, or of autocast if it is on.
    """
    args = (x, packed, bias, *(up or (None, None)), N, activation)
    if not dispatch.autocasts(x.device) and dispatch.find("linear_packed", args) is not None:
        return dispatch.implementation("linear_packed", "native").forward(*args)
    y = F.linear(x, unpack(packed, N, x.shape[-1]), bias)
    y = FUNCTIONS[activation](y) if activation else y
    return y if up is None else y * F.linear(x, unpack(up[0], N, x.shape[-1]), up[1])
