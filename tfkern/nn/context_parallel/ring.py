"""Attention around a ring of ranks (Liu, Zaharia, Abbeel 2023, "Ring Attention").

Queries stay, and blocks of keys and values travel. Step i of a rank r has the block of rank r - i:

    o_i, lse_i = attention(q, k_i, v_i)
    lse = log sum_i exp(lse_i),  o = sum_i w_i o_i,  w_i = exp(lse_i - lse)

In backward the blocks travel again, and the sums of their gradients follow them home. With do and
dlse the incoming gradients, those of o_i and lse_i are

    do_i = w_i do,  dlse_i = rowsum(do_i o_i) - w_i (rowsum(do o) - dlse)

so that each step is the backward of `tfkern.attention`. o_i and lse_i are computed again rather
than kept, since n of them would be as large as the output of the whole sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.nn.context_parallel.exchange import Passing
from tfkern.nn.context_parallel.split import SequenceSplit
from tfkern.nn.context_parallel.tiles import Segment, Tile, tiles
from tfkern.ops import attention, autograd
from tfkern.reference.attention import Arguments


@dataclass(frozen=True)
class Ring:
    """What a call needs beside the tensors that have a gradient.

    Attributes:
        mask, alibi_slopes: as in `Arguments`.
        options: further arguments of `tfkern.attention`.
        steps: from which rank, counted backwards from this one, each block comes. No rank needs
            the blocks that are left out.
        tiles: for each step what this rank computes.
    """

    split: SequenceSplit
    mask: Tensor | None
    alibi_slopes: Tensor | None
    options: dict[str, Any]
    steps: list[int]
    tiles: list[list[Tile]]

    def hop(self, step: int) -> int | None:
        """How many ranks further the block of a step is needed next, None if nowhere."""
        return self.steps[step + 1] - self.steps[step] if step + 1 < len(self.steps) else None


def ring_attention(
    a: Arguments, split: SequenceSplit, segments: list[Segment], backend: str | None
) -> tuple[Tensor, Tensor]:
    """o and lse (B, H, T / n) of this rank's queries, in float32 or wider, without the sink.

    Args:
        a: q, k, v, bias and mask are those of this rank, bias and mask with the keys of all ranks.

    Raises:
        NotImplementedError: an option that this method lacks.
    """
    if a.seed is not None:
        raise NotImplementedError(
            "dropout_p by the ring: the kernels draw for keys counted from 0; use all_to_all"
        )
    if a.alibi_slopes is not None and any(s.queries != s.keys for s in segments):
        raise NotImplementedError("alibi_slopes by the ring need as many queries as keys")
    n, rank = split.ranks, split.rank
    T, S = a.q.shape[2] * n, a.k.shape[2] * n
    queries = [split.chunks(T, r) for r in range(n)]
    keys = [split.chunks(S, r) for r in range(n)]

    def of(r: int, step: int):
        return tiles(segments, queries[r], keys[(r - step) % n], a.left, a.right)

    steps = [i for i in range(n) if i == 0 or any(any(True for _ in of(r, i)) for r in range(n))]
    options = {"scale": a.scale, "softcap": a.softcap, "backend": backend, "return_lse": True}
    found = [list(of(rank, i)) for i in steps]
    ring = Ring(split, a.mask, a.alibi_slopes, options, steps, found)
    return autograd.apply(_Ring, a.q, a.k, a.v, a.bias, ring)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, bias, ring):
        wide = torch.promote_types(q.dtype, torch.float32)
        o = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        block = torch.cat([k.flatten(), v.flatten()])
        for step, found in enumerate(ring.tiles):
            hop = ring.hop(step)
            passing = None if hop is None else Passing(block, ring.split.group, hop)
            k, v = _unpacked(block, k, v)
            for tile in found:
                at = (tile.batch, slice(None), tile.rows)
                part = _attend(ring, tile, q, k, v, bias)
                o[at], lse[at] = _merged(o[at], lse[at], *part)
            block = block if passing is None else passing.wait()
        return o, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ring = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        bias_grad = ctx.needs_input_grad[3]
        tensors = ctx.saved_tensors
        with dispatch.no_autocast(tensors[0].device):
            grads = autograd.apply(_Backward, do, dlse, *tensors, bias_grad, ctx.ring)
        return *grads[:3], grads[3] if bias_grad else None, None


def _backward(do, dlse, q, k, v, bias, o, lse, bias_grad: bool, ring: Ring) -> tuple[Tensor, ...]:
    """dq, dk, dv and dbias, which is empty if it is not wanted."""
    do = torch.zeros_like(o) if do is None else do.masked_fill((lse == -torch.inf)[..., None], 0)
    delta = (do * o).sum(-1) if dlse is None else (do * o).sum(-1) - dlse
    dq = torch.zeros_like(q, dtype=o.dtype)
    dbias = torch.zeros_like(bias, dtype=o.dtype) if bias_grad else o.new_empty(0)
    block = torch.cat([k.flatten(), v.flatten()])
    arriving, dblock = None, torch.empty(0)
    for step, found in enumerate(ring.tiles):
        hop = ring.hop(step)
        passing = None if hop is None else Passing(block, ring.split.group, hop)
        k, v = _unpacked(block, k, v)
        dblock = torch.zeros_like(block, dtype=o.dtype)
        dk, dv = _unpacked(dblock, k, v)
        for tile in found:
            at = (tile.batch, slice(None), tile.rows)
            grads = _tile_backward(ring, tile, q, k, v, bias, bias_grad, do[at], lse[at], delta[at])
            dq[at] += grads[0]
            dk[tile.batch, :, tile.keys] += grads[1]
            dv[tile.batch, :, tile.keys] += grads[2]
            if bias_grad:
                dbias[_cut(bias, tile)] += grads[3]
        if arriving is not None:
            dblock += arriving.wait()
        if hop is None and ring.steps[step]:  # home
            hop = ring.split.ranks - ring.steps[step]
        if hop is not None:
            arriving = Passing(dblock, ring.split.group, hop, tag=1)
        block = block if passing is None else passing.wait()
    dk, dv = _unpacked(dblock if arriving is None else arriving.wait(), k, v)
    dbias = dbias.to(bias.dtype) if bias_grad else dbias
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias


_Backward = autograd.first_order("context_parallel_attention", _backward)


def _tile_backward(
    ring: Ring, tile: Tile, q, k, v, bias, bias_grad: bool, do, lse, delta
) -> tuple[Tensor, ...]:
    """The gradients of the parts of q, k, v, and of bias if wanted, that a tile uses."""
    with torch.enable_grad():
        q = q[tile.batch, :, tile.rows].detach().requires_grad_()
        k, v = (x[tile.batch, :, tile.keys].detach().requires_grad_() for x in (k, v))
        if bias is not None:
            bias = bias[_cut(bias, tile)].detach().requires_grad_(bias_grad)
        part, part_lse = _attention(ring, tile, q, k, v, bias)
        inputs = (q, k, v, bias) if bias_grad else (q, k, v)
    with torch.no_grad():
        seen = part_lse != -torch.inf
        weight = torch.where(seen, (part_lse - lse).exp(), 0)
        part_do = (weight[..., None] * do).to(part.dtype)
        part_dlse = (part_do.to(do.dtype) * part).sum(-1) - weight * delta
    return torch.autograd.grad((part, part_lse), inputs, (part_do, part_dlse))


def _attend(ring: Ring, tile: Tile, q, k, v, bias) -> tuple[Tensor, Tensor]:
    """o and lse of a tile, from this rank's queries and the block of keys and values."""
    k, v = (x[tile.batch, :, tile.keys] for x in (k, v))
    bias = None if bias is None else bias[_cut(bias, tile)]
    return _attention(ring, tile, q[tile.batch, :, tile.rows], k, v, bias)


def _attention(ring: Ring, tile: Tile, q, k, v, bias) -> tuple[Tensor, Tensor]:
    options = ring.options | {"window": (tile.left, tile.right)}
    options["mask"] = None if ring.mask is None else ring.mask[_cut(ring.mask, tile)]
    slopes = None if ring.alibi_slopes is None else ring.alibi_slopes[tile.batch]
    if slopes is None or tile.shift == 0:
        return attention(q, k, v, bias=bias, alibi_slopes=slopes, **options)
    of_keys, of_rows = _alibi(slopes, q.shape[2], k.shape[2], tile.shift, q.dtype)
    o, lse = attention(q, k, v, bias=of_keys if bias is None else bias + of_keys, **options)
    return o, lse + of_rows


def _alibi(slopes: Tensor, T: int, S: int, shift: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-slope |t + S - T - s + shift| as a term (B, H, 1, S) of the keys and one (B, H, T) of rows.

    All keys of a tile with a shift are on one side of all its queries. The term of the keys counts
    from the nearest one, so that it is small where the softmax is large.
    """
    slopes = slopes.to(torch.promote_types(dtype, torch.float32))[..., None]
    t, s = (torch.arange(n, device=slopes.device) for n in (T, S))
    if shift > 0:
        return (-slopes * (S - s))[:, :, None], -slopes * (shift - T + t)
    return (-slopes * (s + 1))[:, :, None], -slopes * (T - t - shift - S - 1)


def _merged(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of results over different keys, by their log-sum-exp."""
    total = torch.logaddexp(lse, part_lse)
    old, new = (
        torch.where(x == -torch.inf, 0, (x - total).exp())[..., None] for x in (lse, part_lse)
    )
    return old * o + new * part, total


def _unpacked(block: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the shapes of k and v, as views of a block."""
    return block[: k.numel()].view(k.shape), block[k.numel() :].view(v.shape)


def _cut(x: Tensor, tile: Tile) -> tuple[slice, ...]:
    """The index of a tile in a bias or mask, which may be broadcast."""
    index = (tile.batch, slice(None), tile.rows, tile.columns)
    return tuple(i if n > 1 else slice(None) for i, n in zip(index, x.shape, strict=True))
