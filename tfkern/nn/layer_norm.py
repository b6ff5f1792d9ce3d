"""Layer norm and RMS norm modules with fused dropout and residual addition."""

from typing import Any

import torch
from torch import Tensor, nn

from tfkern.ops import checks, layer_norm, rms_norm


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
        _check(self.normalized_shape, input)
        return layer_norm(
            input,
            self.weight,
            self.bias,
            residual=residual,
            dropout_p=dropout_p if self.training else 0.0,
            eps=self.eps,
            axes=len(self.normalized_shape),
            return_residual=return_residual,
        )


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
        _check(self.normalized_shape, x)
        return rms_norm(
            x,
            self.factor,
            residual=residual,
            dropout_p=dropout_p if self.training else 0.0,
            eps=self.eps,
            axes=len(self.normalized_shape),
            return_residual=return_residual,
        )

    @property
    def factor(self) -> Tensor | None:
        """What the normalised vector is multiplied by."""
        return self.weight


class ZeroCenteredRMSNorm(RMSNorm):
    """An `RMSNorm` that multiplies by 1 + weight, so that decay of the weights draws it towards the
    plain norm. As in Gemma (Gemma Team 2024), the sum is float32 or wider.
    """

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.zeros_(self.weight)

    @property
    def factor(self) -> Tensor | None:
        if self.weight is None:
            return None
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


def _check(normalized_shape, x):
    checks.dense("input", x)
    if tuple(x.shape[-len(normalized_shape) :]) != normalized_shape:
        raise ValueError(
            f"input has shape {tuple(x.shape)}, expected its last axes to be {normalized_shape}"
        )
