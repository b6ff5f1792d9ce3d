"""Softmax attention: checks, autograd, the public function."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import checks

dispatch.register("attention")

_MAX_D = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`softmax(scale q k^T) v`, with memory linear in the lengths on the native and triton
    backends.

    Softmax and sums are float32 (float64 for float64 inputs). Autocast applies as it does to
    `F.scaled_dot_product_attention`. Each tensor may have any strides; none is copied if its last
    dimension is contiguous.

    Args:
        q: (B, H, T, D), float32, float64, bfloat16 or float16.
        k: (B, Hk, S, D) with H a multiple of Hk: query head h uses key head h // (H / Hk), which
            makes grouped-query (Hk < H) and multi-query (Hk = 1) attention.
        v: (B, Hk, S, Dv). D and Dv lie in 1 to 256; T and S may be 0.
        causal: query t sees the keys s <= t + S - T. This is aligned to the lower right, so that
            the last query sees every key; `F.scaled_dot_product_attention` aligns to the upper
            left, which is the same only for T = S.
        scale: factor of the scores, D^(-1/2) if None.
        query_lengths, key_lengths: (B,) int32 or int64, how many queries and keys of each batch
            exist; the rest is padding, whose content (NaN included) never matters. Causal alignment
            uses these lengths. On a GPU and under torch.compile they are clamped to [0, T] and [0,
            S] instead of checked.
        return_lse: also return the log-sum-exp of the scores.
        backend: forces "native", "triton" or "reference" for this call.

    Returns:
        o (B, H, T, Dv) in the dtype of q, or (o, lse) with lse (B, H, T) float32 (float64 for
        float64). Both are differentiable once. A row that sees no key gives o = 0, lse = -inf and
        zero gradients. The causal mask assumes finite keys and values, as in every tiled kernel.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit together.
        NotImplementedError: the forced backend cannot serve the call.

    FlashAttention: Dao et al. 2022; Dao 2023. Online softmax: Milakov, Gimelshein 2018.
    """
    args = bind(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )
    backend = dispatch.select("attention", args, backend)
    with dispatch.no_autocast(q.device):
        o, lse = _Attention.apply(*dispatch.distinct(args), backend)
    return (o, lse) if return_lse else o


def bind(q, k, v, *, causal=False, scale=None, query_lengths=None, key_lengths=None):
    """The public arguments, checked, as the positional arguments of an implementation's forward."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, size), got {tuple(x.shape)}")
        checks.same_device("q", q, name, x)
    q, k, v = checks.autocast(q, k, v)
    checks.same_dtype("q", q, "k", k)
    checks.same_dtype("q", q, "v", v)
    B, H, T, D = q.shape
    Hk, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    checks.shape("k", k, (B, Hk, S, D), "the batch and head size of q")
    checks.shape("v", v, (B, Hk, S, Dv), "the batch, heads and length of k")
    if H and (Hk == 0 or H % Hk):
        raise ValueError(f"the heads of q must be a multiple of those of k, got {H} and {Hk}")
    for name, size in (("q and k", D), ("v", Dv)):
        if not 1 <= size <= _MAX_D:
            raise ValueError(f"the head size of {name} must lie in 1 to {_MAX_D}, got {size}")
    _check_lengths("query_lengths", query_lengths, q, T)
    _check_lengths("key_lengths", key_lengths, q, S)
    scale = D**-0.5 if scale is None else scale
    checks.number("scale", scale)
    return q, k, v, query_lengths, key_lengths, bool(causal), float(scale)


def _check_lengths(name: str, lengths: Tensor | None, q: Tensor, size: int) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"{name} must be an int32 or int64 tensor, got {got}")
    checks.same_device("q", q, name, lengths)
    checks.shape(name, lengths, (q.shape[0],), "one length for each batch")
    if checks.values_at_hand(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > size:
            raise ValueError(f"{name} must lie in 0 to {size}, got {low if low < 0 else high}")


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, query_lengths, key_lengths, causal, scale, backend):
        op = dispatch.implementation("attention", backend)
        return op.forward(q, k, v, query_lengths, key_lengths, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, query_lengths, key_lengths, causal, scale, backend = inputs
        ctx.save_for_backward(q, k, v, *output, query_lengths, key_lengths)
        ctx.causal, ctx.scale, ctx.backend = causal, scale, backend
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, query_lengths, key_lengths = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        with dispatch.no_autocast(q.device):
            grads = _AttentionBackward.apply(
                do,
                dlse,
                q,
                k,
                v,
                o,
                lse,
                query_lengths,
                key_lengths,
                ctx.causal,
                ctx.scale,
                ctx.backend,
            )
        return *grads, None, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    """A function of its own, so that a second differentiation raises instead of losing terms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(do, dlse, q, k, v, o, lse, query_lengths, key_lengths, causal, scale, backend):
        op = dispatch.implementation("attention", backend)
        return op.backward(do, dlse, q, k, v, o, lse, query_lengths, key_lengths, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("attention has no second derivative")
