"""The weights that a transformer begins with."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tfkern.models.blocks import Attention, Block
from tfkern.models.config import TransformerConfig
from tfkern.models.embedding import PatchEmbedding, TokenEmbedding
from tfkern.models.heads import VocabularyHead
from tfkern.models.stack import Stack
from tfkern.nn import ZeroCenteredRMSNorm

_STD = 0.02
_DRAWN = (nn.Linear, nn.Embedding, nn.Conv2d, VocabularyHead)


@torch.no_grad()
def initialise(model: nn.Module, config: TransformerConfig) -> None:
    """Draws all weights by the scheme `config.init` (see `TransformerConfig`); biases become 0, and
    weights of norms 1, or 0 if they stand for 1 + weight."""
    draw = _SCHEMES[config.init](model, config)
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)
        if isinstance(module, PatchEmbedding):
            draw(module.first, module)
            draw(module.positions, module)
        elif isinstance(weight, Tensor) and isinstance(module, _DRAWN):
            drawn = torch.empty_like(weight)
            draw(drawn, module)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                drawn[module.padding_idx] = 0
            if is_parametrized(module, "weight"):
                module.weight = drawn
            else:
                weight.copy_(drawn)
        elif isinstance(weight, Tensor):  # the module is a norm
            nn.init.constant_(weight, 0 if isinstance(module, ZeroCenteredRMSNorm) else 1)


# A scheme takes a model, and returns the function that draws the weight of one of its modules.
_Draw = Callable[[Tensor, nn.Module], None]


def _gpt2(model: nn.Module, config: TransformerConfig) -> _Draw:
    """Divides layers that write to the residual stream by the root of their number, taken as two
    for each block."""
    scale = {
        layer: math.sqrt(2 * len(stack.blocks))
        for stack in model.modules()
        if isinstance(stack, Stack)
        for block in stack.blocks
        if isinstance(block, Block)
        for layer in block.residual_outputs()
    }
    return lambda weight, module: _gauss(weight, _STD / scale.get(module, 1))


def _normal(model: nn.Module, config: TransformerConfig) -> _Draw:
    return lambda weight, module: _gauss(weight, _STD)


def _truncated(model: nn.Module, config: TransformerConfig) -> _Draw:
    def draw(weight: Tensor, module: nn.Module) -> None:
        nn.init.trunc_normal_(weight, std=_STD, a=-2 * _STD, b=2 * _STD)

    return draw


def _t5(model: nn.Module, config: TransformerConfig) -> _Draw:
    """Divides queries by the root of the head size, since T5 does not divide the scores by it."""
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    queries = {attention.query_layer: attention for attention in attentions}

    def draw(weight: Tensor, module: nn.Module) -> None:
        if isinstance(module, _TABLES):
            _gauss(weight, 1)
            return
        fan_in = config.dim if isinstance(module, nn.Embedding) else weight[0].numel()
        _gauss(weight, fan_in**-0.5)
        if module in queries:
            queries[module].query_rows(weight).mul_(config.head_size**-0.5)

    return draw


def _xavier(model: nn.Module, config: TransformerConfig) -> _Draw:
    def draw(weight: Tensor, module: nn.Module) -> None:
        if isinstance(module, _TABLES):
            _gauss(weight, config.dim**-0.5)
        else:
            nn.init.xavier_uniform_(weight)

    return draw


_TABLES = (TokenEmbedding, PatchEmbedding, VocabularyHead)


def _gauss(weight: Tensor, std: float) -> None:
    nn.init.normal_(weight, std=std)


_SCHEMES: dict[str, Callable[[nn.Module, TransformerConfig], _Draw]] = {
    "gpt2": _gpt2,
    "normal": _normal,
    "truncated": _truncated,
    "t5": _t5,
    "xavier": _xavier,
}
