"""Layer norm and RMS norm of the rows of tensors, with dropout and residual addition in front.

The operators take tensors of any rank, the kernels (M, N) matrices: the last `axes` axes have N
elements, and all others have M.

Forward: a program holds whole rows in registers, so x is read once; the variance is summed from the
register copy, which is as stable as Welford's method. Backward: a fixed number of programs stride
over the rows, read h and dy once, and keep their part of dweight and dbias in float32 registers;
one small kernel adds the parts in a fixed order, so there are no atomics and the result is
deterministic. Sums of rows beyond 8192 elements would not fit into registers: several programs
share such rows. Each reads all of a row for the row's sums, and owns the results of its columns.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from tfkern.reference.layer_norm import backward_outputs, forward_outputs

from . import Tiles, dropout, programs, register, unavailable

_MAX_N = {2: 32768, 4: 16384}  # by bytes of an element: the forward would spill beyond this
_BACKWARD_TILE = 8192  # the most elements of a tile of the backward


def _tiles(kernel: str, N: int) -> Tiles:
    """The tile of "forward", of whole rows, or of "backward", with 16 elements for each thread.

    A forward program has one tile, so small tiles give many programs. A backward program keeps two
    sums for each element of its tile: two tiles of 4096 elements fill the registers of an SM, and
    their loads are enough to use the bandwidth of the memory.
    """
    columns = max(16, triton.next_power_of_2(N))
    if kernel == "backward":
        columns = min(columns, _BACKWARD_TILE)
    rows = max(1, (1024 if kernel == "forward" else 4096) // columns)
    return Tiles(rows, columns, num_warps=min(max(rows * columns // 512, 2), 32))


@triton.jit
def _keep(SEED, m, first, last_dropped, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout mask of the columns from `first`, a multiple of 4, on: element (m, n) takes lane
    n % 4 of counter (n // 4, m, m >> 32, 1)."""
    group = first // 4 + tl.arange(0, BLOCK_N // 4)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    low = (m & 0xFFFFFFFF).to(tl.uint32)[:, None] + tl.zeros_like(group).to(tl.uint32)
    high = (m >> 32).to(tl.uint32)[:, None] + tl.zeros_like(group).to(tl.uint32)
    one = tl.zeros_like(group) + 1
    a, b, c, d = tl.philox(tl.load(SEED), group.to(tl.uint32), low, high, one.to(tl.uint32))
    draw = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK_M, BLOCK_N)
    return draw > tl.cast(last_dropped, tl.uint32)


@triton.jit
def _forward_kernel(
    X, W, BIAS, R, SEED, Y, H, MEAN, RSTD,
    stride_x, stride_r, M, N, last_dropped, keep_scale, eps,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes h = residual + dropout(x), its statistics and y for BLOCK_M rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    mask = in_m[:, None] & in_n[None, :]
    h = tl.load(X + m[:, None] * stride_x + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if SEED is not None:
        keep = _keep(SEED, m, 0, last_dropped, BLOCK_M, BLOCK_N)
        h = tl.where(keep, h * tl.cast(keep_scale, tl.float32), 0.0)
    if R is not None:
        h += tl.load(R + m[:, None] * stride_r + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if H is not None:
        tl.store(H + m[:, None] * N + n[None, :], h.to(H.dtype.element_ty), mask=mask)

    if RMS:
        centred = h
    else:
        mean = tl.sum(h, 1) / N
        centred = tl.where(mask, h - mean[:, None], 0.0)
        shift = tl.sum(centred, 1) / N  # rounding error of the mean, which matters if it is large
        centred = tl.where(mask, centred - shift[:, None], 0.0)
        tl.store(MEAN + m, mean + shift, mask=in_m)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / N + tl.cast(eps, tl.float32))
    tl.store(RSTD + m, rstd, mask=in_m)
    y = centred * rstd[:, None]
    if W is not None:
        y *= tl.load(W + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + m[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=mask)


def _rows(x: Tensor | None, axes: int) -> Tensor | None:
    """x as an (M, N) matrix with contiguous rows; a view if strides allow."""
    if x is None:
        return None
    x = x.reshape(math.prod(x.shape[:-axes]), math.prod(x.shape[-axes:]))
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _forward(x, weight, bias, residual, seed, dropout_p, eps, rms, axes):
    y, h, mean, rstd = forward_outputs(x, weight, bias, residual, seed, dropout_p, eps, rms, axes)
    x, residual = _rows(x, axes), _rows(residual, axes)
    M, N = x.shape
    seed = seed if dropout_p > 0 else None
    if x.numel():
        tiles = _tiles("forward", N)
        _forward_kernel[(triton.cdiv(M, tiles.rows),)](
            x, weight, bias, residual, seed, y, _or_none(h), _or_none(mean), rstd,
            x.stride(0), 0 if residual is None else residual.stride(0), M, N,
            *dropout(dropout_p), eps,
            RMS=rms, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.num_warps,
            maxnreg=64,  # what 32 warps have; ptxas would halve it and spill
        )  # fmt: skip
    return y, h, mean, rstd


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


@triton.jit
def _load_weight(W, n, N):
    w = 1.0
    if W is not None:
        w = tl.load(W + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit
def _load_gradient(DY, H, m, in_m, n, mean, rstd, stride_dy, stride_h, N, CENTRED: tl.constexpr):
    """(dy, xhat) of a tile, 0 past the ends."""
    mask = in_m[:, None] & (n < N)[None, :]
    dy = tl.load(DY + m[:, None] * stride_dy + n[None, :], mask=mask, other=0.0).to(tl.float32)
    xhat = tl.load(H + m[:, None] * stride_h + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        xhat = tl.where(mask, xhat - mean, 0.0)
    return dy, xhat * rstd


@triton.jit
def _backward_kernel(
    DY, DH, H, W, MEAN, RSTD, SEED, DX, DR, PARTIAL_DW, PARTIAL_DB,
    stride_dy, stride_dh, stride_h, M, N, last_dropped, keep_scale, shared_by,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes dx and dresidual, and one part of dweight and dbias, of BLOCK_N columns. shared_by
    consecutive programs, each with columns of its own, work on the same rows at the same time, so
    that they find in the L2 cache what another has read."""
    owner = tl.program_id(0) % shared_by
    pid = (tl.program_id(0) // shared_by).to(tl.int64)
    first = owner * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    in_n = n < N
    CENTRED: tl.constexpr = MEAN is not None
    w = _load_weight(W, n, N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(pid * BLOCK_M, M, tl.num_programs(0) // shared_by * BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        in_m = m < M
        mask = in_m[:, None] & in_n[None, :]
        rstd = tl.load(RSTD + m, mask=in_m, other=0.0)[:, None]
        mean = rstd
        if CENTRED:
            mean = tl.load(MEAN + m, mask=in_m, other=0.0)[:, None]
        g_sum = tl.zeros([BLOCK_M], tl.float32)
        gx_sum = tl.zeros([BLOCK_M], tl.float32)
        for i in range(1, shared_by):  # the columns of the other programs
            others = (owner + i) % shared_by * BLOCK_N + tl.arange(0, BLOCK_N)
            g, xhat = _load_gradient(
                DY, H, m, in_m, others, mean, rstd, stride_dy, stride_h, N, CENTRED
            )
            g *= _load_weight(W, others, N)
            g_sum += tl.sum(g, 1)
            gx_sum += tl.sum(g * xhat, 1)
        if shared_by > 1:  # in registers it would make the sums spill
            w = _load_weight(W, n, N)
        g, xhat = _load_gradient(DY, H, m, in_m, n, mean, rstd, stride_dy, stride_h, N, CENTRED)
        # forward: y = xhat * weight + bias
        dw += g * xhat
        db += g
        g *= w
        # forward: xhat = (h - mean) * rstd
        dh = g - xhat * ((gx_sum + tl.sum(g * xhat, 1)) / N)[:, None]
        if CENTRED:
            dh -= ((g_sum + tl.sum(g, 1)) / N)[:, None]
        dh *= rstd
        if DH is not None:
            more = tl.load(DH + m[:, None] * stride_dh + n[None, :], mask=mask, other=0.0)
            dh += more.to(tl.float32)
        # forward: h = residual + dropout(x)
        if DR is not None:
            tl.store(DR + m[:, None] * N + n[None, :], dh.to(DR.dtype.element_ty), mask=mask)
        if SEED is not None:
            keep = _keep(SEED, m, first, last_dropped, BLOCK_M, BLOCK_N)
            dh = tl.where(keep, dh * tl.cast(keep_scale, tl.float32), 0.0)
        tl.store(DX + m[:, None] * N + n[None, :], dh.to(DX.dtype.element_ty), mask=mask)
    if PARTIAL_DW is not None:
        tl.store(PARTIAL_DW + pid * N + n, tl.sum(dw, 0), mask=in_n)
    if PARTIAL_DB is not None:
        tl.store(PARTIAL_DB + pid * N + n, tl.sum(db, 0), mask=in_n)


@triton.jit
def _sum_partials_kernel(
    PARTIAL_DW, PARTIAL_DB, DW, DB, G, N, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds the G parts of dweight and dbias of BLOCK_N columns."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    db = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        mask = (g < G)[:, None] & (n < N)[None, :]
        if DW is not None:
            dw += tl.load(PARTIAL_DW + g[:, None] * N + n[None, :], mask=mask, other=0.0)
        if DB is not None:
            db += tl.load(PARTIAL_DB + g[:, None] * N + n[None, :], mask=mask, other=0.0)
    if DW is not None:
        tl.store(DW + n, tl.sum(dw, 0).to(DW.dtype.element_ty), mask=n < N)
    if DB is not None:
        tl.store(DB + n, tl.sum(db, 0).to(DB.dtype.element_ty), mask=n < N)


def _backward(dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, separate_residual, axes):
    outputs = backward_outputs(
        dy, dh, h, weight, bias, mean, rstd, seed, dropout_p, separate_residual, axes
    )
    dx, dresidual, dweight, dbias = outputs
    dy, dh, h = (_rows(x, axes) for x in (dy, dh, h))
    M, N = dy.shape
    if not dx.numel():
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    tiles = _tiles("backward", N)
    shared_by = triton.cdiv(N, tiles.columns)
    # As many programs as the registers of the device hold, with at least one for each column.
    each = max(1, _BACKWARD_TILE // max(4096, tiles.columns))
    parts = max(1, programs(dy.device, each, interpreted=4) // shared_by)
    parts = min(triton.cdiv(M, tiles.rows), parts)
    partial_dweight, partial_dbias = (
        None if p is None else rstd.new_empty(parts, N) for p in (weight, bias)
    )
    seed = seed if dropout_p > 0 else None
    _backward_kernel[(parts * shared_by,)](
        dy, dh, h, weight, mean, rstd, seed,
        dx, _or_none(dresidual), partial_dweight, partial_dbias,
        dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0), M, N, *dropout(dropout_p),
        shared_by,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.num_warps, maxnreg=128,
    )  # fmt: skip
    if weight is not None or bias is not None:
        columns = min(64, max(16, triton.next_power_of_2(N) // 64))  # narrow, for many programs
        _sum_partials_kernel[(triton.cdiv(N, columns),)](
            partial_dweight, partial_dbias, _or_none(dweight), _or_none(dbias), parts, N,
            BLOCK_G=2048 // columns, BLOCK_N=columns,
        )  # fmt: skip
    return outputs


def why_not(
    x, weight, bias, residual, seed, dropout_p, eps, rms, axes, *, needs_grad
) -> str | None:
    for tensor in (x, weight, bias, residual):
        if tensor is not None and (reason := unavailable(tensor)):
            return reason
    N, most = math.prod(x.shape[-axes:]), _MAX_N[x.itemsize]
    if N > most:
        return f"holds whole rows in registers, at most {most} elements, got {N}"
    return None


forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, "
    "float dropout_p, float eps, bool rms, int axes) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _forward,
    forward_outputs,
)
backward = register(
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, "
    "Tensor? mean, Tensor rstd, Tensor? seed, float dropout_p, bool separate_residual, "
    "int axes) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward,
    backward_outputs,
)
