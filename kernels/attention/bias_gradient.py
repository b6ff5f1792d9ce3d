"""dbias: a program sums ds of one tile over the dimensions that bias is broadcast along."""

import math

import torch
import triton
import triton.language as tl

from .. import architecture, programs
from .config import constants, tiles_of
from .tile import (
    INF,
    RUNTIME,
    Band,
    Scoring,
    extent,
    gradients,
    head_at,
    key_ranges,
    keys_at,
    load_keys,
    load_rows,
    matrix,
    minus_delta,
)


@triton.jit(do_not_specialize=RUNTIME)
def _dbias_kernel(
    DBIAS, DO, Q, K, V, SHIFT, REST, DELTA, opt,
    H, group, T, S, documents, pages, left, right, limit,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    padded, loops_b, loops_h, loops_t, loops_s, bias_heads, bias_size, parts,
    SUM_T: tl.constexpr, SUM_S: tl.constexpr, ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Computes one part of the sum of one tile of dbias. The terms of the sum are loops_b batches
    of loops_h heads of loops_t by loops_s tiles of scores. A count is 1 along a dimension that bias
    has; along a dimension that bias is broadcast along, it takes in all."""
    pid = tl.program_id(0)
    part = pid % parts
    tile = pid // parts
    tiles_t = tl.cdiv(T, BLOCK_T) // loops_t
    tiles_s = tl.cdiv(S, BLOCK_S) // loops_s
    tile_s = tile % tiles_s
    tile_t = tile // tiles_s % tiles_t
    bias_h = tile // tiles_s // tiles_t % bias_heads
    bias_b = tile // tiles_s // tiles_t // bias_heads

    terms = tl.cast(loops_b, tl.int64) * loops_h * loops_t * loops_s
    first = part * terms // parts
    last = (part + 1) * terms // parts
    # Without lengths, all terms of a tile see the same keys. If they see none of the tile, the sum
    # is skipped.
    if not SUM_T and not SUM_S and opt.query_lengths is None and opt.key_lengths is None:
        t_first = tile_t * BLOCK_T
        band = Band(T, S, left, right)
        ranges = key_ranges(band, t_first, tl.minimum(t_first + BLOCK_T, T) - 1, BLOCK_S)
        outside = (tile_s * BLOCK_S < ranges[0]) | (tile_s * BLOCK_S >= ranges[3])
        last = tl.where(outside, first, last)

    stride_qt = tl.cast(stride_qt, tl.int64) * ALIGN
    stride_dot = tl.cast(stride_dot, tl.int64) * ALIGN
    bias = matrix(stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, BIAS_ALIGN)
    mask = matrix(stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, BIAS_ALIGN)
    dbias = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for i in range(first, last):
        s0 = ((tile_s + i % loops_s) * BLOCK_S).to(tl.int32)
        t0 = ((tile_t + i // loops_s % loops_t) * BLOCK_T).to(tl.int32)
        h = bias_h + i // loops_s // loops_t % loops_h
        b = bias_b + i // loops_s // loops_t // loops_h
        _, _, t_end, _ = extent(None, opt.query_lengths, b, T)
        _, _, s_end, _ = extent(None, opt.key_lengths, b, S)
        band = Band(t_end, s_end, left, right)
        scoring = Scoring(opt, b, H, band, bias, mask, limit)
        t = t0 + tl.arange(0, BLOCK_T)
        s = s0 + tl.arange(0, BLOCK_S)
        row = (b * H + h) * padded + t
        shift = tl.load(SHIFT + row, mask=t < t_end, other=INF)
        rest = tl.load(REST + row, mask=t < t_end, other=0.0)
        delta = tl.load(DELTA + row, mask=t < t_end, other=0.0)
        sees = shift != INF
        q = load_rows(
            Q + (b * stride_qb + h * stride_qh) * ALIGN, t0, stride_qt, sees,
            D, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        do = load_rows(
            DO + (b * stride_dob + h * stride_doh) * ALIGN, t0, stride_dot, sees,
            Dv, BLOCK_T, BLOCK_DV,
        )  # fmt: skip
        k = keys_at(
            K, opt, b, b, 0, h // group, stride_kb, stride_kh, stride_ks, S, pages, ALIGN, None,
        )  # fmt: skip
        v = keys_at(
            V, opt, b, b, 0, h // group, stride_vb, stride_vh, stride_vs, S, pages, ALIGN, None,
        )  # fmt: skip
        keys = load_keys(k, s0, s < s_end, None, D, BLOCK_S, BLOCK_D)
        values = load_keys(v, s0, s < s_end, None, Dv, BLOCK_S, BLOCK_DV)
        x = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        dp = minus_delta(delta[:, None], opt, BLOCK_T, BLOCK_S)
        dp = tl.dot(do, tl.trans(values), dp, input_precision=PRECISION)
        _, ds, _ = gradients(
            x, dp, shift[:, None], rest[:, None], delta[:, None], t[:, None], s[None, :], s0,
            head_at(h, scoring), scoring, True, False, BLOCK_S,
        )  # fmt: skip
        # forward: s = softcap tanh(scale q k^T / softcap) + bias
        dbias += tl.where(sees[:, None], ds, 0.0)  # other rows may be NaN

    rows = tl.where(SUM_T, 1, T)
    columns = tl.where(SUM_S, 1, S)
    DBIAS += part.to(tl.int64) * bias_size
    DBIAS += (tl.cast(bias_b, tl.int64) * bias_heads + bias_h) * rows * columns
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    if SUM_T:
        t = tl.arange(0, 1)
        dbias = tl.sum(dbias, 0, keep_dims=True)
    if SUM_S:
        s = tl.arange(0, 1)
        dbias = tl.sum(dbias, 1, keep_dims=True)
    exists = (t < rows)[:, None] & (s < columns)[None, :]
    elements = DBIAS + t.to(tl.int64)[:, None] * columns + s[None, :]
    tl.store(elements, dbias.to(DBIAS.dtype.element_ty), mask=exists)


def backward(dbias, inputs, aligns, padded):
    """Returns dbias, either `dbias` itself or, if it is summed in parts, a new tensor. `inputs` are
    the inputs of the dkv and dq kernels, `padded` the rows of a head of shift, rest and delta."""
    _, q, k, v, *_ = inputs
    (B, H, T, D), S, Dv = q.shape, k.shape[2], v.shape[3]
    shape = tiles_of("dbias", D, Dv, q.dtype, architecture(q.device))
    sizes = (B, H, triton.cdiv(T, shape.rows), triton.cdiv(S, shape.columns))
    loops = [n if x == 1 else 1 for n, x in zip(sizes, dbias.shape, strict=True)]
    tiles = math.prod(sizes) // math.prod(loops)
    # If there are few tiles, each is summed in parts, which are added in a fixed order.
    parts = min(math.prod(loops), triton.cdiv(programs(q.device, 4, interpreted=16), tiles))
    out = dbias
    if parts > 1:
        out = torch.empty(parts, *dbias.shape, dtype=torch.float32, device=q.device)
    _dbias_kernel[(tiles * parts,)](
        out, *inputs, padded, *loops, dbias.shape[1], dbias.numel(), parts,
        SUM_T=dbias.shape[2] == 1, SUM_S=dbias.shape[3] == 1, **aligns,
        **constants(shape, D, Dv, q.dtype),
    )  # fmt: skip
    if parts > 1:
        return out.sum(0).to(dbias.dtype)
    return dbias
