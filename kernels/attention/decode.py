# ruff: noqa: E741  O and l are the letters of the papers
"""o and lse of few queries over many keys, which are split among programs.

The rows of a tile are the queries of all heads that share a key head, so that keys are read once.
Each program leaves the o and lse of its part of the keys; a second kernel weighs and adds them.
"""

import functools

import torch
import triton
import triton.language as tl

from .. import architecture
from .config import _config
from .forward_kernel import attend, no_keys, result
from .tile import (
    INF,
    LN2,
    RUNTIME,
    Band,
    Scoring,
    extent,
    head_at,
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

_MAX_ROWS = 64
_MIN_S = 256
_MAX_SPLITS = tl.constexpr(64)


def serves(q, k, opt) -> bool:
    """Whether a call is one of few queries and many keys."""
    S = k.shape[2] if opt.page_table is None else k.shape[2] * opt.page_table.shape[1]
    few = q.shape[1] // k.shape[1] * q.shape[2] <= _MAX_ROWS
    return few and S >= _MIN_S and opt.cu_seqlens_q is None


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=RUNTIME)
def _decode_kernel(
    Q, K, V, O, LSE, opt, H, group, T, S, documents, pages, left, right, limit,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, splits,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o (B, H, T, splits, Dv) and lse (B, H, T, splits) in base 2 of BLOCK_T rows of one key head
    over one of the parts of its keys."""
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
    m, l = no_keys(h, opt, BLOCK_T)
    m = tl.where(split == 0, m, -INF)  # the sink belongs to the first part
    l = tl.where(split == 0, l, 0.0)
    acc, m, l = attend(
        m, l, q, k, v, t[:, None], head_at(h[:, None], scoring), scoring, ranges,
        PAGE, PRECISION, D, Dv, BLOCK_S, BLOCK_DV,
    )  # fmt: skip
    o, lse2 = result(acc, m, l, exists, opt)
    row = ((b * H + h) * T + t) * splits + split
    col = tl.arange(0, BLOCK_DV)
    tl.store(O + row[:, None] * Dv + col, o, mask=in_group[:, None] & (col < Dv)[None, :])
    tl.store(LSE + row, lse2, mask=in_group)


@triton.jit(do_not_specialize=RUNTIME)
def _combine_kernel(
    O, LSE, PART_O, PART_LSE, splits,
    MAX_SPLITS: tl.constexpr, Dv: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o and lse of one query from those of the parts of its keys."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MAX_SPLITS)
    col = tl.arange(0, BLOCK_DV)
    lse = tl.load(PART_LSE + row * splits + split, mask=split < splits, other=-INF)
    elements = PART_O + (row * splits + split)[:, None] * Dv + col[None, :]
    o = tl.load(elements, mask=(split < splits)[:, None] & (col < Dv)[None, :], other=0.0)
    m = tl.max(lse, 0)
    p = tl.exp2(lse - tl.where(m == -INF, 0.0, m))
    l = tl.sum(p, 0)
    l = tl.where(l == 0, 1.0, l)
    o = tl.sum(o * (p / l)[:, None], 0)
    tl.store(O + row * Dv + col, o.to(O.dtype.element_ty), mask=col < Dv)
    tl.store(LSE + row, (m + tl.log2(l)) * LN2)


def forward(q, k, v, o, lse, opt, left, right, dropout_p):
    (B, H, T, D), Hk, Dv = q.shape, k.shape[1], v.shape[3]
    q, k, v = rows(q), rows(k), rows(v)
    row_strides, align = strides(q, k, v)
    score_strides, bias_align = matrix_strides(opt.bias, opt.mask)
    numbers = integers(q, k, opt, left, right, dropout_p)
    group, S = numbers[1], numbers[3]
    config = _config("decode", D, Dv, q.dtype, architecture(q.device))
    programs = B * Hk * triton.cdiv(group * T, config["BLOCK_T"])
    wanted = triton.cdiv(2 * processors(q.device), programs)
    splits = min(wanted, triton.cdiv(S, 2 * config["BLOCK_S"]), _MAX_SPLITS.value)
    part_o = lse.new_empty(B, H, T, splits, Dv)
    part_lse = lse.new_empty(B, H, T, splits)
    _decode_kernel[(programs * splits,)](
        q, k, v, part_o, part_lse, opt, *numbers, *row_strides, *score_strides, splits,
        ALIGN=align, BIAS_ALIGN=bias_align, PAGE=page_size(k, opt), **config,
    )  # fmt: skip
    _combine_kernel[(B * H * T,)](
        o, lse, part_o, part_lse, splits,
        MAX_SPLITS=_MAX_SPLITS.value, Dv=Dv, BLOCK_DV=config["BLOCK_DV"],
    )  # fmt: skip
