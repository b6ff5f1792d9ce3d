"""Weights of eight bits, for inference."""

from dataclasses import replace
from typing import Any

from torch import nn

from tfkern.nn import Int8Linear, Linear


def quantize(model: Any) -> Any:
    """Makes the weights of the linear layers of a `Transformer` int8, in place, and returns it.

    Decoding reads all weights for every token, and these are a quarter of float32's bytes: on a CPU
    without gradients, where few rows are multiplied with them as they are; elsewhere they are
    widened in every call. Each row of a weight has one scale (see `tfkern.nn.Int8Linear`), and so
    has each row of the table with which a vocabulary head makes logits. A tied table is kept beside
    its int8 copy, since tokens are still looked up in it as it was. Norms, biases, positions and
    the layers that `wide_output` keeps in float32 stay as they are. `save` writes the model with
    form="tfkern".

    Raises:
        ValueError: the weights are int8 already, or are written as length and direction
            ("weight_norm").
    """
    if model.config.int8:
        raise ValueError("the weights of the model are int8 already")
    model.config = replace(model.config, int8=True)
    replace_linear(model)
    return model


def replace_linear(model: Any) -> None:
    """Puts an `Int8Linear` in the place of each linear layer of a `Transformer`."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) in (Linear, nn.Linear):
                setattr(module, name, Int8Linear(layer.weight, layer.bias))
    head = model.vocabulary
    if head is not None:
        head.int8 = Int8Linear(model.embedding.weight if head.weight is None else head.weight)
        head.weight = None
