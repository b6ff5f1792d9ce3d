# ruff: noqa: E741  O and l are the letters of the papers
"""Softmax attention: FlashAttention-2 (Dao 2022, 2023), forward and backward.

Forward: a program owns a tile of queries and walks over the keys. It keeps a running maximum m and
sum l per row, and rescales what it has when m grows, so the scores s = scale q k^T stay on chip:

    m' = max(m, max s)   p = exp(s - m')   l = l exp(m - m') + sum p   acc = acc exp(m - m') + p v

It ends with o = acc / l and lse = m + log l. Backward: p = exp(s - lse) again, in two kernels. One
owns a tile of keys and sums dk and dv over the queries of all heads that share it; the other owns a
tile of queries and sums dq over the keys. No atomics, so every run gives the same bits.

Query t sees key s if s < key_length and, if causal, s <= t + key_length - query_length. Tiles in
which nothing is seen are skipped, and only tiles in which something is not seen compute masks. Rows
past a length are loaded as 0, so what they hold reaches nothing.

Exponentials have base 2: exp(scale x) = exp2(scale log2(e) x), a multiply-add and one instruction.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import architecture, precision, register, unavailable

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))
_PAD = tl.constexpr(128)  # lse and delta of the backward are padded to this, a multiple of BLOCK_T
_RUNTIME = """H group T S
    stride_qb stride_qh stride_qt stride_kb stride_kh stride_ks stride_vb stride_vh stride_vs
    stride_ob stride_oh stride_ot stride_dob stride_doh stride_dot""".split()  # never recompile

# (BLOCK_T, BLOCK_S, num_warps, num_stages) for head sizes up to 64, 128 and 256: large tiles that
# neither spill registers nor exceed the shared memory of an SM, which is 163 KiB on sm_80, 227 KiB
# on sm_90 and sm_100, 99 KiB on others.
_TILES = {
    ("sm_80", "forward"): ((128, 32, 4, 4), (128, 64, 8, 3), (64, 32, 8, 3)),
    ("sm_80", "dkv"): ((32, 128, 8, 3), (64, 64, 8, 3), (64, 32, 8, 2)),
    ("sm_80", "dq"): ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    ("sm_90", "forward"): ((128, 128, 8, 3), (128, 128, 8, 2), (64, 32, 8, 3)),
    ("sm_90", "dkv"): ((64, 128, 8, 3), (32, 128, 8, 3), (64, 32, 8, 3)),
    ("sm_90", "dq"): ((128, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2)),
    ("sm_100", "forward"): ((128, 64, 8, 4), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("sm_100", "dkv"): ((64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 8, 2)),
    ("sm_100", "dq"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 32, 8, 2)),
    ("others", "forward"): ((128, 32, 4, 4), (128, 64, 8, 3), (64, 32, 8, 2)),
    ("others", "dkv"): ((32, 128, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)),
    ("others", "dq"): ((128, 64, 8, 3), (128, 32, 8, 3), (32, 32, 4, 2)),
    ("float32", "forward"): ((128, 16, 8, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
    ("float32", "dkv"): ((32, 32, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
    ("float32", "dq"): ((64, 16, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
}
_FAMILIES = {80: "sm_80", 87: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}


def _config(kernel: str, D: int, Dv: int, dtype: torch.dtype, arch: int) -> dict:
    """Constants and launch options of a kernel, "forward", "dkv" or "dq", on sm_<arch>."""
    size = max(D, Dv)
    family = "float32" if dtype == torch.float32 else _FAMILIES.get(arch, "others")
    tiles = _TILES[family, kernel][0 if size <= 64 else 1 if size <= 128 else 2]
    config = dict(zip(("BLOCK_T", "BLOCK_S", "num_warps", "num_stages"), tiles, strict=True))
    sizes = {"D": D, "Dv": Dv, "BLOCK_D": _block(D), "BLOCK_DV": _block(Dv)}
    PRECISION = precision(dtype)
    if PRECISION == "tf32x3" and size > 128:
        PRECISION = "ieee"  # three products would need more registers than there are
    return config | sizes | {"PRECISION": PRECISION}


def _block(size: int) -> int:
    """A head size as tl.dot takes it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _program(blocks, H):
    """The block, batch and head of a program; the blocks of a head run one after the other."""
    pid = tl.program_id(0)
    bh = pid // blocks
    return pid % blocks, (bh // H).to(tl.int64), (bh % H).to(tl.int64)


@triton.jit
def _load(
    X, start, stride, valid,
    ALIGN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows start, start + 1, ... of X as a (ROWS, COLS) tile; 0 where a row is not valid (None: all
    are) and in columns past D."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    col = tl.arange(0, COLS)[None, :]
    stride = tl.cast(stride, tl.int64) * ALIGN
    tile = X + start * stride + row * stride + col
    if valid is None and D == COLS:
        return tl.load(tile)
    elif valid is None:
        return tl.load(tile, mask=col < D, other=0.0)
    elif D == COLS:
        return tl.load(tile, mask=valid[:, None], other=0.0)
    else:
        return tl.load(tile, mask=valid[:, None] & (col < D), other=0.0)


@triton.jit
def _store(X, x, start, end, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Writes tile x to the rows start, start + 1, ... below end of the contiguous X."""
    row = start + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    tl.store(X + row.to(tl.int64) * D + col, x.to(X.dtype.element_ty), mask=(row < end) & (col < D))


@triton.jit
def _lengths(QUERY_LENGTHS, KEY_LENGTHS, b, T, S):
    """How many queries and keys of batch b are valid."""
    t_end = T
    s_end = S
    if QUERY_LENGTHS is not None:
        t_end = tl.minimum(tl.maximum(tl.load(QUERY_LENGTHS + b), 0), T).to(tl.int32)
    if KEY_LENGTHS is not None:
        s_end = tl.minimum(tl.maximum(tl.load(KEY_LENGTHS + b), 0), S).to(tl.int32)
    return t_end, s_end


@triton.jit
def _key_range(
    t0, t_end, s_end, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """(full, stop): the tile of queries at t0 sees all keys below full, a multiple of BLOCK_S, and
    none from stop on."""
    full = s_end
    stop = s_end
    if CAUSAL:
        offset = s_end - t_end
        full = tl.maximum(t0 + offset + 1, 0)
        stop = tl.maximum(tl.minimum(t0 + BLOCK_T, t_end) + offset, 0)
    stop = tl.where(t0 < t_end, stop, 0)
    return tl.minimum(full, stop) // BLOCK_S * BLOCK_S, stop


@triton.jit
def _mask(x, t, s, t_end, s_end, CAUSAL: tl.constexpr):
    """x, with -inf where query t does not see key s."""
    visible = (s < s_end)[None, :]
    if CAUSAL:
        visible &= s[None, :] <= (t + (s_end - t_end))[:, None]
    return tl.where(visible, x, -_INF)


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_kernel(
    Q, K, V, O, LSE, QUERY_LENGTHS, KEY_LENGTHS, H, group, T, S, scale,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_T queries of one head."""
    blocks = tl.cdiv(T, BLOCK_T)
    block, b, h = _program(blocks, H)
    if CAUSAL:
        block = blocks - 1 - block  # the queries that see most keys start first
    Q += (b * stride_qb + h * stride_qh) * ALIGN
    K += (b * stride_kb + h // group * stride_kh) * ALIGN
    V += (b * stride_vb + h // group * stride_vh) * ALIGN

    t_end, s_end = _lengths(QUERY_LENGTHS, KEY_LENGTHS, b, T, S)
    t0 = block * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    full, stop = _key_range(t0, t_end, s_end, CAUSAL, BLOCK_T, BLOCK_S)

    # max(scale x) = scale max(x) needs scale >= 0: q takes the sign. -inf scale = -inf needs > 0.
    q = _load(Q, t0, stride_qt, t < t_end, ALIGN, D, BLOCK_T, BLOCK_D)
    scale = tl.cast(scale, tl.float32) * _LOG2E
    q = tl.where(scale < 0, -q, q)
    scale = tl.maximum(tl.abs(scale), 1e-30)

    acc = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_T], -_INF, tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc, m, l = _forward_loop(
        acc, m, l, q, K, V, stride_ks, stride_vs, t, 0, full, t_end, s_end, scale,
        False, CAUSAL, PRECISION, ALIGN, D, Dv, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    acc, m, l = _forward_loop(
        acc, m, l, q, K, V, stride_ks, stride_vs, t, full, stop, t_end, s_end, scale,
        True, CAUSAL, PRECISION, ALIGN, D, Dv, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    # A query that saw no key has l = 0 and m = -inf, and gets o = 0 and lse = -inf.
    l = tl.where(l == 0, 1.0, l)
    o = tl.where((t < t_end)[:, None], acc * (1 / l)[:, None], 0.0)
    lse = tl.where(t < t_end, (m + tl.log2(l)) * _LN2, -_INF)
    _store(O + (b * H + h) * T * Dv, o, t0, T, Dv, BLOCK_T, BLOCK_DV)
    tl.store(LSE + (b * H + h) * T + t, lse, mask=t < T)


@triton.jit
def _forward_loop(
    acc, m, l, q, K, V, stride_ks, stride_vs, t, start, stop, t_end, s_end, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds the keys start ... stop to acc, m and l of a tile of queries. m counts in base 2."""
    for s0 in range(start, stop, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = s < s_end if MASKED else None
        k = _load(K, s0, stride_ks, valid, ALIGN, D, BLOCK_S, BLOCK_D)
        v = _load(V, s0, stride_vs, valid, ALIGN, Dv, BLOCK_S, BLOCK_DV)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            x = _mask(x, t, s, t_end, s_end, CAUSAL)
        m_new = tl.maximum(m, tl.max(x, 1) * scale)
        shift = tl.where(m_new == -_INF, 0.0, m_new)
        p = tl.exp2(x * scale - shift[:, None])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, l


def _forward(q, k, v, query_lengths, key_lengths, causal, scale):
    B, H, T, D = q.shape
    Hk, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    o, lse = _forward_outputs(q, k, v)
    if o.numel() == 0 or S == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    q, k, v = _rows(q), _rows(k), _rows(v)
    strides, align = _strides(q, k, v)
    config = _config("forward", D, Dv, q.dtype, architecture(q.device))
    _forward_kernel[(B * H * triton.cdiv(T, config["BLOCK_T"]),)](
        q, k, v, o, lse, _packed(query_lengths), _packed(key_lengths), H, H // Hk, T, S, scale,
        *strides, ALIGN=align, CAUSAL=causal, **config,
    )  # fmt: skip
    return o, lse


def _forward_outputs(q, k, v, *options):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which is all that the kernels ask of its strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of batch, head and row in units of 1, 2, 4 or 8 elements, and that unit: it tells the
    compiler how rows are aligned, and is nearly always a matter of the head size alone."""
    strides = [x.stride(i) if x.shape[i] > 1 else 0 for x in tensors for i in range(3)]
    align = math.gcd(8, *strides)
    return [s // align for s in strides], align


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit(do_not_specialize=_RUNTIME)
def _delta_kernel(
    LSE2, DELTA, LSE, DLSE, DO, O, H, T,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    ALIGN: tl.constexpr, Dv: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """lse in base 2, and delta, what the ds of all keys of a query have in common.

    Queries that see no key, and the padding, get lse +inf and delta 0, so that p = 0 and ds = 0.
    """
    padded = tl.cdiv(T, _PAD) * _PAD
    block, b, h = _program(padded // BLOCK_T, H)
    O += (b * stride_ob + h * stride_oh) * ALIGN
    DO += (b * stride_dob + h * stride_doh) * ALIGN
    t0 = block * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    lse = tl.load(LSE + (b * H + h) * T + t, mask=t < T, other=-_INF)
    sees = lse > -_INF
    o = _load(O, t0, stride_ot, sees, ALIGN, Dv, BLOCK_T, BLOCK_DV).to(tl.float32)
    do = _load(DO, t0, stride_dot, sees, ALIGN, Dv, BLOCK_T, BLOCK_DV).to(tl.float32)
    # forward: p = softmax(s), o = p v; so ds = p (dp - sum_s p dp), where sum_s p dp = do o
    delta = tl.sum(do * o, 1)
    # forward: lse = log sum_s exp(s); so ds = p (... + dlse)
    if DLSE is not None:
        delta -= tl.load(DLSE + (b * H + h) * T + t, mask=sees, other=0.0)
    tl.store(LSE2 + (b * H + h) * padded + t, tl.where(sees, lse * _LOG2E, _INF))
    tl.store(DELTA + (b * H + h) * padded + t, delta)


@triton.jit(do_not_specialize=_RUNTIME)
def _dkv_kernel(
    DK, DV, DO, Q, K, V, LSE2, DELTA, QUERY_LENGTHS, KEY_LENGTHS, H, group, T, S, scale,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_S keys of one key head."""
    block, b, h = _program(tl.cdiv(S, BLOCK_S), H // group)
    K += (b * stride_kb + h * stride_kh) * ALIGN
    V += (b * stride_vb + h * stride_vh) * ALIGN
    Q += (b * stride_qb + h * group * stride_qh) * ALIGN  # the first of the query heads
    DO += (b * stride_dob + h * group * stride_doh) * ALIGN
    padded = tl.cdiv(T, _PAD) * _PAD
    LSE2 += (b * H + h * group) * padded
    DELTA += (b * H + h * group) * padded

    # The queries first ... full see some of these keys, those from full on see them all. What is
    # computed for keys from s_end on has no meaning, and is dropped at the end.
    t_end, s_end = _lengths(QUERY_LENGTHS, KEY_LENGTHS, b, T, S)
    offset = s_end - t_end
    s0 = block * BLOCK_S
    t_end = tl.where(s0 < s_end, t_end, 0)
    first = 0
    full = 0
    if CAUSAL:
        first = tl.maximum(s0 - offset, 0) // BLOCK_T * BLOCK_T
        full = tl.cdiv(tl.maximum(s0 + BLOCK_S - 1 - offset, 0), BLOCK_T) * BLOCK_T

    s = s0 + tl.arange(0, BLOCK_S)
    k = _load(K, s0, stride_ks, s < s_end, ALIGN, D, BLOCK_S, BLOCK_D)
    v = _load(V, s0, stride_vs, s < s_end, ALIGN, Dv, BLOCK_S, BLOCK_DV)
    scale = tl.cast(scale, tl.float32)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    if CAUSAL:
        dk, dv = _dkv_loop(
            dk, dv, k, v, Q, DO, LSE2, DELTA, stride_qh, stride_qt, stride_doh, stride_dot,
            group, padded, s, first, tl.minimum(full, t_end), t_end, offset, scale * _LOG2E,
            True, PRECISION, ALIGN, D, Dv, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dk, dv = _dkv_loop(
        dk, dv, k, v, Q, DO, LSE2, DELTA, stride_qh, stride_qt, stride_doh, stride_dot,
        group, padded, s, full, t_end, t_end, offset, scale * _LOG2E,
        False, PRECISION, ALIGN, D, Dv, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    dk = tl.where((s < s_end)[:, None], dk * scale, 0.0)
    dv = tl.where((s < s_end)[:, None], dv, 0.0)
    row = (b * (H // group) + h) * S
    _store(DK + row * D, dk, s0, S, D, BLOCK_S, BLOCK_D)
    _store(DV + row * Dv, dv, s0, S, Dv, BLOCK_S, BLOCK_DV)


@triton.jit
def _dkv_loop(
    dk, dv, k, v, Q, DO, LSE2, DELTA, stride_qh, stride_qt, stride_doh, stride_dot,
    group, padded, s, start, stop, t_end, offset, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds the queries start ... stop of a group of heads to dk (without scale) and dv of a tile of
    keys. Tiles are transposed, (keys, queries), so that p and ds enter products from registers.

    Heads and tiles share one loop: around an inner loop, the compiler would hold in registers all
    that is the same for every head, and spill.
    """
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_T)
    for i in range(group * tiles):
        h = tl.cast(i // tiles, tl.int64)
        t0 = start + i % tiles * BLOCK_T
        t = t0 + tl.arange(0, BLOCK_T)
        valid = t < t_end
        if MASKED:
            valid &= t + offset >= 0
        q = _load(Q + h * stride_qh * ALIGN, t0, stride_qt, valid, ALIGN, D, BLOCK_T, BLOCK_D)
        do = _load(DO + h * stride_doh * ALIGN, t0, stride_dot, valid, ALIGN, Dv, BLOCK_T, BLOCK_DV)
        lse2 = tl.load(LSE2 + h * padded + t0 + tl.arange(0, BLOCK_T))
        delta = tl.load(DELTA + h * padded + t0 + tl.arange(0, BLOCK_T))
        # forward: o = p v, p = softmax(s); delta is subtracted as the sum starts
        dp = tl.zeros([BLOCK_S, BLOCK_T], tl.float32) - delta[None, :]
        dp = tl.dot(v, tl.trans(do), dp, input_precision=PRECISION)
        # forward: s = scale q k^T, p = exp(s - lse)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse2[None, :]
        if MASKED:
            x = tl.where(s[:, None] <= (t + offset)[None, :], x, -_INF)
        p = tl.exp2(x)
        ds = p * dp
        # forward: o = p v
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        # forward: s = scale q k^T
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_RUNTIME)
def _dq_kernel(
    DQ, DO, Q, K, V, LSE2, DELTA, QUERY_LENGTHS, KEY_LENGTHS, H, group, T, S, scale,
    stride_dob, stride_doh, stride_dot, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_T queries of one head."""
    blocks = tl.cdiv(T, BLOCK_T)
    block, b, h = _program(blocks, H)
    if CAUSAL:
        block = blocks - 1 - block
    Q += (b * stride_qb + h * stride_qh) * ALIGN
    DO += (b * stride_dob + h * stride_doh) * ALIGN
    K += (b * stride_kb + h // group * stride_kh) * ALIGN
    V += (b * stride_vb + h // group * stride_vh) * ALIGN
    padded = tl.cdiv(T, _PAD) * _PAD
    LSE2 += (b * H + h) * padded
    DELTA += (b * H + h) * padded

    t_end, s_end = _lengths(QUERY_LENGTHS, KEY_LENGTHS, b, T, S)
    t0 = block * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    full, stop = _key_range(t0, t_end, s_end, CAUSAL, BLOCK_T, BLOCK_S)

    lse2 = tl.load(LSE2 + t)
    delta = tl.load(DELTA + t)
    q = _load(Q, t0, stride_qt, lse2 < _INF, ALIGN, D, BLOCK_T, BLOCK_D)
    do = _load(DO, t0, stride_dot, lse2 < _INF, ALIGN, Dv, BLOCK_T, BLOCK_DV)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    scale = tl.cast(scale, tl.float32)
    dq = _dq_loop(
        dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, t, 0, full, t_end, s_end,
        scale * _LOG2E, False, CAUSAL, PRECISION, ALIGN, D, Dv, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, t, full, stop, t_end, s_end,
        scale * _LOG2E, True, CAUSAL, PRECISION, ALIGN, D, Dv, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    _store(DQ + (b * H + h) * T * D, dq * scale, t0, T, D, BLOCK_T, BLOCK_D)


@triton.jit
def _dq_loop(
    dq, q, do, lse2, delta, K, V, stride_ks, stride_vs, t, start, stop, t_end, s_end, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds the keys start ... stop to dq (without scale) of a tile of queries."""
    for s0 in range(start, stop, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = s < s_end if MASKED else None
        k = _load(K, s0, stride_ks, valid, ALIGN, D, BLOCK_S, BLOCK_D)
        v = _load(V, s0, stride_vs, valid, ALIGN, Dv, BLOCK_S, BLOCK_DV)
        # forward: s = scale q k^T, p = exp(s - lse)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse2[:, None]
        if MASKED:
            x = _mask(x, t, s, t_end, s_end, CAUSAL)
        p = tl.exp2(x)
        # forward: o = p v, p = softmax(s)
        dp = tl.zeros([BLOCK_T, BLOCK_S], tl.float32) - delta[:, None]
        dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
        ds = p * dp
        # forward: s = scale q k^T
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


def _backward(do, dlse, q, k, v, o, lse, query_lengths, key_lengths, causal, scale):
    B, H, T, D = q.shape
    Hk, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    dq, dk, dv = _backward_outputs(do, dlse, q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    do, q, k, v, o = _rows(do), _rows(q), _rows(k), _rows(v), _rows(o)
    lse2, delta = lse.new_empty(2, B * H, triton.cdiv(T, _PAD.value) * _PAD.value)
    strides, align = _strides(do, o)
    _delta_kernel[(delta.numel() // 16,)](
        lse2, delta, lse.contiguous(), _packed(dlse), do, o, H, T, *strides,
        ALIGN=align, Dv=Dv, BLOCK_T=16, BLOCK_DV=_block(Dv),
    )  # fmt: skip
    strides, align = _strides(do, q, k, v)
    inputs = (
        do, q, k, v, lse2, delta, _packed(query_lengths), _packed(key_lengths),
        H, H // Hk, T, S, scale, *strides,
    )  # fmt: skip
    config = _config("dkv", D, Dv, q.dtype, architecture(q.device))
    grid = (B * Hk * triton.cdiv(S, config["BLOCK_S"]),)
    _dkv_kernel[grid](dk, dv, *inputs, ALIGN=align, CAUSAL=causal, **config)
    config = _config("dq", D, Dv, q.dtype, architecture(q.device))
    grid = (B * H * triton.cdiv(T, config["BLOCK_T"]),)
    _dq_kernel[grid](dq, *inputs, ALIGN=align, CAUSAL=causal, **config)
    return dq, dk, dv


def _backward_outputs(do, dlse, q, k, v, *options):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def why_not(q, k, v, query_lengths, key_lengths, causal, scale, *, needs_grad) -> str | None:
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes head sizes up to 256, got {q.shape[-1]} and {v.shape[-1]}"
    return unavailable(q)


forward = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? query_lengths, Tensor? key_lengths, "
    "bool causal, float scale) -> (Tensor o, Tensor lse)",
    _forward,
    _forward_outputs,
)
backward = register(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
    "Tensor lse, Tensor? query_lengths, Tensor? key_lengths, bool causal, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_outputs,
)
