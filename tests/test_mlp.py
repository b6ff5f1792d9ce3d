"""The MLP, plain and gated, on every backend against torch in float64."""

import importlib
import math

import aot
import compiling
import pytest
import torch
import torch.nn.functional as F

import tfkern
from tfkern.testing import validate

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: F.silu(1.702 * x) / 1.702,
}
# x, hidden size, output size: 0 and 1, primes, one past a tile of rows and columns, several tiles
SIZES = [
    ((0, 4), 5, 3),
    ((4, 0), 5, 3),
    ((4, 3), 0, 2),
    ((4, 3), 5, 0),
    ((1,), 1, 1),
    ((2, 3, 7), 11, 5),
    ((65, 33), 67, 29),
    ((3, 48), 32, 16),
    ((129, 80), 144, 40),
]


def ours(gated, activation, **options):
    options["activation"] = activation

    def plain(x, w1, w2, b1=None, b2=None):
        return tfkern.mlp(x, w1, b1, w2, b2, **options)

    def fn(x, w1, w_up, w2, b1=None, b_up=None, b2=None):
        return tfkern.gated_mlp(x, w1, b1, w_up, b_up, w2, b2, **options)

    return fn if gated else plain


def torchs(gated, activation):
    def fn(x, w1, w2, b1=None, b2=None, w_up=None, b_up=None):
        h = ACTIVATIONS[activation](F.linear(x, w1, b1))
        if gated:
            h = h * F.linear(x, w_up, b_up)
        return F.linear(h, w2, b2)

    return fn


def make(shape, hidden, out, dtype, device, gated=False, bias=True):
    def draw(*shape):  # so that products have the variance of their factors
        fan_in = shape[-1] if len(shape) == 2 else 1
        return (torch.randn(shape, device=device) / math.sqrt(max(fan_in, 1))).to(dtype)

    inputs = {"x": torch.randn(shape, device=device).to(dtype)}
    inputs |= {"w1": draw(hidden, shape[-1]), "w2": draw(out, hidden)}
    if gated:
        inputs["w_up"] = draw(hidden, shape[-1])
    if bias:
        inputs |= {"b1": draw(hidden), "b2": draw(out)}
        inputs |= {"b_up": draw(hidden)} if gated else {}
    return inputs


def check(gated, activation, inputs, **options):
    x, rows = inputs["x"], math.sqrt(math.prod(inputs["x"].shape[:-1]))
    scale = {name: rows for name in inputs if name != "x"}
    if x.dtype == torch.float32:  # sums of as many terms, which both round in the same dtype
        terms = len(inputs["w1"]) * (2 if gated else 1)
        scale |= dict.fromkeys(("output", "x"), math.sqrt(max(1, terms)))
    reference = torchs(gated, activation)
    validate(ours(gated, activation, **options), reference, inputs, floor_scale=scale).check()


gatedness = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@gatedness
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(backend, dtype, device, sizes, bias, gated):
    check(gated, "gelu", make(*sizes, dtype, device, gated, bias), backend=backend)


@gatedness
@activations
def test_activations(backend, dtype, device, activation, gated):
    inputs = make((37, 16), 40, 8, dtype, device, gated)
    inputs["x"] *= 3  # to reach the tails
    check(gated, activation, inputs, backend=backend)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@activations
def test_activation_over_its_whole_range(backend, dtype, device, activation):
    """Identity weights lay the function and its slope open."""
    large = min(1e30, torch.finfo(dtype).max / 4)
    x = torch.cat([torch.linspace(-20, 20, 801), torch.tensor([-large, -1e3, 1e3, large])])
    x = x.to(device, dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=device, dtype=dtype)
    y = tfkern.mlp(x, one, None, one, None, activation=activation, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wide = x.detach().double().requires_grad_()
    true_y = ACTIVATIONS[activation](wide)
    (true_dx,) = torch.autograd.grad(true_y, wide, torch.ones_like(true_y))
    # In float64 torch cancels as it forms the tails, so that the error is that of the truth.
    limit = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    assert ((y - true_y).abs() <= limit * x.abs().clamp(min=1)).all()
    assert ((dx - true_dx).abs() <= limit * true_dx.abs().clamp(min=1)).all()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@activations
def test_infinities_and_nan(backend, dtype, device, activation):
    pre = torch.tensor([math.inf, -math.inf, math.nan, 1.0], device=device, dtype=dtype)[:, None]
    empty = torch.empty(4, 0, device=device, dtype=dtype)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for b1 in pre:  # by way of the bias, since 0 * inf in a product is NaN
        b1.requires_grad_()
        y = tfkern.mlp(empty, one[:, :0], b1, one, None, activation=activation, backend=backend)
        expected = ACTIVATIONS[activation](b1.detach().double()).expand(4, 1)
        assert torch.equal(y.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(y[finite].isinf(), expected[finite].isinf())


def test_exact_and_tanh_gelu_differ(backend, device):
    """The two GELUs differ by up to 4.7e-4, which is far more than either's error."""
    x = torch.linspace(-4, 4, 101, device=device)[:, None]
    one = torch.ones(1, 1, device=device)
    for activation, other in (("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")):
        y = tfkern.mlp(x, one, None, one, None, activation=activation, backend=backend).double()
        assert (y - ACTIVATIONS[activation](x.double())).abs().max() < 2e-6
        assert (y - ACTIVATIONS[other](x.double())).abs().max() > 4e-4


@gatedness
@pytest.mark.parametrize("layout", ["transposed", "rows apart", "expanded", "every other"])
def test_strides(backend, device, layout, gated):
    def lay(x):
        rows, columns = x.shape
        if layout == "transposed":
            return x.t().contiguous().t()
        if layout == "rows apart":
            return F.pad(x, (3, 4))[:, 3:-4]
        if layout == "expanded":
            return x[:1].expand(rows, columns)
        return x.repeat_interleave(2, 1)[:, ::2]

    inputs = make((21, 12), 24, 6, torch.float32, device, gated)
    inputs = {name: lay(t) if t.dim() == 2 else lay(t[None])[0] for name, t in inputs.items()}
    check(gated, "silu", inputs, backend=backend)
    dy = torch.ones(1, 1, device=device).expand(21, 6)  # zero strides
    y = ours(gated, "silu", backend=backend)(**{k: v.requires_grad_() for k, v in inputs.items()})
    strided, contiguous = (
        torch.autograd.grad(y, list(inputs.values()), g, retain_graph=True) for g in (dy, dy + 0)
    )
    for a, b in zip(strided, contiguous, strict=True):
        torch.testing.assert_close(a, b)


@gatedness
def test_nothing_is_overwritten_and_runs_are_equal(backend, dtype, device, gated):
    inputs = make((70, 20), 48, 12, dtype, device, gated)
    before = {k: v.clone() for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    dy = torch.randn(70, 12, device=device).to(dtype)
    kept = dy.clone()

    def run():
        y = ours(gated, "gelu", backend=backend)(**leaves)
        return (y, *torch.autograd.grad(y, list(leaves.values()), dy))

    for a, b in zip(run(), run(), strict=True):
        if backend == "triton":
            assert torch.equal(a, b)
        else:  # whose products are those of a BLAS
            torch.testing.assert_close(a, b)
    assert all(torch.equal(before[k], v) for k, v in leaves.items())
    assert torch.equal(dy, kept)


needs_native = pytest.mark.skipif(
    not hasattr(torch.ops.tfkern, "mlp_activation_forward"), reason="not built"
)


@needs_native
@gatedness
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ours", [True, False], ids=["own products", "matrix unit"])
@pytest.mark.parametrize("hidden, out", [(67, 29), (29, 67)])
def test_products_of_native(monkeypatch, hidden, out, ours, dtype, bias, gated):
    """Both ways to form products, whatever this processor has."""
    native = importlib.import_module("tfkern.native.linear")
    monkeypatch.setattr(native, "_MATRIX_UNIT", not ours)
    monkeypatch.setattr(native, "_MOST_ROWS", {dtype: native._ALL} if ours else {})
    monkeypatch.setattr(native, "_LEAST_TERMS", {})
    inputs = make((65, 33), hidden, out, dtype, "cpu", gated, bias)
    check(gated, "gelu_tanh", inputs, backend="native")


@needs_native
@gatedness
@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [5, 31])
def test_hidden_layer_of_native(rows, dtype, activation, gated):
    """In one pass: as torch computes it in float64, whether pre and up are kept or not."""
    inputs = make((rows, 600), 75, 1, dtype, "cpu", gated)
    args = [inputs.get(name) for name in ("x", "w1", "b1", "w_up", "b_up")]
    x, w1, b1, w_up, b_up = (t if t is None else t.double() for t in args)
    h, kept = torch.ops.tfkern.mlp_hidden(*args, activation, True)
    alone, nothing = torch.ops.tfkern.mlp_hidden(*args, activation, False)
    assert torch.equal(alone, h) and nothing.numel() == 0
    factors = [F.linear(x, w1, b1)] + ([F.linear(x, w_up, b_up)] if gated else [])
    true_h = ACTIVATIONS[activation](factors[0]) * (factors[1] if gated else 1)
    limit = 2 * torch.finfo(dtype).eps + 1e-5
    for ours, wide in zip([h, *kept], [true_h, *factors], strict=True):
        assert (
            ours.dtype == dtype and ((ours - wide).abs() <= limit * wide.abs().clamp(min=1)).all()
        )


@needs_native
@gatedness
def test_threads_do_not_change_the_result(gated):
    """The result is that of our own operators, not of torch's products."""
    ops = torch.ops.tfkern
    pre, dh, up = (torch.randn(130, 259) for _ in range(3))
    up = up if gated else None
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        h = ops.mlp_activation_forward(pre, up, "gelu")
        results.append((h, *ops.mlp_activation_backward(dh, pre, up, "gelu", True)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    assert torch.equal(results[0][0], results[0][2]), "backward computes another h than forward"


@gatedness
def test_only_wanted_gradients(backend, device, gated):
    """Each input alone requires a gradient: the same values as when all do, and nothing else."""
    inputs = make((9, 8), 16, 4, torch.float32, device, gated)
    fn, names = ours(gated, "silu", backend=backend), list(inputs)
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    together = torch.autograd.grad(fn(**dict(zip(names, leaves, strict=True))).sum(), leaves)
    for name, expected in zip(names, together, strict=True):
        leaf = inputs[name].clone().requires_grad_()
        fn(**inputs | {name: leaf}).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


@gatedness
@activations
def test_reference_gradcheck(activation, gated):
    inputs = make((4, 3), 5, 2, torch.float64, "cpu", gated)
    leaves = [t.requires_grad_() for t in inputs.values()]
    fn = ours(gated, activation, backend="reference")
    assert torch.autograd.gradcheck(lambda *t: fn(**dict(zip(inputs, t, strict=True))), leaves)


def test_second_derivative_raises(backend, device):
    inputs = make((3, 4), 8, 2, torch.float32, device)
    x = inputs["x"].requires_grad_()
    y = ours(False, "silu", backend=backend)(**inputs)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        g.sum().backward()


@gatedness
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(backend, device, bias, gated):
    if backend == "reference":
        pytest.skip("the reference is not a registered operator")
    inputs = make((6, 20), 24, 3, torch.float32, device, gated, bias)
    x, w1, b1, w_up, b_up = (inputs.get(name) for name in ("x", "w1", "b1", "w_up", "b_up"))
    dh = torch.randn(6, 24, device=device)
    if backend == "native":
        ops, pre = torch.ops.tfkern, F.linear(x, w1, b1)
        up = F.linear(x, w_up, b_up) if gated else None
        torch.library.opcheck(ops.mlp_activation_forward.default, (pre, up, "gelu"))
        for keep in (False, True):
            args = (x, w1, b1, w_up, b_up, "gelu", keep)
            torch.library.opcheck(ops.mlp_hidden.default, args)
        narrow = up if up is None else up.bfloat16()
        args = (dh.bfloat16(), pre.bfloat16(), narrow, "gelu", bias)
        torch.library.opcheck(ops.mlp_activation_backward.default, args)
    else:
        ops, args = torch.ops.tfkern_triton, (x, w1, b1, w_up, b_up, "gelu")
        torch.library.opcheck(ops.mlp_activated_product.default, args)
        pre, up = (*ops.mlp_activated_product(*args)[1], None)[:2]
    torch.library.opcheck(ops.mlp_activation_backward.default, (dh, pre, up, "gelu", bias))


@pytest.mark.parametrize("K, dtype, arch, fused", [
    (2047, torch.bfloat16, 90, True),
    (2048, torch.bfloat16, 90, False),
    (2048, torch.float16, 90, False),
    (2048, torch.float32, 90, True),
    (2048, torch.bfloat16, 80, True),
    (2048, torch.bfloat16, 100, True),
    (0, torch.bfloat16, 80, False),
])  # fmt: skip
def test_products_of_many_terms_are_torchs_on_sm_90(K, dtype, arch, fused):
    kernels = pytest.importorskip("tfkern.kernels.mlp")
    assert kernels.fuses(K, dtype, arch) is fused


@gatedness
@pytest.mark.parametrize("K", [80, 2048], ids=["by descriptors", "not fused"])
def test_on_sm_90(monkeypatch, device, K, gated):
    """The interpreter runs what only sm_90 has; tiles end within rows and columns."""
    if device != "cpu":
        pytest.skip("kernels run as they are")
    kernels = pytest.importorskip("tfkern.kernels.mlp")
    monkeypatch.setattr(kernels, "architecture", lambda device: 90)
    check(gated, "gelu", make((150, K), 272, 16, torch.bfloat16, device, gated), backend="triton")


def test_distant_elements_are_brought_near():
    """Offsets within a tile have 32 bits."""
    kernels = pytest.importorskip("tfkern.kernels.mlp")
    tiles = kernels._tiles(16, 16, torch.bfloat16, False, 80)
    for stride, near in ((2**24 - 2, True), (2**24, False)):
        for strides in ((stride, 1), (1, 2 * stride)):
            x = torch.empty_strided((300, 64), strides, dtype=torch.bfloat16, device="meta")
            assert (kernels._near(x, tiles) is x) is near


@aot.each_arch
def test_compiles_ahead_of_time_without_spills(arch):
    aot.check("mlp", arch)


@gatedness
def test_compile(backend, device, gated):
    torch._dynamo.reset()
    inputs = make((5, 2, 24), 32, 8, torch.float32, device, gated)
    leaves = [t.requires_grad_() for name, t in inputs.items() if name != "x"]
    names = [name for name in inputs if name != "x"]

    def fn(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return ours(gated, "gelu_tanh", backend=backend)(x.sin(), **named).cos()

    compiled = compiling.compiled(fn, backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (5, 9, 23):
            x = torch.randn(M, 2, 24, device=device, requires_grad=True)
            dy = torch.randn(M, 2, 8, device=device)
            eager = torch.autograd.grad(fn(x, *leaves), (x, *leaves), dy)
            traced = torch.autograd.grad(compiled(x, *leaves), (x, *leaves), dy)
            for a, b in zip(traced, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@gatedness
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap(backend, device, axis, gated):
    """Gradients of x and of w1 for each of three inputs, wherever their axis is."""
    inputs = make((5, 8), 16, 4, torch.float32, device, gated)
    x = torch.randn(3, 5, 8, device=device)

    def loss(fn):
        def of(x, w1):
            return fn(**inputs | {"x": x, "w1": w1}).square().sum()

        return of

    grad = torch.func.grad(loss(ours(gated, "silu", backend=backend)), argnums=(0, 1))
    batched = torch.func.vmap(grad, in_dims=(axis, None))(x.movedim(0, axis), inputs["w1"])
    inputs = {k: v.double() for k, v in inputs.items()}
    for i in range(3):
        leaves = x[i].double().requires_grad_(), inputs["w1"].clone().requires_grad_()
        expected = torch.autograd.grad(loss(torchs(gated, "silu"))(*leaves), leaves)
        for a, b in zip(batched, expected, strict=True):
            torch.testing.assert_close(a[i].double(), b, rtol=1e-4, atol=1e-4)


@gatedness
def test_autocast(backend, device, gated):
    """As `F.linear`: computes in autocast's dtype; gradients come in the dtype of the inputs."""
    inputs = make((9, 16), 32, 8, torch.float32, device, gated)
    narrow = {k: v.bfloat16() for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    fn = ours(gated, "gelu", backend=backend)
    with torch.autocast(device, torch.bfloat16):
        y = fn(**leaves)
        assert y.dtype == torchs(gated, "gelu")(**leaves).dtype == torch.bfloat16
        y.float().sum().backward()
    torch.testing.assert_close(y, fn(**narrow))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


@gatedness
def test_explain(backend, device, gated):
    inputs = make((2, 4), 6, 3, torch.float64, device, gated)
    names = ("x", "w1", "b1", "w_up", "b_up", "w2", "b2")
    args = [inputs[name] for name in names if name in inputs]
    explanation = tfkern.explain("gated_mlp" if gated else "mlp", *args, backend=backend)
    assert explanation.backend == (None if backend == "triton" else backend)
    assert ("float64" in str(explanation)) == (backend == "triton")


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def call(x=(2, 4), w1=(6, 4), b1=(6,), w2=(3, 6), b2=(3,), function=tfkern.mlp, **options):
    """The function on zeros of these shapes; what is not a shape is passed as it is."""
    args = [zeros(*a) if isinstance(a, tuple) else a for a in (x, w1, b1, w2, b2)]
    return function(*args, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"x": [1.0]}, ["x", "list"]),
        ({"x": ()}, ["x", "0-d"]),
        ({"x": zeros(2, 4, dtype=torch.int32)}, ["x", "int32"]),
        ({"w1": (6, 5)}, ["w1", "(6, 5)", "(*, 4)"]),
        ({"w1": (6,)}, ["w1", "(6,)", "(*, 4)"]),
        ({"w1": None}, ["w1", "NoneType"]),
        ({"w1": zeros(6, 4, dtype=torch.float64)}, ["w1", "float64", "x", "float32"]),
        ({"b1": (5,)}, ["b1", "(5,)", "(6,)"]),
        ({"b1": zeros(6, device="meta")}, ["b1", "meta", "x", "cpu"]),
        ({"w2": (3, 5)}, ["w2", "(3, 5)", "(*, 6)"]),
        ({"b2": (3, 1)}, ["b2", "(3, 1)", "(3,)"]),
        ({"activation": "tanh"}, ["activation", "'tanh'", "relu, gelu, ", "silu, quick_gelu"]),
        ({"backend": "cuda"}, ["backend", "'cuda'", "native, triton"]),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError) as error:
        call(**options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_gate": zeros(6, 5)}, ["w_gate", "(6, 5)", "(*, 4)"]),
        ({"w_up": zeros(5, 4)}, ["w_up", "(5, 4)", "(6, 4)", "w_gate"]),
        ({"w_up": None}, ["w_up", "NoneType"]),
        ({"w_up": zeros(6, 4, dtype=torch.float64)}, ["w_up", "float64", "x", "float32"]),
        ({"b_gate": zeros(5)}, ["b_gate", "(5,)", "(6,)"]),
        ({"b_up": zeros(6, 1)}, ["b_up", "(6, 1)", "(6,)"]),
        ({"w2": zeros(3, 12)}, ["w2", "(3, 12)", "(*, 6)"]),
        ({"activation": "tanh"}, ["activation", "'tanh'"]),
    ],
)
def test_bad_input_of_gated(changes, words):
    inputs = {"x": zeros(2, 4), "w_gate": zeros(6, 4), "b_gate": zeros(6), "w_up": zeros(6, 4)}
    inputs |= {"b_up": None, "w2": zeros(3, 6), "b2": zeros(3)}
    with pytest.raises(ValueError) as error:
        tfkern.gated_mlp(**inputs | changes)
    assert all(word in str(error.value) for word in words), error.value


@gatedness
def test_either_bias_alone(backend, device, gated):
    """A bias of the gate or of up may be there without the other."""
    for name in ("b1", "b_up", "b2"):
        inputs = make((9, 8), 16, 4, torch.float32, device, gated)
        check(
            gated,
            "silu",
            {k: x for k, x in inputs.items() if k[0] != "b" or k == name},
            backend=backend,
        )
        if not gated:
            break
