"""Layer norm and RMS norm modules with fused dropout and residual addition."""

from typing import Any

from torch import Tensor, nn

from tfkern.ops import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on the fused kernels: its constructor, parameters and state dict.

    Layer normalization: Ba, Kiros, Hinton 2016.
    """

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        return_residual: bool = False,
    ) -> Any:
        """Normalises `h = residual + dropout(input)` over the last `len(normalized_shape)` axes.

        A pre-norm block adds the output of a sublayer to the residual stream and normalises the sum
        for the next sublayer, in one pass over memory:

            y, residual = norm(sublayer(y), residual=residual, return_residual=True)

        Args:
            input: (..., *normalized_shape), float32, float64, bfloat16 or float16.
            residual: the shape of input, any floating dtype.
            dropout_p: probability that an element of input is zeroed, in training mode only.
            return_residual: also return h.

        Returns:
            y in the shape and dtype of input, or (y, h).

        Raises:
            ValueError: shapes, dtypes, devices or numbers that do not fit together.
        """
        x, residual, weight, bias = _flatten(
            self.normalized_shape, input, residual, self.weight, self.bias
        )
        y, h = layer_norm(
            x,
            weight,
            bias,
            residual=residual,
            dropout_p=dropout_p if self.training else 0.0,
            eps=self.eps,
            return_residual=True,
        )
        y = y.view(input.shape)
        return (y, h.view(input.shape)) if return_residual else y


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on the fused kernels: its constructor, parameters and state dict.

    Root mean square layer normalization: Zhang, Sennrich 2019.
    """

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        return_residual: bool = False,
    ) -> Any:
        """As `LayerNorm.forward`, but divides by the root mean square and subtracts no mean."""
        shape = x.shape
        x, residual, weight, _ = _flatten(self.normalized_shape, x, residual, self.weight, None)
        y, h = rms_norm(
            x,
            weight,
            residual=residual,
            dropout_p=dropout_p if self.training else 0.0,
            eps=self.eps,
            return_residual=True,
        )
        y = y.view(shape)
        return (y, h.view(shape)) if return_residual else y


def _flatten(normalized_shape, x, residual, weight, bias):
    """The same tensors with the normalised axes as one, which is what the op takes."""
    axes = len(normalized_shape)
    if tuple(x.shape[-axes:]) != normalized_shape:
        raise ValueError(
            f"input has shape {tuple(x.shape)}, expected its last axes to be {normalized_shape}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, that of input"
        )
    if axes == 1:
        return x, residual, weight, bias
    x, residual = (t if t is None else t.flatten(-axes) for t in (x, residual))
    weight, bias = (p if p is None else p.flatten() for p in (weight, bias))
    return x, residual, weight, bias
