"""The sizes of activations and gradients in the layers of a model, in one training step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfkern.models.blocks import Block


class LayerReport(NamedTuple):
    """The numbers of one block.

    Attributes:
        name: name of the module.
        activation: root mean square of the residual stream behind the block.
        gradient: norm of the gradients of all parameters of the block.
    """

    name: str
    activation: float
    gradient: float


def report_layers(model: nn.Module, loss: Callable[[], Tensor]) -> list[LayerReport]:
    """Activations and gradients of each block. Norms and residuals keep them of similar size.

    Args:
        model: a `Transformer`. Afterwards its parameters hold the gradients of this step.
        loss: function that runs the model and returns the loss.

    Returns:
        One entry for each block, in the order of the model.
    """
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, Block)}
    sizes: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor | None]) -> None:
            x, h = outputs
            stream = x if h is None else x + h
            sizes[name] = stream.detach().float().square().mean().sqrt().item()

        return hook

    handles = [block.register_forward_hook(watch(name)) for name, block in blocks.items()]
    try:
        model.zero_grad()
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    reports = []
    for name, block in blocks.items():
        grads = [p.grad.float().norm() for p in block.parameters() if p.grad is not None]
        norm = torch.stack(grads).norm().item() if grads else 0.0
        reports.append(LayerReport(name, sizes[name], norm))
    return reports
