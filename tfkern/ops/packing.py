"""Documents that lie one after the other: made of batches with padding and back, and their limits,
positions and mask where several of them share a row."""

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


def cu_seqlens(documents: Tensor) -> Tensor:
    """Where each document of a batch begins, for `tfkern.attention_varlen` over all its rows.

        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B, T, H, D) to (B * T, H, D)
        ends = cu_seqlens(batch["documents"])
        o = tfkern.attention_varlen(q, k, v, ends, ends, causal=True)

    Python needs the number of documents as a size, so this call waits for the GPU, and breaks a
    graph of torch.compile.

    Args:
        documents: (B, T), "documents" of a batch. A document begins with each row, and wherever the
            number is another one than before. Padding is a document.

    Returns:
        (n + 1,) int32, from 0 to B * T.
    """
    starts = torch.nn.functional.pad(_starts(documents).flatten(), (0, 1), value=True)
    return starts.nonzero().squeeze(1).int()


def positions(documents: Tensor) -> Tensor:
    """The position (B, T) int64 of each token in its document, or in its part in the row."""
    steps = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return steps - (steps * _starts(documents)).cummax(1).values


def same_document(documents: Tensor) -> Tensor:
    """Which tokens (B, T) are of one document, as a mask (B, 1, T, T) for `tfkern.attention`.

    It serves where `cu_seqlens` cannot: beside a bias, and in a graph of torch.compile.
    """
    number = _starts(documents).cumsum(1)[:, None]
    return number[..., None] == number[:, :, None]


def _starts(documents: Tensor) -> Tensor:
    """(B, T) bool: True at the first token of each document in its row."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts


def _what(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
