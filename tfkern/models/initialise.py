"""The weights that a transformer begins with."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

if TYPE_CHECKING:
    from tfkern.models.transformer import Transformer

_STD = 0.02
_LAST = ("out", "fc2", "down")  # the layers that write to the residual stream


@torch.no_grad()
def initialise(model: "Transformer") -> None:
    """Draws all weights by the scheme `config.init`; biases are 0, and norms leave things as they
    are. See `TransformerConfig`."""
    scheme = model.config.init
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)) or name == "vocabulary":
            if isinstance(weight, Tensor):
                drawn = torch.empty_like(weight)
                _SCHEMES[scheme](drawn, name, model)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    drawn[module.padding_idx] = 0
                if is_parametrized(module, "weight"):
                    module.weight = drawn
                else:
                    weight.copy_(drawn)
        elif isinstance(weight, Tensor):  # of a norm
            nn.init.ones_(weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)
        for own in ("first", "positions"):  # of images
            if isinstance(parameter := getattr(module, own, None), nn.Parameter):
                _SCHEMES[scheme](parameter, name, model)


def _gpt2(weight: Tensor, name: str, model: "Transformer") -> None:
    _, _, last = name.rpartition(".")
    depth = model.config.layers if "decoder" in name else model.config.encoder_layers
    scale = math.sqrt(2 * (depth or model.config.layers)) if last in _LAST else 1
    nn.init.normal_(weight, std=_STD / scale)


def _normal(weight: Tensor, name: str, model: "Transformer") -> None:
    nn.init.normal_(weight, std=_STD)


def _truncated(weight: Tensor, name: str, model: "Transformer") -> None:
    nn.init.trunc_normal_(weight, std=_STD, a=-2 * _STD, b=2 * _STD)


def _t5(weight: Tensor, name: str, model: "Transformer") -> None:
    """Queries are smaller by the root of the head size, which the scores are not divided by."""
    config, (_, _, last) = model.config, name.rpartition(".")
    if last in ("embedding", "vocabulary"):
        nn.init.normal_(weight)
        return
    fan_in = config.dim if last == "positions" else weight[0].numel()
    nn.init.normal_(weight, std=fan_in**-0.5)
    if last in ("q", "qkv"):
        weight[: config.heads * config.head_size] *= config.head_size**-0.5


def _xavier(weight: Tensor, name: str, model: "Transformer") -> None:
    if name.rpartition(".")[2] in ("embedding", "vocabulary"):
        nn.init.normal_(weight, std=model.config.dim**-0.5)
        return
    nn.init.xavier_uniform_(weight)


_SCHEMES: dict[str, Any] = {
    "gpt2": _gpt2,
    "normal": _normal,
    "truncated": _truncated,
    "t5": _t5,
    "xavier": _xavier,
}
