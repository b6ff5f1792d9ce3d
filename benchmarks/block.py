"""A training step of one decoder block over context length: the part that a transformer repeats."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import tfkern
from tfkern.models import TransformerConfig
from tfkern.models.blocks import Block
from tfkern.ops.flops import formulas

from . import attention
from .case import BACKWARD, BOTH, FORWARD, Case, Variant, compiled


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """A block with GPT-2's parts on x (batch, length, hidden). Its parameters are inputs, too."""

    op = "block"
    lengths = {
        "cpu": (128, 256, 512, 1024, 2048),
        "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384),
    }
    unit = "TFLOP/s"
    growth = 2.0

    backward: bool = True
    layers: ClassVar[int] = 1
    batch: int = 1
    hidden: int = 768
    heads: int = 12

    def __post_init__(self) -> None:
        self.config()  # raises if the sizes make no block
        if self.hidden > 256 * self.heads:
            size = self.hidden // self.heads
            raise ValueError(f"heads of tfkern.attention have up to 256 features, got {size}")

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=1, dim=self.hidden, layers=1, heads=self.heads, max_length=1
        )

    def module(self) -> nn.Module:
        """The block of tfkern, used for its structure only: every call passes the parameters."""
        return on_meta(Block, self.config())

    def small(self) -> "OpCase":
        return replace(self, batch=1, length=min(self.length, 67))

    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.draw(self.batch, self.length, self.hidden), **self.parameters()}

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by their names in the module, with values as large as before training."""
        return {
            name: self.draw(*p.shape, std=0.02) if p.dim() > 1 else self._vector(name, p)
            for name, p in self.module().named_parameters()
        }

    def floor_scale(self) -> dict[str, float]:
        # The gradients of parameters are sums over all tokens.
        names = dict(self.module().named_parameters())
        return dict.fromkeys(names, math.sqrt(self.batch * self.length))

    def reference(self, **inputs: Tensor) -> Tensor:
        return self.in_torch(attention.plain, **inputs)

    def fused(self, **inputs: Tensor) -> Tensor:
        return self.in_torch(attention.sdpa, **inputs)

    def in_torch(self, attend: Callable, x: Tensor, **weights: Tensor) -> Tensor:
        """The block in PyTorch's operators; `attend` is the way to compute attention."""
        return torch_block(attend, self.heads, x, weights)

    def in_tfkern(self, x: Tensor, **weights: Tensor) -> Tensor:
        x = x.view_as(x)  # FlopCounterMode fails on a module whose input is a leaf
        y, h = functional_call(self.module(), weights, (x, None))
        return y + h  # the norm of the next block would add them

    def variants(self, backends: Iterable[str] | None = None) -> list[Variant]:
        rows = self.batch * self.heads * self.length**2 * self.torch_dtype.itemsize
        scratch = (self.layers + 2) * rows if self.backward else 2 * rows
        names = ["reference", None] if backends is None else list(backends)
        return [
            Variant("torch plain", self.reference, scratch),
            Variant("torch sdpa", self.fused),
            compiled("torch.compile", self.fused),
            *(
                Variant(
                    f"tfkern {name}" if name else "tfkern",
                    functools.partial(self._with_backend, name),
                    scratch if name == "reference" else 0,
                )
                for name in names
            ),
        ]

    def work(self, pass_: str) -> float:
        """FLOPs of the products with weights, and of attention, halved since it is causal."""
        tokens = self.batch * self.length
        products = 2 * tokens * 12 * self.layers * self.hidden**2
        pairs = 2 * tokens * self.length * self.layers * self.hidden
        factors = {FORWARD: (1, 1), BACKWARD: (2, 2.5), BOTH: (3, 3.5)}[pass_]
        return factors[0] * products + factors[1] * pairs

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        return formulas(causal=True)

    def _vector(self, name: str, parameter: Tensor) -> Tensor:
        fill = 0.0 if name.endswith("bias") else 1.0
        vector = torch.full(parameter.shape, fill, dtype=self.torch_dtype, device=self.device)
        return vector.requires_grad_(self.backward)

    def _with_backend(self, backend: str | None, **inputs: Tensor) -> Tensor:
        with tfkern.use_backend(backend):
            return self.in_tfkern(**inputs)


@functools.cache
def on_meta(kind: type[nn.Module], config: TransformerConfig) -> nn.Module:
    """A module on the device "meta", without memory for its parameters."""
    with torch.device("meta"):
        return kind(config)


def torch_block(
    attend: Callable, heads: int, x: Tensor, weights: dict[str, Tensor], prefix: str = ""
) -> Tensor:
    """One block in PyTorch's operators. The names of its weights begin with `prefix`."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])

    qkv = linear(torch_norm(x, weights, prefix + "norm1"), "attention.qkv_by_head")
    q, k, v = qkv.unflatten(-1, (heads, 3, -1)).transpose(1, 2).unbind(3)
    o = attend(q, k, v, band=(None, 0)).transpose(1, 2).flatten(-2)
    x = x + linear(o, "attention.out")
    inner = linear(torch_norm(x, weights, prefix + "norm2"), "mlp.fc1")
    return x + linear(F.gelu(inner, approximate="tanh"), "mlp.fc2")


def torch_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias)
