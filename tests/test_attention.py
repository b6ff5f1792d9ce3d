"""Attention on every backend against plain PyTorch in float64."""

import aot
import compiling
import pytest
import torch
import torch.nn.functional as F
from bits import check_bits

import tfkern
from tfkern.testing import validate
from tfkern.validation.attention import floor_scale, torch_attention

# B, H, Hk, T, S, D, Dv, causal: tiles are 64 to 128 rows, so lengths lie on either side of them
CASES = [
    (64, 1, 1, 1, 1, 1, 1, False),  # many batches of a tiny case: the rule compares maxima
    (8, 2, 1, 1, 9, 16, 16, True),
    (8, 2, 2, 2, 5, 7, 7, True),
    (8, 2, 2, 12, 9, 40, 40, True),  # the first three rows see nothing
    (1, 4, 2, 33, 65, 16, 32, False),
    (2, 4, 1, 113, 203, 64, 64, True),
    (1, 1, 1, 239, 1, 59, 59, False),
    (1, 2, 1, 129, 129, 80, 96, True),
    (1, 1, 1, 70, 131, 128, 128, False),
    (1, 1, 1, 67, 67, 256, 256, True),
]


def identifier(case):
    *sizes, causal = case
    return "x".join(map(str, sizes)) + ("-causal" if causal else "")


def make(case, dtype, device):
    B, H, Hk, T, S, D, Dv, _ = case
    shapes = {"q": (B, H, T, D), "k": (B, Hk, S, D), "v": (B, Hk, S, Dv)}
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}


def scale_of(inputs):
    B, _, T, _ = inputs["q"].shape
    return floor_scale(inputs, B, T, inputs["k"].shape[2])


def check(inputs, backend, **options):
    report = validate(
        lambda **kw: tfkern.attention(**kw, **options, return_lse=True, backend=backend),
        lambda **kw: torch_attention(**kw, **options, return_lse=True),
        inputs,
        floor_scale=scale_of(inputs),
    )
    report.check()


@pytest.mark.parametrize("case", CASES, ids=identifier)
def test_matches_torch(backend, dtype, device, case):
    check(make(case, dtype, device), backend, causal=case[-1])


@pytest.mark.slow
@pytest.mark.parametrize("D", [1, 7, 16, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_head_sizes(backend, dtype, device, D, causal):
    check(make((1, 2, 1, 71, 135, D, D, causal), dtype, device), backend, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize(
    "T, S",
    [(1, 1), (1, 9), (2, 5), (5, 2), (239, 1), (113, 203), (799, 3), (255, 256), (1023, 1024)],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths_pairs(backend, dtype, device, T, S, causal):
    B = 1 + 64 // T  # the rule compares maxima, which takes some rows
    H = 1 if T > 1000 else 2
    check(make((B, H, 1, T, S, 32, 32, causal), dtype, device), backend, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(backend, dtype, device, causal):
    """Padding holds NaN and infinities, in the incoming gradient as well, and never matters."""
    B, H, T, S, D = 5, 2, 66, 130, 16
    query_lengths = torch.tensor([66, 0, 3, 65, 40], device=device)
    key_lengths = torch.tensor([130, 5, 0, 2, 129], device=device, dtype=torch.int32)
    inputs = make((B, H, 1, T, S, D, D, causal), dtype, device)
    lengths = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    for name, length in (("q", query_lengths), ("k", key_lengths), ("v", key_lengths)):
        x = inputs[name]
        padding = torch.arange(x.shape[2], device=device) >= length[:, None]
        x.masked_fill_(padding[:, None, :, None], torch.nan)
        x[:, :, -1] = torch.where(padding[:, None, -1:], torch.inf, x[:, :, -1])
    padding = torch.arange(T, device=device) >= query_lengths[:, None]

    def poisoned(**kw):
        o, lse = tfkern.attention(**kw, causal=causal, **lengths, return_lse=True, backend=backend)
        o.register_hook(lambda do: do.masked_fill(padding[:, None, :, None], torch.nan))
        return o, lse

    def reference(**kw):
        return torch_attention(**kw, causal=causal, **lengths, return_lse=True)

    validate(poisoned, reference, inputs, floor_scale=scale_of(inputs)).check()


@pytest.fixture
def sm_90(monkeypatch, device):
    """The interpreter runs the kernels, and the tiles, of sm_90."""
    if device != "cpu":
        pytest.skip("kernels run as they are")
    kernels = pytest.importorskip("tfkern.kernels.attention.forward_kernel")
    monkeypatch.setattr(kernels, "architecture", lambda device: 90)


# Head sizes of all tiles, not all of them powers of two; one with odd strides
@pytest.mark.parametrize("case", [
    (2, 4, 2, 33, 70, 40, 72, True),
    (1, 2, 1, 129, 130, 128, 128, True),
    (1, 1, 1, 67, 131, 256, 256, False),
    (1, 2, 1, 33, 65, 17, 16, True),
], ids=identifier)  # fmt: skip
def test_matches_torch_by_descriptors(sm_90, device, case):
    check(make(case, torch.bfloat16, device), "triton", causal=case[-1])


def test_lengths_by_descriptors(sm_90, device):
    test_lengths("triton", torch.bfloat16, device, True)


def test_tensors_that_descriptors_take():
    """TMA takes 16-bit elements, contiguous rows and multiples of 16 bytes."""
    kernels = pytest.importorskip("tfkern.kernels")
    x = torch.empty(2, 3, 5, 64, dtype=torch.bfloat16)
    taken = [x, x.transpose(1, 2), x[:1, :1, :1], x[..., 8:48], x[:1, ..., :16].float().half()]
    refused = [
        x.float(), x[..., 1:], x[..., ::2], x.mT, x[:, :1].expand(2, 3, 5, 64), x[:, :0],
        x.new_empty(2, 3, 5, 65)[..., :64],
    ]  # fmt: skip
    for arch in (90, 100, 103):
        assert all(kernels.describable(arch, t) for t in taken)
        assert not any(kernels.describable(arch, t) for t in refused)
        assert not kernels.describable(arch, x, x.float())
    assert not any(kernels.describable(arch, x) for arch in (80, 86, 89, 120))


def test_rows_that_see_nothing_may_hold_nan(backend, dtype, device):
    """Neither the queries of such rows nor their incoming gradients reach a gradient."""
    q, k, v = make((2, 2, 1, 70, 50, 16, 16, True), dtype, device).values()
    do = torch.randn_like(q)
    grads = []
    for hidden in (0.0, torch.nan):
        q[:, :, :20] = hidden
        do[:, :, :20] = hidden
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = tfkern.attention(*leaves, causal=True, backend=backend)
        grads.append(torch.autograd.grad(o, leaves, do))
    check_bits(*grads, backend)
    assert not grads[1][0][:, :, :20].any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(backend, dtype, device, shape):
    B, H, T, S = shape
    q, k, v = make((B, H, H, T, S, 8, 8, False), dtype, device).values()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = tfkern.attention(*leaves, causal=True, return_lse=True, backend=backend)
    assert o.shape == (B, H, T, 8) and lse.shape == (B, H, T)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    grads = torch.autograd.grad(o.sum() + lse.nan_to_num(neginf=0).sum(), leaves)
    for x, dx in zip(leaves, grads, strict=True):
        assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-44, 3.0])
def test_scale(backend, device, scale):
    inputs = make((1, 2, 2, 65, 70, 16, 16, True), torch.float32, device)
    check(inputs, backend, causal=True, scale=scale)


def test_large_logits(backend, dtype, device):
    """Scores of +-1e4: the softmax is nearly one-hot and nothing overflows."""
    inputs = make((1, 1, 1, 40, 70, 16, 16, False), dtype, device)
    inputs = {name: x * (50 if name != "v" else 1) for name, x in inputs.items()}
    o, lse = tfkern.attention(**inputs, scale=1.0, return_lse=True, backend=backend)
    wide = {name: x.double() for name, x in inputs.items()}
    truth, true_lse = torch_attention(**wide, scale=1.0, return_lse=True)
    assert true_lse.max() > 1e4
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(o.double(), truth, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["bthd", "every other", "expanded", "amid NaN"])
def test_strides(backend, device, layout, narrow):
    """Strided inputs and incoming gradients give the very bits of contiguous ones."""
    if narrow and backend != "native":
        pytest.skip("only the native kernels read bfloat16 otherwise than float32")
    B, H, T, D = 2, 2, 71, 17 if layout == "amid NaN" else 16
    options = {"dtype": torch.bfloat16 if narrow else torch.float32, "device": device}
    if layout == "bthd":
        inputs = torch.randn(4, B, T, H, D, **options).transpose(2, 3)
    elif layout == "every other":
        inputs = torch.randn(4, B, H, T, 2 * D, **options)[..., ::2]
    elif layout == "expanded":
        inputs = torch.randn(4, B, H, 1, 1, **options).expand(4, B, H, T, D)
    else:
        inputs = torch.full((4, B, H, T + 9, D + 6), torch.nan, **options)[..., 4:-5, 3:-3]
        inputs.normal_()
    q, k, v, do = inputs.unbind()
    results = []
    for copy in (False, True):
        leaves = [(x.contiguous() if copy else x).detach().requires_grad_() for x in (q, k, v)]
        o = tfkern.attention(*leaves, causal=True, backend=backend)
        results.append((o, *torch.autograd.grad(o, leaves, do.contiguous() if copy else do)))
    check_bits(*results, backend)
    check({"q": q, "k": k, "v": v}, backend, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", ["first", "last"])
def test_outputs_lie_in_memory_as_inputs_do(dtype, tokens):
    """So that a model that merges heads copies nothing. Rows beyond the lengths are 0, too."""
    B, H, Hk, T, D = 2, 4, 2, 70, 16
    shapes = ((B, T, H, D), (B, T, Hk, D), (B, T, Hk, 2 * D))
    leaves = [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]
    if tokens == "last":
        leaves = [x.contiguous() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    lengths = torch.tensor([70, 33])
    options = {"query_lengths": lengths, "key_lengths": lengths, "causal": True}
    o = tfkern.attention(*leaves, **options, backend="native")
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, leaves, do)
    for x in (o, *gradients):
        assert (x.transpose(1, 2) if tokens == "first" else x).is_contiguous()
        assert not x[1, :, 33:].any()
    same = [x.detach().contiguous().requires_grad_() for x in leaves]
    expected = tfkern.attention(*same, **options, backend="native")
    check_bits((o, *gradients), (expected, *torch.autograd.grad(expected, same, do)), "native")


def test_documents_lie_in_memory_one_after_the_other():
    q, k, v = torch.randn(3, 70, 4, 16)
    limits = torch.tensor([0, 33, 70])
    o = tfkern.attention_varlen(q, k, v, limits, limits, causal=True, backend="native")
    assert o.is_contiguous()
    for a, b in ((0, 33), (33, 70)):
        parts = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(*parts, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(o[a:b], expected)


@pytest.mark.parametrize("window", [None, (150, 0)], ids=["full", "window"])
def test_more_keys_than_are_kept_in_cache(window):
    """Rows that do not lie side by side are copied, the first 4096 of this size for all queries."""
    if tfkern.backends("attention")["native"]:
        pytest.skip("no native build")
    q, do = torch.randn(2, 1, 4, 130, 256)
    k, v = torch.randn(2, 1, 2, 4200, 512)[..., :256]
    results = []
    for copy in (False, True):
        leaves = [(x.contiguous() if copy else x).detach().requires_grad_() for x in (q, k, v)]
        o = tfkern.attention(*leaves, window=window, backend="native")
        results.append((o, *torch.autograd.grad(o, leaves, do)))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("queries", [2, 16], ids=["narrow", "wide"])
def test_lse_of_equal_scores(queries):
    """log(S), rounded once, for all S that leave room."""
    if tfkern.backends("attention")["native"]:
        pytest.skip("no native build")
    q, k = torch.zeros(300, 1, queries, 8), torch.zeros(300, 1, 300, 8)
    lengths = torch.arange(1, 301)
    _, lse = tfkern.attention(q, k, k, key_lengths=lengths, return_lse=True, backend="native")
    truth = lengths.double().log()[:, None, None]
    unit = torch.nextafter(truth.float(), torch.tensor(torch.inf)) - truth.float()
    assert ((lse.double() - truth).abs() <= unit).all()


def test_same_tensor_three_times(backend, device):
    x = torch.randn(1, 2, 40, 16, device=device)

    def both(attention):
        return lambda x: attention(x, x, x, causal=True)

    ours = both(lambda *a, **kw: tfkern.attention(*a, **kw, backend=backend))
    validate(ours, both(lambda *a, **kw: torch_attention(*a, **kw)), {"x": x}).check()


def test_gradient_of_lse_alone(backend, device):
    inputs = make((1, 2, 1, 20, 30, 8, 8, True), torch.float32, device)
    v = inputs.pop("v")
    report = validate(
        lambda q, k: tfkern.attention(q, k, v, causal=True, return_lse=True, backend=backend)[1],
        lambda q, k: torch_attention(q, k, v.to(q.dtype), causal=True, return_lse=True)[1],
        inputs,
    )
    report.check()


def test_runs_are_equal_and_nothing_is_overwritten(backend, dtype, device):
    inputs = make((2, 4, 2, 100, 130, 32, 32, True), dtype, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    before = [x.detach().clone() for x in leaves]
    do = torch.randn(2, 4, 100, 32, device=device).to(dtype)
    kept = do.clone()

    def run():
        o = tfkern.attention(*leaves, causal=True, backend=backend)
        return (o, *torch.autograd.grad(o, leaves, do))

    first = run()
    for _ in range(3 if backend == "triton" and device == "cpu" else 20):
        check_bits(first, run(), backend)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))
    assert torch.equal(do, kept)


def test_what_memory_held_before_does_not_matter(backend, dtype, device):
    q, k, v = make((1, 4, 4, 64, 64, 32, 32, False), dtype, device).values()
    hidden = torch.zeros(1, 1, 64, 64, dtype=torch.bool, device=device)
    inputs = {"q": q, "k": k[:, :, :33], "v": v[:, :, :33]}  # an odd number of keys
    for seed in range(5):
        tfkern.attention(q, k, v, mask=hidden, backend=backend)  # leaves tiles of -inf
        check(inputs, backend, dropout_p=0.5, seed=seed)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 2)], ids=["one head", "grouped"])
def test_threads_do_not_change_the_result(shape):
    if tfkern.backends("attention")["native"]:
        pytest.skip("no native build")
    B, H, Hk = shape
    leaves = [
        x.requires_grad_()
        for x in make((B, H, Hk, 300, 300, 32, 32, True), torch.float32, "cpu").values()
    ]
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        o = tfkern.attention(*leaves, causal=True, backend="native")
        results.append((o, *torch.autograd.grad(o.square().sum(), leaves)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_causal_is_aligned_to_the_lower_right(backend, device):
    """The last query sees every key, and a query does not see what comes after it."""
    q, k, v = make((1, 1, 1, 3, 5, 8, 8, True), torch.float32, device).values()
    o = tfkern.attention(q, k, v, causal=True, backend=backend)
    last = F.scaled_dot_product_attention(q[:, :, 2:], k, v)
    torch.testing.assert_close(o[:, :, 2:], last)
    first = F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(o[:, :, :1], first)
    square = make((1, 2, 2, 7, 7, 8, 8, True), torch.float32, device)
    upper_left = F.scaled_dot_product_attention(
        **{"query": square["q"], "key": square["k"], "value": square["v"]}, is_causal=True
    )
    torch.testing.assert_close(tfkern.attention(**square, causal=True, backend=backend), upper_left)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_reference_gradcheck(causal):
    q, k, v = make((2, 2, 1, 4, 5, 3, 2, causal), torch.float64, "cpu").values()
    lengths = torch.tensor([5, 2])

    def fn(q, k, v):
        o, lse = tfkern.attention(
            q, k, v, causal=causal, key_lengths=lengths, return_lse=True, backend="reference"
        )
        return o, lse.nan_to_num(neginf=0)

    assert torch.autograd.gradcheck(fn, tuple(x.requires_grad_() for x in (q, k, v)))


def test_second_derivative_raises(backend, device):
    q, k, v = (
        x.requires_grad_()
        for x in make((1, 1, 1, 4, 4, 8, 8, False), torch.float32, device).values()
    )
    o = tfkern.attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
def test_opcheck(backend, device, full):
    if backend == "reference":
        pytest.skip("the reference is not a registered operator")
    ops = torch.ops.tfkern if backend == "native" else torch.ops.tfkern_triton
    B, H, T, S = 2, 2, 9, 20
    q, k, v = make((B, H, 1, T, S, 16, 8, True), torch.float32, device).values()
    # A dense layout other than the contiguous one.
    q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v))
    tensors: list = [None] * 9
    options = (None, 0, 0.25, 0.0, 0.0)
    if full:
        lengths = torch.tensor([9, 4], device=device)
        bias, sink = torch.randn(B, 1, T, 1, device=device), torch.randn(H, device=device)
        mask, slopes = bias < 1, torch.rand(B, H, device=device)
        seed = torch.tensor(3, device=device)
        tensors = [bias, mask, slopes, sink, lengths, lengths, None, None, seed]
        options = (7, 1, 0.25, 2.0, 0.1)
    *others, seed = tensors
    args = (q, k, v, *others, None, seed, *options)
    torch.library.opcheck(ops.attention_forward.default, args)
    o, lse = ops.attention_forward(*args)
    dlse = torch.randn_like(lse[0]) if full else None
    torch.library.opcheck(ops.attention_backward.default, (o, dlse, o, lse, *args, full))


# Without descriptors, the forward spills outside of its loops. Tiles of half as many keys need no
# spills, but their loops load 15 % more from shared memory.
SPILLS = {("_forward_kernel", arch): 56 for arch in (80, 89)}


@aot.each_arch
def test_compiles_ahead_of_time_without_spills(arch):
    aot.check("attention", arch, spills={"_dkv_kernel": 80} | SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
def test_more_cases_compile_without_spills(arch):
    aot.check("attention_of_others", arch, spills=SPILLS)


def test_compile(backend, device):
    torch._dynamo.reset()

    def fn(q, k, v):
        o, lse = tfkern.attention(q.sin(), k, v, causal=True, return_lse=True, backend=backend)
        return o * 2 + lse[..., None]

    compiled = compiling.compiled(fn, backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, S in ((5, 8), (9, 31), (70, 70)):
            leaves = [
                x.requires_grad_()
                for x in make((2, 4, 2, T, S, 16, 16, True), torch.float32, device).values()
            ]
            do = torch.randn(2, 4, T, 16, device=device)
            eager = torch.autograd.grad(fn(*leaves), leaves, do)
            ours = torch.autograd.grad(compiled(*leaves), leaves, do)
            for a, b in zip(ours, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(backend, device):
    q, k, v = (
        x.unflatten(0, (3, 2))
        for x in make((6, 2, 2, 5, 7, 8, 8, True), torch.float32, device).values()
    )

    def loss(q, k, v):
        return tfkern.attention(q, k, v, causal=True, backend=backend).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    leaves = [x.flatten(0, 1).double().requires_grad_() for x in (q, k, v)]
    o = torch_attention(*leaves, causal=True)
    for a, b in zip(ours, torch.autograd.grad(o.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a.flatten(0, 1).double(), b, rtol=1e-4, atol=1e-5)


def test_autocast(backend, device):
    q, k, v = (
        x.requires_grad_()
        for x in make((1, 2, 2, 6, 6, 16, 16, False), torch.float32, device).values()
    )
    narrow = tfkern.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    with torch.autocast(device, torch.bfloat16):
        o = tfkern.attention(q, k, v, backend=backend)
        assert o.dtype == torch.bfloat16
        o.sum().backward()
    assert q.grad.dtype == torch.float32
    wide = torch.autograd.grad(narrow.sum(), q)[0]
    check_bits((o, q.grad), (narrow, wide), backend)


q, k, v = (torch.zeros(2, 4, 3, 8) for _ in range(3))


def on_keys(lengths):
    return lambda: tfkern.attention(q, k, v, key_lengths=lengths)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tfkern.attention(q[0], k, v), ["q", "(4, 3, 8)"]),
        (lambda: tfkern.attention(q.int(), k, v), ["q", "int32"]),
        (lambda: tfkern.attention(q, k.double(), v), ["k", "float64", "float32"]),
        (lambda: tfkern.attention(q, k.to("meta"), v), ["k", "meta", "cpu"]),
        (lambda: tfkern.attention(q, k[..., :4], v), ["k", "(2, 4, 3, 4)", "(2, 4, 3, 8)"]),
        (lambda: tfkern.attention(q, k, v[:, :, :2]), ["v", "(2, 4, 2, 8)", "(2, 4, 3, 8)"]),
        (lambda: tfkern.attention(q, k[:, :3], v[:, :3]), ["heads", "4", "3"]),
        (lambda: tfkern.attention(q, k[:, :0], v[:, :0]), ["heads", "4", "0"]),
        (lambda: tfkern.attention(*(torch.zeros(1, 1, 2, 257),) * 3), ["head size", "256", "257"]),
        (lambda: tfkern.attention(*(torch.zeros(1, 1, 2, 0),) * 3), ["head size", "0"]),
        (on_keys(torch.tensor([1, 4])), ["key_lengths", "0 to 3", "4"]),
        (on_keys(torch.tensor([-1, 2])), ["key_lengths", "-1"]),
        (on_keys(torch.tensor([1.0, 2])), ["key_lengths", "float32"]),
        (on_keys([1, 2]), ["key_lengths", "list"]),
        (on_keys(torch.tensor([1])), ["key_lengths", "(1,)", "(2,)"]),
        (lambda: tfkern.attention(q, k, v, backend="flash"), ["backend", "'flash'"]),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
