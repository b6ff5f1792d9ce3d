"""Each option of attention by itself, on every backend."""

import contextlib
import itertools
import math
import random
from types import SimpleNamespace

import compiling
import pytest
import torch
import torch.nn.functional as F
from bits import check_bits
from torch.utils.checkpoint import checkpoint

import tfkern
from tfkern.testing import validate
from tfkern.validation.attention import floor_scale, torch_attention, torch_attention_varlen


def heads(B=1, H=2, Hk=2, T=70, S=70, D=16, dtype=torch.float32, device="cpu"):
    shapes = (B, H, T, D), (B, Hk, S, D), (B, Hk, S, D)
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


def with_gradients(fn, *leaves):
    """o, lse and the gradients of `leaves`, for fixed incoming gradients."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    o, lse = fn(*leaves)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=generator).to(o)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    return o, lse, *torch.autograd.grad((o, lse), leaves, (do, dlse))


# ---- windows ----


def test_a_window_skips_what_lies_outside(backend, device):
    """Tiles outside of the band are never multiplied: 0 times NaN would be NaN."""
    if backend == "reference":
        pytest.skip("the reference computes all of it")
    q, k, v = heads(T=600, S=600, device=device)
    q = q[:, :, 290:300]
    v[:, :, :30] = k[:, :, :30] = math.nan
    v[:, :, 570:] = k[:, :, 570:] = math.nan
    # query 290 + t stands at 590 + t, and sees 20 keys on either side
    o = tfkern.attention(q, k[:, :, :300], v[:, :, :300], window=(20, 20), backend=backend)
    assert o.isfinite().all()
    q, k, v = (x.requires_grad_() for x in heads(T=600, S=600, device=device))
    o = tfkern.attention(q, k, v, window=(20, 0), backend=backend)
    do = torch.zeros_like(o)
    do[:, :, 300] = 1
    do[:, :, :30] = do[:, :, 570:] = math.nan
    _, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    assert dk[:, :, 281:300].isfinite().all() and dv[:, :, 281:300].isfinite().all()


def test_windows_without_limits_are_full_attention(backend, device):
    q, k, v = heads(T=50, S=90, device=device)
    full = with_gradients(
        lambda *x: tfkern.attention(*x, return_lse=True, backend=backend), q, k, v
    )
    for window in ((None, None), (10**6, 10**6)):
        banded = with_gradients(
            lambda *x, w=window: tfkern.attention(*x, window=w, return_lse=True, backend=backend),
            q, k, v,
        )  # fmt: skip
        for a, b in zip(banded, full, strict=True):
            torch.testing.assert_close(a, b)


def test_causal_and_window_both_apply(backend, device):
    q, k, v = heads(T=40, S=60, device=device)
    both = tfkern.attention(q, k, v, causal=True, window=(5, 9), backend=backend)
    check_bits([both], [tfkern.attention(q, k, v, window=(5, 0), backend=backend)], backend)


# ---- bias and mask ----


@pytest.mark.parametrize("pattern", list(itertools.product((0, 1), repeat=4)), ids=str)
def test_bias_gradient_of_every_broadcast(backend, device, pattern):
    B, H, T, S = 2, 2, 35, 66
    shape = [n if full else 1 for n, full in zip((B, H, T, S), pattern, strict=True)]
    q, k, v = heads(B, H, 1, T, S, device=device)
    inputs = {"q": q, "k": k, "v": v, "bias": torch.randn(shape, device=device)}
    options = {"causal": True, "return_lse": True}
    validate(
        lambda **x: tfkern.attention(**x, **options, backend=backend),
        lambda **x: torch_attention(**x, **options),
        inputs,
        floor_scale=floor_scale(inputs, B, T, S),
    ).check()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias_of_another_dtype_and_fewer_dimensions(backend, device, bias_dtype):
    q, k, v = heads(T=20, S=40, dtype=torch.bfloat16, device=device)
    bias = torch.randn(20, 80, device=device).to(bias_dtype)[:, ::2].requires_grad_()
    o = tfkern.attention(q, k, v, bias=bias, backend=backend)
    (dbias,) = torch.autograd.grad(o.float().square().sum(), bias)
    assert dbias.dtype == bias_dtype and dbias.shape == bias.shape
    leaf = bias.detach().double().requires_grad_()
    truth = torch_attention(q.double(), k.double(), v.double(), bias=leaf)
    (expected,) = torch.autograd.grad(truth.square().sum(), leaf)
    torch.testing.assert_close(o.double(), truth, rtol=0.02, atol=0.02)
    torch.testing.assert_close(dbias.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("asked", [False, True])
def test_no_bias_gradient_unless_asked(backend, device, asked, monkeypatch):
    q, k, v = (x.requires_grad_() for x in heads(device=device))
    bias = torch.randn(1, 1, 70, 70, device=device, requires_grad=asked)
    implementation = tfkern.dispatch.implementation("attention", backend)
    sizes = []

    def backward(*args):
        grads = implementation.backward(*args)
        sizes.append(grads[3].numel())
        return grads

    spy = SimpleNamespace(forward=implementation.forward, backward=backward)
    o = tfkern.attention(q, k, v, bias=bias, backend=backend)
    monkeypatch.setattr(tfkern.dispatch, "implementation", lambda op, backend: spy)
    o.sum().backward()
    assert sizes == [bias.numel() if asked else 0]


def test_minus_infinity_as_bias_is_a_mask(backend, device):
    """One row is hidden altogether; its neighbours are not touched."""
    q, k, v = heads(T=40, S=50, device=device)
    mask = torch.rand(1, 2, 40, 50, device=device) < 0.6
    mask[:, :, 7] = False
    bias = torch.zeros(1, 2, 40, 50, device=device).masked_fill(~mask, -torch.inf)
    run = {
        name: with_gradients(
            lambda *x, o=option: tfkern.attention(*x, **o, return_lse=True, backend=backend),
            q, k, v,
        )
        for name, option in {"mask": {"mask": mask}, "bias": {"bias": bias}}.items()
    }  # fmt: skip
    check_bits(run["mask"], run["bias"], backend)
    o, lse, dq, *_ = run["mask"]
    assert not o[:, :, 7].any() and (lse[:, :, 7] == -torch.inf).all() and not dq[:, :, 7].any()
    assert all(x.isfinite().all() for x in run["mask"][2:]) and o.isfinite().all()
    rows = [t for t in range(40) if t != 7]
    alone = tfkern.attention(q[:, :, rows], k, v, mask=mask[:, :, rows], backend=backend)
    torch.testing.assert_close(o[:, :, rows], alone)


def test_alibi_is_a_bias(backend, device):
    T, S = 30, 45
    q, k, v = heads(2, 4, 2, T, S, device=device)
    slopes = torch.rand(2, 4, device=device)
    t, s = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    bias = -slopes[..., None, None] * (t + S - T - s).abs()
    o = tfkern.attention(q, k, v, alibi_slopes=slopes, backend=backend)
    torch.testing.assert_close(o, tfkern.attention(q, k, v, bias=bias, backend="reference"))


# ---- sink and softcap ----


def test_sink(backend, device):
    """It is one more key with value 0; a sink of -inf is none; a row that sees nothing has it."""
    q, k, v = heads(2, 2, 1, 30, 40, device=device)
    mask = torch.ones(30, 40, dtype=torch.bool, device=device)
    mask[3] = False
    sink = torch.tensor([0.5, -torch.inf], device=device, requires_grad=True)
    o, lse = tfkern.attention(q, k, v, sink=sink, mask=mask, return_lse=True, backend=backend)
    none, lse_none = tfkern.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    torch.testing.assert_close(o[:, 1], none[:, 1])
    torch.testing.assert_close(lse[:, 1], lse_none[:, 1])
    assert (lse[:, 0, 3] == 0.5).all() and not o[:, :, 3].any()
    torch.testing.assert_close(lse[:, 0], torch.logaddexp(lse_none[:, 0], sink[0].detach()))
    torch.testing.assert_close(
        o[:, 0], none[:, 0] * (lse_none[:, 0] - lse[:, 0]).exp()[..., None].detach()
    )
    (dsink,) = torch.autograd.grad(o.sum(), sink)
    assert dsink.isfinite().all() and dsink[1] == 0 and dsink[0] != 0


def test_softcap_bounds_the_scores(backend, device):
    """Scores of thousands become +-softcap, and their gradients vanish."""
    q, k, v = (x.requires_grad_() for x in heads(T=20, S=30, device=device))
    o, lse = tfkern.attention(q, k, v, scale=1e4, softcap=3.0, return_lse=True, backend=backend)
    assert (lse <= 3 + math.log(30) + 1e-5).all() and (lse >= -3 - 1e-5).all()
    dq, _ = torch.autograd.grad(o.sum(), (q, k))
    assert dq.isfinite().all() and dq.abs().median() < 1e-3


# ---- dropout ----


def masks(backend, device, p, seed, B=2, H=3, T=70, S=130, **options):
    """The mask itself: with v = identity and equal scores, o is keep / (S (1 - p))."""
    q = torch.zeros(B, H, T, 8, device=device)
    k = torch.zeros(B, H, S, 8, device=device)
    v = torch.eye(S, device=device).expand(B, H, S, S)
    return tfkern.attention(q, k, v, dropout_p=p, seed=seed, backend=backend, **options)


def test_all_backends_drop_the_same_elements(backend, device):
    o = masks(backend, device, 0.3, 123456789012345)
    expected = masks("reference", device, 0.3, 123456789012345)
    assert torch.equal(o == 0, expected == 0)
    torch.testing.assert_close(o, expected)
    kept = o[o != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (0.7 * 130)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(backend, device, p):
    """The fraction is p within 5 standard deviations, in all of it and along every dimension, and
    the heads, rows and batches differ."""
    zero = masks(backend, device, p, 7) == 0
    n = zero.numel()
    assert abs(zero.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for dim in range(4):
        along = zero.float().mean([d for d in range(4) if d != dim])
        assert (along - p).abs().max() < 5.5 * math.sqrt(p * (1 - p) / (n / zero.shape[dim]))
        a, b = zero.select(dim, 0), zero.select(dim, 1)
        assert 0 < (a ^ b).float().mean() - p * (1 - p) < 2 * p * (1 - p)


def test_dropout_of_0_and_1(backend, device):
    q, k, v = heads(T=40, S=50, device=device)
    plain = with_gradients(
        lambda *x: tfkern.attention(*x, return_lse=True, backend=backend), q, k, v
    )
    none = with_gradients(
        lambda *x: tfkern.attention(*x, dropout_p=0.0, seed=3, return_lse=True, backend=backend),
        q, k, v,
    )  # fmt: skip
    check_bits(plain, none, backend)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = tfkern.attention(*leaves, dropout_p=1.0, backend=backend)
    assert not o.any()
    assert not any(g.any() for g in torch.autograd.grad(o.sum(), leaves))


def test_dropout_seeds(backend, device):
    q, k, v = heads(device=device)

    def drop(seed=None):
        return tfkern.attention(q, k, v, dropout_p=0.5, seed=seed, backend=backend)

    check_bits([drop(3)], [drop(torch.tensor(3, device=device))], backend)
    assert not torch.allclose(drop(3), drop(4)) and not torch.allclose(drop(3), drop(3 + 2**40))
    torch.manual_seed(5)
    first, second = drop(), drop()
    torch.manual_seed(5)
    check_bits([first], [drop()], backend)
    assert not torch.allclose(first, second)


# ---- packed documents ----


def packed(device, lengths, H=2, Hk=1, D=16, dtype=torch.float32):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    total = sum(lengths)
    tensors = [torch.randn(total, n, D, device=device).to(dtype) for n in (H, Hk, Hk)]
    return *tensors, cu


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_no_leak_between_documents(backend, device, causal):
    """Document 2 keeps its very bits, gradients included, whatever the others hold."""
    q, k, v, cu = packed(device, (35, 70, 0, 20))
    mine = slice(35, 105)

    def run(q, k, v):
        return tfkern.attention_varlen(
            q, k, v, cu, cu, causal=causal, dropout_p=0.2, seed=1, return_lse=True, backend=backend
        )

    def of_document(q, k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, lse = run(*leaves)
        do = torch.ones_like(o)
        do[:35] = do[105:] = q[0, 0, 0].item()  # NaN where the others hold NaN
        grads = torch.autograd.grad(o, leaves, do)
        return o[mine], lse[:, mine], *(g[mine] for g in grads)

    before = of_document(q, k, v)
    for value in (3.0, math.nan, math.inf):
        for x in (q, k, v):
            x[:35] = x[105:] = value
        check_bits(before, of_document(q, k, v), backend)


def test_documents_as_padded_batches(backend, device):
    """A packed batch equals the padded one of the same documents, dropout included."""
    lengths = (17, 66, 1, 0, 40)
    q, k, v, cu = packed(device, lengths)
    options = {"causal": True, "window": (30, None), "dropout_p": 0.3, "seed": 11}
    o = tfkern.attention_varlen(q, k, v, cu, cu, 66, 66, **options, backend=backend)

    def padded(x):
        rows = x.new_zeros(len(lengths), 66, *x.shape[1:])
        for i, n in enumerate(lengths):
            rows[i, :n] = x[cu[i] : cu[i] + n]
        return rows.transpose(1, 2)

    n = torch.tensor(lengths, device=device)
    truth = torch_attention(
        *(padded(x).double() for x in (q, k, v)),
        query_lengths=n, key_lengths=n, **options,
    ).transpose(1, 2)  # fmt: skip
    for i, n in enumerate(lengths):
        ours = o[cu[i] : cu[i] + n].double()
        torch.testing.assert_close(ours, truth[i, :n], rtol=1e-4, atol=1e-5)


def test_many_documents_of_every_length(backend, device):
    """More documents than tiles, whose ends lie anywhere."""
    generator = random.Random(0)
    queries = [generator.choice((0, 1, 2, 15, 16, 17, 31, 33)) for _ in range(37)]
    keys = [generator.choice((0, 1, 5, 16, 64, 65)) for _ in queries]
    q, _, _, cu_q = packed(device, queries)
    _, k, v, cu_k = packed(device, keys)
    options = {"causal": True, "return_lse": True}
    validate(
        lambda q, k, v: tfkern.attention_varlen(q, k, v, cu_q, cu_k, **options, backend=backend),
        lambda q, k, v: torch_attention_varlen(q, k, v, cu_q, cu_k, **options),
        {"q": q, "k": k, "v": v},
        floor_scale=dict.fromkeys(("q", "k", "v", "output 0", "output 1"), 8.0),
    ).check()


# ---- decoding ----


@pytest.mark.parametrize("B, T, S", [(4, 1, 1500), (1, 3, 1111)])
def test_decode(backend, dtype, device, B, T, S):
    """Few queries and many keys, which are split: lengths end within, before and at a split."""
    q, k, v = heads(B, 2 * B, (B + 1) // 2, T, S, 32, dtype, device)
    lengths = torch.tensor([S - 7, 1, S // 2, 0][:B], device=device)
    padding = torch.arange(S, device=device) >= lengths[:, None]
    for x in (k, v):
        x.masked_fill_(padding[:, None, :, None], math.nan)
    inputs = {"q": q, "k": k, "v": v, "sink": 3 + torch.randn(2 * B, device=device).to(dtype)}
    options = {"causal": True, "key_lengths": lengths, "return_lse": True}
    validate(
        lambda **x: tfkern.attention(**x, **options, backend=backend),
        lambda **x: torch_attention(**x, **options),
        inputs,
        floor_scale=floor_scale(inputs, B, T, S),
    ).check()


def test_decode_with_every_option(backend, device):
    """The parts of a split agree on positions, and count the sink once."""
    B, H, T, S = 1, 2, 2, 1300
    q, k, v = heads(B, H, 1, T, S, 16, device=device)
    inputs = {"q": q, "k": k, "v": v, "sink": 4 + torch.randn(H, device=device)}
    inputs["bias"] = torch.randn(1, H, 1, S, device=device)
    options = {
        "window": (1100, 0), "mask": torch.rand(T, S, device=device) < 0.8, "softcap": 3.0,
        "alibi_slopes": torch.rand(H, device=device) / 1000, "dropout_p": 0.3, "seed": 5,
        "return_lse": True,
    }  # fmt: skip
    validate(
        lambda **x: tfkern.attention(**x, **options, backend=backend),
        lambda **x: torch_attention(**x, **options),
        inputs,
        floor_scale=floor_scale(inputs, B, T, S),
    ).check()


def test_pages_need_no_gradient(backend, device):
    q = torch.randn(1, 2, 3, 16, device=device, requires_grad=True)
    k = torch.randn(5, 2, 4, 16, device=device)
    table = torch.tensor([[3, 1]], device=device)
    with pytest.raises(NotImplementedError, match="no backward"):
        tfkern.attention(q, k, k, page_table=table, backend=backend)
    with torch.no_grad():
        o = tfkern.attention(q, k, k, page_table=table, backend=backend)
    rows = k[[3, 1]].transpose(0, 1).flatten(1, 2)[None]
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q.detach(), rows, rows))


# ---- incoming gradients, transforms ----


@pytest.mark.parametrize("layout", ["expanded scalar", "view of a concatenation", "transposed"])
def test_incoming_gradients(backend, device, layout):
    q, k, v = (x.requires_grad_() for x in heads(2, 2, 1, 40, 50, device=device))
    o = tfkern.attention(q, k, v, causal=True, backend=backend)
    do = {
        "expanded scalar": lambda: torch.tensor(0.7, device=device).expand(o.shape),
        "view of a concatenation": lambda: torch.randn(2, 2, 40, 3 * 16 + 1, device=device)[
            ..., 17:33
        ],
        "transposed": lambda: torch.randn(16, 40, 2, 2, device=device).permute(3, 2, 1, 0),
    }[layout]()
    strided = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    check_bits(strided, torch.autograd.grad(o, (q, k, v), do.contiguous()), backend)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(torch_attention(*leaves, causal=True), leaves, do.double())
    for a, b in zip(strided, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


ALL_OPTIONS = {"causal": True, "window": (20, None), "softcap": 3.0, "dropout_p": 0.2, "seed": 5}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_options(backend, device, dynamic):
    torch._dynamo.reset()

    def fn(q, k, v, bias, sink):
        return tfkern.attention(
            q.sin(), k, v, bias=bias, sink=sink, mask=bias < 2, **ALL_OPTIONS, return_lse=True,
            backend=backend,
        )  # fmt: skip

    compiled = compiling.compiled(fn, backend, dynamic=dynamic)
    lengths = ((20, 30), (33, 65)) if dynamic else ((20, 30),)
    guard = torch._dynamo.config.patch(error_on_recompile=True)
    with guard if dynamic else contextlib.nullcontext():
        for T, S in lengths:
            bias, sink = torch.randn(2, 1, T, S, device=device), torch.randn(4, device=device)
            leaves = (*heads(2, 4, 2, T, S, device=device), bias, sink)
            eager, ours = with_gradients(fn, *leaves), with_gradients(compiled, *leaves)
            for a, b in zip(ours, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_packed(backend, device):
    if backend == "reference":
        pytest.skip("loops over documents")
    torch._dynamo.reset()

    def fn(q, k, v, cu):
        return tfkern.attention_varlen(q, k, v, cu, cu, causal=True, backend=backend)

    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((20, 30), (3, 40)):
            args = packed(device, lengths)
            torch.testing.assert_close(compiled(*args), fn(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_with_options(backend, device):
    n = 3
    q, k, v = (torch.randn(n, 2, h, t, 8, device=device) for h, t in ((4, 9), (2, 12), (2, 12)))
    bias, sink = torch.randn(n, 1, 4, 1, 12, device=device), torch.randn(4, device=device)

    def loss(q, k, v, bias):
        options = ALL_OPTIONS | {"seed": None, "dropout_p": 0.0}
        o = tfkern.attention(q, k, v, bias=bias, sink=sink, **options, backend=backend)
        return o.square().sum()

    ours = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
    for i in range(n):
        alone = torch.func.grad(loss, (0, 1, 2, 3))(q[i], k[i], v[i], bias[i])
        for a, b in zip(ours, alone, strict=True):
            torch.testing.assert_close(a[i], b)
    leaves = [x.double().requires_grad_() for x in (q[0], k[0], v[0], bias[0])]
    options = {"causal": True, "window": (20, None), "softcap": 3.0, "sink": sink.double()}
    truth = torch_attention(*leaves[:3], bias=leaves[3], **options).square().sum()
    for a, b in zip(ours, torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(a[0].double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_replays_dropout(backend, device, reentrant):
    q, k, v = heads(device=device)

    def fn(q, k, v):
        return tfkern.attention(q, k, v, causal=True, dropout_p=0.3, backend=backend)

    def grads(wrapped):
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = wrapped(*leaves)
        o.square().sum().backward()  # autograd.grad does not reach through a reentrant checkpoint
        return o, *(x.grad for x in leaves)

    again = grads(lambda *x: checkpoint(fn, *x, use_reentrant=reentrant))
    check_bits(grads(fn), again, backend)


def test_second_derivative_with_options_raises(backend, device):
    q, k, v = (x.requires_grad_() for x in heads(device=device))
    bias = torch.randn(1, 1, 70, 70, device=device, requires_grad=True)
    o = tfkern.attention(q, k, v, bias=bias, backend=backend)
    (dbias,) = torch.autograd.grad(o.square().sum(), bias, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dbias.sum().backward()


def test_reference_gradcheck():
    q, k, v = (x.double() for x in heads(2, 4, 2, 4, 6, 3))
    bias = torch.randn(2, 1, 4, 1, dtype=torch.float64)
    sink = torch.randn(4, dtype=torch.float64)
    lengths = torch.tensor([6, 2])

    def fn(q, k, v, bias, sink):
        return tfkern.attention(
            q, k, v, bias=bias, sink=sink, alibi_slopes=torch.rand(2, 4), key_lengths=lengths,
            mask=torch.ones(4, 6).tril(3).bool(), **ALL_OPTIONS, return_lse=True,
            backend="reference",
        )  # fmt: skip

    def seeded(*x):
        torch.manual_seed(0)
        return fn(*x)

    leaves = tuple(x.requires_grad_() for x in (q, k, v, bias, sink))
    assert torch.autograd.gradcheck(seeded, leaves)


@pytest.mark.slow
def test_strides_beyond_32_bits(backend, device):
    """Elements more than 2^31 apart. The memory between them is never touched, hence not there."""
    if backend == "reference":
        pytest.skip("plain PyTorch")
    apart = 2**31 + 64
    base = torch.empty(0, device=device, dtype=torch.bfloat16)
    base.untyped_storage().resize_(2 * (apart + 40 * 16 * 3))
    rows = []
    for i in range(3):
        x = base.as_strided((2, 1, 40, 16), (apart, 16, 16, 1), i * 40 * 16)
        x.copy_(torch.randn(2, 1, 40, 16, device=device))
        rows.append(x.requires_grad_())
    o = tfkern.attention(*rows, causal=True, backend=backend)
    grads = torch.autograd.grad(o.float().sum(), rows)
    near = [x.detach().clone().requires_grad_() for x in rows]
    expected = tfkern.attention(*near, causal=True, backend=backend)
    again = torch.autograd.grad(expected.float().sum(), near)
    check_bits((o, *grads), (expected, *again), backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow under the interpreter")
def test_more_heads_than_a_grid_dimension(backend, device):
    q, k, v = heads(33000, 2, 1, 2, 3, 16, device=device)
    o = tfkern.attention(q, k, v, backend=backend)
    torch.testing.assert_close(o, torch_attention(q, k, v))


# ---- bad input ----

q, k, v = (torch.zeros(2, 4, 3, 8) for _ in range(3))
cu = torch.tensor([0, 1, 3])
flat = torch.zeros(3, 4, 8)


def on(**options):
    return lambda: tfkern.attention(q, k, v, **options)


def on_packed(cu_q=cu, cu_k=cu, *more, **options):
    return lambda: tfkern.attention_varlen(flat, flat, flat, cu_q, cu_k, *more, **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (on(window=(-1, -1)), ["window", "None", "(-1, -1)"]),
        (on(window=3), ["window", "3"]),
        (on(window=(2**63, 0)), ["window", "2^31", str(2**63)]),
        (on(softcap=float("inf")), ["softcap", "finite", "inf"]),
        (on(softcap=1e-50), ["softcap", "1e-50"]),
        (on(scale=math.nan), ["scale", "finite", "nan"]),
        (on(softcap=-1.0), ["softcap", "-1.0"]),
        (on(dropout_p=1.5), ["dropout_p", "[0, 1]", "1.5"]),
        (on(dropout_p=0.5, seed=2.0), ["seed", "2.0"]),
        (on(bias=torch.zeros(3, 4)), ["bias", "(3, 4)", "(2, 4, 3, 3)"]),
        (on(bias=torch.zeros(1, 1, 1, 1, 3)), ["bias", "(1, 1, 1, 1, 3)"]),
        (on(bias=torch.zeros(3, 3, dtype=torch.int32)), ["bias", "int32"]),
        (on(bias=torch.zeros(3, 3, dtype=torch.float64)), ["bias", "float64", "float32"]),
        (on(mask=torch.zeros(3, 3)), ["mask", "bool", "float32"]),
        (on(mask=torch.zeros(2, 3, 3).bool()), ["mask", "(2, 3, 3)", "(2, 4, 3, 3)"]),
        (on(alibi_slopes=torch.zeros(3)), ["alibi_slopes", "(3,)", "(4,)", "(2, 4)"]),
        (on(alibi_slopes=torch.zeros(4, requires_grad=True)), ["alibi_slopes", "no gradient"]),
        (on(sink=torch.zeros(2)), ["sink", "(2,)", "(4,)"]),
        (on(page_table=torch.zeros(3, 1).int()), ["page_table", "(3, 1)", "(2, pages"]),
        (on(page_table=torch.zeros(2).int()), ["page_table", "(2,)"]),
        (on(page_table=torch.tensor([[0], [2]])), ["page_table", "0 to 1", "2"]),
        (on(page_table=torch.zeros(2, 1)), ["page_table", "float32"]),
        (on_packed(cu.float()), ["cu_seqlens_q", "float32"]),
        (on_packed(cu[None]), ["cu_seqlens_q", "(1, 3)"]),
        (on_packed(cu, torch.tensor([0, 3])), ["cu_seqlens", "3", "2"]),
        (on_packed(torch.tensor([0, 1, 4])), ["cu_seqlens_q", "3", "[0, 1, 4]"]),
        (on_packed(torch.tensor([1, 2, 3])), ["cu_seqlens_q", "[1, 2, 3]"]),
        (on_packed(torch.tensor([0, 4, 3])), ["cu_seqlens_q", "[0, 4, 3]"]),
        (on_packed(cu, cu, 1), ["max_seqlen_q", "1", "2"]),
        (lambda: tfkern.attention_varlen(q, k, v, cu, cu), ["q", "(total", "(2, 4, 3, 8)"]),
    ],
)  # fmt: skip
def test_bad_options(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
