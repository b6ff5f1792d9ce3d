"""Functions of all attention kernels: arguments, the place of a program, loads, scores of a tile.

A tile of scores is (queries, keys), or transposed (keys, queries). t and s are the indices of its
queries and keys within their batch or document. They broadcast to the tile: t is (rows, 1) and s
(1, columns) or, transposed, the other way round. So the functions here serve both kinds of tiles.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tfkern.reference.attention import Arguments

from .. import dropout

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))

# The integer arguments that vary from call to call: no kernel is compiled again for their values.
RUNTIME = """H group T S documents pages left right limit
    stride_qb stride_qh stride_qt stride_kb stride_kh stride_ks stride_vb stride_vh stride_vs
    stride_ob stride_oh stride_ot stride_dob stride_doh stride_dot
    stride_bias_b stride_bias_h stride_bias_t stride_mask_b stride_mask_h stride_mask_t
    splits padded loops_b loops_h loops_t loops_s bias_heads bias_size parts""".split()


class Options(NamedTuple):
    """Tensors and floats of a call. Each set of fields that are None has kernels of its own."""

    scale: float  # factor of the products q k^T, not negative
    late_scale: float  # positive factor that turns the values `scores` returns into scores
    softcap: float | None
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    page_table: Tensor | None
    seed: Tensor | None
    keep_scale: float | None  # 1 / (1 - dropout_p)


class Band(NamedTuple):
    """The limits of sight: query t < t_end sees key s < s_end if -left <= s - t - offset <= right,
    where offset = s_end - t_end. left and right are None if there is no limit."""

    t_end: object
    s_end: object
    left: object
    right: object


class Matrix(NamedTuple):
    """The strides of bias or mask, (B, H, T, S), in elements; 0 along broadcast dimensions."""

    stride_b: object
    stride_h: object
    stride_t: object
    stride_s: object


class Head(NamedTuple):
    """The inputs that the scores of a query head need, beside q and k."""

    bias: object  # pointer to bias of the head
    mask: object  # pointer to mask of the head
    slope: object  # ALiBi slope
    counter: object  # b H + h, a word of the dropout's counter


class Scoring(NamedTuple):
    """The arguments that turn products into scores in batch or document b."""

    opt: object
    b: object
    H: object
    band: object
    bias: object
    mask: object
    limit: object  # the largest draw that drops an element


class Queries(NamedTuple):
    """The queries of the `group` heads from h on, which share a key head."""

    Q: object
    DO: object
    SHIFT: object
    REST: object
    DELTA: object
    h: object
    group: object
    padded: object  # rows of a head of SHIFT, REST and DELTA
    stride_qh: object
    stride_qt: object
    stride_doh: object
    stride_dot: object


class Keys(NamedTuple):
    """The keys, or the values, of one head. Row s lies at pointer + s stride or, with pages, at
    pointer + table[s // PAGE] stride_page + (s % PAGE) stride. The descriptor, if there is one, is
    of the whole tensor and has the row at (b, h, start + s)."""

    pointer: object
    stride: object
    table: object
    stride_page: object
    pages: object
    descriptor: object
    b: object
    h: object
    start: object


def options(a: Arguments, scale: float) -> Options:
    """The Options of a call. `scale` is the factor that kernels multiply products by."""
    softcap = a.softcap if a.softcap > 0 else None
    late_scale = softcap or max(scale, 1e-45)  # the least float32 there is
    if a.bias is not None or a.alibi_slopes is not None:
        late_scale = 1.0
    return Options(
        scale,
        late_scale,
        softcap,
        a.bias,
        a.mask,
        _float(a.alibi_slopes),
        _float(a.sink),
        _packed(a.query_lengths),
        _packed(a.key_lengths),
        _packed(a.cu_seqlens_q),
        _packed(a.cu_seqlens_k),
        _packed(a.page_table),
        a.seed if a.dropout_p > 0 else None,
        dropout(a.dropout_p)[1],
    )


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def integers(q, k, opt: Options, left, right, dropout_p) -> tuple:
    """The integer arguments of the kernels that follow the options."""
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    if opt.page_table is not None:
        S *= opt.page_table.shape[1]
    if left is not None and right is not None and left + right < 0:
        left = right = -(T + S)  # no query sees a key
    left, right = (None if x is None else max(-(T + S), min(x, T + S)) for x in (left, right))
    limit = None if opt.seed is None else dropout(dropout_p)[0]
    return H, H // k.shape[1], T, S, documents(opt), k.shape[0], left, right, limit


def heavy(opt: Options) -> bool:
    """Tells whether a call needs more registers than causal attention with lengths."""
    several = (opt.softcap, opt.bias, opt.mask, opt.alibi_slopes, opt.cu_seqlens_q, opt.seed)
    return any(x is not None for x in several)


def documents(opt: Options) -> int:
    """The number of documents of a packed batch; 0 if the batch is not packed."""
    return 0 if opt.cu_seqlens_q is None else opt.cu_seqlens_q.shape[0] - 1


def page_size(k: Tensor, opt: Options) -> int | None:
    """The number of keys of a page; None without pages."""
    return None if opt.page_table is None else k.shape[2]


def blocks(B: int, N: int, BLOCK: int, opt: Options) -> int:
    """The number of programs that own the N rows of a head in all batches: see `owner`."""
    packed = opt.cu_seqlens_q is not None
    return N // BLOCK + documents(opt) if packed else B * triton.cdiv(N, BLOCK)


def rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows are contiguous: kernels ask no more of its strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[list[int], int]:
    """(strides, unit): strides of batch, head and row in units of 1, 2, 4 or 8 elements. The unit
    tells the compiler how rows are aligned, and nearly always depends on the head size alone."""
    all_strides = [x.stride(i) if x.shape[i] > 1 else 0 for x in tensors for i in range(3)]
    align = math.gcd(8, *all_strides)
    return [s // align for s in all_strides], align


def matrix_strides(*matrices: Tensor | None) -> tuple[list[int], int]:
    """(strides, unit): strides of bias and mask, 0 along dimensions that they broadcast along. The
    strides of batch, head and query are in units of 8 elements if all are multiples of 8, else of
    1; the stride of keys is in elements."""
    found = [[0 if x is None or n == 1 else s for n, s in _sizes_and_strides(x)] for x in matrices]
    align = 8 if all(s % 8 == 0 for matrix in found for s in matrix[:3]) else 1
    return [s // align if i < 3 else s for matrix in found for i, s in enumerate(matrix)], align


def _sizes_and_strides(x: Tensor | None):
    return ((1, 0),) * 4 if x is None else zip(x.shape, x.stride(), strict=True)


@triton.jit
def owner(CU_SEQLENS, N, H, documents, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """(block, b, h) of a program that owns BLOCK of N rows. Programs of consecutive blocks of a
    head follow one another, with REVERSE from the last block to the first.

    In a packed batch, the blocks of document b start at cu_seqlens[b] // BLOCK + b, which leaves
    enough for each document. There are N // BLOCK + documents of them; a surplus block has no row
    within its document. REVERSE has no effect.
    """
    pid = tl.program_id(0)
    if CU_SEQLENS is None:
        blocks = tl.cdiv(N, BLOCK)
        bh = pid // blocks
        block = pid % blocks
        if REVERSE:
            block = blocks - 1 - block
        return block, (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    else:
        blocks = N // BLOCK + documents
        block = pid % blocks
        low = tl.cast(0, tl.int32)
        high = documents - 1
        while low < high:  # finds the last document that starts at this block or before
            middle = (low + high + 1) // 2
            starts = (tl.load(CU_SEQLENS + middle) // BLOCK + middle) <= block
            low = tl.where(starts, middle, low)
            high = tl.where(starts, high, middle - 1)
        first = (_clamp(tl.load(CU_SEQLENS + low), 0, N) // BLOCK + low).to(tl.int32)
        return tl.maximum(block - first, 0), low.to(tl.int64), (pid // blocks).to(tl.int64)


@triton.jit
def extent(CU_SEQLENS, LENGTHS, b, N):
    """(batch, start, end, rows) of batch or document b: its rows are start, start + 1, ... of
    `batch`. The first `end` of them exist, and results are written for the first `rows`."""
    if CU_SEQLENS is not None:
        start = _clamp(tl.load(CU_SEQLENS + b), 0, N).to(tl.int64)
        end = (_clamp(tl.load(CU_SEQLENS + b + 1), start, N) - start).to(tl.int32)
        return b * 0, start, end, end
    elif LENGTHS is not None:
        return b, b * 0, _clamp(tl.load(LENGTHS + b), 0, N).to(tl.int32), N
    else:
        return b, b * 0, N, N


@triton.jit
def matrix(stride_b, stride_h, stride_t, stride_s, ALIGN: tl.constexpr):
    """The Matrix of strides that a kernel takes in units of ALIGN elements."""
    return Matrix(
        tl.cast(stride_b, tl.int64) * ALIGN, tl.cast(stride_h, tl.int64) * ALIGN,
        tl.cast(stride_t, tl.int64) * ALIGN, tl.cast(stride_s, tl.int64),
    )  # fmt: skip


@triton.jit
def keys_at(
    X, opt, b, batch, start, h, stride_b, stride_h, stride_s, S, pages,
    ALIGN: tl.constexpr, PAGE: tl.constexpr, descriptor=0,
):  # fmt: skip
    """The Keys (keys or values) of key head h in batch or document b."""
    stride_b = tl.cast(stride_b, tl.int64) * ALIGN
    stride_s = tl.cast(stride_s, tl.int64) * ALIGN
    X += h * stride_h * ALIGN
    if PAGE is None:
        X += batch * stride_b + start * stride_s
        return Keys(X, stride_s, 0, 0, 0, descriptor, batch, h, start)
    else:
        table = opt.page_table + b * (S // PAGE)
        return Keys(X, stride_s, table, stride_b, pages, 0, batch, h, start)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def load(X, offsets, valid, D: tl.constexpr, COLS: tl.constexpr):
    """The rows at X + offsets as a (rows, COLS) tile. Columns past D and rows that are not valid
    are 0; if `valid` is None, all rows are valid."""
    col = tl.arange(0, COLS)[None, :]
    tile = X + offsets[:, None] + col
    if valid is None and D == COLS:
        return tl.load(tile)
    elif valid is None:
        return tl.load(tile, mask=col < D, other=0.0)
    elif D == COLS:
        return tl.load(tile, mask=valid[:, None], other=0.0)
    else:
        return tl.load(tile, mask=valid[:, None] & (col < D), other=0.0)


@triton.jit
def load_rows(X, start, stride, valid, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows start, start + 1, ... of X, as `load` returns them."""
    return load(X + start * stride, tl.arange(0, ROWS).to(tl.int64) * stride, valid, D, COLS)


@triton.jit
def load_keys(
    keys, s0, valid,
    PAGE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DESCRIBED: tl.constexpr = False,
):  # fmt: skip
    """Keys or values s0, s0 + 1, ..., as `load` returns them; with DESCRIBED by their descriptor,
    where only rows past the end of the tensor are 0."""
    if DESCRIBED:
        start = (keys.start + s0).to(tl.int32)
        place = [keys.b.to(tl.int32), keys.h.to(tl.int32), start, 0]
        return keys.descriptor.load(place).reshape(ROWS, COLS)
    elif PAGE is None:
        return load_rows(keys.pointer, s0, keys.stride, valid, D, ROWS, COLS)
    else:
        s = s0 + tl.arange(0, ROWS)
        page = tl.load(keys.table + s // PAGE, mask=valid, other=None if valid is None else 0)
        page = _clamp(page.to(tl.int64), 0, keys.pages - 1)
        offsets = page * keys.stride_page + (s % PAGE).to(tl.int64) * keys.stride
        return load(keys.pointer, offsets, valid, D, COLS)


@triton.jit
def store(X, x, start, end, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Writes tile x to the rows start, start + 1, ... below end of the contiguous X."""
    row = start + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    tl.store(X + row.to(tl.int64) * D + col, x.to(X.dtype.element_ty), mask=(row < end) & (col < D))


@triton.jit
def head_at(h, scoring):
    """The Head of query head h, or of one head for each row of a tile."""
    opt = scoring.opt
    b = scoring.b
    bias, mask, slope = 0, 0, 0.0  # functions cannot return None
    if opt.bias is not None:
        bias = opt.bias + b * scoring.bias.stride_b + h * scoring.bias.stride_h
    if opt.mask is not None:
        mask = opt.mask + b * scoring.mask.stride_b + h * scoring.mask.stride_h
    if opt.alibi_slopes is not None:
        slope = tl.load(opt.alibi_slopes + b * scoring.H + h)
    return Head(bias, mask, slope, b * scoring.H + h)


@triton.jit
def key_ranges(band, t_first, t_last, BLOCK_S: tl.constexpr):
    """(start, full, full_stop, stop): some queries of t_first ... t_last see keys from start to
    stop, and all of them see the keys from full to full_stop. All but stop are multiples of
    BLOCK_S."""
    s_end = band.s_end
    offset = s_end - band.t_end
    start = 0
    full = 0
    full_stop = s_end
    stop = s_end
    if band.right is not None:
        full_stop = _clamp(t_first + offset + band.right + 1, 0, s_end)
        stop = _clamp(t_last + offset + band.right + 1, 0, s_end)
    stop = tl.where(t_first <= t_last, stop, 0)
    if band.left is not None:
        start = _clamp(t_first + offset - band.left, 0, stop) // BLOCK_S * BLOCK_S
        full = tl.cdiv(_clamp(t_last + offset - band.left, 0, s_end), BLOCK_S) * BLOCK_S
    return start, full, tl.minimum(full_stop, stop) // BLOCK_S * BLOCK_S, stop


@triton.jit
def query_ranges(band, s0, opt, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """(start, full, full_stop, stop): queries from start to stop see some of the BLOCK_S keys from
    s0 on, and queries from full to full_stop see all of them. start and full are multiples of
    BLOCK_T; full_stop is a multiple of BLOCK_T, or equals t_end."""
    s_last = tl.minimum(s0 + BLOCK_S, band.s_end) - 1
    t_end = tl.where(s0 <= s_last, band.t_end, 0)
    offset = band.s_end - band.t_end
    start = 0
    full = 0
    full_stop = t_end
    stop = t_end
    if band.right is not None:
        start = tl.maximum(s0 - offset - band.right, 0) // BLOCK_T * BLOCK_T
        full = tl.cdiv(tl.maximum(s_last - offset - band.right, 0), BLOCK_T) * BLOCK_T
    if band.left is not None:
        stop = _clamp(s_last - offset + band.left + 1, 0, t_end)
        full_stop = _clamp(s0 - offset + band.left + 1, 0, t_end) // BLOCK_T * BLOCK_T
    if opt.bias is not None or opt.mask is not None:  # they must not be read beyond s_end
        full = tl.where(s0 + BLOCK_S > band.s_end, tl.cdiv(t_end, BLOCK_T) * BLOCK_T, full)
    return start, full, full_stop, stop


@triton.jit
def scores(x, t, s, head, scoring, MASKED: tl.constexpr):
    """(values, derivative): values times late_scale are the scores of the products x = q k^T, and
    derivative is that of the softcap. Unless MASKED, all queries that exist see all keys.

    Bias and ALiBi are added in natural units: a bias of the lowest finite number would overflow if
    it were multiplied by log2(e). Forward and backward round at the same steps, so that they get
    the same scores.
    """
    opt = scoring.opt
    band = scoring.band
    scale = tl.cast(opt.scale, tl.float32)
    derivative = 1.0
    if opt.softcap is not None:
        softcap = tl.cast(opt.softcap, tl.float32)
        x = tanh(x * (scale / softcap))
        derivative = 1 - x * x
        scale = softcap
    if opt.bias is not None:
        added = _elements(scoring.bias, head.bias, t, s, band, MASKED).to(tl.float32)
        if opt.alibi_slopes is not None:
            added = tl.fma(-head.slope, _distance(t, s, band), added)
        x = tl.fma(x, scale, added)
    elif opt.alibi_slopes is not None:
        x = tl.fma(x, scale, -head.slope * _distance(t, s, band))
    if opt.mask is not None:
        x = tl.where(_elements(scoring.mask, head.mask, t, s, band, MASKED) != 0, x, -INF)
    if MASKED:
        x = tl.where(_visible(t, s, band), x, -INF)
    return x, derivative


@triton.jit
def _distance(t, s, band):
    return tl.abs((t + (band.s_end - band.t_end)).to(tl.float32) - s.to(tl.float32))


@triton.jit
def _elements(matrix, head, t, s, band, MASKED: tl.constexpr):
    """A tile of bias or mask; 0 where no query or, if MASKED, no key exists."""
    elements = head + t * matrix.stride_t + s * matrix.stride_s
    exists = t < band.t_end
    if MASKED:  # a condition on s would split the loads of whole tiles into single elements
        exists &= s < band.s_end
    return tl.load(elements, mask=exists, other=0)


@triton.jit
def _visible(t, s, band):
    visible = s < band.s_end
    offset = band.s_end - band.t_end
    if band.right is not None:
        visible &= s <= t + (offset + band.right)
    if band.left is not None:
        visible &= s >= t + (offset - band.left)
    return visible


@triton.jit
def tanh(x):
    """tanh(x) = (e^2x - 1) / (e^2x + 1). For |x| <= 1 the numerator would cancel, so the continued
    fraction x / (1 + x^2 / (3 + x^2 / (5 + x^2 / (7 + x^2 / 9)))) is used."""
    e = tl.exp2(tl.minimum(tl.maximum(x, -10.0), 10.0) * (2 * LOG2E))
    x2 = x * x
    large = tl.abs(x) > 1
    above = tl.where(large, e - 1, x * (945 + x2 * (105 + x2)))
    return above / tl.where(large, e + 1, 945 + x2 * (420 + x2 * 15))


@triton.jit
def keep(t, s0, head, scoring, TRANSPOSED: tl.constexpr, BLOCK_S: tl.constexpr):
    """The elements that dropout keeps. Element (t, s) takes lane s % 4 of counter
    (s // 4, t, head.counter, 0)."""
    group = s0 // 4 + tl.arange(0, BLOCK_S // 4)
    group = group[:, None] if TRANSPOSED else group[None, :]
    zero = tl.zeros_like(group) + tl.zeros_like(t)
    group = (group + zero).to(tl.uint32)
    a, b, c, d = tl.philox(
        tl.load(scoring.opt.seed), group, (t + zero).to(tl.uint32),
        (head.counter + zero).to(tl.uint32), zero.to(tl.uint32),
    )  # fmt: skip
    lanes = tl.join(tl.join(a, c), tl.join(b, d)) > tl.cast(scoring.limit, tl.uint32)
    if TRANSPOSED:
        return tl.permute(lanes, 0, 2, 3, 1).reshape(BLOCK_S, t.shape[1])
    else:
        return lanes.reshape(t.shape[0], BLOCK_S)


@triton.jit
def gradients(
    x, dp, shift, rest, delta, t, s, s0, head, scoring,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(p keep, ds, derivative) of a tile, from x = q k^T and dp = do v^T + minus_delta(...). ds is
    the gradient of the scores after the softcap, and derivative is the softcap's."""
    # forward: p = exp(s - lse)
    x, derivative = scores(x, t, s, head, scoring, MASKED)
    p = tl.exp2(tl.fma(x - shift, in_base_2(scoring.opt), -rest))
    kept = p
    # forward: o = (p keep / (1 - dropout_p)) v
    if scoring.opt.seed is not None:
        keeps = keep(t, s0, head, scoring, TRANSPOSED, BLOCK_S)
        kept = tl.where(keeps, p, 0.0)
        dp = tl.where(keeps, dp * tl.cast(scoring.opt.keep_scale, tl.float32), 0.0) - delta
    # forward: p = softmax(s)
    return kept, p * dp, derivative


@triton.jit
def in_base_2(opt):
    """The factor that turns differences of values of `scores` into exponents of exp2."""
    return tl.cast(opt.late_scale, tl.float32) * LOG2E


@triton.jit
def minus_delta(delta, opt, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The initial value of the sum dp = do v^T: -delta, or 0 with dropout, which is applied to dp
    before delta is subtracted."""
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    if opt.seed is None:
        zeros -= delta
    return zeros
