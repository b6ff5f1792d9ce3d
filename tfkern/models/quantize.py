"""Weights in other forms, for inference: of eight bits, or packed for the processor."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tfkern.nn import Int8Linear, Linear, PackedLinear
from tfkern.nn.lora import has_adapters
from tfkern.ops.linear_packed import pack


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
        ValueError: the weights are int8 already or packed, are written as length and direction
            ("weight_norm"), or have adapters.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters: unload it, or make its weights int8 before adapt")
    if model.config.int8:
        raise ValueError("the weights of the model are int8 already")
    if is_packed(model):
        raise ValueError("the weights of the model are packed: make them int8 before")
    model.config = replace(model.config, int8=True)
    replace_linear(model)
    return model


def replace_linear(model: Any) -> None:
    """Puts an `Int8Linear` in the place of each linear layer of a `Transformer`."""
    for module, name, layer in _linear_layers(model):
        setattr(module, name, Int8Linear(layer.weight, layer.bias))
    head = model.vocabulary
    if head is not None:
        head.int8 = Int8Linear(model.embedding.weight if head.weight is None else head.weight)
        head.weight = None


def prepack(model: Any) -> Any:
    """Lays the weights of the linear layers of a `Transformer` in memory as the kernels of this
    processor read them, in place, and returns it. It is the last step before inference on a CPU.

    Kernels otherwise do this in every call, which costs most where few tokens are multiplied, as in
    decoding. The packed weights take the place of the others, and as much memory, except that a
    tied table is kept for tokens beside its packed copy. Outputs are those of the model before, up
    to rounding where other products served it. Layers stay as they are where packing does not pay:
    in float64 and int8, in 16 bits on CPUs with a matrix unit, on a GPU and on CPUs without AVX2.

    A model of packed weights cannot be trained or saved. `.to` packs them anew.

    Raises:
        ValueError: layers have adapters.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters: unload it, or pack its weights before adapt")
    for module, name, layer in _linear_layers(model):
        if _pays(layer.weight):
            setattr(module, name, PackedLinear(layer.weight, layer.bias))
    head = model.vocabulary
    if head is not None and head.int8 is None:
        table = model.embedding.weight if head.weight is None else head.weight
        if _pays(table):
            head.packed, head.weight = PackedLinear(table), None
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether a model has packed weights."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _pays(weight: Tensor) -> bool:
    return pack(weight[:1]) is not None


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """All plain linear layers, with the modules that have them and their names there."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and type(layer) in (Linear, nn.Linear):
                yield module, name, layer
