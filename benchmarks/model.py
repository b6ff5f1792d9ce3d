"""A training step of a decoder over context length: loss and gradients, without the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tfkern.models import Transformer, TransformerConfig, cross_entropy

from . import block
from .case import BACKWARD, BOTH, FORWARD

_VOCABULARY = 512


@dataclass(frozen=True, kw_only=True)
class OpCase(block.OpCase):
    """Tokens (batch, length) through `layers` blocks with GPT-2's parts; a small vocabulary."""

    op = "model"

    layers: int = 2
    hidden: int = 256
    heads: int = 4

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=_VOCABULARY,
            dim=self.hidden,
            layers=self.layers,
            heads=self.heads,
            max_length=self.length,
        )

    def module(self) -> Transformer:
        return block.on_meta(Transformer, self.config())

    def inputs(self) -> dict[str, Tensor]:
        tokens = torch.randint(_VOCABULARY, (2, self.batch, self.length), device=self.device)
        return {"tokens": tokens[0], "targets": tokens[1], **self.parameters()}

    def in_torch(
        self, attend: Callable, tokens: Tensor, targets: Tensor, **weights: Tensor
    ) -> Tensor:
        embedding = weights["embedding.weight"]
        x = F.embedding(tokens, embedding) + weights["decoder.positions.weight"][: tokens.shape[1]]
        for i in range(self.layers):
            x = block.torch_block(attend, self.heads, x, weights, prefix=f"decoder.blocks.{i}.")
        logits = F.linear(block.torch_norm(x, weights, "decoder.norm"), embedding)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def in_tfkern(self, tokens: Tensor, targets: Tensor, **weights: Tensor) -> Tensor:
        return cross_entropy(functional_call(self.module(), weights, (tokens,)), targets)

    def work(self, pass_: str) -> float:
        head = 2 * self.batch * self.length * self.hidden * _VOCABULARY
        return super().work(pass_) + {FORWARD: 1, BACKWARD: 2, BOTH: 3}[pass_] * head
