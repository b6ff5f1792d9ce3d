"""Attention where each rank has the whole sequence of some heads (Jacobs et al. 2023, "DeepSpeed
Ulysses"): parts of the sequence become parts of the heads by an all-to-all, and back after it."""

from typing import Any

import torch
from torch import Tensor

from tfkern.nn.context_parallel.exchange import all_to_all
from tfkern.nn.context_parallel.split import SequenceSplit
from tfkern.ops import attention, attention_varlen
from tfkern.ops.packing import cu_seqlens, pad, same_document, unpad
from tfkern.reference.attention import Arguments


def why_not(a: Arguments, split: SequenceSplit) -> str | None:
    """Why the heads cannot be split, or None if they can."""
    heads = a.q.shape[1], a.k.shape[1]
    if any(h % split.ranks for h in heads):
        return f"{heads[0]} and {heads[1]} heads cannot be split over {split.ranks} ranks"
    if a.seed is not None and (a.bias is not None or a.mask is not None) and split.ranks > 1:
        return "dropout_p beside a bias or mask: the kernels draw for heads counted from 0"
    return None


def needs_whole_scores(a: Arguments, documents: Tensor | None) -> bool:
    """Whether each rank would hold rows of a bias or mask for all queries, as they are the same
    for all heads, so that memory would not fall with the ranks."""
    rows = [x for x in (a.bias, a.mask) if x is not None]
    return bool(rows and documents is not None) or any(x.shape[1] == 1 < x.shape[2] for x in rows)


def all_to_all_attention(
    a: Arguments, split: SequenceSplit, documents: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """o and lse (B, H, T / n) of this rank's queries, in the dtypes of `tfkern.attention`.

    Args:
        a: q, k, v, bias and mask are those of this rank, bias and mask with the keys of all ranks.
    """
    q, k, v = (_whole(x, split) for x in (a.q, a.k, a.v))
    slopes = None if a.alibi_slopes is None else _heads(a.alibi_slopes, 1, split)
    options: dict[str, Any] = {
        "scale": a.scale,
        "softcap": a.softcap,
        "window": (a.left, a.right),
        "sink": None if a.sink is None else _heads(a.sink, 0, split),
        "dropout_p": a.dropout_p,
        "seed": a.seed,
        "return_lse": True,
        "backend": backend,
    }
    masked = a.bias is not None or a.mask is not None
    if (documents is None or masked) and a.seed is None:
        mask = None if a.mask is None else _scores(a.mask, a.q, split)
        if documents is not None:
            mask = same_document(documents) if mask is None else mask & same_document(documents)
        o, lse = attention(
            q, k, v,
            bias=None if a.bias is None else _scores(a.bias, a.q, split),
            mask=mask,
            alibi_slopes=slopes,
            query_lengths=a.query_lengths,
            key_lengths=a.key_lengths,
            **options,
        )  # fmt: skip
    else:
        o, lse = _by_documents(q, k, v, a, split, documents, slopes, options)
    return _part(o, split), _part(lse[..., None], split)[..., 0]


def _by_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Arguments,
    split: SequenceSplit,
    documents: Tensor | None,
    slopes: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention of documents one after the other. Without documents each batch is one.

    It serves dropout, too. The kernels draw for head h of document i by the number i H + h, where H
    is the number of heads that they get. Each document is preceded by as many empty ones as there
    are ranks with lower heads, and followed by as many as there are ranks with higher ones, so
    that this number is that of the head in the whole call.
    """
    B, _, T, _ = q.shape
    rows, keys = _lengths(a.query_lengths, q), _lengths(a.key_lengths, k)
    queries, packed_k, packed_v = (
        unpad(x.transpose(1, 2), lengths) for x, lengths in ((q, rows), (k, keys), (v, keys))
    )
    limits_q, limits_k = queries.cu_seqlens, packed_k.cu_seqlens
    batch = torch.arange(B, device=q.device)  # of each document
    if documents is not None:
        limits_q = limits_k = cu_seqlens(documents)
        batch = limits_q[:-1].long() // T
    if slopes is not None:
        slopes = slopes[batch].repeat_interleave(split.ranks, 0)
    o, lse = attention_varlen(
        queries.packed,
        packed_k.packed,
        packed_v.packed,
        _amid_empty(limits_q, split),
        _amid_empty(limits_k, split),
        alibi_slopes=slopes,
        **options,
    )
    o, lse = (pad(x, queries.indices, B, T).transpose(1, 2) for x in (o, lse.mT))
    exist = torch.arange(T, device=q.device) < rows[:, None, None]
    return o, lse.masked_fill(~exist, -torch.inf)


def _amid_empty(limits: Tensor, split: SequenceSplit) -> Tensor:
    """The limits of documents with empty ones around each of them, `ranks` for each in all."""
    n, documents = split.ranks, len(limits) - 1
    limits = torch.cat([limits[:1].expand(split.rank + 1), limits[1:].repeat_interleave(n)])
    return limits[: documents * n + 1]


def _lengths(lengths: Tensor | None, x: Tensor) -> Tensor:
    if lengths is not None:
        return lengths
    return torch.full((x.shape[0],), x.shape[2], device=x.device)


def _whole(x: Tensor, split: SequenceSplit) -> Tensor:
    """All positions (B, H / n, T, D) of this rank's heads, from its positions (B, H, T / n, D)."""
    parts = all_to_all(x.unflatten(1, (split.ranks, -1)).movedim(1, 0), split.group)
    x = parts.movedim(0, 2).flatten(2, 3)
    return x.index_select(2, split.order(x.shape[2], x.device))


def _part(x: Tensor, split: SequenceSplit) -> Tensor:
    """The inverse of `_whole`."""
    n, T = split.ranks, x.shape[2]
    positions = [split.positions(T, rank, x.device) for rank in range(n)]
    parts = x.index_select(2, torch.cat(positions)).unflatten(2, (n, -1))
    return all_to_all(parts.movedim(2, 0), split.group).movedim(0, 1).flatten(1, 2)


def _heads(x: Tensor, axis: int, split: SequenceSplit) -> Tensor:
    """This rank's heads."""
    return x.unflatten(axis, (split.ranks, -1)).select(axis, split.rank)


def _scores(x: Tensor, q: Tensor, split: SequenceSplit) -> Tensor:
    """A bias or mask of this rank's heads, with the rows of all ranks where it has rows."""
    by_head = x.shape[1] == q.shape[1] > 1
    if x.shape[2] == q.shape[2] > 1 or q.shape[2] == 1:
        return _whole(x, split) if by_head else split.gather(x, 2)
    return _heads(x, 1, split) if by_head else x
