"""Attention over a sequence that is split over the ranks of a group: the public function."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.nn.context_parallel import heads
from tfkern.nn.context_parallel.ring import ring_attention
from tfkern.nn.context_parallel.split import SequenceSplit
from tfkern.nn.context_parallel.tiles import segments
from tfkern.ops import checks
from tfkern.ops.attention import bind
from tfkern.reference.attention import Arguments

METHODS = ("ring", "all_to_all")


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: SequenceSplit,
    *,
    method: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    documents: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`tfkern.attention` of T queries to S keys, of which each of n ranks has an equal part.

        split = SequenceSplit(group)
        o = context_parallel_attention(*(split.split(x, 2) for x in (q, k, v)), split, causal=True)
        o = split.gather(o, 2)  # what tfkern.attention(q, k, v, causal=True) returns

    All ranks must call it together, with the same options and tensors of the same shapes. Memory
    for tokens is 1 / n of that on one rank. torch.compile breaks its graph here. There are two
    methods:

    "ring" (Liu et al. 2023): keys and values travel from rank to rank while the block that arrived
    before is computed. It serves any number of heads. Blocks that no query of any rank sees,
    because of causal, window, lengths or documents, do not travel. Where m blocks have queries,
    each rank's own among them, a rank sends (m - 1) X bytes forward, where X is the size of its
    keys and values. Backward it sends (m - 1) X + m Y, where Y is the size of their gradients in
    float32 (float64 for float64), and nothing if m = 1.

    "all_to_all" (Jacobs et al. 2023, "DeepSpeed Ulysses"): each rank gets the whole sequence of
    1 / n of the heads. n must divide the heads of q and of k. Forward a rank sends (n - 1) / n of
    the size of its q, k, v, o and lse, and backward as much again. Rows of a bias or mask add as
    much of their size, or n - 1 times their size if they are the same for all heads.

    Args:
        q: (B, H, T / n, D), this rank's part.
        k, v: (B, Hk, S / n, D) and (B, Hk, S / n, Dv), this rank's parts.
        split: which positions are this rank's.
        method: "ring" or "all_to_all"; if None, all_to_all where it serves and its memory falls
            with n (not with rows of a bias or mask that all heads share), else the ring.
        causal, window, scale, softcap, sink: as in `tfkern.attention`, for the whole sequence.
        bias, mask: broadcastable to (B, H, T / n, S): the rows of this rank's queries, with the
            keys of all ranks in the order of the sequence.
        alibi_slopes: (H,) or (B, H); by the ring there must be as many queries as keys.
        query_lengths, key_lengths: (B,), of the whole sequences. This call waits for their values.
        documents: (B, T) integers, the document of each token of the whole sequence: one begins
            with each row, and wherever the number is another one than before. A query sees keys of
            its own document only, T = S, and there are no lengths beside it. This call waits for
            the values.
        dropout_p, seed: by all_to_all, and without bias and mask. With a seed that is equal on all
            ranks the same elements are dropped as on one rank. If None, each rank draws its own.
        return_lse: also return the log-sum-exp of the scores.
        backend: as in `tfkern.attention`.

    Returns:
        o (B, H, T / n, Dv), or (o, lse) with lse (B, H, T / n), of this rank's queries. The
        gradients of q, k, v, and of rows of bias, are those of the sum of all ranks' losses. Those
        of sink and of a bias that is the same for all rows are this rank's share: their sum over
        the ranks is the gradient. There is no second derivative.

    Raises:
        ValueError: arguments that do not fit together.
        NotImplementedError: an option that the method, or the forced backend, lacks.
    """
    n = split.ranks
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, size), got {tuple(x.shape)}")
    T, S = q.shape[2] * n, k.shape[2] * n
    split.chunks(T), split.chunks(S)
    if method is not None:
        checks.choice("method", method, METHODS)
    # Checked as if all keys were here, since rows of a bias have all of them.
    whole = [x[:, :, :1].expand(*x.shape[:2], x.shape[2] * n, x.shape[3]) for x in (k, v)]
    a = bind(
        q,
        *whole,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sink=sink,
        key_lengths=key_lengths,
        dropout_p=dropout_p,
        seed=seed,
    )
    _check_lengths(q, T, S, query_lengths, key_lengths, documents)
    k, v = (x.to(a.q.dtype) for x in (k, v))  # as autocast has made q
    a = a._replace(k=k, v=v, query_lengths=query_lengths)
    reason = heads.why_not(a, split)
    if method is None:
        ring = reason is not None or heads.needs_whole_scores(a, documents)
        method = "ring" if ring else "all_to_all"
    with dispatch.no_autocast(a.q.device):
        if method == "all_to_all":
            if reason is not None:
                raise NotImplementedError(f"method 'all_to_all': {reason}")
            o, lse = heads.all_to_all_attention(a, split, documents, backend)
        else:
            found = segments(q.shape[0], T, S, query_lengths, key_lengths, documents)
            o, lse = ring_attention(a, split, found, backend)
            if sink is not None:
                o, lse = _with_sink(o, lse, sink, _exist(a, split))
            o = o.to(a.q.dtype)
    return (o, lse) if return_lse else o


def _check_lengths(
    q: Tensor,
    T: int,
    S: int,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    documents: Tensor | None,
) -> None:
    if query_lengths is not None:
        checks.integers("query_lengths", query_lengths, q)
        checks.shape("query_lengths", query_lengths, q.shape[:1], "one length for each batch")
        checks.within("query_lengths", query_lengths, 0, T)
    if documents is None:
        return
    checks.shape("documents", documents, (q.shape[0], T), "the whole sequence of each batch")
    checks.same_device("q", q, "documents", documents)
    if documents.is_floating_point() or documents.dtype == torch.bool:
        raise ValueError(f"documents must be integers, got {documents.dtype}")
    if T != S:
        raise ValueError(f"documents need as many queries as keys, got {T} and {S}")
    if query_lengths is not None or key_lengths is not None:
        raise ValueError("documents and lengths exclude each other: padding is a document")


def _exist(a: Arguments, split: SequenceSplit) -> Tensor | None:
    """Which of this rank's queries exist, (B, 1, T / n), None if all do."""
    if a.query_lengths is None:
        return None
    positions = split.positions(a.q.shape[2] * split.ranks, device=a.q.device)
    return positions < a.query_lengths[:, None, None]


def _with_sink(o: Tensor, lse: Tensor, sink: Tensor, exist: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results with one more key, whose value is 0, for the queries that exist."""
    sink = sink.to(lse.dtype)[:, None]
    hidden = lse == -torch.inf
    lse = lse.masked_fill(hidden, 0)
    both = torch.logaddexp(lse, sink)
    share = torch.where(hidden, 0, (lse - both).exp())
    total = torch.where(hidden, sink, both)
    if exist is not None:
        total = total.masked_fill(~exist, -torch.inf)
    return o * share[..., None], total
