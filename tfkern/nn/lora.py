"""Adapters of linear layers: a product of low rank is trained beside a frozen layer."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern import dispatch
from tfkern.nn.linear import Int8Linear, PackedLinear
from tfkern.ops import checks


class LoRALinear(nn.Module):
    """A linear layer with an adapter of low rank (LoRA, Hu et al. 2021).

        y = base(x) + scaling * dropout(x) lora_A^T lora_B^T

    `base` is frozen, and is called as it is, whatever multiplies in it: `nn.Linear` and its
    subclasses, `Int8Linear`, `PackedLinear` or the Conv1D of transformers. lora_B begins as 0, so
    that a fresh adapter changes no bit of the result. The scaling is alpha / rank, or with `rslora`
    alpha / sqrt(rank) (Kalajdzievski 2023).

    With `dora` the rows of the weight have lengths of their own (DoRA, Liu et al. 2024):

        y = x W'^T + bias,  W' = magnitude * V / |V|,  V = weight + scaling * lora_B lora_A

    magnitude begins as the lengths of the rows of the weight. As in the paper (section 4.3), no
    gradient passes through the norm |V|. Dropout acts on what is added to base(x).

    Args:
        base: the layer. Its parameters are frozen.
        rank: r, at least 1.
        alpha: numerator of the scaling.
        dropout: probability with which an element of the adapter's input is 0 in training.
        rslora, dora: see above.
        dtype: dtype of the adapter; that of the base if None, but float32 in place of 16 bits, as
            the steps of an optimiser would be lost in the rounding of bfloat16.

    Attributes:
        lora_A: (rank, in_features).
        lora_B: (out_features, rank).
        magnitude: (out_features,), or None without `dora`.
        merged: while `merge` is in effect, a layer like the base with the adapter in its weight;
            else None. It is no part of the state dict, and `base` keeps its weight.
        enabled: whether the adapter takes part. Default True.

    Raises:
        ValueError: a base that is no linear layer or already has an adapter, numbers out of their
            range, or dora on a base without a weight of floating numbers.
    """

    merged: nn.Module | None

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_linear(base):
            raise ValueError(f"base must be a linear layer, got {type(base).__name__}")
        check_options(rank, alpha, dropout, dtype)
        self.transposed = _is_transposed(base)
        self.in_features, self.out_features = sizes(base)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.dropout, self.enabled = float(dropout), True
        self.base = base.requires_grad_(False)
        if dora and not has_weight(base):
            told = type(base).__name__
            raise ValueError(f"dora needs a base with a weight of floating numbers, got {told}")
        like = base.packed if isinstance(base, PackedLinear) else base.weight
        assert isinstance(like, Tensor)
        wide = like.is_floating_point() and like.dtype.itemsize > 2
        dtype = dtype or (like.dtype if wide else torch.float32)
        new: dict[str, Any] = {"device": like.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, math.sqrt(5))  # as nn.Linear begins
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(self.row_lengths())
        self.__dict__["merged"] = None  # no child, whose weight would be in the state dict

    @property
    def scaling(self) -> float:
        """The factor of the product of lora_B and lora_A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def weight(self) -> Any:
        """The weight of the base, without the adapter: for code that asks for a dtype or a device.
        Whatever multiplies has to call the layer."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The bias of the base, or None."""
        return self.base.bias

    @property
    def acting(self) -> Any:
        """The layer that makes the result alone: `base`, `merged` or this one."""
        if not self.enabled:
            return self.base
        return self if self.merged is None else self.merged

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the base's result."""
        if self.acting is not self:
            return self.acting(input)
        y = self.base(input)
        x = F.dropout(input.to(self.lora_A.dtype), self.dropout, self.training)
        added = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling
        if self.magnitude is not None:
            dropped = self.training and self.dropout > 0
            product = self.base(x.to(input.dtype)) if dropped else y
            product = product if self.bias is None else product - self.bias
            factor = self._factor(self.magnitude)
            added = (factor - 1) * product + factor * added
        return (y + added).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Makes calls multiply once, with one weight that has the adapter in it. This weight takes
        as much memory as that of the base, which stays as it is. The adapter gets no gradients."""
        self.check_mergeable()
        weight = self._rows()
        if self.magnitude is not None:
            weight = self._factor(self.magnitude)[:, None] * weight
        weight = weight.t() if self.transposed else weight
        weight = weight.to(self.weight.dtype).contiguous()
        merged = copy.copy(self.base)
        merged._parameters = {**merged._parameters, "weight": nn.Parameter(weight, False)}
        self.__dict__["merged"] = merged

    def unmerge(self) -> None:
        """Takes `merge` back."""
        self.__dict__["merged"] = None

    def check_mergeable(self) -> None:
        """Raises ValueError if the base has no weight into which the adapter can be merged."""
        if not has_weight(self.base):
            told = type(self.base).__name__
            raise ValueError(f"{told} has no weight of floating numbers to merge an adapter into")
        if hasattr(self.base.weight, "placements"):  # a DTensor
            raise ValueError("the weights are spread over processes: merge in a model on one")

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """The norms |V| (out_features,) of the rows of the weight and the adapter together."""
        return torch.linalg.vector_norm(self._rows(), dim=1)

    def extra_repr(self) -> str:
        told = f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
        return f"{told}, rslora={self.rslora}, dora={self.magnitude is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.merged is not None:
            self.merged._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _rows(self) -> Tensor:
        """V (out_features, in_features), in the dtype of the adapter."""
        weight: Any = self.base.weight
        weight = weight.t() if self.transposed else weight
        with dispatch.no_autocast(weight.device):
            return weight.to(self.lora_A.dtype) + self.scaling * (self.lora_B @ self.lora_A)

    def _factor(self, magnitude: Tensor) -> Tensor:
        """magnitude / |V| (out_features,); 0 where both are."""
        lengths = self.row_lengths()
        return magnitude / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be put on the module."""
    kinds = (nn.Linear, Int8Linear, PackedLinear)
    return isinstance(module, kinds) or _is_transposed(module)


def has_weight(base: nn.Module) -> bool:
    """Whether a layer has a weight of floating numbers as a parameter of its own, into which an
    adapter can be merged."""
    weight = base._parameters.get("weight")
    return weight is not None and weight.is_floating_point()


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of the model has an adapter."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def check_options(rank: Any, alpha: Any, dropout: Any, dtype: Any = None) -> None:
    """Raises ValueError for options that no `LoRALinear` takes."""
    if not checks.is_integer(rank) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    checks.number("alpha", alpha)
    if checks.probability("dropout", dropout) == 1:
        raise ValueError("dropout must lie below 1, which leaves nothing of the adapter, got 1")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype, got {dtype!r}")


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is (in, out), as in the Conv1D of transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def sizes(base: Any) -> tuple[int, int]:
    """The sizes of the input and the output of a linear layer."""
    if _is_transposed(base):
        rows, columns = base.weight.shape
        return rows, columns
    return base.in_features, base.out_features
