"""Choosing a backend."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import tfkern
from tfkern import dispatch

x = torch.randn(3, 8)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd="/",
    )


def test_backends_names_all_three():
    assert tfkern.backends("layer_norm") == {"native": None, "triton": None, "reference": None}


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown op 'softmax': expected one of"):
        tfkern.backends("softmax")
    with pytest.raises(ValueError, match="unknown backend 'cpp': expected one of native"):
        with tfkern.use_backend("cpp"):
            pass
    with pytest.raises(ValueError, match="unknown function 'softmax': expected one of"):
        tfkern.explain("softmax", x)


def test_default_on_a_cpu_is_native():
    explanation = tfkern.explain("layer_norm", x)
    assert explanation.backend == "native" and explanation.reasons == {}
    assert str(explanation) == "layer_norm: native"


def test_explain_gives_the_reason():
    explanation = tfkern.explain("layer_norm", torch.empty(2, 3, device="meta"), backend="native")
    assert explanation.backend is None
    assert "run on the CPU and on CUDA, got meta" in str(explanation)


@pytest.mark.parametrize(
    "level, dtype, way",
    [
        ("amx", torch.bfloat16, "tiles of bfloat16"),
        ("avx512_bf16", torch.bfloat16, "pairs of bfloat16"),
        ("avx512_bf16", torch.float16, "float32"),
        ("avx2", torch.bfloat16, "float32"),
        ("default", torch.float64, "float64"),
    ],
)
def test_explain_tells_how_numbers_are_multiplied(level, dtype, way, monkeypatch):
    native = pytest.importorskip("tfkern.native")
    monkeypatch.setattr(native._C, "cpu_capability", lambda: level)
    q = torch.randn(1, 2, 3, 8, dtype=dtype)
    told = tfkern.explain("attention", q, q, q, backend="native")
    assert str(told) == f"attention: native, products of {way} ({level})"
    assert tfkern.explain("attention", q, q, q, backend="reference").way is None


@pytest.mark.parametrize("level", ["amx", "avx512_bf16"])
@pytest.mark.parametrize("rows, ours", [(8, True), (9, False)])
def test_explain_tells_whose_products_a_linear_layer_has(level, rows, ours, monkeypatch):
    native = pytest.importorskip("tfkern.native")
    monkeypatch.setattr(native._C, "cpu_capability", lambda: level)
    monkeypatch.setattr("tfkern.native.linear._MOST_ROWS", {torch.bfloat16: 8})
    x, w = torch.randn(rows, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    told = tfkern.explain("linear", x, w)
    assert told.backend == ("native" if ours else None)
    pairs = f"products of pairs of bfloat16 ({level})"
    assert told.way == (pairs if ours else None)
    mlp = tfkern.explain("mlp", x, w, None, w.T.contiguous(), None)
    assert mlp.way == (pairs if ours else "products of torch")
    with pytest.raises(ValueError, match="weight has"):
        tfkern.explain("linear", x, w.T)


def test_explain_takes_the_arguments_of_the_call_and_draws_nothing():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    explanation = tfkern.explain("layer_norm", x, dropout_p=0.5, return_residual=True)
    assert explanation.backend == "native"
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("function", ["layer_norm", "attention", "mlp"])
def test_meta_tensors_are_served_by_the_reference(function):
    meta = torch.empty(1, 2, 4, 4, device="meta")
    weight = meta[0, 0]
    call = {
        "layer_norm": lambda: tfkern.layer_norm(meta),
        "attention": lambda: tfkern.attention(meta, meta, meta),
        "mlp": lambda: tfkern.mlp(meta, weight, None, weight, None),
    }[function]
    assert call().shape == meta.shape


def test_use_backend_nests_and_restores():
    with tfkern.use_backend("reference"):
        assert tfkern.explain("layer_norm", x).backend == "reference"
        with tfkern.use_backend("triton"):
            assert tfkern.explain("layer_norm", x).backend == "triton"
            assert tfkern.explain("layer_norm", x, backend="native").backend == "native"
        with tfkern.use_backend(None):
            assert tfkern.explain("layer_norm", x).backend == "native"
        assert tfkern.explain("layer_norm", x).backend == "reference"
    with pytest.raises(RuntimeError), tfkern.use_backend("reference"):
        raise RuntimeError
    assert tfkern.explain("layer_norm", x).backend == "native"


def test_blocks_of_two_threads_may_not_overlap():
    """The one that ends last would leave behind what the other had forced."""
    entered, release, seen = threading.Event(), threading.Event(), []

    def other():
        with tfkern.use_backend("reference"):
            entered.set()
            release.wait()
        seen.append(tfkern.explain("layer_norm", x).backend)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        entered.wait()
        with pytest.raises(RuntimeError, match="another thread is inside of use_backend"):
            with tfkern.use_backend("triton"):
                pytest.fail("the block was entered")
        assert tfkern.explain("layer_norm", x).backend == "reference"
        assert tfkern.explain("layer_norm", x, backend="triton").backend == "triton"
    finally:
        release.set()
        thread.join()
    assert seen == ["native"]
    with tfkern.use_backend("triton"):
        assert tfkern.explain("layer_norm", x).backend == "triton"
    assert tfkern.explain("layer_norm", x).backend == "native"


def test_blocks_that_end_in_the_order_of_their_beginnings_leave_nothing_forced():
    first, second = tfkern.use_backend("reference"), tfkern.use_backend("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tfkern.explain("layer_norm", x).backend == "triton"
    second.__exit__(None, None, None)
    assert tfkern.explain("layer_norm", x).backend == "native"


def test_a_block_inside_of_what_is_compiled():
    def fn(x):
        with tfkern.use_backend("reference"):
            return tfkern.layer_norm(x)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with tfkern.use_backend("native"):
        torch.testing.assert_close(compiled(x), tfkern.layer_norm(x))
    assert tfkern.explain("layer_norm", x).backend == "native"


def test_a_forced_backend_never_falls_back():
    double = x.double()
    assert tfkern.layer_norm(double).dtype == torch.float64
    with tfkern.use_backend("triton"), pytest.raises(NotImplementedError) as error:
        tfkern.layer_norm(double)
    assert "triton: takes float32, bfloat16 and float16, got torch.float64" in str(error.value)


def test_backward_uses_the_backend_of_its_forward(monkeypatch):
    leaf = x.clone().requires_grad_()
    with tfkern.use_backend("reference"):
        y = tfkern.layer_norm(leaf)
    for backend in ("native", "triton"):
        module = dispatch.implementation("layer_norm", backend)
        monkeypatch.setattr(module, "backward", lambda *a: pytest.fail("another backend ran"))
    y.sum().backward()
    assert leaf.grad is not None


def test_needs_grad_reaches_why_not(monkeypatch):
    seen = []
    module = dispatch.implementation("layer_norm", "native")
    monkeypatch.setattr(module, "why_not", lambda *a, needs_grad: seen.append(needs_grad))
    leaf = x.clone().requires_grad_()
    tfkern.layer_norm(leaf)
    with torch.no_grad():
        tfkern.layer_norm(leaf)
    tfkern.layer_norm(x)
    assert seen == [True, False, False]


def test_needs_grad_is_seen_through_the_wrappers_of_vmap(monkeypatch):
    seen = []
    module = dispatch.implementation("layer_norm", "native")
    monkeypatch.setattr(module, "why_not", lambda *a, needs_grad: seen.append(needs_grad))
    for leaf in (x.clone().requires_grad_(), x):
        torch.func.vmap(tfkern.layer_norm)(leaf)
    torch.func.vmap(torch.func.grad(lambda x: tfkern.layer_norm(x).sum()))(x)
    torch.func.vmap(torch.func.vmap(tfkern.layer_norm))(x.view(3, 2, 4).requires_grad_())
    assert seen == [True, False, True, True]


def test_environment_forces_a_backend():
    code = "import torch, tfkern; print(tfkern.explain('rms_norm', torch.zeros(1, 2)).backend)"
    assert run(code, TFKERN_BACKEND="reference").stdout == "reference\n"
    assert "unknown backend 'nativ'" in run(code, TFKERN_BACKEND="nativ").stderr


def test_triton_without_a_gpu_says_what_it_needs():
    code = "import torch, tfkern; tfkern.layer_norm(torch.zeros(1, 2), backend='triton')"
    error = run(code, TRITON_INTERPRET="0").stderr
    assert "NotImplementedError" in error and "TRITON_INTERPRET=1" in error


def test_a_backend_that_cannot_be_imported_gives_its_reason():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import tfkern; print(tfkern.backends('layer_norm')['triton'])"
    )
    assert "triton" in run(code).stdout


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: tfkern.attention(x, x, x),
        lambda x: tfkern.layer_norm(x, residual=x),
        lambda x: tfkern.mlp(x, x[0, 0], None, x[0, 0], None),
    ],
    ids=["attention", "layer_norm", "mlp"],
)
def test_compile_takes_one_tensor_twice(fn):
    torch._dynamo.reset()
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    dy = torch.randn(1, 2, 8, 8)
    eager = torch.autograd.grad(fn(x), x, dy)
    compiled = torch.autograd.grad(torch.compile(fn, fullgraph=True)(x), x, dy)
    torch.testing.assert_close(compiled, eager)
