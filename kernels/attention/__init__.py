"""Softmax attention: FlashAttention-2 (Dao 2022, 2023), forward and backward.

Forward: a program owns a tile of queries and walks over the keys. It keeps a running maximum m and
sum l per row, and rescales l and acc when m grows, so the scores s stay on chip:

    m' = max(m, max s)   p = exp(s - m')   l = l exp(m - m') + sum p   acc = acc exp(m - m') + p v

It ends with o = acc / l and lse = m + log l. Few queries over many keys use the kernels of
decode.py instead.

Backward: a small kernel prepares lse and delta = sum(do o) - dlse; then p = exp(s - lse) is
computed again in two kernels. In one, a program owns a tile of keys and sums dk and dv over the
queries of all heads that share it; in the other, it owns a tile of queries and sums dq over the
keys. If dbias is wanted, a third kernel owns tiles of dbias. There are no atomics, so every run
gives the same bits.

Query t sees key s if t < query_length, s < key_length and -left <= s - t - offset <= right. Tiles
in which nothing is seen are skipped, and masks are computed only in tiles in which something is not
seen. Rows past a length are loaded as 0, so that their values reach nothing.

Exponentials have base 2: exp(scale x) = exp2(scale log2(e) x). If nothing is added to the products
x, then m and s are not scaled yet, and the positive factor scale log2(e) is applied after the
difference s - m: the difference is exact near the maximum, however large scores are. lse is kept in
two parts, the rounded value and its rounding error, so that backward finds the p of forward.
"""

import torch
from torch import Tensor

from tfkern.reference import attention as reference
from tfkern.reference.attention import Arguments, backward_outputs, forward_outputs

from .. import register, unavailable
from . import backward_kernels as _gradients
from . import decode as _decode
from . import forward_kernel as _tiles
from .config import tiles_of as tiles_of
from .tile import options


def _forward(*args):
    a = Arguments(*args)
    q, cu_seqlens = a.q, a.cu_seqlens_q
    o, lse = forward_outputs(q, a.v)
    if cu_seqlens is not None:  # rows may belong to no document
        o.zero_()
        value, lse_rest = lse
        value.fill_(-torch.inf)
        lse_rest.zero_()
    if o.numel() == 0 or _no_documents(cu_seqlens):
        return o, lse
    q, scale, _ = _scaled(q, a.scale)
    opt = options(a, scale)
    launch = _decode.forward if _decode.serves(q, a.k, opt) else _tiles.forward
    launch(q, a.k, a.v, o, lse, opt, a.left, a.right, a.dropout_p)
    return o, lse


def _backward(do, dlse, o, lse, *args):
    *arguments, bias_grad = args
    a = Arguments(*arguments)
    outputs = backward_outputs(a, bias_grad)
    dq, dk, dv, dbias, dsink = outputs
    q, scale, factor = _scaled(a.q, a.scale)
    if a.cu_seqlens_q is not None or q.numel() == 0 or a.k.numel() == 0:
        for x in outputs:  # rows may belong to no document
            x.zero_()
    if q.numel() == 0 or _no_documents(a.cu_seqlens_q):
        return outputs
    dbias, delta = _gradients.backward(
        do, dlse, q, a.k, a.v, o, lse, options(a, scale), a.left, a.right, a.dropout_p,
        dq, dk, dv, dbias,
    )  # fmt: skip
    if factor != 1:
        dq.mul_(factor)
    # forward: lse = log (sum exp(s) + exp(sink))
    if a.sink is not None:
        value, lse_rest = lse
        p = (a.sink.float().view(-1, 1) - value - lse_rest).exp()
        p = torch.where(value == -torch.inf, 0, p)
        dsink = -(p * delta.narrow(2, 0, q.shape[2])).sum((0, 2)).to(a.sink.dtype)
    return dq, dk, dv, dbias, dsink


def _scaled(q, scale):
    """(q, scale, factor): q and scale as the kernels take them, and the factor of their dq.

    Kernels need a scale that is not negative. In float32 q is scaled beforehand and the scale is 1.
    Otherwise the rounding error of a scaled maximum would fill the second part of lse, which must
    hold the logarithm of the sum when scores are large.
    """
    if q.dtype == torch.float32:
        return q * scale, 1.0, scale
    return (-q, -scale, -1.0) if scale < 0 else (q, scale, 1.0)


def _no_documents(cu_seqlens):
    return cu_seqlens is not None and cu_seqlens.shape[0] == 1


def why_not(*args, needs_grad: bool) -> str | None:
    a = Arguments(*args)
    if reason := reference.why_not(*args, needs_grad=needs_grad):
        return reason
    if max(a.q.shape[-1], a.v.shape[-1]) > 256:
        return f"takes head sizes up to 256, got {a.q.shape[-1]} and {a.v.shape[-1]}"
    return unavailable(a.q)


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int | None: "SymInt?", float: "float"}
_ARGUMENTS = ", ".join(f"{_TYPES[t]} {name}" for name, t in Arguments.__annotations__.items())
forward = register(
    f"attention_forward({_ARGUMENTS}) -> (Tensor o, Tensor lse)",
    _forward,
    lambda q, k, v, *others: forward_outputs(q, v),
)


def _backward_outputs(do, dlse, o, lse, *args):
    *arguments, bias_grad = args
    return backward_outputs(Arguments(*arguments), bias_grad)


backward = register(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, {_ARGUMENTS}, "
    "bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    _backward,
    _backward_outputs,
)
