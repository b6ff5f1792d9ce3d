"""Softmax attention: checks, autograd, the public functions."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks
from tfkern.reference.attention import Arguments

dispatch.register("attention")

_MAX_D = 256
_Window = tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: _Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`softmax(scale q k^T) v`, with memory linear in the lengths on the native and triton
    backends.

    Softmax and sums are float32 (float64 for float64 inputs). Autocast applies as it does to
    `F.scaled_dot_product_attention`. Each tensor may have any strides; none is copied if its last
    dimension is contiguous. Options combine freely; the scores go through them in this order:

        s = scale q k^T;  softcap;  + bias + alibi;  causal, window, mask;  sink;  softmax;  dropout

    Args:
        q: (B, H, T, D), float32, float64, bfloat16 or float16.
        k: (B, Hk, S, D) with H a multiple of Hk: query head h uses key head h // (H / Hk), which
            makes grouped-query (Hk < H) and multi-query (Hk = 1) attention.
        v: (B, Hk, S, Dv). D and Dv lie in 1 to 256; T and S may be 0.
        causal: query t sees the keys s <= t + S - T. This is aligned to the lower right, so that
            the last query sees every key; `F.scaled_dot_product_attention` aligns to the upper
            left, which differs unless T = S.
        window: (left, right): query t sees the keys from t + S - T - left to t + S - T + right.
            None lifts a limit. With causal both apply. The cost grows with the window, not with S.
        scale: factor of the scores, D^(-1/2) if None.
        softcap: if positive, scores become softcap tanh(s / softcap).
        bias: floating, broadcastable to (B, H, T, S), added to the scores. Its gradient is summed
            over the dimensions along which it is broadcast.
        mask: bool, broadcastable to (B, H, T, S): True where the query sees the key.
        alibi_slopes: (H,) or (B, H), floating: -slope |t + S - T - s| is added to the scores. Has
            no gradient.
        sink: (H,), floating: the logit of one more key of each head, whose value is 0.
        query_lengths, key_lengths: (B,) int32 or int64, how many queries and keys of each batch
            exist; the rest is padding, whose content (NaN included) never matters. Causal
            alignment, window and alibi use these lengths for T and S. On a GPU and under
            torch.compile they are clamped to [0, T] and [0, S] instead of checked.
        page_table: (B, P) int32 or int64. k and v are then pages (pages, Hk, size, D), and keys
            i size to (i + 1) size - 1 of batch b, with S = P size in all, are the rows of page
            page_table[b, i]. Entries past key_lengths may hold anything. There is no backward.
        dropout_p: probability with which an element of the softmax is dropped.
        seed: int or 0-d int64 tensor, for dropout: the same seed drops the same elements on
            every backend. Drawn from torch's generator if None.
        return_lse: also return the log-sum-exp of the scores.
        backend: forces "native", "triton" or "reference" for this call.

    Returns:
        o (B, H, T, Dv) in the dtype of q, or (o, lse) with lse (B, H, T) float32 (float64 for
        float64); lse includes the sink and knows no dropout. Both are differentiable once. A row
        that sees no key gives o = 0, lse = -inf (or sink) and zero gradients. causal, window and
        mask assume finite keys and values, as in every tiled kernel. With the native backend on
        the CPU, o lies in memory as q does: if that is as (B, T, H, D), to merge its heads copies
        nothing.

    Raises:
        ValueError: shapes, dtypes, devices, lengths or options that do not fit together.
        NotImplementedError: the forced backend cannot serve the call.

    FlashAttention: Dao et al. 2022; Dao 2023. Online softmax: Milakov, Gimelshein 2018. Window:
    Beltagy et al. 2020. ALiBi: Press et al. 2022. Sink: Xiao et al. 2024. Pages: Kwon et al. 2023.
    """
    args = bind(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sink=sink,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        page_table=page_table,
        dropout_p=dropout_p,
        seed=seed,
    )
    o, lse = _run(args, backend)
    return (o, lse[0]) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: _Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` within each of n documents that lie one after the other, without padding.

    The queries of document i are the rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] - 1 of q, its
    keys and values the rows of k and v by cu_seqlens_k. No document sees another: the content of
    one never changes a bit of another's result. Nothing waits for the GPU.

    Args:
        q: (total queries, H, D). Layout and order of the arguments are flash-attn's.
        k: (total keys, Hk, D).
        v: (total keys, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 or int64, from 0 up to the totals. On a GPU and
            under torch.compile they are clamped instead of checked.
        max_seqlen_q, max_seqlen_k: the lengths of the longest documents. No kernel needs them; if
            given, they are checked where the lengths are.
        alibi_slopes: (H,) or (n, H).
        causal, window, scale, softcap, sink, dropout_p, seed, backend: as in `attention`, with the
            lengths of the document for T and S.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        o (total queries, H, Dv), or (o, lse) with lse (H, total queries). With the native
        backend on the CPU o is contiguous; elsewhere it lies in memory with the heads first, so
        that flattening the heads takes a reshape, not a view.

    Raises:
        ValueError, NotImplementedError: as `attention`.
    """
    args = bind_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink=sink,
        dropout_p=dropout_p,
        seed=seed,
    )
    o, lse = _run(args, backend)
    o = o.squeeze(0).transpose(0, 1)
    return (o, lse[0].squeeze(0)) if return_lse else o


def _run(args: Arguments, backend: str | None) -> tuple[Tensor, Tensor]:
    """o, and lse (2, B, H, T): the log-sum-exp, and the rest that its rounding left out."""
    backend = dispatch.select("attention", args, backend)
    with dispatch.no_autocast(args.q.device):
        return autograd.apply(_Attention, *dispatch.distinct(args), backend)


def bind(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    bias=None,
    mask=None,
    alibi_slopes=None,
    sink=None,
    query_lengths=None,
    key_lengths=None,
    page_table=None,
    dropout_p=0.0,
    seed=None,
):
    """Checks the public arguments, and returns them as `Arguments` of an implementation."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x, 4, "(batch, heads, length, size)")
    q, k, v = checks.autocast(q, k, v)
    B, H, T, _ = q.shape
    _check_heads(q, k, v)
    if page_table is None:
        S = k.shape[2]
        checks.shape("k", k, (B, *k.shape[1:]), "the batch of q")
    else:
        checks.integers("page_table", page_table, q)
        if page_table.dim() != 2 or page_table.shape[0] != B:
            got = tuple(page_table.shape)
            raise ValueError(f"page_table has shape {got}, expected ({B}, pages of a batch)")
        S = page_table.shape[1] * k.shape[2]
        if S and B and not k.shape[0]:
            raise ValueError("k has 0 pages, but page_table is not empty")
    _check_scores("bias", bias, q, (B, H, T, S))
    _check_scores("mask", mask, q, (B, H, T, S))
    _check_lengths("query_lengths", query_lengths, q, T)
    _check_lengths("key_lengths", key_lengths, q, S)
    if page_table is not None:
        _check_pages(page_table, key_lengths, k)
    return Arguments(
        q,
        k,
        v,
        bias=_four(bias),
        mask=_four(mask),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        page_table=page_table,
        **_per_head(q, B, alibi_slopes, sink),
        **_numbers(q, causal, window, scale, softcap, dropout_p, seed),
    )


def bind_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    *,
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    seed=None,
):
    """`bind` for `attention_varlen`: the documents become one batch, with heads before rows."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x, 3, "(total length, heads, size)")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in checks.autocast(q, k, v))
    _check_heads(q, k, v)
    _check_cu_seqlens("q", cu_seqlens_q, q, max_seqlen_q)
    _check_cu_seqlens("k", cu_seqlens_k, k, max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be as long as each other, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    return Arguments(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        **_per_head(q, cu_seqlens_q.shape[0] - 1, alibi_slopes, sink),
        **_numbers(q, causal, window, scale, softcap, dropout_p, seed),
    )


def _check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    checks.floating(name, x)
    if x.dim() != rank:
        raise ValueError(f"{name} must be {meaning}, got {tuple(x.shape)}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        checks.same_device("q", q, name, x)
        checks.same_dtype("q", q, name, x)
    H, D, Hk, Dv = q.shape[1], q.shape[3], k.shape[1], v.shape[3]
    checks.shape("k", k, (*k.shape[:3], D), "the head size of q")
    checks.shape("v", v, (*k.shape[:3], Dv), "k but for the head size")
    if H and (Hk == 0 or H % Hk):
        raise ValueError(f"the heads of q must be a multiple of those of k, got {H} and {Hk}")
    for name, size in (("q and k", D), ("v", Dv)):
        if not 1 <= size <= _MAX_D:
            raise ValueError(f"the head size of {name} must lie in 1 to {_MAX_D}, got {size}")


def _check_scores(name: str, x: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    if name == "bias":
        checks.floating(name, x)
        if x.dtype == torch.float64 and q.dtype != torch.float64:
            raise ValueError(f"bias is float64, but q is {q.dtype}")
    else:
        checks.boolean(name, x)
    checks.same_device("q", q, name, x)
    checks.broadcastable(name, x, shape)


def _check_lengths(name: str, lengths: Tensor | None, q: Tensor, size: int) -> None:
    if lengths is None:
        return
    checks.integers(name, lengths, q)
    checks.shape(name, lengths, (q.shape[0],), "one length for each batch")
    checks.within(name, lengths, 0, size)


def _check_pages(page_table: Tensor, key_lengths: Tensor | None, k: Tensor) -> None:
    """Checks that the entries in use are indices of pages."""
    if not all(checks.values_at_hand(x) for x in (page_table, key_lengths) if x is not None):
        return
    if key_lengths is not None:
        first = torch.arange(page_table.shape[1], device=page_table.device) * k.shape[2]
        page_table = page_table[first < key_lengths[:, None]]
    checks.within("page_table", page_table, 0, k.shape[0] - 1)


def _check_cu_seqlens(of: str, cu: Tensor, x: Tensor, longest: int | None) -> None:
    total, name = x.shape[2], f"cu_seqlens_{of}"
    checks.integers(name, cu, x)
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise ValueError(f"{name} must be (documents + 1,), got {tuple(cu.shape)}")
    if not checks.values_at_hand(cu):
        return
    lengths = cu.diff()
    if int(cu[0]) != 0 or int(cu[-1]) != total or (lengths < 0).any():
        raise ValueError(f"{name} must rise from 0 to {total}, got {cu.tolist()}")
    if longest is not None and lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(
            f"max_seqlen_{of} is {longest}, but a document has {int(lengths.max())} rows"
        )


def _four(x: Tensor | None) -> Tensor | None:
    """A bias or mask with leading dimensions added, four in all."""
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _per_head(q: Tensor, B: int, alibi_slopes: Tensor | None, sink: Tensor | None) -> dict:
    """Checks alibi_slopes and sink, and returns them with shapes (B, H) and (H,)."""
    H = q.shape[1]
    for name, x in (("alibi_slopes", alibi_slopes), ("sink", sink)):
        if x is not None:
            checks.floating(name, x)
            checks.same_device("q", q, name, x)
    if sink is not None:
        checks.shape("sink", sink, (H,), "one logit for each head of q")
    if alibi_slopes is not None:
        if dispatch.requires_grad([alibi_slopes]):
            raise ValueError("alibi_slopes has no gradient: detach it, or pass it as bias")
        if tuple(alibi_slopes.shape) not in ((H,), (B, H)):
            raise ValueError(
                f"alibi_slopes has shape {tuple(alibi_slopes.shape)}, expected {(H,)} or {(B, H)}"
            )
        alibi_slopes = alibi_slopes.expand(B, H)
    return {"alibi_slopes": alibi_slopes, "sink": sink}


def _numbers(q, causal, window, scale, softcap, dropout_p, seed) -> dict:
    """Checks the numbers of a call, and returns them with the seed, None without dropout."""
    left, right = _limits(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scale, softcap = checks.number("scale", scale), checks.number("softcap", softcap)
    if softcap < 0 or 0 < softcap < 1e-30:  # could be 0 in float32
        raise ValueError(f"softcap must be at least 1e-30, or 0 for none, got {softcap}")
    dropout_p = checks.probability("dropout_p", dropout_p)
    seed = checks.seed(seed, q.device) if dropout_p > 0 else None
    return {
        "seed": seed,
        "left": left,
        "right": right,
        "scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }


def _limits(window: _Window | None) -> _Window:
    if window is None:
        return None, None
    wrong = not isinstance(window, (tuple, list)) or len(window) != 2
    if not wrong and torch.jit.is_tracing():  # sizes are tensors then
        left, right = (x.item() if isinstance(x, Tensor) else x for x in window)
        window = left, right
    if wrong or not all(x is None or (checks.is_integer(x) and 0 <= x < 2**31) for x in window):
        raise ValueError(
            f"window must be two of None (no limit) or integers from 0 to 2^31 - 1, got {window!r}"
        )
    return window[0], window[1]


_Backward = autograd.first_order("attention")


class _Attention(torch.autograd.Function):
    """Attention for autograd: takes an implementation's arguments, and the name of the backend."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *arguments, backend = args
        return dispatch.implementation("attention", backend).forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arguments, ctx.backend = inputs
        a = Arguments(*arguments)
        ctx.save_for_backward(*output, *a.tensors)
        ctx.numbers = a.numbers
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        o, lse, *tensors = ctx.saved_tensors
        a = Arguments(*tensors, *ctx.numbers)
        wanted = Arguments(*ctx.needs_input_grad[:-1])
        if do is None:
            do = torch.zeros_like(o)
        if dlse is not None:
            dlse = dlse[0]
        with dispatch.no_autocast(o.device):
            dq, dk, dv, dbias, dsink = autograd.apply(
                _Backward, do, dlse, o, lse, *a, wanted.bias, ctx.backend
            )
        grads = dict.fromkeys((*Arguments._fields, "backend"))
        grads |= {"q": dq, "k": dk, "v": dv}
        grads["bias"] = dbias if wanted.bias else None
        grads["sink"] = None if a.sink is None else dsink
        return tuple(grads.values())
