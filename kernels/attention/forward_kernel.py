# ruff: noqa: E741  O and l are the letters of the papers
"""o and lse, a tile of queries at a time."""

import triton
import triton.language as tl

from .. import architecture, describable, descriptor
from .config import block, constants, tiles_of
from .tile import (
    INF,
    LOG2E,
    RUNTIME,
    Band,
    Scoring,
    blocks,
    extent,
    head_at,
    heavy,
    in_base_2,
    integers,
    keep,
    key_ranges,
    keys_at,
    load_keys,
    load_rows,
    matrix,
    matrix_strides,
    owner,
    page_size,
    rows,
    scores,
    store,
    strides,
)


@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    Q, K, V, K_DESCRIPTOR, V_DESCRIPTOR, O, LSE, LSE_REST, opt,
    H, group, T, S, documents, pages, left, right, limit,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GUARD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes o and lse of BLOCK_T queries of one head."""
    # With a limit to the right the last queries see the most keys, so their programs start first.
    block, b, h = owner(opt.cu_seqlens_q, T, H, documents, right is not None, BLOCK_T)
    batch, q_start, t_end, t_rows = extent(opt.cu_seqlens_q, opt.query_lengths, b, T)
    batch, k_start, s_end, _ = extent(opt.cu_seqlens_k, opt.key_lengths, b, S)
    Q += (batch * stride_qb + h * stride_qh + q_start * stride_qt) * ALIGN
    k = keys_at(
        K, opt, b, batch, k_start, h // group, stride_kb, stride_kh, stride_ks, S, pages,
        ALIGN, PAGE, K_DESCRIPTOR if DESCRIBED else 0,
    )  # fmt: skip
    v = keys_at(
        V, opt, b, batch, k_start, h // group, stride_vb, stride_vh, stride_vs, S, pages,
        ALIGN, PAGE, V_DESCRIPTOR if DESCRIBED else 0,
    )  # fmt: skip
    bias = matrix(stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, BIAS_ALIGN)
    mask = matrix(stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, BIAS_ALIGN)
    band = Band(t_end, s_end, left, right)

    t0 = block * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    q = load_rows(Q, t0, tl.cast(stride_qt, tl.int64) * ALIGN, t < t_end, D, BLOCK_T, BLOCK_D)
    scoring = Scoring(opt, b, H, band, bias, mask, limit)
    ranges = key_ranges(band, t0, tl.minimum(t0 + BLOCK_T, t_end) - 1, BLOCK_S)
    acc, m, l = attend(
        q, k, v, t[:, None], head_at(h, scoring), scoring, ranges,
        PAGE, PRECISION, D, Dv, BLOCK_S, BLOCK_DV, GUARD, DESCRIBED,
    )  # fmt: skip
    o, lse, lse_rest = result(acc, m, l, h, t < t_end, opt, O.dtype.element_ty)
    row = (batch * H + h) * T + q_start
    store(O + row * Dv, o, t0, t_rows, Dv, BLOCK_T, BLOCK_DV)
    tl.store(LSE + row + t, lse, mask=t < t_rows)
    tl.store(LSE_REST + row + t, lse_rest, mask=t < t_rows)


_SMALLER = tl.constexpr(8)  # weights are 2^-8 exp(s - m), except in float16: see _attend


@triton.jit
def attend(
    q, k, v, t, head, scoring, ranges,
    PAGE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, GUARD: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """(acc, m, l) of a tile of queries over the keys in `ranges` (see key_ranges). m is the maximum
    of the values that `scores` returns."""
    start, full, full_stop, stop = ranges
    acc = tl.zeros([q.shape[0], BLOCK_DV], tl.float32)
    m = tl.full([q.shape[0]], -INF, tl.float32)
    l = tl.zeros([q.shape[0]], tl.float32)
    rest = full_stop
    if scoring.band.left is not None:
        rest = tl.maximum(full, full_stop)
        acc, m, l = _attend(
            acc, m, l, q, k, v, t, head, scoring, start, tl.minimum(full, stop),
            True, PAGE, PRECISION, D, Dv, BLOCK_S, GUARD, DESCRIBED,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, k, v, t, head, scoring, full, full_stop,
        False, PAGE, PRECISION, D, Dv, BLOCK_S, GUARD, DESCRIBED,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, k, v, t, head, scoring, rest, stop,
        True, PAGE, PRECISION, D, Dv, BLOCK_S, GUARD, DESCRIBED,
    )  # fmt: skip
    return acc, m, l


@triton.jit
def _attend(
    acc, m, l, q, k, v, t, head, scoring, start, stop,
    MASKED: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_S: tl.constexpr, GUARD: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Adds the keys start ... stop to acc, m and l of a tile of queries.

    With GUARD an empty loop is branched around: ptxas serialises the asynchronous products of sm_90
    if a path leads to the end of the loop without any product.
    """
    to_base_2 = in_base_2(scoring.opt)
    # With small weights, sums of values near the largest float32 or bfloat16 do not overflow. In
    # float16 small weights would underflow, and its values cannot overflow a sum in float32.
    SMALLER: tl.constexpr = 0 if q.dtype == tl.float16 else _SMALLER
    # Values past the end of a sequence may be NaN, and a descriptor only knows that of the tensor.
    opt = scoring.opt
    ENDS: tl.constexpr = opt.key_lengths is not None or opt.cu_seqlens_k is not None
    BY_DESCRIPTOR: tl.constexpr = DESCRIBED and not (MASKED and ENDS)
    if not GUARD or start < stop:
        for s0 in range(start, stop, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            valid = s < scoring.band.s_end if MASKED else None
            keys = load_keys(k, s0, valid, PAGE, D, BLOCK_S, q.shape[1], BY_DESCRIPTOR)
            values = load_keys(v, s0, valid, PAGE, Dv, BLOCK_S, acc.shape[1], BY_DESCRIPTOR)
            x = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            x, _ = scores(x, t, s[None, :], head, scoring, MASKED)
            m_new = tl.maximum(m, tl.max(x, 1))
            # The difference comes before the factor: if large x and m were scaled first, their
            # rounding would change p by a factor.
            shift = tl.where(m_new == -INF, 0.0, m_new)
            p = tl.exp2((x - shift[:, None]) * to_base_2 - SMALLER)
            rescale = tl.exp2((m - shift) * to_base_2)
            l = l * rescale + tl.sum(p, 1)
            if scoring.opt.seed is not None:
                p = tl.where(keep(t, s0, head, scoring, False, BLOCK_S), p, 0.0)
            acc *= rescale[:, None]
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
            m = m_new
    return acc, m, l


@triton.jit
def result(acc, m, l, h, exists, opt, DTYPE: tl.constexpr):
    """(o, lse, lse_rest) of rows of head h, or of one head for each row; lse_rest is what the
    rounding of lse left out. A query that saw no key has l = 0 and m = -inf; its results are 0,
    -inf and 0. DTYPE is the dtype of q."""
    scale = tl.cast(opt.late_scale, tl.float32)
    FACTOR: tl.constexpr = 1.0 if DTYPE == tl.float16 else 2.0**_SMALLER.value
    l *= FACTOR
    factor = FACTOR
    if opt.sink is not None:  # one more key, whose value is 0
        sink = tl.load(opt.sink + h) + tl.zeros_like(m)
        lead = tl.where(sink == -INF, INF, tl.fma(m, scale, -sink))
        less = tl.exp2(-tl.abs(lead) * LOG2E)
        l = tl.where(lead >= 0, l + less, l * less + tl.exp2(sink - sink))  # NaN beside inf
        factor = tl.where(lead >= 0, FACTOR, FACTOR * less)
        m = tl.where(lead >= 0, m, sink)
        scale = tl.where(lead >= 0, scale, 1.0)
    l = tl.where(l == 0, 1.0, l)
    lse = tl.where(exists, tl.fma(m, scale, tl.log(l)), -INF)
    lse_rest = tl.where(lse == -INF, 0.0, tl.fma(m, scale, -lse) + tl.log(l))
    if opt.seed is not None:
        factor *= tl.cast(opt.keep_scale, tl.float32)
    o = tl.where(exists[:, None], acc * (factor / l)[:, None], 0.0)
    return o, lse, lse_rest


def forward(q, k, v, o, lse, opt, left, right, dropout_p):
    """Writes o and lse, of which lse[1] is what the rounding of lse[0] left out."""
    (B, H, T, D), Dv = q.shape, v.shape[3]
    q, k, v = rows(q), rows(k), rows(v)
    row_strides, align = strides(q, k, v)
    score_strides, bias_align = matrix_strides(opt.bias, opt.mask)
    numbers = integers(q, k, opt, left, right, dropout_p)
    arch = architecture(q.device)
    by_descriptors = opt.page_table is None and describable(arch, k, v)
    kernel = "forward by descriptors" if by_descriptors else "forward"
    tiles = tiles_of(kernel, D, Dv, q.dtype, arch, options=heavy(opt))
    descriptors = [None, None]
    if by_descriptors:
        descriptors = [descriptor(x, (1, 1, tiles.columns, block(x.shape[3]))) for x in (k, v)]
    grid = (H * blocks(B, T, tiles.rows, opt),)
    _forward_kernel[grid](
        q, k, v, *descriptors, o, *lse, opt, *numbers, *row_strides, *score_strides,
        ALIGN=align, BIAS_ALIGN=bias_align, PAGE=page_size(k, opt), GUARD=arch == 90,
        DESCRIBED=by_descriptors, **constants(tiles, D, Dv, q.dtype),
    )  # fmt: skip
