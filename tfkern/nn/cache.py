"""Keys and values of earlier tokens, to generate token by token."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import checks
from tfkern.ops.append import append_

_KINDS = ("static", "growing", "ring")


class KVCache:
    """The keys and values of the tokens that a layer has seen, one sequence for each batch.

        cache = KVCache(B, Hk, D, capacity=4096, dtype=q.dtype, device=q.device)
        k, v, key_lengths = cache.append(k, v)
        o = attention(q, k, v, causal=True, key_lengths=key_lengths)

    Three kinds:

    - "static" holds up to capacity tokens. `append` works in place and never waits for the GPU, so
      that torch.compile traces it and CUDA graphs replay it.
    - "growing" begins as "static" and doubles its capacity whenever a token might not fit: it
      counts the rows of every `append`, right padding too. Neither torch.compile nor CUDA graphs
      can follow it to its next buffer.
    - "ring" holds the last capacity tokens, for attention with
      `causal=True, window=(capacity - 1, None)`, or with a narrower window while `append` is given
      more than one row. Memory is bounded however long the sequence. `append` works in place.

    When a ring is given one row, it returns keys in ring order, and the query must see all of them:
    a window narrower than the capacity, alibi_slopes, and a bias or mask that depends on the key
    then give wrong results. Rotary positions work: keys are turned before they are appended.

    There are no gradients through a cache.

    Args:
        batch: B, the number of sequences.
        heads: Hk, the number of key heads.
        size: D, the size of a key.
        capacity: most tokens of a sequence; for "growing" in the first buffer.
        value_size: Dv, the size of a value; D if None.
        kind: "static", "growing" or "ring".
        dtype, device: of keys and values.

    Raises:
        ValueError: sizes that are not positive, or an unknown kind.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        size: int,
        capacity: int,
        value_size: int | None = None,
        *,
        kind: str = "static",
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        checks.choice("kind", kind, _KINDS)
        value_size = size if value_size is None else value_size
        sizes = {"batch": batch, "heads": heads, "size": size, "value_size": value_size}
        for name, x in {**sizes, "capacity": capacity}.items():
            if x < 1:
                raise ValueError(f"{name} must be positive, got {x}")
        self.kind = kind
        options = {"dtype": dtype, "device": device}
        with torch.inference_mode(False):  # inference tensors cannot be written to in ordinary mode
            self._k = torch.zeros(batch, heads, capacity, size, **options)
            self._v = torch.zeros(batch, heads, capacity, value_size, **options)
            self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._rows = 0  # for "growing": an upper bound of all lengths

    @property
    def capacity(self) -> int:
        return self._k.shape[2]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, how many tokens each sequence has had: the position of its next one."""
        return self._lengths.clone()

    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds tokens, and returns keys, values and key_lengths to hand to `attention`.

        Args:
            k: (B, Hk, T, D), v: (B, Hk, T, Dv), with T >= 1.
            lengths: (B,) int32 or int64, how many of the T tokens each sequence has; the others are
                padding, which the next `append` writes over. Give it to `attention` as
                query_lengths, too. All T if None.

        Returns:
            k (B, Hk, S, D), v (B, Hk, S, Dv), key_lengths (B,). k and v are the cache itself, valid
            until the next call of one of its methods. A ring that is given several rows returns a
            copy instead: what it held and the new rows, in the order of time.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, tensors that require a gradient,
                lengths out of range, or more tokens than the capacity of a static cache. The last
                two are checked on the CPU in eager mode only; elsewhere lengths are clamped, and
                tokens beyond the capacity overwrite the first ones, so that results are wrong.
        """
        self._check(k, v, lengths)
        T = k.shape[2]
        if self.kind == "growing":
            self.reserve(T)
            self._rows += T
        counts = None if lengths is None else lengths.to(self._lengths.dtype).clamp(0, T)
        if self.kind == "static" and checks.values_at_hand(self._lengths):
            self._check_room(T, counts)
        if self.kind == "ring" and T > 1:
            new = torch.full_like(self._lengths, T) if counts is None else counts
            return self._append_to_ring(k, v, new, self._lengths + new)
        used = append_(self._k, self._v, self._lengths, k.detach(), v.detach(), counts)
        return self._k, self._v, used

    def reserve(self, rows: int) -> None:
        """Makes room in a growing cache for the rows of the next `append`, which will return S =
        capacity keys. The other kinds stay as they are."""
        needed = self._rows + rows
        if self.kind != "growing" or needed <= self.capacity:
            return
        more = max(needed, 2 * self.capacity) - self.capacity
        with torch.inference_mode(False):
            self._k, self._v = (
                torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], 2)
                for x in (self._k, self._v)
            )

    def reset(self) -> None:
        """Forgets all tokens, and keeps the memory."""
        self._lengths.zero_()
        self._rows = 0

    def crop(self, lengths: Tensor) -> None:
        """Forgets the tokens of each sequence from lengths on.

        Args:
            lengths: (B,) int32 or int64, on the device of the cache.

        Raises:
            ValueError: another shape, dtype or device, negative lengths (on the CPU), or a ring,
                which may have overwritten the tokens that would now be its last.
        """
        if self.kind == "ring":
            raise ValueError("a ring cannot be cropped")
        checks.integers("lengths", lengths, self._k)
        checks.shape("lengths", lengths, self._lengths.shape, "one length for each batch")
        if checks.values_at_hand(lengths) and int(lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        self._lengths.copy_(torch.minimum(self._lengths, lengths.to(self._lengths.dtype)))

    def reorder(self, indices: Tensor) -> None:
        """Replaces sequence b by sequence indices[b], for beam search.

        Args:
            indices: (B,) int32 or int64, on the device of the cache.

        Raises:
            ValueError: another shape, dtype or device, or on the CPU indices out of range.
        """
        checks.integers("indices", indices, self._k)
        checks.shape("indices", indices, self._lengths.shape, "one for each sequence")
        checks.within("indices", indices, 0, len(self._lengths) - 1)
        for x in (self._k, self._v, self._lengths):
            x.copy_(x.index_select(0, indices))

    def _check(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        for name, x, cache in (("k", k, self._k), ("v", v, self._v)):
            B, Hk, _, D = cache.shape
            checks.floating(name, x)
            checks.same_device("the cache", cache, name, x)
            checks.same_dtype("the cache", cache, name, x)
            T = max(k.shape[2], 1) if k.dim() == 4 else "T"
            checks.shape(name, x, (B, Hk, T, D), "as the cache was made, and T >= 1")
            if torch.is_grad_enabled() and dispatch.requires_grad([x]):
                raise ValueError(f"{name} requires a gradient: detach it, or use torch.no_grad()")
        if self.kind == "static" and k.shape[2] > self.capacity:
            raise ValueError(f"{k.shape[2]} rows do not fit into a cache of {self.capacity}")
        if lengths is not None:
            checks.integers("lengths", lengths, k)
            checks.shape("lengths", lengths, self._lengths.shape, "one length for each batch")
            checks.within("lengths", lengths, 0, k.shape[2])

    def _check_room(self, T: int, counts: Tensor | None) -> None:
        """Checks that T tokens, or the first `counts` of them, fit into a static cache."""
        if max(self._lengths.tolist(), default=0) + T <= self.capacity:
            return
        most = int((self._lengths + (T if counts is None else counts)).max())
        if most > self.capacity:
            raise ValueError(
                f"a sequence of {most} tokens does not fit into a cache of {self.capacity}: "
                'take a larger capacity, or kind "growing"'
            )

    def _append_to_ring(
        self, k: Tensor, v: Tensor, new: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        W, T = self.capacity, k.shape[2]
        old = self._lengths.clamp(max=W)
        out = torch.arange(W + T, device=k.device)
        # Returned row j is the j-th oldest of the ring, or from j = old on, new row j - old.
        oldest = (self._lengths - old)[:, None]
        source = torch.where(out < old[:, None], (oldest + out) % W, W + out - old[:, None])
        # Place s of the ring holds the last token whose position is s modulo W.
        place = torch.arange(W, device=k.device)
        age = (total[:, None] - 1 - place) % W
        kept = ((old + new)[:, None] - 1 - age).clamp(min=0)  # 0 where the place is still empty
        rows = []
        for cache, x in ((self._k, k), (self._v, v)):
            rows.append(_gather(torch.cat([cache, x.detach()], 2), source.clamp(max=W + T - 1)))
            cache.copy_(_gather(rows[-1], kept))
        self._lengths.copy_(total)
        return rows[0], rows[1], old + new


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """For each batch, the rows of x (B, Hk, S, D) that index (B, N) names."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
