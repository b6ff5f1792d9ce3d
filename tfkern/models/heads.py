"""The layers behind the last block: from hidden states to logits."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tfkern.models.blocks import norm
from tfkern.models.config import TransformerConfig
from tfkern.models.embedding import rows
from tfkern.nn import Int8Linear, Linear, PackedLinear
from tfkern.ops import linear
from tfkern.ops.activation import FUNCTIONS

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class VocabularyPart(NamedTuple):
    """The part of a vocabulary that a process has, of several ones with the parts in their order.

    Attributes:
        mesh: the processes, along one axis.
        first: its first token.
        size: how many tokens it has.
        classes: how many tokens all parts have.
    """

    mesh: "DeviceMesh"
    first: int
    size: int
    classes: int


class DeferredLogits(NamedTuple):
    """What the logits `cap(x @ weight^T + bias)` are made of.

    `tfkern.models.cross_entropy` makes a loss of it, mostly without having the logits whole in
    memory.

    Attributes:
        x: (..., K).
        weight: (V, K).
        bias: (V,) or None.
        softcap: the cap, 0 for none.
        part: which logits these are, if other processes have the others; None if they are all.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float
    part: VocabularyPart | None = None


class VocabularyHead(nn.Module):
    """Logits of tokens: `cap(scale * norm(act(dense(y))) @ table^T + bias)`.

    Only masked language models have the dense layer, its norm and a trained bias. The table is
    `weight`, or with tied embeddings the weight of the token embedding. The cap c, of which most
    models have none, makes c tanh(x / c) of x.

    Attributes:
        deferred: whether forward returns `DeferredLogits` in training mode. Default False;
            without effect if weights are int8 or packed.
        part: which logits are made, by a table that has their rows only; all if None.
    """

    def __init__(self, config: TransformerConfig, masked: bool) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.vocab_size, self.scale = config.vocab_size, config.logit_scale
        self.softcap = config.logit_softcap
        self.deferred = False
        self.part: VocabularyPart | None = None
        self.act = FUNCTIONS[config.activation]
        self.dense = Linear(config.dim, config.dim) if masked else None
        self.norm = norm(config) if masked else None
        self.bias: Tensor | None = None
        if masked:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        elif config.logit_bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(config.vocab_size))
        self.int8: Int8Linear | None = None  # the table, in a model of int8 weights
        self.packed: PackedLinear | None = None  # or in one of packed weights
        self.weight: nn.Parameter | None = None
        if not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(rows(config), config.embedding_size))

    def forward(self, y: Tensor, *, table: Tensor | None) -> Tensor | DeferredLogits:
        """y (..., dim) and the table (rows, dim) to logits (..., vocab_size).

        The table has to be named: FlopCounterMode fails on parameters among positional arguments.
        """
        if self.dense is not None and self.norm is not None:
            y = self.norm(self.act(self.dense(y)))
        y = y if self.scale == 1 else y * self.scale
        layer = self.packed if self.int8 is None else self.int8
        if layer is not None:
            return self._finished(layer(y))
        table = table if self.weight is None else self.weight
        if table is None:
            raise ValueError("a tied vocabulary head needs the table of a token embedding")
        if self.deferred and self.training:
            bias, size = self._own()
            table = table[:size] if len(table) > size else table
            return DeferredLogits(y, table, bias, self.softcap or 0.0, self.part)
        return self._finished(linear(y, table))

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits (..., vocab_size) of products (..., rows of the table)."""
        bias, size = self._own()
        logits = logits[..., :size]  # without the rows that pad the table
        logits = logits if bias is None else logits + bias
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def _own(self) -> tuple[Tensor | None, int]:
        """The bias, and how many tokens there are, of the part."""
        if self.part is None:
            return self.bias, self.vocab_size
        _, first, size, _ = self.part
        return None if self.bias is None else self.bias[first : first + size], size


_POOLER = {"tanh": torch.tanh, "relu": torch.relu}


class Pooler(nn.Module):
    """A dense layer and an activation, in front of heads for the whole sequence: tanh in BERT
    (Devlin et al. 2019)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.dim, config.dim)
        self.act = _POOLER[config.pooler_activation]

    def forward(self, y: Tensor) -> Tensor:
        return self.act(self.dense(y))


def classifier(config: TransformerConfig) -> nn.Linear | None:
    """The layer of a head that chooses among classes."""
    kinds = {"pretraining": 2, "next_sentence": 2, "span": 2, "choice": 1}
    several = ("classification", "lm_classification", "token")
    kinds |= dict.fromkeys(several, config.classes or 0)
    if config.head not in kinds:
        return None
    return Linear(config.embedding_size, kinds[config.head], config.classifier_bias)


def ends(
    config: TransformerConfig, tokens: Tensor, source: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """A mask for `pool` in which the last token of each row is the one that a decoder's classifier
    reads.

    In a decoder-only model this is the last one that is not pad_token. In an encoder-decoder it
    stands where the source has its last end_token: the decoder reads the source, shifted by one.
    """
    marks = None
    if source is None and config.pad_token is not None:
        marks = tokens != config.pad_token
    elif source is not None and config.end_tokens and source.shape == tokens.shape:
        marks = torch.isin(source, source.new_tensor(config.end_tokens))
        marks = marks | ~marks.any(1, keepdim=True)
    if mask is None or marks is None:
        return mask if marks is None else marks
    return marks & _exists(mask, tokens.shape[1])


def _exists(mask: Tensor, length: int) -> Tensor:
    """A mask, (B, T) bool or (B,) of numbers of tokens, as (B, T) bool."""
    if mask.dim() == 2:
        return mask
    return torch.arange(length, device=mask.device) < mask[:, None]


def pool(y: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """One vector for each sequence: its first token, its last token, or the mean of all.

    Args:
        y: (B, T, dim).
        mask: (B, T) bool, the tokens that exist, or (B,) their number; all if None.
        kind: "first", "last" or "mean".

    Returns:
        (B, dim).

    Raises:
        ValueError: another kind.
    """
    if kind not in ("first", "last", "mean"):
        raise ValueError(f"pooling must be first, last or mean, got {kind!r}")
    place = torch.arange(y.shape[1], device=y.device)
    if mask is None:
        mask = torch.full(y.shape[:1], y.shape[1], device=y.device)
    exists = _exists(mask, y.shape[1])
    if kind == "mean":
        weights = exists / exists.sum(1, keepdim=True).clamp(min=1)
        return (y * weights[..., None].to(y.dtype)).sum(1)
    first, last = exists.int().argmax(1), (exists * place).argmax(1)
    chosen = first if kind == "first" else last
    return y[torch.arange(len(y), device=y.device), chosen]
