"""The linear layer on processors that multiply 16-bit numbers in different ways."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tfkern
from tfkern import dispatch
from tfkern.nn import Linear
from tfkern.testing import validate

native = pytest.importorskip("tfkern.native.linear")
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


WIDENED = {
    "widens": [torch.bfloat16, torch.float16],
    "widens float16": [torch.float16],
    "has a matrix unit": [],
    "does neither": [],
}


@pytest.fixture(params=WIDENED)
def processor(request, monkeypatch):
    monkeypatch.setattr(native, "_MATRIX_UNIT", request.param == "has a matrix unit")
    monkeypatch.setattr(native, "_WIDENED_FROM", dict.fromkeys(WIDENED[request.param], 65))
    return request.param


@pytest.mark.parametrize(
    "x86, level, widened",
    [
        (True, "default", [torch.bfloat16, torch.float16]),
        (True, "avx512", [torch.bfloat16, torch.float16]),
        (True, "avx512_bf16", [torch.float16]),  # Zen 4: its products of bfloat16 are the fastest
        (True, "amx", []),
        (False, "default", []),
    ],
)
def test_what_each_processor_widens(x86, level, widened, monkeypatch):
    levels = ("default", "avx2", "avx512", "avx512_bf16", "amx") if x86 else ("default",)
    monkeypatch.setattr(native._C, "cpu_levels", levels)
    assert native.widened_from(level) == dict.fromkeys(widened, 128)


class Products(TorchDispatchMode):
    """The dtypes of the factors of all products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.name():
            self.dtypes.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


def make(shape, out, dtype, bias=True):
    K = shape[-1]
    inputs = {"x": torch.randn(shape), "weight": torch.randn(out, K) / math.sqrt(max(K, 1))}
    inputs |= {"bias": torch.randn(out)} if bias else {}
    return {name: t.to(dtype) for name, t in inputs.items()}


@narrow
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize(
    "shape, out",
    [((64, 33), 7), ((65, 33), 7), ((5, 13, 7), 33), ((9,), 4), ((65, 0), 3), ((0, 3), 5)],
)
def test_against_torch(processor, shape, out, bias, dtype):
    rows = math.sqrt(math.prod(shape[:-1]))
    report = validate(
        tfkern.linear,
        F.linear,
        make(shape, out, dtype, bias),
        floor_scale={"weight": rows, "bias": rows},
    )
    report.check()


@narrow
@pytest.mark.parametrize("rows", [64, 65])
def test_dtype_of_products(processor, rows, dtype):
    inputs = {name: t.requires_grad_() for name, t in make((rows, 3), 5, dtype).items()}
    with Products() as products:
        tfkern.linear(**inputs).sum().backward()
    widened = dtype in WIDENED[processor] and rows >= 65
    assert products.dtypes == [torch.float32 if widened else dtype] * 3


def test_float32_is_left_to_torch(processor):
    inputs = make((130, 33), 7, torch.float32)
    assert dispatch.find("linear", (*inputs.values(), torch.float32)) is None
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
    assert products.dtypes == [torch.bfloat16]


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
    monkeypatch.setattr(native, "_WIDENED_FROM", {torch.bfloat16: 1})
    ours, theirs = Linear(5, 3, dtype=torch.bfloat16), torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5).bfloat16()
    with Products() as products:
        torch.testing.assert_close(ours(x), theirs(x))
    assert products.dtypes == [torch.float32, torch.bfloat16]
    assert repr(ours) == repr(theirs)
