# ruff: noqa: E741  O and l are the letters of the papers
"""o and lse of few queries over many keys: the keys are split among programs.

The rows of a tile are the queries of all heads that share a key head, so that keys are read once.
Each program stores acc, m and l of its part of the keys; a second kernel weighs and adds the parts.
"""

import triton
import triton.language as tl

from .. import architecture, programs
from .config import block, constants, tiles_of
from .forward_kernel import attend, result
from .tile import (
    INF,
    RUNTIME,
    Band,
    Scoring,
    extent,
    head_at,
    in_base_2,
    integers,
    key_ranges,
    keys_at,
    load,
    matrix,
    matrix_strides,
    page_size,
    rows,
    strides,
)

_MAX_ROWS = 64  # the most queries that share a key head
_MIN_S = 256  # the fewest keys
_MAX_SPLITS = tl.constexpr(64)  # the most parts of the keys


def serves(q, k, opt) -> bool:
    """Tells whether a call has few queries and many keys."""
    S = k.shape[2] if opt.page_table is None else k.shape[2] * opt.page_table.shape[1]
    few = q.shape[1] // k.shape[1] * q.shape[2] <= _MAX_ROWS
    return few and S >= _MIN_S and opt.cu_seqlens_q is None


@triton.jit(do_not_specialize=RUNTIME)
def _decode_kernel(
    Q, K, V, ACC, M, L, opt, H, group, T, S, documents, pages, left, right, limit,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, splits,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Computes acc (B, H, T, splits, Dv), m and l (B, H, T, splits) of BLOCK_T rows of one key head
    over one part of the keys."""
    pid = tl.program_id(0)
    split = pid % splits
    tiles = tl.cdiv(group * T, BLOCK_T)
    tile = pid // splits % tiles
    key_heads = H // group
    key_head = (pid // splits // tiles % key_heads).to(tl.int64)
    b = (pid // splits // tiles // key_heads).to(tl.int64)
    _, _, t_end, _ = extent(None, opt.query_lengths, b, T)
    _, _, s_end, _ = extent(None, opt.key_lengths, b, S)
    k = keys_at(K, opt, b, b, 0, key_head, stride_kb, stride_kh, stride_ks, S, pages, ALIGN, PAGE)
    v = keys_at(V, opt, b, b, 0, key_head, stride_vb, stride_vh, stride_vs, S, pages, ALIGN, PAGE)
    bias = matrix(stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, BIAS_ALIGN)
    mask = matrix(stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, BIAS_ALIGN)
    band = Band(t_end, s_end, left, right)

    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_group = row < group * T
    h = key_head * group + tl.minimum(row // T, group - 1)
    t = row % T
    exists = in_group & (t < t_end)
    offsets = (b * stride_qb + h * stride_qh + t.to(tl.int64) * stride_qt) * ALIGN
    q = load(Q, offsets, exists, D, BLOCK_D)
    scoring = Scoring(opt, b, H, band, bias, mask, limit)
    start, full, full_stop, stop = key_ranges(band, 0, t_end - 1, BLOCK_S)
    part = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), BLOCK_S), splits) * BLOCK_S
    start += split * part
    stop = tl.minimum(start + part, stop)
    full_stop = tl.maximum(tl.minimum(full_stop, stop), start)
    ranges = (start, tl.maximum(full, start), full_stop, stop)
    acc, m, l = attend(
        q, k, v, t[:, None], head_at(h[:, None], scoring), scoring, ranges,
        PAGE, PRECISION, D, Dv, BLOCK_S, BLOCK_DV, False, False,
    )  # fmt: skip
    row = ((b * H + h) * T + t) * splits + split
    col = tl.arange(0, BLOCK_DV)
    tl.store(ACC + row[:, None] * Dv + col, acc, mask=in_group[:, None] & (col < Dv)[None, :])
    tl.store(M + row, m, mask=in_group)
    tl.store(L + row, l, mask=in_group)


@triton.jit(do_not_specialize=RUNTIME)
def _combine_kernel(
    O, LSE, LSE_REST, ACC, M, L, opt, H, T, splits,
    MAX_SPLITS: tl.constexpr, Dv: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds up o and lse of one query from the parts of its keys."""
    row = tl.program_id(0).to(tl.int64)
    b = row // T // H
    _, _, t_end, _ = extent(None, opt.query_lengths, b, T)
    split = tl.arange(0, MAX_SPLITS)
    col = tl.arange(0, BLOCK_DV)
    m = tl.load(M + row * splits + split, mask=split < splits, other=-INF)
    l = tl.load(L + row * splits + split, mask=split < splits, other=0.0)
    elements = ACC + (row * splits + split)[:, None] * Dv + col[None, :]
    acc = tl.load(elements, mask=(split < splits)[:, None] & (col < Dv)[None, :], other=0.0)
    m_all = tl.max(m, 0, keep_dims=True)
    weight = tl.exp2((m - tl.where(m_all == -INF, 0.0, m_all)) * in_base_2(opt))
    l = tl.sum(l * weight, 0, keep_dims=True)
    acc = tl.sum(acc * weight[:, None], 0, keep_dims=True)
    row = row + tl.zeros_like(m_all).to(tl.int64)
    dtype: tl.constexpr = O.dtype.element_ty
    o, lse, lse_rest = result(acc, m_all, l, row // T % H, row % T < t_end, opt, dtype)
    tl.store(O + row[:, None] * Dv + col, o.to(O.dtype.element_ty), mask=(col < Dv)[None, :])
    tl.store(LSE + row, lse)
    tl.store(LSE_REST + row, lse_rest)


def forward(q, k, v, o, lse, opt, left, right, dropout_p):
    """Writes o and lse, of which lse[1] is what the rounding of lse[0] left out."""
    (B, H, T, D), Hk, Dv = q.shape, k.shape[1], v.shape[3]
    q, k, v = rows(q), rows(k), rows(v)
    row_strides, align = strides(q, k, v)
    score_strides, bias_align = matrix_strides(opt.bias, opt.mask)
    numbers = integers(q, k, opt, left, right, dropout_p)
    group, S = numbers[1], numbers[3]
    tiles = tiles_of("decode", D, Dv, q.dtype, architecture(q.device))
    owned = B * Hk * triton.cdiv(group * T, tiles.rows)
    wanted = triton.cdiv(programs(q.device, 2, interpreted=8), owned)
    splits = min(wanted, triton.cdiv(S, 2 * tiles.columns), _MAX_SPLITS.value)
    acc = lse.new_empty(B, H, T, splits, Dv)
    m, l = lse.new_empty(2, B, H, T, splits)
    _decode_kernel[(owned * splits,)](
        q, k, v, acc, m, l, opt, *numbers, *row_strides, *score_strides, splits,
        ALIGN=align, BIAS_ALIGN=bias_align, PAGE=page_size(k, opt),
        **constants(tiles, D, Dv, q.dtype),
    )  # fmt: skip
    _combine_kernel[(B * H * T,)](
        o, *lse, acc, m, l, opt, H, T, splits,
        MAX_SPLITS=_MAX_SPLITS.value, Dv=Dv, BLOCK_DV=block(Dv),
    )  # fmt: skip
