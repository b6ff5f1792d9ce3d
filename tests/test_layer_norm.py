"""Layer norm and RMS norm on every backend against torch in float64."""

import itertools
import math

import aot
import compiling
import pytest
import torch
import torch.nn.functional as F

import tfkern
from tfkern.reference.dropout import philox
from tfkern.testing import validate

# 0 and 1, primes, one past a power of two, one larger than any tile of rows
SHAPES = [(0, 8), (4, 0), (1, 1000), (3, 7), (2, 3, 16), (67, 33), (5, 257)]


def torch_norm(rms, x, weight=None, bias=None, eps=1e-5):
    if rms:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def our_norm(rms, x, weight=None, bias=None, eps=1e-5, **options):
    if rms:
        return tfkern.rms_norm(x, weight, eps=eps, **options)
    return tfkern.layer_norm(x, weight, bias, eps=eps, **options)


def make(shape, dtype, device, rms=False, affine=True):
    N = shape[-1]
    inputs = {"x": torch.randn(shape, device=device).to(dtype)}
    if affine:
        inputs["weight"] = torch.randn(N, device=device).to(dtype)
    if affine and not rms:
        inputs["bias"] = torch.randn(N, device=device).to(dtype)
    return inputs


def check(rms, inputs, **options):
    rows = math.prod(inputs["x"].shape[:-1])
    report = validate(
        lambda **kw: our_norm(rms, **kw, **options),
        lambda **kw: torch_norm(rms, **kw),
        inputs,
        floor_scale={"weight": math.sqrt(rows), "bias": math.sqrt(rows)},
    )
    report.check()


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(backend, dtype, device, shape, affine, rms):
    check(rms, make(shape, dtype, device, rms, affine), backend=backend)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("N", [2049, 6000, 10008])
def test_long_rows(backend, dtype, device, N, rms):
    """Some rows fit into a warp, some into a block, and some are shared by several."""
    check(rms, make((3, N), dtype, device, rms), backend=backend)


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("N", [20011, 20016, 32768])
def test_longest_rows(backend, dtype, device, N, rms):
    inputs = make((3, N), dtype, device, rms)
    reason = tfkern.explain("layer_norm", **inputs, backend=backend).reasons.get(backend)
    if reason is not None:
        pytest.skip(reason)
    check(rms, inputs, backend=backend)


def test_no_rows_with_strides_of_zero(backend, dtype, device):
    x = torch.empty(0, 33, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(33, device=device, dtype=dtype, requires_grad=True)
    y = tfkern.layer_norm(x.new_ones(()).expand(0, 33) + x, weight, backend=backend)
    y.sum().backward()  # dy is an expanded scalar
    assert x.grad.shape == (0, 33) and not weight.grad.any()
    assert tfkern.layer_norm(x.new_ones(()).expand(0, 33), backend=backend).shape == (0, 33)


def test_dropped_elements_are_zero_whatever_they_were(backend, device):
    x = torch.full((64, 8), torch.inf, device=device)
    zero = torch.zeros_like(x)
    _, h = tfkern.layer_norm(
        x, residual=zero, dropout_p=0.5, seed=1, return_residual=True, backend=backend
    )
    assert not h.isnan().any() and (h == 0).any()


def test_the_threshold_is_exact(backend, device):
    """A draw next to the threshold, where float32 would round it: kept if it reaches it."""
    seed = torch.tensor(5, device=device)
    draw = int(philox(seed, 0, 0, 0, 1)[0])
    for p, kept in ((draw / 2**32, True), ((draw + 1) / 2**32, False)):
        _, h = tfkern.layer_norm(
            torch.ones(1, 4, device=device),
            residual=torch.zeros(1, 4, device=device),
            dropout_p=p,
            seed=seed,
            return_residual=True,
            backend=backend,
        )
        assert bool(h[0, 0] != 0) == kept


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_large_mean(backend, dtype, device, rms):
    if dtype == torch.float64:
        pytest.skip("the float64 truth has the same error")
    inputs = make((7, 260), dtype, device, rms)
    inputs["x"] = (1e4 + torch.randn(7, 260, device=device)).to(dtype)
    check(rms, inputs, backend=backend)


def test_rows_of_one_element(backend, dtype, device):
    """Closed form: xhat is 0, or the sign of x for RMS norm, and the gradient of x is 0."""
    x, weight, dy = (torch.randn(41, 1, device=device).to(dtype) for _ in range(3))
    weight, bias = weight[0], weight[1].clone()
    x = (x + x.sign()).requires_grad_()
    y = tfkern.layer_norm(x, weight, bias, backend=backend)
    assert torch.equal(y, bias.expand(41, 1))
    assert not torch.autograd.grad(y, x, dy)[0].any()
    y = tfkern.rms_norm(x, weight, eps=0.0, backend=backend)
    torch.testing.assert_close(y, x.sign() * weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.zeros_like(dx), rtol=0, atol=1e-5)


def test_zero_weight(backend, dtype, device):
    inputs = make((5, 40), dtype, device)
    inputs["weight"].zero_()
    check(False, inputs, backend=backend)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
def test_eps(backend, device, eps):
    inputs = make((5, 40), torch.float32, device)
    check(False, {k: v * 1e-2 for k, v in inputs.items()}, backend=backend, eps=1e-5)
    report = validate(
        lambda x: tfkern.layer_norm(x, eps=eps, backend=backend),
        lambda x: F.layer_norm(x, (40,), eps=eps),
        {"x": inputs["x"]},
    )
    report.check()


def test_rms_default_eps_is_torchs(backend, dtype, device):
    x = (1e-4 * torch.randn(3, 32, device=device)).to(dtype)
    y, expected = tfkern.rms_norm(x, backend=backend), F.rms_norm(x, (32,))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_and_dropout(backend, dtype, device, residual_dtype, p):
    M, N = 13, 37
    inputs = make((M, N), dtype, device)
    inputs["residual"] = torch.randn(M, N, device=device).to(residual_dtype)
    seed = torch.tensor(2**35 + 11, device=device)
    m = torch.arange(M, device=device)[:, None]
    n = torch.arange((N + 3) // 4, device=device)
    kept = philox(seed, n, m, 0, 1).reshape(M, -1)[:, :N] >= p * 2**32

    def reference(x, weight, bias, residual):
        h = residual + torch.where(kept, x / (1 - p), 0)
        return torch_norm(False, h, weight.to(h.dtype), bias.to(h.dtype)).to(x.dtype), h

    def ours(**kw):
        return tfkern.layer_norm(
            **kw, dropout_p=p, seed=seed, return_residual=True, backend=backend
        )

    validate(ours, reference, inputs, floor_scale={"weight": 4, "bias": 4}).check()


def test_float32_parameters_beside_narrow_activations(backend, device):
    inputs = make((9, 50), torch.float32, device)
    inputs["x"] = inputs["x"].bfloat16()

    def reference(x, weight, bias):
        wide = torch.promote_types(x.dtype, weight.dtype)
        return torch_norm(False, x.to(wide), weight, bias).to(x.dtype)

    report = validate(
        lambda **kw: tfkern.layer_norm(**kw, backend=backend),
        reference,
        inputs,
        floor_scale={"weight": 3, "bias": 3},
    )
    report.check()


def test_a_seed_without_dropout(backend, device):
    """Implementations take one, although the public functions do not hand it on."""
    op = tfkern.dispatch.implementation("layer_norm", backend)
    x, dy = torch.randn(2, 6, 20, device=device)
    seed = torch.tensor(3, device=device)
    y, h, mean, rstd = op.forward(x, None, None, None, seed, 0.0, 1e-5, False, 1)
    dx, *_ = op.backward(dy, None, h, None, None, mean, rstd, seed, 0.0, False, 1)
    wide = x.double().requires_grad_()
    expected = F.layer_norm(wide, (20,))
    (gradient,) = torch.autograd.grad(expected, wide, dy.double())
    assert torch.equal(h, x)
    torch.testing.assert_close(
        (y.double(), dx.double()), (expected, gradient), rtol=1e-4, atol=1e-5
    )


def test_dropout_statistics_and_replay(backend, device):
    x = torch.ones(64, 100, device=device)
    zero = torch.zeros_like(x)

    def dropped(seed, p=0.25):
        return tfkern.layer_norm(
            x, residual=zero, dropout_p=p, seed=seed, return_residual=True, backend=backend
        )[1]

    h = dropped(5)
    # a binomial of 6400 draws stays within 5 standard deviations
    assert abs((h == 0).float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 6400)
    assert set(h.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(h, dropped(5)) and not torch.equal(h, dropped(6))
    assert not dropped(5, p=1.0).any()


def test_every_backend_draws_the_same_mask(device):
    x, residual = torch.ones(11, 21, device=device), torch.zeros(11, 21, device=device)
    names = [b for b, reason in tfkern.backends("layer_norm").items() if reason is None]
    masks = [
        tfkern.layer_norm(
            x, residual=residual, dropout_p=0.5, seed=3, return_residual=True, backend=b
        )[1]
        for b in names
    ]
    assert len(masks) >= 2
    assert all(torch.equal(m, masks[0]) for m in masks)


def test_seed_comes_from_torchs_generator(device):
    x = torch.ones(4, 64, device=device)
    torch.manual_seed(1)
    first, second = (tfkern.rms_norm(x, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, tfkern.rms_norm(x, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    full = 0xFFFFFFFF
    cases = [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, (full, full, full, full), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for seed, counter, expected in cases:
        draws = philox(torch.tensor(seed), *counter)
        assert " ".join(f"{d:08x}" for d in draws.tolist()) == expected


def test_without_residual_h_is_x(backend, device):
    x = torch.randn(3, 8, device=device)
    _, h = tfkern.layer_norm(x, return_residual=True, backend=backend)
    assert h is x


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "expanded", "every other"])
def test_strides(backend, device, layout):
    x = {
        "transposed": torch.randn(24, 60, device=device).t(),
        "rows apart": torch.randn(60, 40, device=device)[:, 3:27],
        "expanded": torch.randn(1, 24, device=device).expand(60, 24),
        "every other": torch.randn(60, 48, device=device)[:, ::2],
    }[layout]
    weight, bias = torch.randn(48, device=device)[::2], torch.randn(1, device=device).expand(24)
    results = []
    for copy in (False, True):
        leaves = [t.clone() if copy else t for t in (x, weight, bias)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = tfkern.layer_norm(*leaves, backend=backend)
        dy = torch.arange(60.0, device=device)[:, None].expand(60, 24)  # zero strides
        results.append((y, *torch.autograd.grad(y, leaves, dy.clone() if copy else dy)))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)
    check(False, {"x": x, "weight": weight, "bias": bias}, backend=backend)


def test_nothing_is_overwritten_and_runs_are_equal(backend, dtype, device):
    inputs = make((33, 70), dtype, device) | {
        "residual": torch.randn(33, 70, device=device).to(dtype)
    }
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    before = {k: v.detach().clone() for k, v in inputs.items()}
    grads = (torch.randn(33, 70).to(device, dtype), torch.randn(33, 70).to(device, dtype))
    kept = [g.clone() for g in grads]

    def run():
        y, h = tfkern.layer_norm(
            **leaves, dropout_p=0.1, seed=1, return_residual=True, backend=backend
        )
        return (y, h, *torch.autograd.grad((y, h), list(leaves.values()), grads))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(before[k], v) for k, v in leaves.items())
    assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))


def test_shared_gradient_of_x_and_residual_accumulates(backend, device):
    """dx and dresidual are one tensor: accumulating into the first must not change the second."""
    x, residual = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    for _ in range(2):
        tfkern.layer_norm(x, residual=residual, backend=backend).square().sum().backward()
    x.grad.zero_()
    once = torch.autograd.grad(
        F.layer_norm((x + residual).double(), (8,)).square().sum(), residual
    )[0]
    torch.testing.assert_close(residual.grad, 2 * once, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.skipif(not hasattr(torch.ops.tfkern, "layer_norm_forward"), reason="no native build")
def test_threads_do_not_change_the_result():
    x, dy = torch.randn(130, 257), torch.randn(130, 257)
    weight = torch.randn(257, requires_grad=True)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = tfkern.layer_norm(x, weight, backend="native")
        results.append((y, torch.autograd.grad(y, weight, dy)[0]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_reference_gradcheck(rms):
    x, residual, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), 5, 5)
    )

    def fn(x, residual, weight, bias):
        return our_norm(
            rms, x, weight, None if rms else bias + 0, residual=residual, dropout_p=0.4, seed=1,
            return_residual=True, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(fn, (x, residual, weight, bias.detach() if rms else bias))


def test_second_derivative_raises(backend, device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(
        tfkern.layer_norm(x, backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(backend, device, with_residual):
    if backend == "reference":
        pytest.skip("the reference is not a registered operator")
    ops = torch.ops.tfkern if backend == "native" else torch.ops.tfkern_triton
    tfkern.backends("layer_norm")  # loads the backend
    x, weight, bias = torch.randn(6, 20), torch.randn(20), torch.randn(20)
    x, weight, bias = (t.to(device) for t in (x, weight, bias))
    residual = torch.randn(6, 20, device=device) if with_residual else None
    seed = torch.tensor(1, device=device) if with_residual else None
    args = (
        x,
        weight,
        bias if with_residual else None,
        residual,
        seed,
        0.2,
        1e-5,
        not with_residual,
        1,
    )
    torch.library.opcheck(ops.layer_norm_forward.default, args)
    _, h, mean, rstd = ops.layer_norm_forward(*args)
    args = (
        x, h if with_residual else None, h if with_residual else x, weight, args[2],
        mean if with_residual else None, rstd, seed, 0.2, with_residual, 1,
    )  # fmt: skip
    torch.library.opcheck(ops.layer_norm_backward.default, args)


@aot.each_arch
def test_compiles_ahead_of_time_without_spills(arch):
    aot.check("layer_norm", arch, spills={"_backward_kernel": 56})


@pytest.mark.parametrize("residual", [False, True])
def test_compile(backend, device, residual):
    torch._dynamo.reset()

    def fn(x, weight, bias):
        kw = {"residual": x * 2, "return_residual": True} if residual else {}
        y = tfkern.layer_norm(x.sin(), weight, bias, backend=backend, **kw)
        return y[0] + y[1] if residual else y

    compiled = compiling.compiled(fn, backend, dynamic=True)
    weight, bias = (torch.randn(24, device=device, requires_grad=True) for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (5, 9, 23):
            x = torch.randn(M, 2, 24, device=device, requires_grad=True)
            dy = torch.randn(M, 2, 24, device=device)
            eager = torch.autograd.grad(fn(x, weight, bias), (x, weight, bias), dy)
            ours = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias), dy)
            for a, b in zip(ours, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


LEAVES = {"1-D": (8,), "2-D": (3, 8), "3-D": (2, 3, 8), "transposed": (2, 8, 3)}


@pytest.mark.parametrize("shape", LEAVES)
@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_gradients_of_two_leaves_share_no_memory(backend, device, compiler, shape):
    """Sharing shows in whatever changes gradients in place: accumulation, clipping, zeroing."""
    if compiler == "inductor" and (backend, shape) != ("native", "3-D"):
        pytest.skip("a compilation takes seconds")
    torch._dynamo.reset()

    def fn(x, r):
        x, r = (t.mT if shape == "transposed" else t for t in (x, r))
        y, h = tfkern.layer_norm(x, residual=r, return_residual=True, backend=backend)
        return y * 3 + h

    run = fn if compiler is None else torch.compile(fn, backend=compiler)
    x, r = (torch.randn(LEAVES[shape], device=device, requires_grad=True) for _ in range(2))
    h = (x + r).detach().double().requires_grad_()
    wide = h.mT if shape == "transposed" else h
    weights = torch.randn(wide.shape, device=device)
    ((F.layer_norm(wide, wide.shape[-1:]) * 3 + wide) * weights).sum().backward()
    for times in (1, 2, 3):
        (run(x, r) * weights).sum().backward()
        for leaf in (x, r):
            torch.testing.assert_close(leaf.grad.double(), h.grad * times, rtol=1e-4, atol=1e-4)
    x.grad.zero_()
    torch.testing.assert_close(r.grad.double(), h.grad * 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "compiler, shape",
    [*itertools.product([None, "aot_eager"], [(8,), (3, 8), (2, 3, 8)]), ("inductor", (2, 3, 8))],
)
@pytest.mark.parametrize("changed", ["x", "h"])
def test_changes_in_place_are_refused(backend, device, changed, shape, compiler):
    """An error is raised, as by F.layer_norm, where backward would use the changed values."""
    torch._dynamo.reset()

    def fn(x, r):
        options = {} if changed == "x" else {"residual": r}
        return tfkern.rms_norm(x, return_residual=True, backend=backend, **options)

    run = fn if compiler is None else torch.compile(fn, backend=compiler)
    x, r = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    y, h = run(x, r)
    loss = y.square().sum()
    with torch.no_grad():
        (x if changed == "x" else h).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_results_may_be_changed_in_place(backend, device):
    x, r = (torch.randn(2, 3, 8, device=device, requires_grad=True) for _ in range(2))
    y, h = tfkern.layer_norm(x, residual=r, return_residual=True, backend=backend)
    y.relu_()
    y.sum().backward()
    wide = (x + r).detach().double().requires_grad_()
    F.layer_norm(wide, (8,)).relu().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert h._base is None  # what is done to it in place is done to no other tensor


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 8), (3, 8), (0, 3, 8)])
def test_several_axes(backend, device, shape, residual):
    """Normalised as if they were one, also where two leaves are added in front."""
    weight, bias = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    x, r = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    options = {"residual": r} if residual else {}
    dy = torch.randn(shape, device=device)
    leaves = (x, weight, bias, r) if residual else (x, weight, bias)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.layer_norm(wide[0] + (wide[3] if residual else 0), (3, 8), *wide[1:3])
    for _ in range(2):
        y, h = tfkern.layer_norm(
            x, weight, bias, axes=2, return_residual=True, backend=backend, **options
        )
        y.backward(dy)
        expected.backward(dy.double(), retain_graph=True)
    assert h.shape == x.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(leaves, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="axes must lie in 1 to"):
        tfkern.rms_norm(x, axes=len(shape) + 1)
    for axes in (2.0, "2", None, 0):
        with pytest.raises(ValueError, match="axes must lie in 1 to"):
            tfkern.layer_norm(x, axes=axes)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(backend, device):
    x, weight = torch.randn(3, 4, 10, device=device), torch.randn(10, device=device)

    def loss(x):
        return tfkern.rms_norm(x, weight, backend=backend).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.double().requires_grad_()
    eps = torch.finfo(torch.float32).eps
    expected = torch.autograd.grad(
        F.rms_norm(leaf, (10,), weight.double(), eps).square().sum(), leaf
    )[0]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_dtype_of_x(backend, device):
    x = torch.randn(4, 16, device=device, requires_grad=True)
    plain = tfkern.layer_norm(x, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        y = tfkern.layer_norm(x, backend=backend)
        assert y.dtype == torch.float32 and torch.equal(y, plain)
        y.sum().backward()
    assert x.grad.dtype == torch.float32


x = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tfkern.layer_norm(torch.zeros(2, 4, dtype=torch.int32)), ["x", "int32"]),
        (lambda: tfkern.layer_norm(torch.zeros(())), ["x", "0-d"]),
        (lambda: tfkern.layer_norm([1.0]), ["x", "list"]),
        (lambda: tfkern.layer_norm(x, torch.zeros(3)), ["weight", "(3,)", "(4,)"]),
        (lambda: tfkern.layer_norm(x, None, torch.zeros(4, 1)), ["bias", "(4, 1)", "(4,)"]),
        (lambda: tfkern.layer_norm(x, torch.zeros(4, device="meta")), ["weight", "meta", "cpu"]),
        (lambda: tfkern.layer_norm(x, residual=torch.zeros(4)), ["residual", "(4,)", "(2, 4)"]),
        (lambda: tfkern.layer_norm(x, dropout_p=1.5), ["dropout_p", "1.5"]),
        (
            lambda: tfkern.rms_norm(x, dropout_p=0.5, seed=torch.zeros(2)),
            ["seed", "float32", "(2,)"],
        ),
        (lambda: tfkern.rms_norm(x, eps=-1.0), ["eps", "-1.0"]),
        (lambda: tfkern.layer_norm(x, eps=None), ["eps", "None"]),
        (lambda: tfkern.layer_norm(x, dropout_p="0.1"), ["dropout_p", "'0.1'"]),
        (lambda: tfkern.layer_norm(x, dropout_p=0.1, seed=3.7), ["seed", "3.7"]),
        (lambda: tfkern.layer_norm(x, dropout_p=0.1, seed=2**63), ["seed", "9223372036854775808"]),
        (lambda: tfkern.rms_norm(x, backend="cuda"), ["backend", "'cuda'", "native, triton"]),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
