"""Functions with the signatures of their namesakes in `torch.nn.functional`."""

import math

import torch
from torch import Tensor

from tfkern.ops import attention, checks


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on the fused kernels.

    Arguments and results are torch's; see `tfkern.attention` for more options. A mask is read
    where it lies: a broadcast mask is not written out.

    Args:
        query: (..., L, E), with any number of leading dimensions, the last of which counts heads.
        key: (..., S, E), value: (..., S, Ev). The leading dimensions broadcast. E and Ev lie in 1
            to 256.
        attn_mask: broadcastable to (..., L, S). bool: True where the query sees the key.
            Floating, but not wider than query: added to the scores, with a gradient.
        dropout_p: probability with which an element of the softmax is dropped, whether or not any
            module is in training. The seed is drawn from torch's generator.
        is_causal: query t sees the keys s <= t, also for L != S: aligned to the upper left, unlike
            `tfkern.attention`.
        scale: factor of the scores, E^(-1/2) if None.
        enable_gqa: key and value may have fewer heads than query, a divisor of their number.

    Returns:
        (..., L, Ev) in the dtype of query. A query that sees no key gives 0.

    Raises:
        ValueError: arguments that do not fit together, where torch raises RuntimeError.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.dense(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name} must be (..., length, size), got {tuple(x.shape)}")
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError("enable_gqa needs a dimension of heads: (..., heads, length, size)")
    lead = _leading(query, key, value, enable_gqa)
    L, S = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal exclude each other")
        _check_mask(attn_mask, query, (*lead, L, S))
    # With grouped heads, key and value keep their own number of heads.
    q, k, v = (
        _four(x, (*lead[:-1], x.shape[-3]) if enable_gqa else lead) for x in (query, key, value)
    )
    mask = None if attn_mask is None else _four_mask(attn_mask, lead)
    boolean = mask is not None and mask.dtype == torch.bool
    k, v, window = upper_left(k, v, L) if is_causal else (k, v, None)
    o = attention(
        q,
        k,
        v,
        window=window,
        scale=scale,
        mask=mask if boolean else None,
        bias=None if boolean else mask,
        dropout_p=dropout_p,
    )
    return o if len(lead) == 2 else o.reshape(*lead, L, v.shape[-1])


def upper_left(k: Tensor, v: Tensor, T: int) -> tuple[Tensor, Tensor, tuple[None, int]]:
    """Keys and values (B, Hk, S, D) and a window with which query t of T sees the keys s <= t.

    Keys from T on are dropped, since no query sees them; so the window has no negative limit.
    """
    k, v = k[:, :, :T], v[:, :, :T]
    return k, v, (None, T - k.shape[2])


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The leading dimensions of the result, heads of query included."""
    shapes = [x.shape[: -3 if enable_gqa else -2] for x in (query, key, value)]
    try:
        lead = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        hint = "" if enable_gqa else " (fewer heads in key and value need enable_gqa=True)"
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            f"have leading dimensions that do not broadcast{hint}"
        ) from None
    return (*lead, query.shape[-3]) if enable_gqa else lead


def _check_mask(mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> None:
    checks.dense("attn_mask", mask)
    wide = mask.dtype == torch.float64 != query.dtype
    if wide or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attn_mask must be bool, or floating and not wider than query, got {mask.dtype}"
        )
    checks.broadcastable("attn_mask", mask, shape)


def _four(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """x (..., M, N) broadcast to (*lead, M, N), as (B, H, M, N) with H = lead[-1]."""
    lead = (1,) * (2 - len(lead)) + lead
    x = x[(None,) * (len(lead) + 2 - x.dim())].expand(*lead, -1, -1)
    return x.reshape(math.prod(lead[:-1]), *x.shape[-3:])


def _four_mask(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A mask as by `_four`, but still broadcast wherever four dimensions can express it."""
    batch = tuple(mask.shape[:-3])
    if len(lead) > 2 and math.prod(batch) > 1:
        batch = lead[:-1]
    return _four(mask, (*batch, *mask.shape[-3:-2]))
