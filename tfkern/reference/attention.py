"""Softmax attention in plain PyTorch: the definition of the op.

    s   = scale q k^T
    s   = softcap tanh(s / softcap)                                 if softcap > 0
    s   = s + bias - alibi_slope |t + offset - s|, -inf where query t does not see key s
    lse = log (sum exp(s) + exp(sink))
    p   = exp(s - lse)
    o   = (p keep / (1 - dropout_p)) v

    dp    = (do v^T) keep / (1 - dropout_p),  dv = (p keep / (1 - dropout_p))^T do
    ds    = p (dp - delta)      delta = rowsum(p dp) - dlse = rowsum(do o) - dlse
    dbias = ds, summed over the dimensions that bias is broadcast along
    dsink = -sum exp(sink - lse) delta
    ds    = ds (1 - tanh(s / softcap)^2)                            if softcap > 0
    dq    = scale ds k,  dk = scale ds^T q

q is (B, H, T, D), k (B, Hk, S, D), v (B, Hk, S, Dv), lse (B, H, T). Query head h uses key head
h // (H / Hk). Query t sees key s if both exist, t < query_length and s < key_length, and if

    t + offset - left <= s <= t + offset + right,  offset = key_length - query_length

(None lifts a limit), and if mask is True there. A row that sees nothing has o = 0, lse = -inf (or
sink) and no gradient from do. With cu_seqlens the documents of a batch lie one after the other in
T and S of a single batch: t, s and the lengths then count within a document, and b counts
documents. With page_table (B, pages) k and v are (number, Hk, size, D) pages, and key s of batch b
is row s % size of page page_table[b, s // size].

Dropout keeps an element where a draw of 32 bits is at least dropout_p 2^32: lane s % 4 of Philox
with key seed and counter (s // 4, t, b H + h, 0).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfkern.reference import rounded
from tfkern.reference.dropout import dropout, philox


class Arguments(NamedTuple):
    """The arguments of every implementation's forward, in their order; backward has them too."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None  # (B or 1, H or 1, T or 1, S or 1)
    mask: Tensor | None = None  # as bias, bool
    alibi_slopes: Tensor | None = None  # (documents, H)
    sink: Tensor | None = None  # (H,)
    query_lengths: Tensor | None = None  # (B,), as key_lengths
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None  # (documents + 1,), as cu_seqlens_k
    cu_seqlens_k: Tensor | None = None
    page_table: Tensor | None = None  # (B, pages of a batch), indices into k and v
    seed: Tensor | None = None  # 0-d, None without dropout
    left: int | None = None  # limits of the window, None for no limit
    right: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0

    @property
    def tensors(self) -> tuple:
        return self[: self._fields.index("left")]

    @property
    def numbers(self) -> tuple:
        return self[self._fields.index("left") :]


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Returns o (B, H, T, Dv) in the dtype of q, and lse (2, B, H, T) in float32 or wider.

    lse[0] + lse[1] is the log-sum-exp. In lse[0] alone, rounding next to a large score would lose
    the logarithm of the sum, and kernels whose backward computes p = exp(s - lse) would get p wrong
    by a factor. Here lse[1] is 0, since this backward computes the softmax again from the scores.
    """
    a = Arguments(*args)
    if a.cu_seqlens_q is None:
        o, lse = _forward(a._replace(k=_paged(a.k, a.page_table), v=_paged(a.v, a.page_table)))
        return o, torch.stack([lse, torch.zeros_like(lse)])
    dtype = torch.promote_types(a.q.dtype, torch.float32)
    o = a.q.new_zeros(*a.q.shape[:3], a.v.shape[3])
    lse = a.q.new_full(a.q.shape[:3], -torch.inf, dtype=dtype)
    for number, (t, _, document) in enumerate(_documents(a)):
        o[t], lse[t] = _forward(document, number)
    return o, torch.stack([lse, torch.zeros_like(lse)])


def backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes the arguments of forward and `bias_grad` at the end; dlse is (B, H, T).

    Returns dq, dk, dv, dbias, dsink in the dtypes of the inputs. dbias is empty unless `bias_grad`
    is true, and dsink is empty without a sink.
    """
    *arguments, bias_grad = args
    a, lse = Arguments(*arguments), lse[0]
    if a.cu_seqlens_q is None:
        dq, dk, dv, ds, dsink = _backward(do, dlse, lse, a)
    else:
        # Allocated from do, which may be batched by vmap even where q is not.
        dq, dk, dv = (do.new_zeros(x.shape, dtype=x.dtype) for x in (a.q, a.k, a.v))
        dsink = lse.new_zeros(a.q.shape[1])
        for number, (t, s, document) in enumerate(_documents(a)):
            dlse_t = None if dlse is None else dlse[t]
            grads = _backward(do[t], dlse_t, lse[t], document, number)
            dq[t], dk[s], dv[s] = grads[:3]
            dsink = dsink + grads[4]
    # forward: s = s + bias, lse = log (sum exp(s) + exp(sink))
    dbias = absent = do.new_empty(0)
    if a.bias is not None and bias_grad:
        dbias = ds.sum_to_size(a.bias.shape).to(a.bias.dtype)
    return dq, dk, dv, dbias, absent if a.sink is None else dsink.to(a.sink.dtype)


def forward_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised o and lse, as kernels return them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(2, *q.shape[:3], dtype=dtype)


def backward_outputs(a: Arguments, bias_grad: bool) -> tuple[Tensor, ...]:
    """Uninitialised dq, dk, dv, dbias and dsink, as kernels return them."""
    bias = a.bias if bias_grad else None
    return tuple(
        a.q.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (a.q, a.k, a.v, bias, a.sink)
    )


def why_not(*args, needs_grad: bool) -> str | None:
    if Arguments(*args).page_table is not None and needs_grad:
        return "paged keys and values have no backward: detach the inputs, or use torch.no_grad()"
    return None


def _forward(a: Arguments, number: int = 0) -> tuple[Tensor, Tensor]:
    """o and lse (B, H, T) of a padded batch whose first row is document `number` for dropout."""
    rows, keys = positions(a.q, a.query_lengths), positions(a.k, a.key_lengths)
    s, _ = scores(a, rows, keys)
    p, _, lse = _softmax(s, rows, a.sink)
    o = _drop(p, _keep(s, a, number)) @ _per_query_head(a.v, keys, a.q.shape[1], s.dtype)
    return rounded(o, a.q.dtype), lse


def _backward(do, dlse, lse: Tensor, a: Arguments, number: int = 0) -> tuple[Tensor, ...]:
    """dq, dk, dv, ds (B, H, T, S) before the softcap, and dsink (H,)."""
    rows, keys = positions(a.q, a.query_lengths), positions(a.k, a.key_lengths)
    dtype, H, Hk = lse.dtype, a.q.shape[1], a.k.shape[1]
    seen = (lse != -torch.inf)[..., None]  # do and dlse of other rows may hold NaN
    do = torch.where(seen, do.to(dtype), 0)
    dlse = lse.new_zeros(()) if dlse is None else torch.where(seen, dlse[..., None], 0)
    # forward: s, p = softmax(s), recomputed
    s, derivative = scores(a, rows, keys)
    p, p_sink, _ = _softmax(s, rows, a.sink)
    # forward: o = (p keep / (1 - dropout_p)) v
    keep = _keep(s, a, number)
    dv = _drop(p, keep).mT @ do
    dp = _drop(do @ _per_query_head(a.v, keys, H, dtype).mT, keep)
    delta = (p * dp).sum(-1, keepdim=True) - dlse
    ds = p * (dp - delta)
    # forward: lse = log (sum exp(s) + exp(sink))
    dsink = -torch.where(seen, p_sink * delta, 0).sum((0, 2, 3))
    # forward: s = softcap tanh(scale q k^T / softcap)
    dx = torch.where(seen, a.scale * ds * derivative, 0)
    dq = dx @ _per_query_head(a.k, keys, H, dtype)
    dk = dx.mT @ torch.where(seen, a.q.to(dtype), 0)
    dk, dv = (_sum_groups(x, Hk) for x in (dk, dv))
    return dq.to(a.q.dtype), dk.to(a.k.dtype), dv.to(a.v.dtype), ds, dsink


def _documents(a: Arguments) -> Iterator[tuple[tuple, tuple, Arguments]]:
    """For each document, indices of its queries and keys, and the arguments for it alone.

    Documents are computed one at a time rather than under one mask, since one may hold NaN. This
    waits for a GPU, and torch.compile cannot trace it into one graph.
    """
    assert a.cu_seqlens_q is not None and a.cu_seqlens_k is not None
    ends_q, ends_k = a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        every = (slice(None), slice(None))
        t, s = (*every, slice(*ends_q[i : i + 2])), (*every, slice(*ends_k[i : i + 2]))
        slopes = None if a.alibi_slopes is None else a.alibi_slopes[i : i + 1]
        yield t, s, a._replace(q=a.q[t], k=a.k[s], v=a.v[s], alibi_slopes=slopes)


class Positions(NamedTuple):
    """Positions of the queries or keys of a batch. Each tensor is (B, N), (1, N) or (B, 1)."""

    exist: Tensor
    position: Tensor
    length: Tensor


def positions(x: Tensor, lengths: Tensor | None) -> Positions:
    """The positions of the rows of x (B, heads, N, size)."""
    position = torch.arange(x.shape[2], device=x.device)[None]
    length = torch.full_like(position[:, :1], x.shape[2]) if lengths is None else lengths[:, None]
    return Positions(position < length, position, length)


def scores(a: Arguments, rows: Positions, keys: Positions) -> tuple[Tensor, Tensor]:
    """s (B, H, T, S), -inf where hidden, and its derivative in scale q k^T, without the mask."""
    dtype = torch.promote_types(a.q.dtype, torch.float32)
    q = torch.where(rows.exist[:, None, :, None], a.q.to(dtype), 0)  # padding may hold NaN
    s = a.scale * (q @ _per_query_head(a.k, keys, q.shape[1], dtype).mT)
    derivative = s.new_ones(())
    if a.softcap > 0:
        tanh = (s / a.softcap).tanh()
        s, derivative = a.softcap * tanh, 1 - tanh.square()
    # t + offset - s, from the distances of s and t to the ends of their sequences
    distance = (keys.length - keys.position)[:, None, :] - (rows.length - rows.position)[..., None]
    visible = rows.exist[:, :, None] & keys.exist[:, None, :]
    if a.left is not None:
        visible = visible & (distance <= a.left)
    if a.right is not None:
        visible = visible & (distance >= -a.right)
    visible, distance = visible[:, None], distance[:, None]
    if a.mask is not None:
        visible = visible & a.mask
    if a.bias is not None:
        s = s + a.bias.to(dtype)
    if a.alibi_slopes is not None:
        s = s - a.alibi_slopes.to(dtype)[..., None, None] * distance.abs()
    return s.masked_fill(~visible, -torch.inf), derivative


def _paged(x: Tensor, page_table: Tensor | None) -> Tensor:
    """Pages (number, Hk, size, D) as keys or values (B, Hk, pages size, D)."""
    if page_table is None:
        return x
    # Entries beyond the length may hold anything, so they are clamped.
    pages = x[page_table.long().clamp(0, max(x.shape[0] - 1, 0))]
    return pages.transpose(1, 2).flatten(2, 3)


def _per_query_head(x: Tensor, keys: Positions, heads: int, dtype: torch.dtype) -> Tensor:
    """Keys or values (B, H, S, D), with 0 for those that do not exist: they may hold NaN."""
    x = torch.where(keys.exist[:, None, :, None], x.to(dtype), 0)
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] else x


def _sum_groups(x: Tensor, key_heads: int) -> Tensor:
    """The gradient of a key head: the sum over the query heads that share it."""
    B, H, S, D = x.shape
    return x.reshape(B, key_heads, H // max(key_heads, 1), S, D).sum(2)


def _softmax(s: Tensor, rows: Positions, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """p (B, H, T, S), p of the sink (B, H, T, 1), and lse (B, H, T).

    p is exp(s - lse), and 0 in rows that see nothing. The sink counts as one more score; without
    one its p is 0. lse is -inf in rows that do not exist.
    """
    S = s.shape[-1]
    if sink is not None:
        s = torch.cat([s, sink.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)], -1)
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    p = torch.where((s != -torch.inf).any(-1, keepdim=True), s.softmax(-1), 0)
    return (
        p[..., :S],
        p[..., S:].sum(-1, keepdim=True),
        lse.masked_fill(~rows.exist[:, None], -torch.inf),
    )


def _drop(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _keep(s: Tensor, a: Arguments, number: int) -> Tensor | None:
    """The factor of p for dropout: (B, H, T, S) of 0 and 1 / (1 - dropout_p), None without it."""
    if a.seed is None or a.dropout_p == 0:
        return None
    B, H, T, S = s.shape
    t, four = (torch.arange(n, device=s.device) for n in (T, -(-S // 4)))
    heads = torch.arange(B * H, device=s.device).view(B, H, 1, 1) + number * H
    draws = philox(a.seed, four, t[:, None], heads, 0).flatten(-2)
    return dropout(torch.ones_like(s), draws[..., :S], a.dropout_p)
