# ruff: noqa: E741  O is the letter of the papers
"""dk and dv, summed by programs that own a tile of keys, and dq, by programs that own queries."""

import triton
import triton.language as tl

from .. import architecture
from . import bias_gradient
from .config import block, constants, tiles_of
from .tile import (
    INF,
    LOG2E,
    RUNTIME,
    Band,
    Queries,
    Scoring,
    blocks,
    extent,
    gradients,
    head_at,
    heavy,
    integers,
    key_ranges,
    keys_at,
    load_keys,
    load_rows,
    matrix,
    matrix_strides,
    minus_delta,
    owner,
    query_ranges,
    rows,
    store,
    strides,
)

PAD = tl.constexpr(128)  # shift, rest and delta are padded to this, a multiple of BLOCK_T


@triton.jit(do_not_specialize=RUNTIME)
def _delta_kernel(
    SHIFT, REST, DELTA, LSE, LSE_REST, DLSE, DO, O, opt, H, T,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    ALIGN: tl.constexpr, Dv: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Computes shift, rest and delta of each query, for ds = p (dp - delta).

    shift and rest give p = exp(late_scale (x - shift) - rest) from the values x that `scores`
    returns, since lse = late_scale shift + rest. The difference x - shift is exact even if x is
    large, and rest is small; it is stored in base 2, times log2(e). Queries that see no key, and
    the padding, get shift +inf, rest 0 and delta 0, so that p = 0 and ds = 0.
    """
    padded = tl.cdiv(T, PAD) * PAD
    tile, b, h = owner(None, padded, H, 0, False, BLOCK_T)
    O += (b * stride_ob + h * stride_oh) * ALIGN
    DO += (b * stride_dob + h * stride_doh) * ALIGN
    t0 = tile * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    row = (b * H + h) * T + t
    lse = tl.load(LSE + row, mask=t < T, other=-INF)
    lse_rest = tl.load(LSE_REST + row, mask=t < T, other=0.0)
    sees = lse != -INF
    stride_ot = tl.cast(stride_ot, tl.int64) * ALIGN
    stride_dot = tl.cast(stride_dot, tl.int64) * ALIGN
    o = load_rows(O, t0, stride_ot, sees, Dv, BLOCK_T, BLOCK_DV).to(tl.float32)
    do = load_rows(DO, t0, stride_dot, sees, Dv, BLOCK_T, BLOCK_DV).to(tl.float32)
    # forward: p = softmax(s), o = p v; so ds = p (dp - sum_s p dp), where sum_s p dp = do o
    delta = tl.sum(do * o, 1)
    # forward: lse = log sum_s exp(s); so ds = p (... + dlse)
    if DLSE is not None:
        delta -= tl.load(DLSE + row, mask=sees, other=0.0)
    scale = tl.cast(opt.late_scale, tl.float32)
    shift = lse / scale
    shift += (tl.fma(-shift, scale, lse) + lse_rest) / scale  # corrects the division's rounding
    shift = tl.where(tl.abs(shift) < INF, shift, 0.0)  # a tiny scale lets the quotient overflow
    rest = (tl.fma(-shift, scale, lse) + lse_rest) * LOG2E
    row = (b * H + h) * padded + t
    tl.store(SHIFT + row, tl.where(sees, shift, INF))
    tl.store(REST + row, tl.where(sees, rest, 0.0))
    tl.store(DELTA + row, delta)


@triton.jit(do_not_specialize=RUNTIME)
def _dkv_kernel(
    DK, DV, DO, Q, K, V, SHIFT, REST, DELTA, opt,
    H, group, T, S, documents, pages, left, right, limit,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of BLOCK_S keys of one key head."""
    tile, b, key_head = owner(opt.cu_seqlens_k, S, H // group, documents, False, BLOCK_S)
    batch, q_start, t_end, _ = extent(opt.cu_seqlens_q, opt.query_lengths, b, T)
    batch, k_start, s_end, s_rows = extent(opt.cu_seqlens_k, opt.key_lengths, b, S)
    k = keys_at(
        K, opt, b, batch, k_start, key_head, stride_kb, stride_kh, stride_ks, S, pages, ALIGN,
        None,
    )  # fmt: skip
    v = keys_at(
        V, opt, b, batch, k_start, key_head, stride_vb, stride_vh, stride_vs, S, pages, ALIGN,
        None,
    )  # fmt: skip
    h = key_head * group  # the first of the query heads
    Q += (batch * stride_qb + h * stride_qh + q_start * stride_qt) * ALIGN
    DO += (batch * stride_dob + h * stride_doh + q_start * stride_dot) * ALIGN
    padded = tl.cdiv(T, PAD) * PAD
    SHIFT += (batch * H + h) * padded + q_start
    REST += (batch * H + h) * padded + q_start
    DELTA += (batch * H + h) * padded + q_start
    queries = Queries(
        Q, DO, SHIFT, REST, DELTA, h, group, padded,
        tl.cast(stride_qh, tl.int64) * ALIGN, tl.cast(stride_qt, tl.int64) * ALIGN,
        tl.cast(stride_doh, tl.int64) * ALIGN, tl.cast(stride_dot, tl.int64) * ALIGN,
    )  # fmt: skip
    bias = matrix(stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, BIAS_ALIGN)
    mask = matrix(stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, BIAS_ALIGN)
    band = Band(t_end, s_end, left, right)
    scoring = Scoring(opt, b, H, band, bias, mask, limit)

    # The sums for keys from s_end on are meaningless; they are replaced by 0 at the end.
    s0 = tile * BLOCK_S
    first, full, full_stop, stop = query_ranges(band, s0, opt, BLOCK_T, BLOCK_S)
    exists = s0 + tl.arange(0, BLOCK_S) < s_end
    k = load_keys(k, s0, exists, None, D, BLOCK_S, BLOCK_D)
    v = load_keys(v, s0, exists, None, Dv, BLOCK_S, BLOCK_DV)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    if right is not None or opt.bias is not None or opt.mask is not None:
        dk, dv = _dkv_loop(
            dk, dv, k, v, queries, s0, scoring, first, tl.minimum(full, stop),
            True, PRECISION, D, Dv, BLOCK_T, GUARD,
        )  # fmt: skip
    dk, dv = _dkv_loop(
        dk, dv, k, v, queries, s0, scoring, full, full_stop,
        False, PRECISION, D, Dv, BLOCK_T, GUARD,
    )  # fmt: skip
    if left is not None:
        dk, dv = _dkv_loop(
            dk, dv, k, v, queries, s0, scoring, tl.maximum(full, full_stop), stop,
            True, PRECISION, D, Dv, BLOCK_T, GUARD,
        )  # fmt: skip

    if opt.seed is not None:
        dv *= tl.cast(opt.keep_scale, tl.float32)
    dk = tl.where(exists[:, None], dk * tl.cast(opt.scale, tl.float32), 0.0)
    dv = tl.where(exists[:, None], dv, 0.0)
    row = (batch * (H // group) + key_head) * S + k_start
    store(DK + row * D, dk, s0, s_rows, D, BLOCK_S, BLOCK_D)
    store(DV + row * Dv, dv, s0, s_rows, Dv, BLOCK_S, BLOCK_DV)


@triton.jit
def _dkv_loop(
    dk, dv, k, v, queries, s0, scoring, start, stop,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Adds the queries start ... stop of a group of heads to dk (without scale) and dv of a tile of
    keys. Tiles are transposed, (keys, queries), so that p and ds enter products from registers.

    Heads and tiles share one loop: with a loop over tiles inside one over heads, the compiler would
    hold in registers all that is the same for every head, and spill.
    """
    opt = scoring.opt
    band = scoring.band
    s = s0 + tl.arange(0, k.shape[0])
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_T)
    if not GUARD or tiles > 0:  # see _attend
        for i in range(queries.group * tiles):
            h = tl.cast(i // tiles, tl.int64)
            t0 = start + i % tiles * BLOCK_T
            t = t0 + tl.arange(0, BLOCK_T)
            valid = t < band.t_end
            rows = queries.padded * h + t
            if opt.cu_seqlens_q is None:
                shift = tl.load(queries.SHIFT + rows)
                rest = tl.load(queries.REST + rows)
                delta = tl.load(queries.DELTA + rows)
            else:  # the rows past t_end belong to another document, not to the padding
                shift = tl.load(queries.SHIFT + rows, mask=valid, other=INF)
                rest = tl.load(queries.REST + rows, mask=valid, other=0.0)
                delta = tl.load(queries.DELTA + rows, mask=valid, other=0.0)
            # Queries that see no key may hold anything.
            if opt.bias is not None or opt.mask is not None:
                valid = shift != INF
            elif MASKED:
                offset = band.s_end - band.t_end
                if band.right is not None:
                    valid &= t + (offset + band.right) >= 0
                if band.left is not None:
                    valid &= t + (offset - band.left) < band.s_end
            q = load_rows(
                queries.Q + h * queries.stride_qh,
                t0,
                queries.stride_qt,
                valid,
                D,
                BLOCK_T,
                k.shape[1],
            )
            do = load_rows(
                queries.DO + h * queries.stride_doh, t0, queries.stride_dot, valid,
                Dv, BLOCK_T, v.shape[1],
            )  # fmt: skip
            dp = minus_delta(delta[None, :], opt, k.shape[0], BLOCK_T)
            dp = tl.dot(v, tl.trans(do), dp, input_precision=PRECISION)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p, ds, derivative = gradients(
                x, dp, shift[None, :], rest[None, :], delta[None, :], t[None, :], s[:, None], s0,
                head_at(queries.h + h, scoring), scoring, MASKED, True, k.shape[0],
            )  # fmt: skip
            # forward: o = (p keep / (1 - dropout_p)) v
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            # forward: s = softcap tanh(scale q k^T / softcap)
            dk = tl.dot((ds * derivative).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def _dq_kernel(
    DQ, DO, Q, K, V, SHIFT, REST, DELTA, opt, H, group, T, S, documents, pages, left, right, limit,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Computes dq of BLOCK_T queries of one head."""
    tile, b, h = owner(opt.cu_seqlens_q, T, H, documents, right is not None, BLOCK_T)
    batch, q_start, t_end, t_rows = extent(opt.cu_seqlens_q, opt.query_lengths, b, T)
    batch, k_start, s_end, _ = extent(opt.cu_seqlens_k, opt.key_lengths, b, S)
    k = keys_at(
        K, opt, b, batch, k_start, h // group, stride_kb, stride_kh, stride_ks, S, pages, ALIGN,
        None,
    )  # fmt: skip
    v = keys_at(
        V, opt, b, batch, k_start, h // group, stride_vb, stride_vh, stride_vs, S, pages, ALIGN,
        None,
    )  # fmt: skip
    Q += (batch * stride_qb + h * stride_qh + q_start * stride_qt) * ALIGN
    DO += (batch * stride_dob + h * stride_doh + q_start * stride_dot) * ALIGN
    bias = matrix(stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, BIAS_ALIGN)
    mask = matrix(stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, BIAS_ALIGN)
    band = Band(t_end, s_end, left, right)
    scoring = Scoring(opt, b, H, band, bias, mask, limit)
    head = head_at(h, scoring)

    t0 = tile * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    padded = tl.cdiv(T, PAD) * PAD
    row = (batch * H + h) * padded + q_start + t
    shift = tl.load(SHIFT + row, mask=t < t_end, other=INF)
    rest = tl.load(REST + row, mask=t < t_end, other=0.0)
    delta = tl.load(DELTA + row, mask=t < t_end, other=0.0)
    stride_qt = tl.cast(stride_qt, tl.int64) * ALIGN
    stride_dot = tl.cast(stride_dot, tl.int64) * ALIGN
    sees = shift != INF
    q = load_rows(Q, t0, stride_qt, sees, D, BLOCK_T, BLOCK_D)
    do = load_rows(DO, t0, stride_dot, sees, Dv, BLOCK_T, BLOCK_DV)
    start, full, full_stop, stop = key_ranges(
        band, t0, tl.minimum(t0 + BLOCK_T, t_end) - 1, BLOCK_S
    )
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if left is not None:
        dq = _dq_loop(
            dq, q, do, shift, rest, delta, k, v, t, head, scoring, start, tl.minimum(full, stop),
            True, PRECISION, D, Dv, BLOCK_S,
        )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, shift, rest, delta, k, v, t, head, scoring, full, full_stop,
        False, PRECISION, D, Dv, BLOCK_S,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, shift, rest, delta, k, v, t, head, scoring, tl.maximum(full, full_stop), stop,
        True, PRECISION, D, Dv, BLOCK_S,
    )  # fmt: skip
    row = (batch * H + h) * T + q_start
    # In rows that see no key, dq may be NaN.
    dq = tl.where(sees[:, None], dq * tl.cast(opt.scale, tl.float32), 0.0)
    store(DQ + row * D, dq, t0, t_rows, D, BLOCK_T, BLOCK_D)


@triton.jit
def _dq_loop(
    dq, q, do, shift, rest, delta, k, v, t, head, scoring, start, stop,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds the keys start ... stop to dq (without scale) of a tile of queries."""
    for s0 in range(start, stop, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = s < scoring.band.s_end if MASKED else None
        keys = load_keys(k, s0, valid, None, D, BLOCK_S, q.shape[1])
        values = load_keys(v, s0, valid, None, Dv, BLOCK_S, do.shape[1])
        x = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        dp = minus_delta(delta[:, None], scoring.opt, q.shape[0], BLOCK_S)
        dp = tl.dot(do, tl.trans(values), dp, input_precision=PRECISION)
        _, ds, derivative = gradients(
            x, dp, shift[:, None], rest[:, None], delta[:, None], t[:, None], s[None, :], s0, head,
            scoring, MASKED, False, BLOCK_S,
        )  # fmt: skip
        # forward: s = softcap tanh(scale q k^T / softcap)
        dq = tl.dot((ds * derivative).to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


def backward(do, dlse, q, k, v, o, lse, opt, left, right, dropout_p, dq, dk, dv, dbias):
    """Writes dq, dk and dv, and returns dbias and delta. delta is (B, H, T), with T padded to a
    multiple of PAD."""
    (B, H, T, D), Hk, S, Dv = q.shape, k.shape[1], k.shape[2], v.shape[3]
    do, q, k, v, o = rows(do), rows(q), rows(k), rows(v), rows(o)
    shift, rest, delta = lse.new_empty(3, B, H, triton.cdiv(T, PAD.value) * PAD.value)
    row_strides, align = strides(do, o)
    _delta_kernel[(delta.numel() // 16,)](
        shift, rest, delta, *lse.contiguous(), None if dlse is None else dlse.contiguous(), do, o,
        opt, H, T,
        *row_strides, ALIGN=align, Dv=Dv, BLOCK_T=16, BLOCK_DV=block(Dv),
    )  # fmt: skip
    row_strides, align = strides(do, q, k, v)
    score_strides, bias_align = matrix_strides(opt.bias, opt.mask)
    numbers = integers(q, k, opt, left, right, dropout_p)
    inputs = (do, q, k, v, shift, rest, delta, opt, *numbers, *row_strides, *score_strides)
    aligns = {"ALIGN": align, "BIAS_ALIGN": bias_align}
    arch = architecture(q.device)
    tiles = tiles_of("dkv", D, Dv, q.dtype, arch, options=heavy(opt))
    grid = (Hk * blocks(B, S, tiles.columns, opt),)
    launch = aligns | constants(tiles, D, Dv, q.dtype)
    _dkv_kernel[grid](dk, dv, *inputs, **launch, GUARD=arch == 90)
    tiles = tiles_of("dq", D, Dv, q.dtype, arch, options=heavy(opt))
    grid = (H * blocks(B, T, tiles.rows, opt),)
    _dq_kernel[grid](dq, *inputs, **aligns, **constants(tiles, D, Dv, q.dtype))
    if dbias.numel() and S:
        dbias = bias_gradient.backward(dbias, inputs, aligns, delta.shape[-1])
    return dbias, delta
