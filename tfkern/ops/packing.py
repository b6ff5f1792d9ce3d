"""Converts batches with padding to documents that lie one after the other, and back."""

from typing import NamedTuple

import torch
from torch import Tensor

from tfkern.ops import checks


class Unpadded(NamedTuple):
    """The result of `unpad`."""

    packed: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def unpad(x: Tensor, keep: Tensor) -> Unpadded:
    """Packs the rows of a padded batch that exist, one after the other, for `attention_varlen`.

        packed, indices, cu_seqlens, max_seqlen = unpad(x, lengths)
        ...
        x = pad(packed, indices, *x.shape[:2])

    It is differentiable in x. Python needs the number of rows as a size, so this call waits for the
    GPU, and breaks a graph of torch.compile.

    Args:
        x: (B, T, ...), of any dtype.
        keep: (B,) int32 or int64, how many first rows of each batch exist; or (B, T) bool, True
            where a row exists, in any pattern: a document is what is left of its batch.

    Returns:
        packed: (total, ...), the rows that exist, batch by batch.
        indices: (total,) int64, where they are in x.flatten(0, 1), for `pad` or to unpad more
            tensors of the same batch: y.flatten(0, 1)[indices].
        cu_seqlens: (B + 1,) int32, where each document begins and the last one ends.
        max_seqlen: int, the length of the longest document.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit together.
    """
    checks.dense("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be a tensor (batch, length, ...), got {_what(x)}")
    checks.dense("keep", keep)
    if keep.dtype not in (torch.bool, torch.int32, torch.int64):
        raise ValueError(f"keep must be a bool mask or int32 or int64 lengths, got {_what(keep)}")
    checks.same_device("x", x, "keep", keep)
    B, T = x.shape[:2]
    if keep.dtype != torch.bool:
        checks.shape("keep", keep, (B,), "one length for each batch (a mask must be bool)")
        checks.within("keep", keep, 0, T)
        keep = torch.arange(T, device=x.device) < keep[:, None]
    checks.shape("keep", keep, (B, T), "the batch and length of x")
    indices = keep.flatten().nonzero().squeeze(1)
    lengths = keep.sum(1)
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=x.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    packed = x.flatten(0, 1).index_select(0, indices)
    return Unpadded(packed, indices, cu_seqlens, int(lengths.max()) if B else 0)


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of `unpad`: puts rows back, and 0 everywhere else. Differentiable in x.

    Args:
        x: (total, ...), of any dtype.
        indices: (total,) int64, as `unpad` gave them: all different.
        batch, length: B and T of the result.

    Returns:
        (B, T, ...).

    Raises:
        ValueError: shapes or indices that do not fit (on a GPU and under torch.compile the values
            of indices are not checked).
    """
    checks.dense("x", x)
    if x.dim() == 0:
        raise ValueError(f"x must be a tensor (total, ...), got {_what(x)}")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise ValueError(f"indices must be an int64 tensor, got {_what(indices)}")
    checks.same_device("x", x, "indices", indices)
    checks.shape("indices", indices, x.shape[:1], "one for each row of x")
    if batch < 0 or length < 0:
        raise ValueError(f"batch and length must not be negative, got {batch} and {length}")
    rows = batch * length
    if checks.values_at_hand(indices):  # in a trace the name would make the sizes constants
        checks.within(f"indices, of batch {batch} and length {length},", indices, 0, rows - 1)
    padded = x.new_zeros(rows, *x.shape[1:]).index_copy(0, indices, x)
    return padded.reshape(batch, length, *x.shape[1:])


def _what(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
