"""Softmax attention in plain PyTorch: the definition of the op.

    s   = scale q k^T, -inf where query t may not see key s
    lse = log sum exp(s)
    p   = exp(s - lse)
    o   = p v

    dv  = p^T do
    dp  = do v^T
    ds  = p (dp - delta)      delta = rowsum(p dp) - dlse = rowsum(do o) - dlse
    dq  = scale ds k,  dk = scale ds^T q

q is (B, H, T, D), k (B, Hk, S, D), v (B, Hk, S, Dv), lse (B, H, T). Query head h uses key head
h // (H / Hk). Per batch, query t < query_length sees key s < key_length, and if causal only
s <= t + key_length - query_length. A row that sees nothing has o = 0, lse = -inf and no gradient.
"""

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns o (B, H, T, Dv) in the dtype of q, and lse in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys = _valid(q, k, query_lengths, key_lengths)
    k, v = (_per_query_head(x, keys, q.shape[1], dtype) for x in (k, v))
    s = scale * (q.to(dtype) @ k.mT)
    s = s.masked_fill(~_visible(rows, keys, causal), -torch.inf)
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    o = _softmax(s) @ v
    return o.to(q.dtype), lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the dtypes of q, k, v."""
    dtype, input_dtype, key_heads = lse.dtype, q.dtype, k.shape[1]
    rows, keys = _valid(q, k, query_lengths, key_lengths)
    seen = (lse > -torch.inf)[..., None]  # other rows may hold anything, NaN included
    do = torch.where(seen, do.to(dtype), 0)
    q = torch.where(rows[:, None, :, None], q.to(dtype), 0)
    k, v = (_per_query_head(x, keys, q.shape[1], dtype) for x in (k, v))
    # forward: p = exp(s - lse), recomputed
    s = scale * (q @ k.mT)
    s = s.masked_fill(~_visible(rows, keys, causal), -torch.inf)
    p = _softmax(s)
    # forward: o = p v
    dv, dp = p.mT @ do, do @ v.mT
    delta = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - torch.where(seen, dlse[..., None], 0)
    ds = p * (dp - delta)
    # forward: s = scale q k^T
    dq, dk = scale * (ds @ k), scale * (ds.mT @ q)
    dk, dv = (_sum_groups(x, key_heads) for x in (dk, dv))
    return dq.to(input_dtype), dk.to(input_dtype), dv.to(input_dtype)


def why_not(*args, needs_grad: bool) -> str | None:
    return None


def _valid(q, k, query_lengths, key_lengths) -> tuple[Tensor, Tensor]:
    """Which rows (B or 1, T) and which keys (B or 1, S) exist."""

    def below(size, lengths):
        index = torch.arange(size, device=q.device)[None]
        return index < (size if lengths is None else lengths[:, None])

    return below(q.shape[2], query_lengths), below(k.shape[2], key_lengths)


def _visible(rows: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """(B or 1, 1, T, S): which query sees which key."""
    visible = rows[:, :, None] & keys[:, None, :]
    if causal:
        t, s = (torch.arange(x.shape[1], device=x.device) for x in (rows, keys))
        offset = keys.sum(1) - rows.sum(1)
        visible = visible & (s <= t[:, None] + offset[:, None, None])
    return visible[:, None]


def _per_query_head(x: Tensor, keys: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Keys or values (B, H, S, D), with 0 for those that do not exist: they may hold NaN."""
    x = torch.where(keys[:, None, :, None], x.to(dtype), 0)
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] else x


def _sum_groups(x: Tensor, key_heads: int) -> Tensor:
    """The gradient of a key head: the sum over the query heads that share it."""
    B, H, S, D = x.shape
    return x.reshape(B, key_heads, H // max(key_heads, 1), S, D).sum(2)


def _softmax(s: Tensor) -> Tensor:
    """exp(s - lse), and 0 in rows that see nothing."""
    return torch.where((s > -torch.inf).any(-1, keepdim=True), s.softmax(-1), 0)
