"""Softmax attention: FlashAttention-2 (Dao 2022, 2023), forward and backward.

Forward: a program owns a tile of queries and walks over the keys. It keeps a running maximum m and
sum l per row, and rescales what it has when m grows, so the scores s stay on chip:

    m' = max(m, max s)   p = exp(s - m')   l = l exp(m - m') + sum p   acc = acc exp(m - m') + p v

It ends with o = acc / l and lse = m + log l. Backward: p = exp(s - lse) again, in two kernels. One
owns a tile of keys and sums dk and dv over the queries of all heads that share it; the other owns a
tile of queries and sums dq over the keys. A third, if asked for, owns a tile of dbias. No atomics,
so every run gives the same bits. Few queries over many keys take the kernels of decode.py.

Query t sees key s if t < query_length, s < key_length and -left <= s - t - offset <= right. Tiles
in which nothing is seen are skipped, and only tiles in which something is not seen compute masks.
Rows past a length are loaded as 0, so what they hold reaches nothing.

Exponentials have base 2: exp(scale x) = exp2(scale log2(e) x). Where nothing is added to the
products x, m and s are in their units, and scale, which is positive, comes with log2(e) after the
difference, which is exact beside the maximum however large scores are. lse is kept in two parts,
its value and what rounding left out of it, so that the backward finds p of the forward.
"""

import torch

from .. import register, unavailable
from . import backward_kernels as _gradients
from . import decode as _decode
from . import forward_kernel as _tiles
from .config import _config as _config
from .tile import options


def _forward(
    q, k, v, bias, mask, alibi_slopes, sink, query_lengths, key_lengths, cu_seqlens_q,
    cu_seqlens_k, page_table, seed, left, right, scale, softcap, dropout_p,
):  # fmt: skip
    o, lse = _forward_outputs(q, k, v)
    if cu_seqlens_q is not None:  # rows may belong to no document
        o.zero_()
        value, low = lse
        value.fill_(-torch.inf)
        low.zero_()
    if o.numel() == 0 or _no_documents(cu_seqlens_q):
        return o, lse
    q, scale, _ = _scaled(q, scale)
    opt = options(
        bias, mask, alibi_slopes, sink, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k,
        page_table, seed, scale, softcap, dropout_p,
    )  # fmt: skip
    launch = _decode.forward if _decode.serves(q, k, opt) else _tiles.forward
    launch(q, k, v, o, lse, opt, left, right, dropout_p)
    return o, lse


def _forward_outputs(q, k, v, *options):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(2, *q.shape[:3], dtype=torch.float32)


def _backward(
    do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sink, query_lengths, key_lengths,
    cu_seqlens_q, cu_seqlens_k, seed, left, right, scale, softcap, dropout_p, bias_grad,
):  # fmt: skip
    outputs = _backward_outputs(
        do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sink, query_lengths, key_lengths,
        cu_seqlens_q, cu_seqlens_k, seed, left, right, scale, softcap, dropout_p, bias_grad,
    )  # fmt: skip
    dq, dk, dv, dbias, dsink = outputs
    q, scale, factor = _scaled(q, scale)
    opt = options(
        bias, mask, alibi_slopes, sink, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k,
        None, seed, scale, softcap, dropout_p,
    )  # fmt: skip
    if cu_seqlens_q is not None or q.numel() == 0 or k.numel() == 0:
        for x in outputs:  # rows may belong to no document
            x.zero_()
    if q.numel() == 0 or _no_documents(cu_seqlens_q):
        return outputs
    dbias, delta = _gradients.backward(
        do, dlse, q, k, v, o, lse, opt, left, right, dropout_p, dq, dk, dv, dbias
    )
    if factor != 1:
        dq.mul_(factor)
    # forward: lse = log (sum exp(s) + exp(sink))
    if sink is not None:
        value, low = lse
        p = (sink.float().view(-1, 1) - value - low).exp()
        p = torch.where(value == -torch.inf, 0, p)
        dsink = -(p * delta.narrow(2, 0, q.shape[2])).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, dbias, dsink


def _scaled(q, scale):
    """(q, scale, factor): the arguments of the kernels, and what their dq is to be multiplied by.

    The scale must not be negative. In float32 it is 1, so that lse, whose second part would be
    taken up by the rounding of a scaled maximum, has the logarithm of the sum beside any score.
    """
    if q.dtype == torch.float32:
        return q * scale, 1.0, scale
    return (-q, -scale, -1.0) if scale < 0 else (q, scale, 1.0)


def _no_documents(cu_seqlens):
    return cu_seqlens is not None and cu_seqlens.shape[0] == 1


def _backward_outputs(do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sink, *options):
    def empty(x):
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    dbias = empty(bias if options[-1] else None)
    return empty(q), empty(k), empty(v), dbias, empty(sink)


def why_not(q, k, v, *options, needs_grad) -> str | None:
    page_table = options[8]
    if page_table is not None and needs_grad:
        return "paged keys and values have no backward: detach the inputs, or use torch.no_grad()"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes head sizes up to 256, got {q.shape[-1]} and {v.shape[-1]}"
    return unavailable(q)


_OPTIONS = (
    "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sink, Tensor? query_lengths, "
    "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {}Tensor? seed, "
    "SymInt? left, SymInt? right, float scale, float softcap, float dropout_p"
)
forward = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS.format('Tensor? page_table, ')}) "
    "-> (Tensor o, Tensor lse)",
    _forward,
    _forward_outputs,
)
backward = register(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
    f"Tensor lse, {_OPTIONS.format('')}, bool bias_grad) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    _backward,
    _backward_outputs,
)
