"""Rotary positions: turns queries and keys by the angles of their tokens.

A program turns some heads of some tokens. Their vectors and the tokens' rows of cos and sin are in
registers, so everything is read once and written once. One launch turns q and k; every element is
read before the same program writes its pair, so that the results may lie in the place of q and k.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import register, unavailable

_MAX_D = 2048  # larger heads would spill


class _Tile(NamedTuple):
    """What a program turns, and its launch."""

    tokens: int
    heads: int
    pairs: int
    num_warps: int


def _tile(H: int, HK: int, R: int, rest: int) -> _Tile:
    """A tile of about 1024 pairs, and 8 pairs for each thread; `rest` features are copied.

    There are never more threads than pairs, unless one warp holds all: with copies of an element in
    two warps, one could read what the other has overwritten.
    """
    pairs = max(8, triton.next_power_of_2(R // 2))
    most = max(1, 1024 // max(pairs, rest // 2))  # vectors
    fewer = triton.next_power_of_2(max(min(H, HK) or max(H, HK), 1))
    heads = min(most, max(4, fewer))
    tokens = min(most // heads, 16)
    return _Tile(tokens, heads, pairs, min(max(tokens * heads * pairs // 256, 1), 8))


@triton.jit
def _load_pairs(X, there, stride, R, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """The first and the second elements of all pairs of the vectors at X (tokens, heads, 1)."""
    if INTERLEAVED:
        n = tl.arange(0, 2 * BLOCK)[None, None, :]
        x = tl.load(X + n * stride, mask=there & (n < R), other=0.0).to(tl.float32)
        xi, xj = tl.split(x.reshape(x.shape[0], x.shape[1], BLOCK, 2))
    else:
        n = tl.arange(0, BLOCK)[None, None, :]
        mask = there & (n < R // 2)
        xi = tl.load(X + n * stride, mask=mask, other=0.0).to(tl.float32)
        xj = tl.load(X + (n + R // 2) * stride, mask=mask, other=0.0).to(tl.float32)
    return xi, xj


@triton.jit
def _turn(
    X, Y, COS, SIN, b, t, first, T, H,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_yb, stride_yh, stride_yt, stride_yd,
    stride_cb, stride_ct, stride_cr, stride_sb, stride_st, stride_sr, R, D,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turns BLOCK_H heads, from the first on, of BLOCK_T tokens, from t on, and copies the last
    REST features."""
    t += tl.arange(0, BLOCK_T)[:, None, None]
    h = first + tl.arange(0, BLOCK_H)[None, :, None]
    there = (t < T) & (h < H)
    X += b * stride_xb + t * stride_xt + h * stride_xh
    Y += b * stride_yb + t * stride_yt + h * stride_yh
    COS += b * stride_cb + t * stride_ct
    SIN += b * stride_sb + t * stride_st
    ci, cj = _load_pairs(COS, t < T, stride_cr, R, INTERLEAVED, BLOCK)
    si, sj = _load_pairs(SIN, t < T, stride_sr, R, INTERLEAVED, BLOCK)
    xi, xj = _load_pairs(X, there, stride_xd, R, INTERLEAVED, BLOCK)
    if INVERSE:
        yi, yj = xi * ci + xj * sj, xj * cj - xi * si
    else:
        yi, yj = xi * ci - xj * si, xj * cj + xi * sj
    yi, yj = yi.to(Y.dtype.element_ty), yj.to(Y.dtype.element_ty)
    if INTERLEAVED:
        n = tl.arange(0, 2 * BLOCK)[None, None, :]
        y = tl.join(yi, yj).reshape(BLOCK_T, BLOCK_H, 2 * BLOCK)
        tl.store(Y + n * stride_yd, y, mask=there & (n < R))
    else:
        n = tl.arange(0, BLOCK)[None, None, :]
        mask = there & (n < R // 2)
        tl.store(Y + n * stride_yd, yi, mask=mask)
        tl.store(Y + (n + R // 2) * stride_yd, yj, mask=mask)
    if REST:
        n = R + tl.arange(0, REST)[None, None, :]
        mask = there & (n < D)
        tl.store(Y + n * stride_yd, tl.load(X + n * stride_xd, mask=mask), mask=mask)


@triton.jit
def _rotary_kernel(
    Q, K, COS, SIN, Q_OUT, K_OUT,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_cb, stride_ct, stride_cr, stride_sb, stride_st, stride_sr,
    stride_qob, stride_qoh, stride_qot, stride_qod, stride_kob, stride_koh, stride_kot, stride_kod,
    T, H, HK, R, D,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turns BLOCK_H heads of q or of k at BLOCK_T tokens."""
    block = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(T, BLOCK_T)
    b, t = block // blocks, block % blocks * BLOCK_T
    groups = tl.cdiv(H, BLOCK_H)  # of q
    if group < groups:
        _turn(
            Q, Q_OUT, COS, SIN, b, t, group * BLOCK_H, T, H,
            stride_qb, stride_qh, stride_qt, stride_qd,
            stride_qob, stride_qoh, stride_qot, stride_qod,
            stride_cb, stride_ct, stride_cr, stride_sb, stride_st, stride_sr, R, D,
            INTERLEAVED, INVERSE, BLOCK_T, BLOCK_H, BLOCK, REST,
        )  # fmt: skip
    else:
        if K is not None:
            _turn(
                K, K_OUT, COS, SIN, b, t, (group - groups) * BLOCK_H, T, HK,
                stride_kb, stride_kh, stride_kt, stride_kd,
                stride_kob, stride_koh, stride_kot, stride_kod,
                stride_cb, stride_ct, stride_cr, stride_sb, stride_st, stride_sr, R, D,
                INTERLEAVED, INVERSE, BLOCK_T, BLOCK_H, BLOCK, REST,
            )  # fmt: skip


def _launch(q, k, cos, sin, q_out, k_out, interleaved, inverse):
    (B, H, T, D), R = q.shape, cos.shape[-1]
    HK = 0 if k is None else k.shape[1]
    rest = 0 if q_out is q or R == D else max(16, triton.next_power_of_2(D - R))
    tokens, heads, pairs, warps = _tile(H, HK, R, rest)
    groups = triton.cdiv(H, heads) + triton.cdiv(HK, heads)
    if not (B * T * D * groups):
        return
    absent = (0,) * 4
    _rotary_kernel[(B * triton.cdiv(T, tokens), groups)](
        q, k, cos, sin, q_out, k_out,
        *q.stride(), *(absent if k is None else k.stride()), *cos.stride(), *sin.stride(),
        *q_out.stride(), *(absent if k is None else k_out.stride()), T, H, HK, R, D,
        INTERLEAVED=interleaved, INVERSE=inverse,
        BLOCK_T=tokens, BLOCK_H=heads, BLOCK=pairs, REST=rest, num_warps=warps,
    )  # fmt: skip


def _forward(q, k, cos, sin, interleaved, inverse):
    q_out, k_out = _outputs(q, k, cos, sin, interleaved, inverse)
    _launch(q, k, cos, sin, q_out, k_out, interleaved, inverse)
    return q_out, k_out


def _forward_inplace(q, k, cos, sin, interleaved, inverse):
    _launch(q, k, cos, sin, q, k, interleaved, inverse)


def _outputs(q, k, cos, sin, interleaved, inverse):
    return _like(q, inverse), q.new_empty(0) if k is None else _like(k, inverse)


def _like(x, inverse):
    if not inverse:
        return x.new_empty(x.shape)
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def why_not(q, k, cos, sin, interleaved, inverse, *, needs_grad) -> str | None:
    if q.shape[-1] > _MAX_D:
        return f"holds whole heads in registers, at most {_MAX_D} features, got {q.shape[-1]}"
    return unavailable(q) or unavailable(cos) or unavailable(sin)


_ARGUMENTS = "Tensor cos, Tensor sin, bool interleaved, bool inverse"
forward = register(
    f"rotary(Tensor q, Tensor? k, {_ARGUMENTS}) -> (Tensor q, Tensor k)", _forward, _outputs
)
forward_ = register(
    f"rotary_(Tensor(a!) q, Tensor(b!)? k, {_ARGUMENTS}) -> ()",
    _forward_inplace,
    lambda *args: None,
)
