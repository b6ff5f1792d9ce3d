"""The MLP: its first product fused with the activation, and the backward of the activation.

    pre = x w1^T + b1,  h = act(pre)            gated: h = act(pre) up, up = x w_up^T + b_up

Forward: a program forms a tile of pre and, if gated, the same tile of up from the same loads of x.
It rounds both to the dtype of x and activates the rounded values, so that the backward, which only
gets these, computes the same h. Consecutive programs work on a group of row tiles, so that the
tiles that one loads are still in the L2 cache for the next. Where torch's products are faster (see
`fuses`), a kernel of its own activates them. pre and up lie in one tensor, (1, M, F)
or gated (2, M, F); so do their gradients.

Backward: one pass over dh, pre and up gives dpre, dup and h. A program owns some columns and
strides over the rows, with a part of the gradients of the biases in float32 registers. The parts
are added without atomics.

torch computes all other products: y = h w2^T + b2, dh, dx, dw1, dw_up and dw2.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tfkern.reference.mlp import activation_backward_outputs

from . import (
    Tiles,
    architecture,
    describable,
    descriptor,
    precision,
    programs,
    register,
    unavailable,
)

_GROUP_M = tl.constexpr(8)  # row tiles of a group of programs
_BLOCK_M, _BLOCK_F = 8, 128  # rows and columns of a tile of the backward
_BLOCK = 2048  # elements that a program activates


def _tiles(
    K: int, F: int, dtype: torch.dtype, gated: bool, arch: int, described: bool = False
) -> Tiles:
    """The tile of the forward on architecture sm_<arch>.

    A gated program has two accumulators, so fewer columns fill its registers. No choice spills.
    """
    if dtype == torch.float32 or K % 16 or F % 16:  # the latter cannot be copied asynchronously
        return Tiles(64, 32 if gated else 64, num_warps=4, depth=32)
    if arch in (100, 103):  # accumulators lie outside the registers
        return Tiles(128, 128 if gated else 256, num_warps=8, depth=64)
    if arch == 90:
        columns = 256 if described else 128
        return Tiles(128, columns // 2 if gated else columns, num_warps=8, num_stages=4, depth=64)
    if arch in (80, 87):
        return Tiles(128, 64 if gated else 128, num_warps=8, depth=64)
    return Tiles(128, 64 if gated else 128, num_warps=8, depth=32)  # 99 KiB of shared memory


def fuses(K: int, dtype: torch.dtype, arch: int) -> bool:
    """Tells whether the product with K terms and the activation are one kernel on sm_<arch>.

    On sm_90 a program here activates its tile while the tensor cores wait, and cuBLAS is expected
    to have a higher rate. If there are many terms, that gains more than another pass over pre:
    for estimates of 535 and 650 TFLOP/s, and 4 bytes of an element at 3 TB/s, the times are equal
    at 2 K (1/535 - 1/650) ps = 4/3 ps, where K = 2000.
    """
    return K > 0 and (arch != 90 or K < 2048 or dtype == torch.float32)


@triton.jit
def _sigmoid(x):
    """(sigma, derivative): 1 / (1 + e^-x) and its derivative. Neither loses digits in either
    tail."""
    e = tl.exp(-tl.abs(x))
    s = 1 / (1 + e)
    return tl.where(x < 0, e * s, s), e * s * s


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) in float32; act(NaN) is NaN."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":  # x (1 + tanh(u)) / 2 = x sigma(2u)
        c: tl.constexpr = 1.5957691216057308  # sqrt(8 / pi)
        # Beyond 30, sigma is 0 or 1, and the square could overflow.
        near = tl.where(tl.abs(x) > 30, tl.where(x < 0, -30.0, 30.0), x)
        square = near * near
        sigma, dsigma = _sigmoid(near * (c + c * 0.044715 * square))
        return x * sigma, sigma + x * (dsigma * (c + 3 * c * 0.044715 * square))
    else:
        tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "quick_gelu")
        c: tl.constexpr = 1.702 if ACTIVATION == "quick_gelu" else 1.0
        sigma, dsigma = _sigmoid(c * x)
        return x * sigma, sigma + x * (dsigma * c)


@triton.jit
def _load(tile, k, end, EVEN: tl.constexpr):
    """The elements of a tile of pointers with k < end, 0 for the others."""
    if EVEN:
        return tl.load(tile)
    return tl.load(tile, mask=k < end, other=0.0)


@triton.jit
def _finish(
    pre, up, B1, B_UP, H, PRE, M, F, first_m, first_f,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Writes h, pre and up of a tile from its products."""
    m = tl.arange(0, pre.shape[0])
    f = tl.arange(0, pre.shape[1])
    in_f = f < F - first_f
    mask = (m < M - first_m)[:, None] & in_f[None, :]
    tile = m[:, None] * F + f[None, :]
    H += first_m.to(tl.int64) * F + first_f
    PRE += first_m.to(tl.int64) * F + first_f
    if B1 is not None:
        pre += tl.load(B1 + first_f + f, mask=in_f, other=0.0).to(tl.float32)[None, :]
    pre = pre.to(PRE.dtype.element_ty)
    tl.store(PRE + tile, pre, mask=mask)
    h, _ = _activate(pre.to(tl.float32), ACTIVATION)
    if GATED:
        if B_UP is not None:
            up += tl.load(B_UP + first_f + f, mask=in_f, other=0.0).to(tl.float32)[None, :]
        up = up.to(PRE.dtype.element_ty)
        tl.store(PRE + tl.cast(M, tl.int64) * F + tile, up, mask=mask)
        h *= up.to(tl.float32)
    tl.store(H + tile, h.to(H.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x):
    """The left and the right half of the columns of a tile."""
    x = x.reshape(x.shape[0], 2, x.shape[1] // 2)
    return tl.permute(x, 0, 2, 1).split()


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    X, W1, B1, W_UP, B_UP, H, PRE, M, F, K,
    stride_xm, stride_xk, stride_wf, stride_wk, stride_uf, stride_uk,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes a tile of pre and h and, if gated, of up. X, W1 and W_UP are descriptors if
    DESCRIBED, else pointers."""
    GATED: tl.constexpr = W_UP is not None
    tl.assume(K > 0)  # ptxas serialises the products of sm_90 if their loop may be empty
    pid = tl.program_id(0)
    blocks_f = tl.cdiv(F, BLOCK_F)
    group = pid // (_GROUP_M * blocks_f)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * _GROUP_M, _GROUP_M)
    pid -= group * _GROUP_M * blocks_f
    first_m = (group * _GROUP_M + pid % height) * BLOCK_M
    first_f = pid // height * BLOCK_F
    pre = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    if DESCRIBED:
        for start in range(0, K, BLOCK_K):
            x = X.load([first_m, start])
            w = W1.load([first_f, start])
            pre = tl.dot(x, tl.trans(w), pre, input_precision=PRECISION)
            if GATED:
                w = W_UP.load([first_f, start])
                up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
    else:
        k = tl.arange(0, BLOCK_K)
        # Rows past the end repeat the last row: loads need no mask, and their products are not
        # stored.
        m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
        f = tl.minimum(tl.arange(0, BLOCK_F), F - 1 - first_f)
        x_tile = m[:, None] * stride_xm + k[None, :] * stride_xk
        w_tile = f[None, :] * stride_wf + k[:, None] * stride_wk
        X += first_m.to(tl.int64) * stride_xm
        W1 += first_f.to(tl.int64) * stride_wf
        if GATED:
            up_tile = f[None, :] * stride_uf + k[:, None] * stride_uk
            W_UP += first_f.to(tl.int64) * stride_uf
        for start in range(0, K, BLOCK_K):
            x = _load(X + x_tile, k[None, :], K - start, EVEN_K)
            w = _load(W1 + w_tile, k[:, None], K - start, EVEN_K)
            pre = tl.dot(x, w, pre, input_precision=PRECISION)
            if GATED:
                w = _load(W_UP + up_tile, k[:, None], K - start, EVEN_K)
                up = tl.dot(x, w, up, input_precision=PRECISION)
                W_UP += BLOCK_K * stride_uk
            X += BLOCK_K * stride_xk
            W1 += BLOCK_K * stride_wk

    if DESCRIBED:  # halves of so large tiles need fewer registers
        left, right = _halves(pre)
        up_left, up_right = left, right
        if GATED:
            up_left, up_right = _halves(up)
        _finish(left, up_left, B1, B_UP, H, PRE, M, F, first_m, first_f, ACTIVATION, GATED)
        first_f += BLOCK_F // 2
        _finish(right, up_right, B1, B_UP, H, PRE, M, F, first_m, first_f, ACTIVATION, GATED)
    else:
        _finish(pre, up, B1, B_UP, H, PRE, M, F, first_m, first_f, ACTIVATION, GATED)


@triton.jit(do_not_specialize=["M"])
def _activation_kernel(
    PRE, H, M, F, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """Computes h from pre and, if gated, up, BLOCK elements at a time."""
    size = tl.cast(M, tl.int64) * F
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h, _ = _activate(tl.load(PRE + i, mask=i < size, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        h *= tl.load(PRE + size + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(H + i, h.to(H.dtype.element_ty), mask=i < size)


def _forward(x, w1, b1, w_up, b_up, activation):
    h, pre = _forward_outputs(x, w1, b1, w_up, b_up, activation)
    (M, K), F, gated = x.shape, h.shape[1], w_up is not None
    arch = architecture(x.device)
    if not h.numel():
        return h, pre
    if not fuses(K, x.dtype, arch):
        for out, w, b in zip(pre, (w1, w_up), (b1, b_up), strict=False):
            if b is None:
                torch.mm(x, w.t(), out=out)
            else:
                torch.addmm(b, x, w.t(), out=out)
        _activation_kernel[(triton.cdiv(h.numel(), _BLOCK),)](
            pre, h, M, F, ACTIVATION=activation, GATED=gated, BLOCK=_BLOCK
        )
        return h, pre
    b1, b_up = (b if b is None else b.contiguous() for b in (b1, b_up))
    weights = [w for w in (w1, w_up) if w is not None]
    described = describable(arch, x, *weights)
    tiles = _tiles(K, F, x.dtype, gated, arch, described)
    x, *weights = (_near(t, tiles) for t in (x, *weights))
    strides = *x.stride(), *weights[0].stride(), *weights[-1].stride()
    if described:
        x = descriptor(x, (tiles.rows, tiles.depth))
        weights = [descriptor(w, (tiles.columns, tiles.depth)) for w in weights]
    _forward_kernel[(triton.cdiv(M, tiles.rows) * triton.cdiv(F, tiles.columns),)](
        x, weights[0], b1, weights[1] if gated else None, b_up, h, pre, M, F, K, *strides,
        ACTIVATION=activation, EVEN_K=K % tiles.depth == 0, PRECISION=precision(h.dtype),
        BLOCK_M=tiles.rows, BLOCK_F=tiles.columns, BLOCK_K=tiles.depth, DESCRIBED=described,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return h, pre


def _near(x, tiles):
    """x, or a copy if the elements of a tile are too far apart for offsets of 32 bits."""
    reach = max(tiles.rows, tiles.columns) * x.stride(0) + tiles.depth * x.stride(1)
    return x if reach < 2**31 else x.contiguous()


def _forward_outputs(x, w1, b1, w_up, b_up, activation):
    M, F = x.shape[0], w1.shape[0]
    return x.new_empty(M, F), x.new_empty(1 if w_up is None else 2, M, F)


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    DH, PRE, UP, DPRE, H, PARTIAL_DB, M, F,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Computes dpre, dup and h of some columns, and a part of the gradients of their biases."""
    GATED: tl.constexpr = UP is not None
    pid = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    W: tl.constexpr = 2 if GATED else 1
    in_f = f < F
    tile = m[:, None] * F + f[None, :]
    DUP = DPRE + tl.cast(M, tl.int64) * F
    db1 = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    db_up = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for first_m in range(pid * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        skipped = tl.cast(first_m, tl.int64) * F
        mask = (m < M - first_m)[:, None] & in_f[None, :]
        dh = tl.load(DH + skipped + tile, mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(PRE + skipped + tile, mask=mask, other=0.0).to(tl.float32)
        # forward: h = act(pre) * up
        h, derivative = _activate(pre, ACTIVATION)
        if GATED:
            up = tl.load(UP + skipped + tile, mask=mask, other=0.0).to(tl.float32)
            dup = dh * h
            tl.store(DUP + skipped + tile, dup.to(DPRE.dtype.element_ty), mask=mask)
            db_up += dup
            h *= up
            dh *= up
        dpre = dh * derivative
        tl.store(DPRE + skipped + tile, dpre.to(DPRE.dtype.element_ty), mask=mask)
        tl.store(H + skipped + tile, h.to(H.dtype.element_ty), mask=mask)
        db1 += dpre
    if PARTIAL_DB is not None:
        partial = PARTIAL_DB + tl.cast(pid, tl.int64) * (W * F) + f
        tl.store(partial, tl.sum(db1, 0), mask=in_f)
        if GATED:
            tl.store(partial + F, tl.sum(db_up, 0), mask=in_f)


def _backward(dh, pre, up, activation, bias):
    dpre, h, db = activation_backward_outputs(dh, pre, up, activation, bias)
    M, F = dh.shape
    if not h.numel():
        return dpre, h, db.zero_()
    dh, pre, up = (t if t is None else t.contiguous() for t in (dh, pre, up))
    columns = triton.cdiv(F, _BLOCK_F)
    # Enough programs to fill the device, few enough for a small last sum.
    most = programs(dh.device, 8, interpreted=4) // columns
    parts = max(1, min(triton.cdiv(M, _BLOCK_M), most))
    partial_db = dh.new_empty(parts, *db.shape, dtype=torch.float32) if bias else None
    _backward_kernel[(columns, parts)](
        dh, pre, up, dpre, h, partial_db, M, F,
        ACTIVATION=activation, BLOCK_M=_BLOCK_M, BLOCK_F=_BLOCK_F,
    )  # fmt: skip
    return dpre, h, partial_db.sum(0).to(db.dtype) if bias else db


def forward(x, w1, b1, w_up, b_up, w2, b2, activation, keep):
    h, pre = _activated_product(x, w1, b1, w_up, b_up, activation)
    return F.linear(h, w2, b2), *pre.unbind()  # pre even if not kept


def backward(dy, x, w1, b1, w_up, b_up, w2, b2, pre, up, activation, wanted=(True,) * 7):
    want_dx, want_dw1, want_db1, want_dw_up, want_db_up, want_dw2, want_db2 = wanted
    absent = dy.new_empty(0)
    want_db1, want_db_up = want_db1 and b1 is not None, want_db_up and b_up is not None
    dpre, h, db = _activation_backward(dy @ w2, pre, up, activation, want_db1 or want_db_up)
    dpre, *dup = dpre.unbind()
    dx = dpre @ w1 if want_dx else absent
    if want_dx and up is not None:
        dx = torch.addmm(dx, dup[0], w_up)
    return (
        dx,
        dpre.t() @ x if want_dw1 else absent,
        db[0] if want_db1 else absent,
        dup[0].t() @ x if want_dw_up and up is not None else absent,
        db[1] if want_db_up else absent,
        dy.t() @ h if want_dw2 else absent,
        dy.sum(0) if want_db2 and b2 is not None else absent,
    )


def why_not(x, *args, needs_grad) -> str | None:
    return unavailable(x)


_activated_product = register(
    "mlp_activated_product(Tensor x, Tensor w1, Tensor? b1, Tensor? w_up, Tensor? b_up, "
    "str activation) -> (Tensor h, Tensor pre)",
    _forward,
    _forward_outputs,
)
_activation_backward = register(
    "mlp_activation_backward(Tensor dh, Tensor pre, Tensor? up, str activation, bool bias) "
    "-> (Tensor dpre, Tensor h, Tensor db)",
    _backward,
    activation_backward_outputs,
)
