"""The linear layer, by torch or by our own products, which differ in what each processor leaves to
them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tfkern
from tfkern import dispatch
from tfkern.nn import MLP, GatedMLP, Linear, PackedLinear
from tfkern.ops.activation import FUNCTIONS
from tfkern.ops.flops import formulas
from tfkern.ops.linear_packed import pack, unpack
from tfkern.ops.mlp import ACTIVATIONS
from tfkern.testing import validate

native = pytest.importorskip("tfkern.native.linear")
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


ALL = native._ALL
PROCESSORS = {  # the most rows of our own products
    "all": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), ALL),
    "few": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 64),
    "matrix unit": {torch.float32: 64},
    "none": {},
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    monkeypatch.setattr(native, "_MATRIX_UNIT", request.param == "matrix unit")
    monkeypatch.setattr(native, "_MOST_ROWS", PROCESSORS[request.param])
    monkeypatch.setattr(native, "_LEAST_TRAINED", {})
    monkeypatch.setattr(native, "_LEAST_TERMS", {})
    monkeypatch.setattr(native, "_LEAST_ROWS", 1)
    return request.param


@pytest.mark.parametrize(
    "level, amd, rows",  # of float32, bfloat16, float16
    [
        ("none", False, []),
        ("default", False, [0, ALL, ALL]),
        ("avx2", True, [ALL, ALL, ALL]),
        ("avx2", False, [0, ALL, ALL]),
        ("avx512", False, [8, ALL, ALL]),
        ("avx512_bf16", True, [ALL, ALL, ALL]),
        ("amx", False, [8, 8, 8]),
    ],
)
def test_what_each_processor_leaves_to_our_products(level, amd, rows):
    levels = ("default",) if level == "none" else ("default", "avx2")
    assert list(native.most_rows(levels, level, amd).values()) == rows


class Products(TorchDispatchMode):
    """Whose each product is, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "mm" in name or "product" in name:
            self.names.append("ours" if name == "tfkern::linear_product" else "torch")
        return function(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """The names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def make(shape, out, dtype, bias=True):
    K = shape[-1]
    inputs = {"x": torch.randn(shape), "weight": torch.randn(out, K) / math.sqrt(max(K, 1))}
    inputs |= {"bias": torch.randn(out)} if bias else {}
    return {name: t.to(dtype) for name, t in inputs.items()}


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def floors(shape, dtype):
    """Sums of as many terms, which both round in the same dtype."""
    rows, K = math.prod(shape[:-1]), shape[-1]
    terms = {"output": max(K, 1), "x": 33} if dtype == torch.float32 else {}
    return {name: math.sqrt(n) for name, n in (terms | {"weight": rows, "bias": rows}).items()}


@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize(
    "shape, out",
    [((64, 33), 7), ((65, 33), 7), ((5, 13, 7), 33), ((9,), 4), ((65, 0), 3), ((0, 3), 5)],
)
def test_against_torch(processor, shape, out, bias, dtype):
    inputs = make(shape, out, dtype, bias)
    validate(tfkern.linear, F.linear, inputs, floor_scale=floors(shape, dtype)).check()


@dtypes
@pytest.mark.parametrize("rows", [64, 65])
def test_whose_the_products_are(processor, rows, dtype):
    inputs = {name: t.requires_grad_() for name, t in make((rows, 3), 5, dtype).items()}
    with Products() as products:
        tfkern.linear(**inputs).sum().backward()
    most = PROCESSORS[processor].get(dtype, -1)
    if rows > most:  # where torch does the forward, it does the backward
        assert set(products.names) == {"torch"} and len(products.names) >= 3
    else:  # dx has as many rows as x, and dweight has 5
        assert products.names == ["ours"] * 3


def test_small_products_are_ours_without_gradients_only(monkeypatch):
    monkeypatch.setattr(native, "_MOST_ROWS", {torch.float32: ALL})
    monkeypatch.setattr(native, "_LEAST_TRAINED", {torch.float32: 130 * 33 * 7 + 1})
    inputs = make((130, 33), 7, torch.float32)
    for trained, whose in ((False, "ours"), (True, "torch")):
        with Products() as products:
            tfkern.linear(**inputs | {"x": inputs["x"].requires_grad_(trained)})
        assert products.names == [whose]


# ---- our own products ----

KERNEL_SHAPES = [  # M, N, K: 1, primes, one past a tile, a panel and a block; several groups
    (1, 1, 1),
    (3, 5, 7),
    (14, 32, 16),
    (15, 33, 17),
    (1, 70, 1000),
    (8, 65, 1025),
    (14, 70, 2049),
    (113, 129, 515),
    (30, 31, 1024),
    (5, 40, 0),
    (40, 5, 0),
]


def product(a, b, bias=None, a2=None, b2=None):
    return torch.ops.tfkern.linear_product(a, b, bias, a2, b2)


def close(ours, wide, dtype, K):
    """Within the rounding of float32 sums of K terms of variance 1 / K, and that of the result."""
    limit = torch.finfo(dtype).eps * wide.abs() + (1 + K) ** 0.5 * 2**-22
    return ours.shape == wide.shape and ((ours.double() - wide).abs() <= limit).all()


@dtypes
@pytest.mark.parametrize("sizes", KERNEL_SHAPES, ids=str)
def test_native_product(dtype, sizes):
    """Of factors with either stride 1, or none; with and without a bias and a second term."""
    M, N, K = sizes
    scale = max(K, 1) ** -0.5

    def draw(rows, columns):
        return torch.randn(rows, columns).to(dtype)

    def layouts(x):
        apart = torch.stack([x, x * math.nan], 2)[..., 0]
        padded = F.pad(x, (1, 2), value=math.nan)[:, 1 : 1 + x.shape[1]]
        return x, x.t().contiguous().t(), apart, padded

    a, b, bias = draw(M, K), (draw(N, K) * scale).to(dtype), draw(1, N)[0]
    wide = a.double() @ b.double().t()
    for x, w in zip(layouts(a) * 2, layouts(b) + layouts(b)[::-1], strict=True):
        assert close(product(x, w), wide, dtype, K)
    assert close(product(a, b, bias), wide + bias, dtype, K)
    a2, b2 = draw(M, K + 3), (draw(N, K + 3) * (K + 3) ** -0.5).to(dtype)
    wide += a2.double() @ b2.double().t()
    assert close(product(a, b, None, a2, b2), wide, dtype, K)
    assert close(product(a, b, None, a2.t().contiguous().t(), b2), wide, dtype, K)


@dtypes
@pytest.mark.parametrize("sizes", KERNEL_SHAPES, ids=str)
def test_native_product_into_given_memory(dtype, sizes):
    """It is overwritten, whatever it holds, or added to."""
    M, N, K = sizes
    a, b = torch.randn(M, K).to(dtype), (torch.randn(N, K) * max(K, 1) ** -0.5).to(dtype)
    bias, before = torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)
    wide, into = a.double() @ b.double().t(), torch.ops.tfkern.linear_product_.default
    out = torch.full((M, N), math.nan, dtype=dtype)
    into(out, a, b, bias, False)
    assert close(out, wide + bias, dtype, K)
    out = before.clone()
    into(out, a.t().contiguous().t(), b, None, True)
    assert close(out, wide + before, dtype, K)


@dtypes
def test_native_rows_depend_on_themselves_alone(dtype):
    """Not on how many rows there are, nor on the number of threads: bit for bit."""
    for K in (33, 64, 1537):
        x, w, bias = (torch.randn(s).to(dtype) for s in ((2100, K), (70, K), (70,)))
        threads, all_rows = torch.get_num_threads(), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            all_rows.append(product(x, w, bias))
        torch.set_num_threads(threads)
        assert all(torch.equal(y, all_rows[0]) for y in all_rows)
        for rows in (1, 2, 7, 14, 15, 16, 113, 500):
            assert torch.equal(product(x[-rows:], w, bias), all_rows[0][-rows:]), rows
        assert torch.equal(product(x[:9], w[5:6], bias[5:6]), all_rows[0][:9, 5:6])


def test_rows_depend_on_themselves_alone_where_all_products_are_ours(monkeypatch):
    monkeypatch.setattr(native, "_MOST_ROWS", PROCESSORS["all"])
    monkeypatch.setattr(native, "_LEAST_ROWS", 1)
    x, w, bias = torch.randn(300, 129), torch.randn(65, 129), torch.randn(65)
    y = tfkern.linear(x, w, bias)
    for rows in (1, 9, 150):
        assert torch.equal(tfkern.linear(x[:rows], w, bias), y[:rows])


@dtypes
@pytest.mark.parametrize("rows", [3, 40])
def test_native_nan_and_infinity_stay_in_their_rows(dtype, rows):
    x, w = torch.randn(rows, 37).to(dtype), torch.randn(33, 37).to(dtype)
    expected = product(x, w)
    x[1, 36], w[32, 0] = math.nan, math.inf
    y = product(x, w)
    assert y[1].isnan().all()
    others = [i for i in range(rows) if i != 1]
    assert torch.equal(y[others, :32], expected[others, :32])
    assert torch.equal(y[others, 32], x[others, 0].sign() * math.inf)


def test_native_opcheck():
    a, b = torch.randn(2, 3, 5), torch.randn(4, 5)
    for args in ((a, b, None, None, None), (a, b, torch.randn(4), a + 1, b)):
        torch.library.opcheck(torch.ops.tfkern.linear_product.default, args)
    out = torch.randn(6, 4)
    for args in ((out, a, b, None, True), (out, a, b, torch.randn(4), False)):
        torch.library.opcheck(torch.ops.tfkern.linear_product_.default, args)


# ---- weights that are packed ahead ----


def packed_product(x, w, bias=None, up=None, bias_up=None, activation=""):
    pack = torch.ops.tfkern.linear_pack.default
    ups = None if up is None else pack(up)
    return torch.ops.tfkern.linear_packed(
        x, pack(w), bias, ups, bias_up, len(w), activation
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("sizes", KERNEL_SHAPES, ids=str)
def test_native_packed(dtype, sizes):
    """Of weights with either stride 1: near float64, and bit for bit what packing in the call
    gives."""
    M, N, K = sizes
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    w = (torch.randn(N, K) * max(K, 1) ** -0.5).to(dtype)
    wide = x.double() @ w.double().t() + bias
    for weight in (w, w.t().contiguous().t(), torch.stack([w, w * math.nan], 2)[..., 0]):
        packed = torch.ops.tfkern.linear_pack(weight)
        assert torch.equal(unpack(packed, N, K), w)
        y = torch.ops.tfkern.linear_packed(x, packed, bias, None, None, N, "")
        assert close(y, wide, dtype, K)
        assert torch.equal(y, product(x, w, bias))


@dtypes
@pytest.mark.parametrize("rows", [(1,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_native_packed_with_an_activation(dtype, rows, activation, gated):
    x = torch.randn(*rows, 70).to(dtype)
    w, up = (torch.randn(33, 70).to(dtype) / 8 for _ in range(2))
    bias, bias_up = torch.randn(2, 33).to(dtype)
    expected = FUNCTIONS[activation](F.linear(x.double(), w.double(), bias.double()))
    ups = (up, bias_up) if gated else (None, None)
    if gated:
        expected = expected * F.linear(x.double(), up.double(), bias_up.double())
    y = packed_product(x, w, bias, *ups, activation)
    scale = 4 * torch.finfo(dtype).eps + 1e-6
    assert ((y.double() - expected).abs() <= scale * (1 + expected.abs())).all()


def test_native_packed_opcheck():
    w, x = torch.randn(40, 7), torch.randn(2, 3, 7)
    packed = torch.ops.tfkern.linear_pack(w)
    for args in (
        (x, packed, None, None, None, 40, ""),
        (x, packed, torch.randn(40), packed, torch.randn(40), 40, "silu"),
    ):
        torch.library.opcheck(torch.ops.tfkern.linear_packed.default, args)


def test_native_packed_flops():
    x, w = torch.randn(2, 3, 7), torch.randn(40, 7)
    for up, layers in ((None, 1), (w, 2)):
        with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
            packed_product(x, w, None, up, None, "silu")
        assert counter.get_total_flops() == layers * 2 * 6 * 7 * 40


@pytest.fixture
def packing(monkeypatch):
    """All that can be packed is packed."""
    monkeypatch.setattr(native, "_MOST_ROWS", PROCESSORS["all"])


@dtypes
def test_packed_module(packing, dtype):
    plain = torch.nn.Linear(37, 70, dtype=dtype)
    layer = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(2, 5, 37, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(copy.deepcopy(layer)(x), plain(x))
    assert torch.equal(layer.weight, plain.weight)
    assert not any(p is plain.bias for p in layer.parameters())
    with pytest.raises(ValueError, match="save them before"):
        layer.state_dict()


def test_packed_module_where_the_kernels_cannot_serve(packing):
    """Gradients, autocast, vmap and other dtypes give what the plain layer gives."""
    plain = torch.nn.Linear(6, 5)
    layer, x = PackedLinear(plain.weight, plain.bias), torch.randn(3, 6, requires_grad=True)
    for found, expected in zip(
        torch.autograd.grad(layer(x).square().sum(), (x, layer.bias)),
        torch.autograd.grad(plain(x).square().sum(), (x, plain.bias)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(torch.vmap(layer)(x), plain(x))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layer.to(dtype), plain.to(dtype)
            assert layer.packed.dtype == layer.weight.dtype == dtype
            torch.testing.assert_close(layer(x.to(dtype)), plain(x.to(dtype)))
        with tfkern.use_backend("reference"):
            torch.testing.assert_close(layer(x), plain(x))
    with pytest.raises(ValueError, match="float64 on cpu are not packed here"):
        layer.double()


def test_packed_layers_are_fused_with_an_activation(packing, monkeypatch):
    """In MLP and GatedMLP, unless a layer has hooks."""
    x = torch.randn(3, 8)
    for module in (MLP(8, 12), GatedMLP(8, 12)):
        with torch.no_grad():
            expected = module(x)
            for name, layer in list(module.named_children()):
                setattr(module, name, PackedLinear(layer.weight, layer.bias))
            with Calls() as calls:
                torch.testing.assert_close(module(x), expected)
            assert calls.names.count("tfkern::linear_packed") == 2
            seen = []
            first = next(iter(module.children()))
            first.register_forward_hook(lambda layer, args, y, seen=seen: seen.append(y))
            torch.testing.assert_close(module(x), expected)
            assert seen[0].shape == (3, 12)


def test_packed_compiled(packing):
    torch._dynamo.reset()
    plain = torch.nn.Linear(6, 5)
    layer, x = PackedLinear(plain.weight, plain.bias), torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), plain(x))


@pytest.mark.parametrize("processor", ["matrix unit", "none"], indirect=True)
def test_weights_that_are_not_packed(processor):
    assert pack(torch.randn(3, 4, dtype=torch.bfloat16)) is None
    assert pack(torch.randn(3, 4, dtype=torch.float64)) is None
    assert (pack(torch.randn(3, 4)) is None) == (processor == "none")
    assert pack(torch.randn(3, 4, device="meta")) is None


def test_float64_is_left_to_torch(processor):
    inputs = make((130, 33), 7, torch.float64)
    assert dispatch.find("linear", (*inputs.values(), torch.float64)) is None
    torch.testing.assert_close(tfkern.linear(**inputs), F.linear(**inputs))


def test_what_only_torch_has(processor):
    """A vector as weight, a bias of any shape, nested tensors, forward derivatives."""
    x, w = torch.randn(130, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    nested = torch.nested.nested_tensor([x, x[:70]], layout=torch.jagged)
    for function in (tfkern.linear, F.linear):
        bias = torch.ones(1, 4, dtype=x.dtype, requires_grad=True)
        function(x, w, bias).sum().backward()
        assert bias.grad.shape == (1, 4)
    torch.testing.assert_close(tfkern.linear(x, w[0]), F.linear(x, w[0]))
    torch.testing.assert_close(tfkern.linear(nested, w).values(), F.linear(nested, w).values())
    tangents = [
        torch.func.jvp(lambda x, f=f: f(x, w), (x,), (x,))[1] for f in (tfkern.linear, F.linear)
    ]
    torch.testing.assert_close(*tangents)


def test_what_no_gradient_needs_is_not_kept(processor):
    """With a frozen weight x may change before the backward, and the other way round."""
    x, w = torch.randn(130, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    for trained, frozen in ((x, w), (w, x)):
        leaf = trained.clone().requires_grad_()
        pair = {id(trained): leaf * 1, id(frozen): frozen}
        y = tfkern.linear(pair[id(x)], pair[id(w)])
        with torch.no_grad():
            pair[id(trained)].add_(1)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        expected = frozen.float().sum(0).bfloat16().expand_as(grad)
        torch.testing.assert_close(grad, expected)


def test_a_forced_backend_is_kept_to(processor):
    with tfkern.use_backend("reference"), Products() as products:
        tfkern.linear(**make((130, 33), 7, torch.bfloat16))
    assert products.names == ["torch"]


def test_autocast(processor):
    """Casts as torch's function does."""
    inputs = make((130, 33), 7, torch.float32)

    def under_autocast(function):
        def fn(**inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(**inputs)

        return fn

    y = under_autocast(tfkern.linear)(**inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, under_autocast(F.linear)(**inputs))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    for function in (tfkern.linear, F.linear):
        grads = torch.autograd.grad(under_autocast(function)(**leaves).sum(), leaves.values())
        assert all(g.dtype == torch.float32 for g in grads)


def test_second_derivative(processor):
    """On small integers, which bfloat16 holds, the gradient is exactly torch's in float32."""

    def second(function, dtype):
        generator = torch.Generator().manual_seed(0)
        x, w = (
            torch.randint(-1, 2, shape, generator=generator).to(dtype).requires_grad_()
            for shape in ((66, 3), (2, 3))
        )
        (dx,) = torch.autograd.grad(function(x, w).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    for ours, theirs in zip(
        second(tfkern.linear, torch.bfloat16), second(F.linear, torch.float32), strict=True
    ):
        assert torch.equal(ours, theirs.bfloat16())


@narrow
def test_compiled(processor, dtype):
    torch._dynamo.reset()
    inputs = {name: t.requires_grad_() for name, t in make((130, 33), 7, dtype).items()}
    results = []
    for function in (tfkern.linear, torch.compile(tfkern.linear, fullgraph=True)):
        y = function(**inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs.values())))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.filterwarnings("error")  # of a loop over the weights
def test_vmap(processor):
    """Gradients for each of several weights."""
    x, weights = torch.randn(130, 5).bfloat16(), torch.randn(3, 4, 5).bfloat16()
    loss = lambda w: tfkern.linear(x, w).float().square().sum()  # noqa: E731
    grads = torch.vmap(torch.func.grad(loss))(weights)
    for w, grad in zip(weights, grads, strict=True):
        torch.testing.assert_close(grad, torch.func.grad(loss)(w))


def test_refuses_what_torch_refuses(processor):
    x = torch.randn(130, 5).bfloat16()
    for weight in (torch.randn(4, 5), torch.randn(4, 6).bfloat16()):
        with pytest.raises(RuntimeError):
            tfkern.linear(x, weight)


def test_module_is_torchs(monkeypatch):
    monkeypatch.setattr(native, "_MOST_ROWS", {torch.bfloat16: ALL})
    monkeypatch.setattr(native, "_LEAST_TERMS", {})
    ours, theirs = Linear(5, 3, dtype=torch.bfloat16), torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5).bfloat16()
    with torch.no_grad(), Products() as products:
        torch.testing.assert_close(ours(x), theirs(x))
    assert products.names == ["ours", "torch"]
    assert repr(ours) == repr(theirs)
