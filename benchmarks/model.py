"""A training step of a decoder over context length: loss and gradients, without the optimizer."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import tfkern
from tfkern.models import Transformer, TransformerConfig

from . import attention
from .case import BACKWARD, BOTH, FORWARD, Case, Variant

_VOCABULARY = 512


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """(batch, length) tokens through `layers` blocks with GPT-2's parts, and a small vocabulary."""

    op = "model"
    lengths = {
        "cpu": (128, 256, 512, 1024, 2048),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384),
    }
    unit = "TFLOP/s"
    growth = 2.0

    backward: bool = True
    batch: int = 1
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

    def small(self) -> "OpCase":
        return replace(self, length=min(self.length, 67))

    def inputs(self) -> dict[str, Tensor]:
        """Two rows of tokens, and the parameters by their names in the model."""
        tokens = torch.randint(_VOCABULARY, (2, self.batch, self.length), device=self.device)
        parameters = dict(_model(self.config()).named_parameters())
        weights = {
            name: self.draw(*p.shape, std=0.02) if p.dim() > 1 else self._vector(name, p)
            for name, p in parameters.items()
        }
        return {"tokens": tokens[0], "targets": tokens[1], **weights}

    def floor_scale(self) -> dict[str, float]:
        # Every gradient is a sum over all tokens.
        names = dict(_model(self.config()).named_parameters())
        return dict.fromkeys(names, math.sqrt(self.batch * self.length))

    def reference(self, tokens: Tensor, targets: Tensor, **weights: Tensor) -> Tensor:
        return self._torch(_plain_attention, tokens, targets, **weights)

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        rows = self.batch * self.heads * self.length**2 * self.torch_dtype.itemsize
        scratch = (self.layers + 2) * rows if self.backward else 2 * rows
        torchs = functools.partial(self._torch, _fused_attention)
        names = ["reference", None] if backends is None else list(backends)
        return [
            Variant("torch plain", self.reference, scratch),
            Variant("torch sdpa", torchs),
            *(
                Variant(
                    f"tfkern {name}" if name else "tfkern",
                    functools.partial(self._tfkern, name),
                    scratch if name == "reference" else 0,
                )
                for name in names
            ),
        ]

    def work(self, which: str) -> float:
        """Of the products with weights, and of the attention, halved since it is causal."""
        tokens = self.batch * self.length
        products = 2 * tokens * self.hidden * (12 * self.layers * self.hidden + _VOCABULARY)
        pairs = 2 * self.layers * self.batch * self.length**2 * self.hidden
        factors = {FORWARD: (1, 1), BACKWARD: (2, 2.5), BOTH: (3, 3.5)}[which]
        return factors[0] * products + factors[1] * pairs

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        return attention.flop_formulas(causal=True)

    def _vector(self, name: str, parameter: Tensor) -> Tensor:
        fill = 0.0 if name.endswith("bias") else 1.0
        vector = torch.full(parameter.shape, fill, dtype=self.torch_dtype, device=self.device)
        return vector.requires_grad_(self.backward)

    def _tfkern(self, backend: str | None, tokens: Tensor, targets: Tensor, **weights: Tensor):
        model = _model(self.config())
        with tfkern.use_backend(backend):
            return functional_call(model, weights, (tokens, targets))

    def _torch(
        self, attend: Callable, tokens: Tensor, targets: Tensor, **weights: Tensor
    ) -> Tensor:
        """The same model in plain PyTorch."""

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        def norm(x: Tensor, name: str) -> Tensor:
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return F.layer_norm(x, (self.hidden,), weight, bias)

        embedding = weights["embedding.weight"]
        x = F.embedding(tokens, embedding) + weights["positions.weight"][: tokens.shape[1]]
        for i in range(self.layers):
            block = f"blocks.{i}."
            qkv = linear(norm(x, block + "norm1"), block + "attention.qkv")
            heads = qkv.unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
            o = attend(*heads.split(self.heads, 1)).transpose(1, 2).flatten(-2)
            x = x + linear(o, block + "attention.out")
            inner = linear(norm(x, block + "norm2"), block + "mlp.fc1")
            x = x + linear(F.gelu(inner, approximate="tanh"), block + "mlp.fc2")
        logits = F.linear(norm(x, "norm"), embedding)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.cache
def _model(config: TransformerConfig) -> Transformer:
    """The structure alone: every call brings its parameters."""
    with torch.device("meta"):
        return Transformer(config)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.plain(q, k, v, band=(None, 0))


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
