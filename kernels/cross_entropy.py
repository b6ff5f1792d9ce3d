"""The cross entropy of rows of logits; tfkern/reference/cross_entropy.py has the formulas.

Forward: a program owns some rows and walks over their columns once, with the maximum and the sum of
exponentials of each row so far, which shrinks when the maximum grows (Milakov and Gimelshein 2018).
Backward: a program owns a tile of the gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from tfkern.reference.cross_entropy import forward_outputs

from . import Tiles, register, unavailable
from .attention.tile import tanh

_LOG2E = tl.constexpr(1.4426950408889634)


def _tiles(columns: int, most: int) -> Tiles:
    """A tile of up to `most` columns, with about 8 elements for each thread."""
    width = min(max(16, triton.next_power_of_2(columns)), most)
    rows = max(1, 1024 // width)
    return Tiles(rows, width, num_warps=min(max(rows * width // 256, 4), 16))


@triton.jit
def _own_factor(t, W, smoothing, classes):
    """(1 - e) w_t of each row, NaN where there is no such class."""
    known = (t >= 0) & (t < classes)
    own = tl.zeros(t.shape, tl.float32) + 1.0
    if W is not None:
        own = tl.load(W + t, mask=known, other=0.0)
    return tl.where(known, (1 - smoothing) * own, float("nan"))


@triton.jit
def _row(m, T, stride, stride_batch):
    """Where rows m begin, which lie in batches of T."""
    return m // T * stride_batch + m % T * stride


@triton.jit(do_not_specialize=["M", "T", "ignore_index"])
def _forward_kernel(
    Z, TARGET, W, SUM_W, LOSS, LSE, REST, T, stride, stride_batch, M, V,
    ignore_index, smoothing, softcap,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, IGNORED_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes loss, lse and rest of BLOCK_M rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    n = tl.arange(0, BLOCK_V)
    smoothing, softcap = tl.cast(smoothing, tl.float32), tl.cast(softcap, tl.float32)
    target = tl.load(TARGET + m, mask=in_m, other=0)
    used = in_m & (target != ignore_index)
    read = in_m if IGNORED_LSE else used
    rows = Z + _row(m, T, stride, stride_batch)[:, None]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    spread = tl.zeros([BLOCK_M], tl.float32)  # sum of w_n (s_n - base)
    base = tl.zeros([BLOCK_M], tl.float32)
    if SMOOTHED:  # the first logit: beside a large mean, its distance from others has more digits
        base = tl.load(Z + _row(m, T, stride, stride_batch), mask=read, other=0.0).to(tl.float32)
        if CAPPED:
            base = softcap * tanh(base / softcap)
        base = tl.where(tl.abs(base) < float("inf"), base, 0.0)
    # Rows that nobody reads end the loop before it begins.
    end = tl.where(tl.max(read.to(tl.int32), 0) > 0, V, 0)
    for start in range(0, end, BLOCK_V):
        mask = read[:, None] & (n < V - start)[None, :]
        s = tl.load(rows + start + n[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        if CAPPED:
            s = tl.where(mask, softcap * tanh(s / softcap), float("-inf"))
        raised = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        total *= tl.where(top == float("-inf"), 0.0, tl.exp2((top - shift) * _LOG2E))
        total += tl.sum(tl.exp2((s - shift[:, None]) * _LOG2E), 1)
        top = raised
        if SMOOTHED:
            terms = tl.where(mask, s - base[:, None], 0.0)
            if W is not None:
                terms *= tl.load(W + start + n, mask=n < V - start, other=0.0)[None, :]
            spread += tl.sum(terms, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    log_sum = tl.log(tl.where(read, total, 1.0))
    lse = shift + log_sum
    rest = tl.where(tl.abs(lse) < float("inf"), shift - lse + log_sum, 0.0)

    own = _own_factor(target, W, smoothing, V)
    known = used & (own == own)
    s_t = tl.load(Z + _row(m, T, stride, stride_batch) + target, mask=known, other=0.0)
    s_t = s_t.to(tl.float32)
    if CAPPED:
        s_t = softcap * tanh(s_t / softcap)
    loss = own * (shift - s_t + log_sum)
    if SMOOTHED:  # sum_n w_n (lse - s_n)
        sum_w = tl.cast(V, tl.float32)
        if W is not None:
            sum_w = tl.load(SUM_W)
        loss += smoothing * ((sum_w * (shift - base + log_sum) - spread) / V)
    tl.store(LOSS + m, tl.where(used, loss, 0.0), mask=in_m)
    tl.store(LSE + m, tl.where(read, lse, 0.0), mask=in_m)
    tl.store(REST + m, tl.where(read, rest, 0.0), mask=in_m)


@triton.jit(do_not_specialize=["M", "T", "ignore_index", "first"])
def _backward_kernel(
    Z, TARGET, W, SUM_W, LSE, REST, DLOSS, DLSE, DZ,
    T, stride, stride_batch, stride_dz, stride_dz_batch, M, columns,
    ignore_index, smoothing, softcap, first, classes,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes a tile of the gradient. DZ may be Z: no other program reads this tile."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    n = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    smoothing, softcap = tl.cast(smoothing, tl.float32), tl.cast(softcap, tl.float32)
    target = tl.load(TARGET + m, mask=in_m, other=0)
    used = in_m & (target != ignore_index)
    dloss = tl.zeros([BLOCK_M], tl.float32)
    if DLOSS is not None:
        dloss = tl.load(DLOSS + m, mask=used, other=0.0)
    dlse = tl.zeros([BLOCK_M], tl.float32)
    if DLSE is not None:
        dlse = tl.load(DLSE + m, mask=in_m, other=0.0)
    # The logits of rows without a gradient are not read: they may hold NaN.
    mask = in_m[:, None] & (n < columns)[None, :]
    read = ((dloss != 0) | (dlse != 0))[:, None]
    lse = tl.load(LSE + m, mask=in_m, other=0.0)[:, None]
    rest = tl.load(REST + m, mask=in_m, other=0.0)[:, None]
    z = Z + _row(m, T, stride, stride_batch)[:, None] + n[None, :]
    s = tl.load(z, mask=mask & read, other=0.0).to(tl.float32)
    if CAPPED:
        s = softcap * tanh(s / softcap)
    # forward: loss = own (lse - s_t) + smoothing sum_n w_n (lse - s_n) / classes
    own = tl.where(dloss == 0, 0.0, dloss * _own_factor(target, W, smoothing, classes))
    total = own + dlse
    if SMOOTHED:
        share = dloss * (smoothing / classes)
        sum_w = tl.cast(classes, tl.float32)
        if W is not None:
            sum_w = tl.load(SUM_W)
        total += share * sum_w
    ds = total[:, None] * tl.exp2((s - lse - rest) * _LOG2E)
    if SMOOTHED:
        if W is None:
            ds -= share[:, None]
        else:
            ds -= share[:, None] * tl.load(W + first + n, mask=n < columns, other=0.0)[None, :]
    ds -= tl.where((target - first)[:, None] == n[None, :], own[:, None], 0.0)
    # forward: s = softcap tanh(z / softcap)
    if CAPPED:
        ds *= 1 - (s / softcap) * (s / softcap)
    dz = DZ + _row(m, T, stride_dz, stride_dz_batch)[:, None] + n[None, :]
    tl.store(dz, tl.where(read, ds, 0.0).to(DZ.dtype.element_ty), mask=mask)


def _rows(z: Tensor) -> tuple[Tensor, int, int, int]:
    """z, or a copy of it, and the T, stride and stride_batch of its rows: those of x[:, 1:] have
    two strides."""
    V, M = z.shape[-1], z.numel() // z.shape[-1]
    for shape in ((1, M), (M // z.shape[-2], z.shape[-2])) if z.dim() > 1 and M else ():
        try:
            rows = z.view(*shape, V)
        except RuntimeError:
            continue
        if rows.stride(2) == 1 or V == 1:
            return z, shape[1], rows.stride(1), rows.stride(0)
    return z.contiguous(), max(M, 1), V, 0


def _forward(logits, targets, weight, ignore_index, label_smoothing, softcap, ignored_lse):
    outputs = forward_outputs(logits, targets)
    logits, *rows = _rows(logits)
    M, V = targets.numel(), logits.shape[-1]
    if M:
        tiles = _tiles(V, 4096)
        _forward_kernel[(triton.cdiv(M, tiles.rows),)](
            logits, targets.contiguous(), weight, None if weight is None else weight.sum(),
            *outputs, *rows, M, V, ignore_index, label_smoothing, softcap,
            CAPPED=softcap > 0, SMOOTHED=label_smoothing > 0, IGNORED_LSE=ignored_lse,
            BLOCK_M=tiles.rows, BLOCK_V=tiles.columns, num_warps=tiles.num_warps,
        )  # fmt: skip
    return outputs


def _backward_(
    logits, targets, weight, lse, rest, dloss, dlse,
    ignore_index, label_smoothing, softcap, first, classes, dlogits=None,
):  # fmt: skip
    """Writes the gradient to dlogits, or over the logits."""
    in_place = dlogits is None
    z, *rows = _rows(logits)
    if in_place and z is not logits:
        raise ValueError("logits to be overwritten must have rows of at most two strides")
    M, columns = targets.numel(), logits.shape[-1]
    if not M:
        return
    T = rows[0]
    dz_strides = rows[1:] if in_place else (columns, T * columns)
    tiles = _tiles(columns, 2048)
    targets, lse, rest, dloss, dlse = (
        x if x is None else x.contiguous() for x in (targets, lse, rest, dloss, dlse)
    )
    _backward_kernel[(triton.cdiv(M, tiles.rows), triton.cdiv(columns, tiles.columns))](
        z, targets, weight, None if weight is None else weight.sum(), lse, rest, dloss, dlse,
        z if in_place else dlogits, *rows, *dz_strides, M, columns,
        ignore_index, label_smoothing, softcap, first, classes,
        CAPPED=softcap > 0, SMOOTHED=label_smoothing > 0,
        BLOCK_M=tiles.rows, BLOCK_V=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip


def _backward(logits, *args):
    dlogits = logits.new_empty(logits.shape)
    _backward_(logits, *args, dlogits)
    return dlogits


def why_not(logits, *args, needs_grad) -> str | None:
    return unavailable(logits)


_OF_ROWS = (
    "Tensor targets, Tensor? weight, Tensor lse, Tensor rest, Tensor? dloss, Tensor? dlse, "
    "int ignore_index, float label_smoothing, float softcap, int first, int classes"
)
forward = register(
    "cross_entropy_forward(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, "
    "float label_smoothing, float softcap, bool ignored_lse) "
    "-> (Tensor loss, Tensor lse, Tensor rest)",
    _forward,
    forward_outputs,
)
backward = register(
    f"cross_entropy_backward(Tensor logits, {_OF_ROWS}) -> Tensor",
    _backward,
    lambda logits, *args: logits.new_empty(logits.shape),
)
backward_ = register(
    f"cross_entropy_backward_(Tensor(a!) logits, {_OF_ROWS}) -> ()",
    _backward_,
    lambda logits, *args: None,
)
