"""The cross entropy as a module."""

from typing import Any

from torch import Tensor, nn

from tfkern import ops


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` by `tfkern.cross_entropy`, and two options more.

    Targets that are probabilities of classes go to torch's own loss, which knows neither option.
    """

    def __init__(
        self, *args: Any, z_loss: float = 0.0, softcap: float = 0.0, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (V,), (N, V) or (N, V, ...), as torch has them, and classes without the axis of V.

        Returns:
            The loss in float32 or wider: 0-d, or one for each target if `reduction` is "none".
        """
        if target.is_floating_point():
            if self.z_loss or self.softcap:
                raise ValueError("z_loss and softcap need class indices as targets")
            return super().forward(input, target)
        return ops.cross_entropy(
            input.movedim(1, -1) if input.dim() > 1 else input,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            weight=self.weight,
            reduction=self.reduction,
        )
