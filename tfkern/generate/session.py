"""A model that reads tokens bit by bit, and what earlier ones left."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfkern.models import Transformer
from tfkern.models.blocks import Block, KeysValues
from tfkern.nn import KVCache

Rows = Tensor | Sequence[Sequence[int] | Tensor]


class Session:
    """The decoder of a model in the middle of a batch of texts.

    Args:
        model: a decoder or an encoder-decoder with head "lm".
        batch: how many texts.
        capacity: the most tokens of a text.
        source: (B, S) and source_lengths: (B,), what the encoder reads: once, as are the keys and
            values that cross-attention takes from it.
        cache: "static", "growing" (see `tfkern.nn.KVCache`), or "none", which reads everything
            again at every step.

    Raises:
        ValueError: a model that does not continue texts, or a capacity beyond its context.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        capacity: int,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        cache: str = "static",
    ) -> None:
        check(model, capacity)
        if cache not in ("static", "growing", "none"):
            raise ValueError(f"cache must be static, growing or none, got {cache!r}")
        both = model.encoder is not None
        if both != (source is not None):
            raise ValueError("encoder-decoders need source, and other models do not take one")
        self.model = model
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        config, stack = model.config, model.decoder
        assert stack is not None
        weight = model.embedding.weight
        assert isinstance(weight, Tensor)
        self.device = weight.device
        self._memory: list[KeysValues] | None = None
        self._memory_mask = source_lengths
        if source is not None:
            hidden = model.encode(source, source_lengths)
            blocks = (b for b in stack.blocks if isinstance(b, Block))
            self._memory = [block.cross.keys_values(hidden) for block in blocks]
        self._caches: list[KVCache] | None = None
        if cache != "none":
            size = capacity if cache == "static" else 64
            heads = config.kv_heads or config.heads
            self._caches = [
                KVCache(
                    batch, heads, config.head_size, size,
                    kind=cache, dtype=_dtype(weight), device=self.device,
                )
                for _ in stack.blocks
            ]  # fmt: skip

    def feed(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads (B, T) tokens, of each row the first lengths (B,), and gives the logits (B, V) of
        what follows the last of them."""
        hidden = self._read(tokens, lengths)
        if lengths is None:
            last = hidden[:, -1:]
        else:
            last = hidden[torch.arange(len(hidden), device=self.device), (lengths - 1).clamp(min=0)]
            last = last[:, None]
        return self.model.project(last)[:, 0]

    def feed_all(self, tokens: Tensor) -> Tensor:
        """Reads (B, T) tokens and gives the logits (B, T, V) of what follows each."""
        return self.model.project(self._read(tokens, None))

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on as row rows[b], which has the same source."""
        self._rows = [list(self._rows[i]) for i in rows.tolist()]
        for cache in self._caches or ():
            cache.reorder(rows)

    def crop(self, length: int) -> None:
        """Forgets the tokens of every row from `length` on."""
        self._rows = [row[:length] for row in self._rows]
        for cache in self._caches or ():
            cache.crop(torch.full((len(self._rows),), length, device=self.device))

    def _read(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """The hidden states of the tokens (B, T, dim)."""
        T = tokens.shape[1]
        if self._caches is not None:
            return self.model.decode(
                tokens, self._memory, lengths, self._memory_mask, caches=self._caches
            )
        counts = [T] * len(tokens) if lengths is None else lengths.tolist()
        for row, new, n in zip(self._rows, tokens.tolist(), counts, strict=True):
            row += new[:n]
        everything, total = pad(self._rows, self.device)
        hidden = self.model.decode(everything, self._memory, total, self._memory_mask)
        first = total - torch.tensor(counts, device=self.device)
        index = (first[:, None] + torch.arange(T, device=self.device)).clamp(
            max=hidden.shape[1] - 1
        )
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def check(model: Transformer, capacity: int) -> None:
    """Raises ValueError if a model cannot write texts, or none of `capacity` tokens."""
    config = model.config
    if config.architecture == "encoder":
        raise ValueError(
            "an encoder-only model does not continue a text: `fill_mask` predicts masked tokens"
        )
    if config.head != "lm":
        raise ValueError(f"a model that writes needs head 'lm', this one has {config.head!r}")
    if config.max_length is not None and capacity > config.max_length:
        raise ValueError(
            f"prompt and new tokens are {capacity} together, more than the context of "
            f"{config.max_length}"
        )


def rows(given: Rows, name: str) -> list[list[int]]:
    """Lists of ids from a tensor (B, T) or a sequence of sequences."""
    lists = [list(map(int, row)) for row in given]
    if not lists or not all(lists):
        raise ValueError(f"{name} must be at least one sequence of at least one token")
    return lists


def pad(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows as (B, T) int64 with zeros on the right, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in lists], device=device)
    T = max(len(row) for row in lists)
    return torch.tensor([[*row, *[0] * (T - len(row))] for row in lists], device=device), lengths


def _dtype(weight: Tensor) -> torch.dtype:
    """What keys and values will have: autocast computes them in its own."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype
