"""Chosen rows of the softmax of attention, from the log-sum-exp that the fused op returns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import checks
from tfkern.ops.attention import bind
from tfkern.reference.attention import Positions, positions, scores

_Choice = Tensor | Sequence[int] | slice | None


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    heads: _Choice = None,
    rows: _Choice = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """The weights `exp(scores - lse)` of some heads and queries of an `attention` call.

    Attention maps can so be looked at, or trained on, while `attention` itself stays fused:

        o, lse = attention(q, k, v, causal=True, return_lse=True)
        p = attention_weights(q, k, lse, heads=[3], rows=[-1], causal=True)

    Memory and time grow with the heads and rows that are asked for. Plain PyTorch computes
    them on every device; gradients reach q, k, bias, and through lse all that it depends on.

    Args:
        q: (B, H, T, D), k: (B, Hk, S, D). They and all options must be as given to `attention`.
        lse: (B, H, T), as `attention(..., return_lse=True)` returned it. It includes the sink,
            which is therefore no argument here: with one, a row sums to less than 1. Otherwise a
            row sums to 1, also where scores are so large that lse is rounded by more than 1.
        heads: which query heads, rows: which queries. A sequence or 1-d int tensor of indices
            (negative ones count from the end), a slice, or None for all.

    Returns:
        (B, heads, rows, S) float32 (float64 for float64), before dropout. A row that sees no key
        is 0.

    Raises:
        ValueError: what `attention` refuses, an lse that does not fit, or indices out of range
            (on a GPU and under torch.compile tensors of indices are not checked).
    """
    a = bind(
        q,
        k,
        k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )
    q, k, alibi_slopes = a.q, a.k, a.alibi_slopes
    _check_lse(lse, q)
    H, T = q.shape[1:3]
    of_queries, of_keys = positions(q, a.query_lengths), positions(k, a.key_lengths)
    # Heads and rows that are not asked for are dropped before the scores are computed.
    head = None if heads is None else _indices("heads", heads, H, q.device)
    row = None if rows is None else _indices("rows", rows, T, q.device)
    bias, mask = _select(a.bias, head, row), _select(a.mask, head, row)
    if head is not None:
        k = k.index_select(1, head // max(H // max(k.shape[1], 1), 1))
        q, lse = q.index_select(1, head), lse.index_select(1, head)
        alibi_slopes = None if alibi_slopes is None else alibi_slopes[:, head]
    if row is not None:
        q, lse = q.index_select(2, row), lse.index_select(2, row)
        exist, position = of_queries.exist[:, row], of_queries.position[:, row]
        of_queries = of_queries._replace(exist=exist, position=position)
    with dispatch.no_autocast(q.device):
        a = a._replace(q=q, k=k, bias=bias, mask=mask, alibi_slopes=alibi_slopes)
        s, _ = scores(a, of_queries, of_keys)
        return _normalised(s, lse[..., None], _rounding(q, k, of_keys, a.scale))


def _normalised(s: Tensor, lse: Tensor, rounding: Tensor) -> Tensor:
    """exp(s - lse), computed as softmax(s) exp(own - lse) with own, the log-sum-exp of s.

    The fused op sums the products of q and k in another order, so lse is rounded differently. If
    own and lse differ by no more than `rounding`, they count as equal: for scores near 1e6 the exp
    of a difference in rounding alone could be a factor of 1.1.
    """
    nothing = (s == -torch.inf).all(-1, keepdim=True)  # rows that see no key
    s = s.masked_fill(nothing, 0)
    own = s.logsumexp(-1, keepdim=True)
    excess = own - lse
    limit = rounding + own.detach().abs() * torch.finfo(s.dtype).eps
    excess = torch.where(excess.detach().abs() <= limit, 0, excess).masked_fill(nothing, -torch.inf)
    return s.softmax(-1) * excess.exp()


def _rounding(q: Tensor, k: Tensor, keys: Positions, scale: float) -> Tensor:
    """(B, H, T, 1): a bound for how far rounding may move the scores of each query."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    k = torch.where(keys.exist[:, None, :, None], k, 0)  # padding may hold anything
    longest = k.norm(dim=-1).max() if k.numel() else 0
    return 8 * torch.finfo(dtype).eps * abs(scale) * longest * q.norm(dim=-1, keepdim=True)


def _check_lse(lse: Tensor, q: Tensor) -> None:
    checks.floating("lse", lse)
    checks.same_device("q", q, "lse", lse)
    checks.shape("lse", lse, q.shape[:3], "that of q without the head size")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if lse.dtype != dtype:
        raise ValueError(f"lse is {lse.dtype}, expected {dtype} beside q in {q.dtype}")


def _indices(name: str, chosen: _Choice, size: int, device: torch.device) -> Tensor:
    """The chosen indices as a tensor with values in 0 to size - 1."""
    every = torch.arange(size, device=device)
    if isinstance(chosen, slice):
        return every[chosen]
    if not isinstance(chosen, Tensor):
        chosen = torch.as_tensor(chosen, device=device)
        chosen = chosen if chosen.numel() else chosen.long()  # an empty list gives float
    if chosen.dim() != 1:
        got = f"{chosen.dim()} dimensions"
        raise ValueError(f"{name} must be a slice, a sequence or a 1-d tensor, got {got}")
    checks.integers(name, chosen, every)
    checks.within(name, chosen, -size, size - 1)
    return every[chosen]


def _select(x: Tensor | None, head: Tensor | None, row: Tensor | None) -> Tensor | None:
    """The chosen heads and rows of a bias or mask, in one copy; sizes of 1 stay broadcast."""
    if x is None:
        return None
    head, row = (None if x.shape[dim] == 1 else i for dim, i in ((1, head), (2, row)))
    if head is None:
        return x if row is None else x[:, :, row]
    return x[:, head] if row is None else x[:, head[:, None], row]
