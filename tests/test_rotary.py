"""Rotary positions on every backend against Hugging Face's formula and complex products."""

import aot
import compiling
import pytest
import torch
from torch.autograd import forward_ad

import tfkern
from tfkern.testing import validate

# B, H, Hk, T, D, R: 0 and 1, primes, one past a block of tokens or a vector, parts of a head
SHAPES = [
    (2, 4, 2, 17, 64, 64),
    (1, 3, 1, 5, 80, 32),
    (1, 1, 1, 1, 2, 2),
    (3, 2, 7, 13, 22, 14),
    (1, 2, 1, 37, 66, 34),
    (1, 2, 2, 3, 7, 0),
    (2, 0, 3, 5, 8, 8),
    (2, 3, 2, 0, 8, 8),
    (0, 3, 2, 4, 8, 4),
    (1, 2, 1, 3, 256, 256),
    (2, 5, 1, 1, 300, 298),
]


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def plain(q, k, cos, sin, interleaved=False):
    """As transformers has it for Llama, or GPT-J if interleaved, in the dtype of the tables."""
    R = cos.shape[-1]
    cos, sin = (t if t.dim() == 2 else t[:, None] for t in (cos, sin))
    turn = rotate_every_two if interleaved else rotate_half
    turned = []
    for x in (q, k):
        y = x[..., :R].to(cos.dtype)
        turned.append(torch.cat([(y * cos + turn(y) * sin).to(x.dtype), x[..., R:]], -1))
    return tuple(turned)


def table(shape, dtype, device, interleaved=False):
    """Cosine and sine of random angles, equal for the two features of a pair."""
    *rows, R = shape
    angles = 3 * torch.randn(*rows, R // 2, dtype=torch.float64)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def make(shape, dtype, device):
    B, H, Hk, T, D, _ = shape
    return {
        "q": torch.randn(B, H, T, D, device=device).to(dtype),
        "k": torch.randn(B, Hk, T, D, device=device).to(dtype),
    }


def check(inputs, cos, sin, interleaved, backend):
    def reference(q, k):
        # The truth has the numbers of the tables, and torch computes in the dtype of q.
        tables = (t.to(q.dtype if q.dtype == torch.float64 else t.dtype) for t in (cos, sin))
        return plain(q, k, *tables, interleaved)

    def ours(q, k):
        return tfkern.rotary(q, k, cos, sin, interleaved=interleaved, backend=backend)

    validate(ours, reference, inputs).check()


interleavings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


@interleavings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(backend, dtype, device, shape, interleaved):
    B, _, _, T, _, R = shape
    cos, sin = table((B, T, R), dtype, device, interleaved)
    check(make(shape, dtype, device), cos, sin, interleaved, backend)


@interleavings
@pytest.mark.parametrize("rows", [(17,), (1, 17), (2, 17)], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_with_tables_of_another_dtype(backend, dtype, device, rows, wide, interleaved):
    cos, sin = table((*rows, 48), wide, device, interleaved)
    inputs = make((2, 3, 1, 17, 64, 48), dtype, device)
    options = {"interleaved": interleaved, "backend": backend}
    if reason := tfkern.explain("rotary", *inputs.values(), cos, sin, **options).reasons:
        assert reason[backend].startswith("takes float32, bfloat16 and float16")
        return
    turned = tfkern.rotary(*inputs.values(), cos, sin, **options)
    if wide == torch.bfloat16 and dtype == torch.float16:
        wide = torch.float32
    exact = plain(*(x.double() for x in inputs.values()), cos.double(), sin.double(), interleaved)
    for x, y in zip(turned, exact, strict=True):
        assert x.dtype == dtype
        limit = max(torch.finfo(dtype).eps, 4e-7 if dtype != torch.float64 else 0)
        torch.testing.assert_close(x.double(), y, rtol=limit, atol=4 * limit)


def test_neighbours_are_complex_numbers(backend, device):
    """q + ik times exp(i angle), by torch's complex product; for halves after a permutation."""
    q = torch.randn(2, 3, 11, 40, device=device)
    angles = torch.randn(11, 20, dtype=torch.float64, device=device)
    turns = torch.polar(torch.ones_like(angles), angles)
    z = torch.view_as_complex(q.double().unflatten(-1, (20, 2))) * turns
    cos, sin = (t.repeat_interleave(2, -1).float() for t in (angles.cos(), angles.sin()))
    turned, none = tfkern.rotary(q, None, cos, sin, interleaved=True, backend=backend)
    assert none is None
    expected = torch.view_as_real(z).flatten(-2)
    torch.testing.assert_close(turned.double(), expected, rtol=1e-5, atol=1e-5)
    halves = torch.cat([torch.arange(0, 40, 2), torch.arange(1, 40, 2)]).to(device)
    turned, _ = tfkern.rotary(q[..., halves], None, cos[:, halves], sin[:, halves], backend=backend)
    expected = expected[..., halves]
    torch.testing.assert_close(turned.double(), expected, rtol=1e-5, atol=1e-5)


@interleavings
def test_matches_with_every_entry_its_own(backend, dtype, device, interleaved):
    """Tables whose pairs differ: the map is linear, and its gradient the transposed map."""
    cos, sin = (torch.randn(2, 9, 20, device=device).to(dtype) for _ in range(2))
    check(make((2, 3, 2, 9, 24, 20), dtype, device), cos, sin, interleaved, backend)


def test_products_depend_on_distances_only(backend, device):
    """What rotary positions are for."""
    q, k = torch.randn(2, 1, 1, 1, 32, device=device).expand(2, 1, 1, 6, 32)
    angles = torch.arange(6.0, device=device)[:, None] * 10 ** -torch.arange(16.0, device=device)
    angles = torch.cat([angles, angles], -1)
    q, k = tfkern.rotary(q, k, angles.cos(), angles.sin(), backend=backend)
    scores = (q @ k.mT)[0, 0]
    for distance in range(6):
        values = scores.diagonal(distance)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-4, atol=1e-4)


LAYOUTS = ["projection", "grouped", "transposed", "every other", "expanded", "offset", "columns"]


def laid_out(layout, dtype, device):
    """q (2, 4, 19, 16) and k (2, 2, 19, 16) with strides of each kind."""
    B, H, Hk, T, D = 2, 4, 2, 19, 16

    def new(*shape):
        return torch.randn(shape, device=device).to(dtype)

    if layout == "projection":
        heads = new(B, T, (H + 2 * Hk) * D).unflatten(-1, (-1, D)).transpose(1, 2)
        return heads[:, :H], heads[:, H : H + Hk]
    if layout == "grouped":  # each key head behind its queries
        heads = new(B, T, Hk, 4, D)
        return heads[..., :2, :].flatten(2, 3).transpose(1, 2), heads[..., 2, :].transpose(1, 2)
    if layout == "offset":  # no row begins at a multiple of 16 bytes
        return new(B, H, T, D + 1)[..., 1:], new(B, Hk, T, D + 1)[..., 1:]
    return {
        "transposed": lambda n: new(n, B, T, D).transpose(0, 1),
        "every other": lambda n: new(B, n, T, 2 * D)[..., ::2],
        "expanded": lambda n: new(B, 1, T, D).expand(B, n, T, D),
        "columns": lambda n: new(B, n, D, T).mT,
    }[layout](H), new(B, Hk, T, D)


@interleavings
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_match_a_copy(backend, dtype, device, layout, interleaved):
    q, k = laid_out(layout, dtype, device)
    cos, sin = table((19, 24), torch.float32, device, interleaved)
    cos, sin = cos[:, :12], sin.t().contiguous().t()[:, :12]  # other strides than each other
    grads = [torch.randn(1, 1, 1, 16, device=device).to(dtype).expand_as(x) for x in (q, k)]
    results = []
    for copy in (False, True):
        leaves = [(x.clone() if copy else x).detach().requires_grad_() for x in (q, k)]
        given = [g.contiguous() if copy else g for g in grads]
        tables = [t.contiguous() if copy else t for t in (cos, sin)]
        turned = tfkern.rotary(*leaves, *tables, interleaved=interleaved, backend=backend)
        results.append((*turned, *torch.autograd.grad(turned, leaves, given)))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)
    assert all(x.is_contiguous() for x in results[0][:2])
    assert all(x.transpose(1, 2).is_contiguous() for x in results[0][2:])
    exact = plain(q.double(), k.double(), cos.double(), sin.double(), interleaved)
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # the table is float32
    for x, y in zip(results[0], exact, strict=False):
        torch.testing.assert_close(x.double(), y, rtol=max(eps, 1e-6), atol=4 * max(eps, 1e-6))


@interleavings
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "expanded"])
def test_inplace_matches(backend, dtype, device, layout, interleaved):
    """Each element of the views has the value that it has out of place, and no other changes."""
    q, k = laid_out(layout, dtype, device)
    cos, sin = table((2, 19, 14), dtype, device, interleaved)
    options = {"interleaved": interleaved, "backend": backend}
    expected = tfkern.rotary(q, k, cos, sin, **options)
    around = [x._base if x._base is not None else x for x in (q, k)]
    before = [x.clone() for x in around]
    ours = tfkern.rotary(q, k, cos, sin, inplace=True, **options)
    assert ours[0] is q and ours[1] is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    for x in (q, k):
        x.copy_(torch.zeros_like(x))
    for base, old in zip(around, before, strict=True):
        kept = base != 0
        assert torch.equal(base[kept], old[kept])


def test_inplace_of_queries_alone(backend, device):
    q = torch.randn(1, 2, 5, 8, device=device)
    cos, sin = table((5, 8), torch.float32, device)
    expected, _ = tfkern.rotary(q, None, cos, sin, backend=backend)
    ours, none = tfkern.rotary(q, None, cos, sin, inplace=True, backend=backend)
    assert ours is q and none is None and torch.equal(q, expected)


def test_inplace_is_noticed_by_autograd(backend, device):
    x = torch.randn(1, 2, 5, 8, device=device, requires_grad=True)
    q = x * 1
    loss = q.square().sum()  # saves q
    cos, sin = table((5, 8), torch.float32, device)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        tfkern.rotary(q, None, cos, sin, inplace=True, backend=backend)
    with torch.no_grad():
        tfkern.rotary(q, None, cos, sin, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        tfkern.rotary(q.clone(), None, cos, sin, inplace=True, backend=backend)


def test_inplace_turns_tangents_too(backend, device):
    q, tangent = torch.randn(2, 1, 2, 5, 8, device=device)
    cos, sin = table((5, 8), torch.float32, device)
    expected, _ = tfkern.rotary(tangent, None, cos, sin, backend=backend)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.clone(), tangent)
        tfkern.rotary(dual, None, cos, sin, inplace=True, backend=backend)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, expected)
        with pytest.raises(NotImplementedError, match="no derivative by cos"):
            angles = forward_ad.make_dual(cos, sin)
            tfkern.rotary(q, None, angles, sin, backend=backend)


def test_inplace_refuses_shared_memory(device):
    cos, sin = table((6, 4), torch.float32, device)
    x = torch.randn(1, 2, 6, 4, device=device)
    untouched = x.clone()
    line = torch.randn(100, device=device)
    for q in (x[:, :1].expand(1, 2, 6, 4), line.as_strided((1, 2, 6, 4), (0, 20, 3, 1))):
        with pytest.raises(ValueError, match=r"q has strides \(.*share memory"):
            tfkern.rotary(q, None, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="k has strides"):
        tfkern.rotary(x, x[:, :1].clone().expand(1, 2, 6, 4), cos, sin, inplace=True)
    wide = torch.randn(1, 6, 5, 4, device=device).transpose(1, 2)
    for q, k in ((x, x), (x, x[:, 1:]), (x[:, :1], x), (wide[:, :3], wide[:, 2:])):
        with pytest.raises(ValueError, match="q and k share memory"):
            tfkern.rotary(q, k, cos, sin, inplace=True)
    assert torch.equal(x, untouched)
    tfkern.rotary(wide[:, :3], wide[:, 3:], cos, sin, inplace=True)
    tfkern.rotary(wide[:, ::2], wide[:, 1::2], cos, sin, inplace=True)


def test_nothing_is_overwritten_and_runs_are_equal(backend, dtype, device):
    inputs = make((2, 3, 2, 33, 70, 0), dtype, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    cos, sin = table((33, 66), dtype, device)
    grads = [torch.randn_like(x) for x in leaves]
    kept = [x.detach().clone() for x in (*leaves, cos, sin, *grads)]

    def run():
        turned = tfkern.rotary(*leaves, cos, sin, backend=backend)
        return (*turned, *torch.autograd.grad(turned, leaves, grads))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(kept, (*leaves, cos, sin, *grads), strict=True):
        assert torch.equal(a, b)


def test_gradients_where_one_result_is_unused(backend, device):
    q, k = (torch.randn(1, 2, 5, 8, device=device, requires_grad=True) for _ in range(2))
    cos, sin = table((5, 8), torch.float32, device)
    expected = torch.autograd.grad(sum(x.sum() for x in plain(q, k, cos, sin)), (q, k))
    for i in range(2):
        turned = tfkern.rotary(q, k, cos, sin, backend=backend)
        gradients = torch.autograd.grad(turned[i].sum(), (q, k), allow_unused=True)
        assert gradients[1 - i] is None
        torch.testing.assert_close(gradients[i], expected[i])
    frozen = tfkern.rotary(q, k.detach(), cos, sin, backend=backend)
    (gradient,) = torch.autograd.grad(frozen[0].sum() + frozen[1].sum(), q)
    torch.testing.assert_close(gradient, expected[0])


def test_other_results_than_finite_ones(backend, device):
    """NaN and infinities stay in their pairs."""
    q = torch.randn(1, 1, 4, 40, device=device)
    q[0, 0, 1, 3], q[0, 0, 2, 35] = torch.nan, torch.inf
    cos, sin = table((4, 36), torch.float32, device)
    turned, _ = tfkern.rotary(q, None, cos, sin, backend=backend)
    bad = ~turned.isfinite()
    expected = torch.zeros_like(bad)
    expected[0, 0, 1, [3, 21]] = expected[0, 0, 2, [35, 17]] = True
    assert torch.equal(bad, expected)


@interleavings
def test_reference_gradcheck(interleaved):
    q, k = (torch.randn(2, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = torch.randn(2, 2, 3, 4, dtype=torch.float64)

    def fn(q, k):
        return tfkern.rotary(q, k, cos, sin, interleaved=interleaved, backend="reference")

    assert torch.autograd.gradcheck(fn, (q, k), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, (q, k))


@interleavings
def test_second_derivatives(backend, device, interleaved):
    q, k = (torch.randn(1, 2, 3, 8, device=device, requires_grad=True) for _ in range(2))
    cos, sin = table((3, 6), torch.float32, device, interleaved)

    def second(f):
        turned = f(q, k)
        first = torch.autograd.grad(sum(x.pow(3).sum() for x in turned), (q, k), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, k))

    ours = second(
        lambda q, k: tfkern.rotary(q, k, cos, sin, interleaved=interleaved, backend=backend)
    )
    expected = second(lambda q, k: plain(q, k, cos, sin, interleaved))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


Q, K, C = torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5, 8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    "args, message",
    [
        ((Q[0], K, C, C), r"q has shape \(3, 5, 8\), expected 4 axes"),
        ((Q.int(), K, C, C), "q must be float32, float64, bfloat16 or float16, got torch.int32"),
        ((Q, K[:1], C, C), r"k has shape \(1, 1, 5, 8\), expected \(2, 1, 5, 8\)"),
        ((Q, K[0], C, C), r"k has shape \(1, 5, 8\), expected \(2, 'Hk', 5, 8\)"),
        ((Q, K.double(), C, C), "k is torch.float64, but q is torch.float32"),
        ((Q, K, C[None, None], C), r"cos has shape \(1, 1, 5, 8\), expected \(5, R\) or \(2, 5, R"),
        ((Q, K, C[:, :5], C), "an even number of features, at most 8 as q, got 5"),
        ((Q, K, C.repeat(1, 2), C), "an even number of features, at most 8 as q, got 16"),
        ((Q, K, C[:4], C), r"cos has shape \(4, 8\), expected \(5, 8\)"),
        ((Q, K, C.expand(3, 5, 8), C), r"cos has shape \(3, 5, 8\), expected \(2, 5, 8\)"),
        ((Q, K, C, C[:, :4]), r"sin has shape \(5, 4\), expected \(5, 8\), the shape of cos"),
        ((Q, K, C.long(), C), "cos must be float32, float64, bfloat16 or float16, got torch.int64"),
        ((Q, K, C, C.to("meta")), "sin is on meta, but q is on cpu"),
        ((Q, K, C.clone().requires_grad_(), C), "cos has no gradient: detach it"),
        ((Q, K, C, C.clone().requires_grad_()), "sin has no gradient: detach it"),
        ((Q, K, 1.0, C), "cos must be a tensor, got float"),
    ],
)
def test_errors_name_what_they_got(args, message):
    for inplace in (False, True):
        with pytest.raises(ValueError, match=message):
            tfkern.rotary(*args, inplace=inplace)


def test_tables_that_require_a_gradient_serve_without_one():
    leaf = C.clone().requires_grad_()
    with torch.no_grad():
        assert tfkern.rotary(Q, K, leaf, leaf)[0].shape == Q.shape


def test_explain_and_backends():
    assert tfkern.explain("rotary", Q, K, C, C, backend="reference").backend == "reference"
    assert set(tfkern.backends("rotary")) == {"native", "triton", "reference"}


@pytest.mark.skipif(not hasattr(torch.ops.tfkern, "rotary"), reason="no native build")
def test_threads_do_not_change_the_result():
    q, k = torch.randn(2, 3, 130, 66), torch.randn(2, 1, 130, 66)
    cos, sin = table((130, 66), torch.float32, "cpu")
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(tfkern.rotary(q, k, cos, sin, backend="native"))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(backend, device, inverse, with_keys):
    if backend == "reference":
        pytest.skip("the reference is not a registered operator")
    ops = torch.ops.tfkern if backend == "native" else torch.ops.tfkern_triton
    tfkern.backends("rotary")  # loads the backend
    q, k = (torch.randn(2, h, 5, 12, device=device) for h in (3, 1))
    cos, sin = (t.expand(2, 5, 8) for t in table((5, 8), torch.float32, device))
    args = (q, k if with_keys else None, cos, sin, not inverse, inverse)
    torch.library.opcheck(ops.rotary.default, args)
    torch.library.opcheck(ops.rotary_.default, args)


@pytest.mark.parametrize("interleaved", [False, True])
def test_compile(backend, device, interleaved):
    torch._dynamo.reset()

    def fn(qkv, cos, sin):
        q, k, v = qkv.unflatten(-1, (-1, 8)).transpose(1, 2).split((3, 2, 2), 1)
        q, k = tfkern.rotary(q, k, cos, sin, interleaved=interleaved, backend=backend)
        return (q[:, :2] * k).sin() + v

    compiled = compiling.compiled(fn, backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (5, 9, 23):
            qkv = torch.randn(2, T, 56, device=device, requires_grad=True)
            tables = table((T, 6), torch.float32, device, interleaved)
            dy = torch.randn(2, 2, T, 8, device=device)
            results = []
            for run in (fn, compiled):
                y = run(qkv, *tables)
                results.append((y.detach(), *torch.autograd.grad(y, qkv, dy)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compile_inplace(backend, device):
    torch._dynamo.reset()

    def fn(qkv, cos, sin):
        q, k, _ = qkv.unflatten(-1, (-1, 8)).transpose(1, 2).split((3, 2, 2), 1)
        tfkern.rotary(q, k, cos, sin, inplace=True, backend=backend)
        return q.sum() + qkv[..., -1]

    compiled = compiling.compiled(fn, backend, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for T in (5, 9, 23):
            first = torch.randn(2, T, 56, device=device)
            second, tables = first.clone(), table((T, 8), torch.float32, device)
            torch.testing.assert_close(fn(first, *tables), compiled(second, *tables))
            torch.testing.assert_close(first, second)


def test_vmap_with_inplace(backend, device):
    q = torch.randn(4, 1, 2, 5, 8, device=device)
    cos, sin = table((5, 8), torch.float32, device)
    expected = tfkern.rotary(q[:, 0], None, cos, sin, backend=backend)[0]
    options = {"inplace": True, "backend": backend}
    torch.func.vmap(lambda q: tfkern.rotary(q, None, cos, sin, **options)[0])(q)
    assert torch.equal(q[:, 0], expected)


@aot.each_arch
def test_compiles_ahead_of_time_without_spills(arch):
    aot.check("rotary", arch)
