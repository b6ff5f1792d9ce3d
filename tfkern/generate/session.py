"""A model that reads texts step by step, and keeps the keys and values of earlier tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfkern.models import Transformer
from tfkern.models.blocks import Block, KeysValues
from tfkern.nn import KVCache
from tfkern.ops import checks

_CACHES = ("static", "growing", "none")


class Session:
    """The decoder of a model in the middle of a batch of texts.

    Where rotary positions have short and long numbers ("longrope"), all texts are read again once
    the longest outgrows the short ones, since the keys in the caches were turned by these.

    Args:
        model: a decoder or an encoder-decoder with head "lm".
        batch: how many texts.
        capacity: the most tokens of a text.
        sources: for each text, the tokens that the encoder reads, None for a decoder. The encoder
            runs once, and cross-attention computes its keys and values once.
        cache: "static" has room for capacity tokens, but in blocks with a window only for those
            within it; "growing" keeps all tokens, which `crop` needs where there is a window;
            "none" reads everything again at every step. See `tfkern.nn.KVCache`.

    Raises:
        ValueError: another cache.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        capacity: int,
        sources: Sequence[Sequence[int]] | None = None,
        cache: str = "static",
    ) -> None:
        checks.choice("cache", cache, _CACHES)
        self.model = model
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        config, stack = model.config, model.decoder
        assert stack is not None
        weight = model.embedding.weight
        assert isinstance(weight, Tensor)
        self.device = weight.device
        self._memory: list[KeysValues] | None = None
        self._memory_mask: Tensor | None = None
        if sources is not None:
            source, self._memory_mask = pad(sources, self.device)
            hidden = model.encode(source, self._memory_mask)
            blocks = (b for b in stack.blocks if isinstance(b, Block))
            self._memory = [block.cross.keys_values(hidden) for block in blocks]
        scaling = config.rotary_scaling
        self._short = capacity  # up to this length of the longest text, caches may be kept
        if scaling is not None and scaling.kind == "longrope":
            assert scaling.length is not None
            self._short = scaling.length
        self._keeps_rows = cache == "none" or self._short < capacity
        self._was_long = False
        self._caches: list[KVCache] | None = None
        if cache != "none":
            dtype = checks.computed_dtype(weight)
            # A ring gives keys in an order of its own, and these positions count from key to key.
            counted = config.positions in ("relative", "alibi")
            self._caches = []
            for block in stack.blocks:
                assert isinstance(block, Block)
                window = block.attention.window
                kind, rows = cache, capacity if cache == "static" else 64
                if cache == "static" and window is not None and not counted:
                    kind, rows = "ring", min(window[0] + 1, capacity)
                heads, size = block.attention.kv_heads, block.attention.head_dim
                self._caches.append(
                    KVCache(batch, heads, size, rows, kind=kind, dtype=dtype, device=self.device)
                )

    def feed(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads tokens (B, T), or of row b the first lengths[b]. Returns the logits (B, V) of the
        token that follows."""
        hidden = self._read(tokens, lengths)
        if lengths is None:
            last = hidden[:, -1:]
        else:
            last = hidden[torch.arange(len(hidden), device=self.device), (lengths - 1).clamp(min=0)]
            last = last[:, None]
        return self.model.project(last)[:, 0]

    def feed_all(self, tokens: Tensor) -> Tensor:
        """Reads tokens (B, T). Returns the logits (B, T, V) of the token that follows each."""
        return self.model.project(self._read(tokens, None))

    def reorder(self, rows: Tensor) -> None:
        """Lets row b go on from what row rows[b] has read. Both must have the same source."""
        self._rows = [list(self._rows[i]) for i in rows.tolist()]
        for cache in self._caches or ():
            cache.reorder(rows)

    def crop(self, length: int) -> None:
        """Forgets the tokens of every row from `length` on."""
        caches = sorted(self._caches or (), key=lambda cache: cache.kind != "ring")
        for cache in caches:  # rings come first, since they refuse
            cache.crop(torch.full((len(self._rows),), length, device=self.device))
        self._rows = [row[:length] for row in self._rows]

    def _read(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """The hidden states (B, T, dim) of the tokens."""
        if not self._keeps_rows:
            return self._decode(tokens, lengths)
        T = tokens.shape[1]
        longest = max(map(len, self._rows)) + T
        counts = [T] * len(tokens) if lengths is None else lengths.tolist()
        for row, new, n in zip(self._rows, tokens.tolist(), counts, strict=True):
            row += new[:n]
        was_long, self._was_long = self._was_long, longest > self._short
        if self._caches is not None and was_long == self._was_long:
            return self._decode(tokens, lengths)
        for cache in self._caches or ():
            cache.reset()
        everything, total = pad(self._rows, self.device, longest)
        hidden = self._decode(everything, total)
        first = total - torch.tensor(counts, device=self.device)
        index = (first[:, None] + torch.arange(T, device=self.device)).clamp(
            max=hidden.shape[1] - 1
        )
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    def _decode(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        memory, mask = self._memory, self._memory_mask
        return self.model.decode(tokens, memory, lengths, mask, caches=self._caches)


def pad(lists: Sequence[Sequence[int]], device: torch.device, T: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as (B, at least T) int64 with zeros on the right, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in lists], device=device)
    T = max(T, *(len(row) for row in lists))
    return torch.tensor([[*row, *[0] * (T - len(row))] for row in lists], device=device), lengths
