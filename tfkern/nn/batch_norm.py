"""Batch norm over tokens, and no norm, with the calling convention of the fused norms."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.ops import checks


class BatchNorm(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the tokens of a batch; padding does not count.

    Constructor, parameters and state dict are torch's. In training each feature is normalised over
    all tokens, so through the statistics a token also depends on later ones.

    Batch normalization: Ioffe, Szegedy 2015.
    """

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        return_residual: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """Normalises `h = residual + dropout(input)` as `LayerNorm.forward` does.

        Args:
            input: (..., num_features).
            residual, dropout_p, return_residual: as in `LayerNorm.forward`.
            mask: bool, the shape of input without the last axis: which tokens count for mean and
                variance. All if None.

        Returns:
            y in the shape and dtype of input, or (y, h).

        Raises:
            ValueError: another number of features, or a mask of another shape.
        """
        checks.dense("input", input)
        if input.shape[-1:] != (self.num_features,):
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected (..., {self.num_features})"
            )
        if mask is not None:
            checks.boolean("mask", mask)
            checks.shape("mask", mask, input.shape[:-1], "that of input without features")
        h = drop_and_add(input, residual, dropout_p, self.training)
        if self.training or self.running_mean is None or self.running_var is None:
            mean, variance = self._statistics(h, mask)
        else:
            mean, variance = self.running_mean, self.running_var
        y = (h - mean) * (variance + self.eps).rsqrt()
        if self.weight is not None:
            y = y * self.weight + self.bias
        y = y.to(input.dtype)
        return (y, h) if return_residual else y

    def _statistics(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the tokens that count, float32 or wider."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32)).flatten(0, -2)
        counted = torch.ones_like(wide[:, :1]) if mask is None else mask.flatten()[:, None]
        total = counted.sum()
        n = total.clamp(min=1)
        mean = (wide * counted).sum(0) / n
        variance = ((wide - mean).square() * counted).sum(0) / n
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            weight: Any = self.momentum
            if weight is None:  # torch's meaning: the mean over all batches
                weight = 1.0 / self.num_batches_tracked
            with torch.no_grad():
                unbiased = variance * n / (n - 1).clamp(min=1)
                weight = weight * (total > 0)  # a batch without tokens changes nothing
                self.running_mean += weight * (mean - self.running_mean)
                self.running_var += weight * (unbiased - self.running_var)
        return mean, variance


class NoNorm(nn.Module):
    """Adds the residual, and leaves the sum as it is."""

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        return_residual: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """`h = residual + dropout(input)`, or (h, h). It takes the mask of `BatchNorm`, unused."""
        h = drop_and_add(input, residual, dropout_p, self.training)
        return (h.to(input.dtype), h) if return_residual else h.to(input.dtype)


def drop_and_add(x: Tensor, residual: Tensor | None, dropout_p: float, training: bool) -> Tensor:
    """residual + dropout(x), the input of a norm."""
    checks.dense("input", x)
    x = F.dropout(x, dropout_p, training)
    return x if residual is None else residual + x
