"""What stands behind the last block: from hidden states to logits, and from logits to a loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.blocks import norm
from tfkern.models.config import TransformerConfig
from tfkern.nn import Linear
from tfkern.nn.mlp import FUNCTIONS
from tfkern.ops import linear


class VocabularyHead(nn.Module):
    """Logits of tokens: `scale * norm(act(dense(y))) @ table^T + bias`.

    The dense layer, its norm and the bias are those of masked language models. The table is that of
    the embedding if the two are tied, so that one parameter is both.
    """

    def __init__(self, config: TransformerConfig, masked: bool) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.vocab_size, self.scale = config.vocab_size, config.logit_scale
        self.act = FUNCTIONS[config.activation]
        self.dense = Linear(config.dim, config.dim) if masked else None
        self.norm = norm(config) if masked else None
        self.bias: Tensor | None = None
        if masked:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        elif config.logit_bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(config.vocab_size))
        if not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(rows(config), config.dim))
        self.tied = config.tie_embeddings

    def forward(self, y: Tensor, *, table: Tensor) -> Tensor:
        """(..., dim) and (rows, dim) to logits (..., vocab_size).

        The table has to be named: FlopCounterMode fails on parameters among positional arguments.
        """
        if self.dense is not None and self.norm is not None:
            y = self.norm(self.act(self.dense(y)))
        y = y if self.scale == 1 else y * self.scale
        logits = linear(y, table if self.tied else self.weight)
        logits = logits[..., : self.vocab_size]  # not those of the rows that pad the table
        return logits if self.bias is None else logits + self.bias


class Pooler(nn.Module):
    """tanh of a dense layer, in front of what sees the whole sequence (Devlin et al. 2019)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.dim, config.dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.dense(y).tanh()


def rows(config: TransformerConfig) -> int:
    """Rows of the embedding of tokens: vocab_size, rounded up to a multiple of vocab_multiple."""
    assert config.vocab_size is not None
    return -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple


def classifier(config: TransformerConfig) -> nn.Linear | None:
    """The layer of a head that chooses among classes."""
    kinds = {"pretraining": 2, "next_sentence": 2, "span": 2}
    kinds |= dict.fromkeys(("classification", "token"), config.classes or 0)
    return Linear(config.dim, kinds[config.head]) if config.head in kinds else None


def pool(y: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """One vector for each sequence: that of the first token, of the last one, or their mean.

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
    exists = place < mask[:, None] if mask.dim() == 1 else mask
    if kind == "mean":
        weights = exists / exists.sum(1, keepdim=True).clamp(min=1)
        return (y * weights[..., None].to(y.dtype)).sum(1)
    first, last = exists.int().argmax(1), (exists * place).argmax(1)
    chosen = first if kind == "first" else last
    return y[torch.arange(len(y), device=y.device), chosen]


def loss(logits: Tensor | tuple[Tensor, ...], targets: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Mean cross entropy in nats, float32 or wider; of several heads the sum.

    Logits (..., classes) go with targets (...) of int64, -100 where there is none; lists of logits
    with lists of targets.

    Raises:
        ValueError: targets of another shape than the logits without classes.
    """
    if isinstance(logits, tuple):
        if not isinstance(targets, (tuple, list)) or len(targets) != len(logits):
            raise ValueError(f"targets must be {len(logits)} tensors, one for each head")
        terms = [loss(a, b) for a, b in zip(logits, targets, strict=True)]
        return torch.stack(terms).sum()
    if not isinstance(targets, Tensor) or targets.shape != logits.shape[:-1]:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets has shape {shape}, expected {tuple(logits.shape[:-1])}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
