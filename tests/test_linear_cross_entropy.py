"""Cross entropy of a linear layer on every backend against torch in float64, and its memory."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import tfkern
from tfkern.models import Transformer, TransformerConfig, cross_entropy
from tfkern.ops import logit_pieces
from tfkern.testing import validate
from tfkern.validation.cross_entropy import torch_cross_entropy

OPTIONS = {
    "plain": {},
    "capped": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "softcap": 4.0, "z_loss": 0.03, "weighted": True},
}


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 16 rows and columns, so that small inputs have several."""

    def slices(size, pieces, least):
        return [slice(i, min(i + 16, size)) for i in range(0, size, 16)]

    monkeypatch.setattr(logit_pieces, "_slices", slices)


def make(M, K, V, dtype, device, bias=False):
    inputs = {
        "x": torch.randn(M, K, device=device).to(dtype),
        "weight": (torch.randn(V, K, device=device) * (3 / math.sqrt(K))).to(dtype),
    }
    if bias:
        inputs["bias"] = torch.randn(V, device=device).to(dtype)
    targets = torch.randint(V, (M,), device=device)
    targets[1::3] = -100
    return inputs, targets


def check(inputs, targets, backend, weighted=False, **options):
    V = len(inputs["weight"])
    class_weight = 0.1 + torch.rand(V, device=targets.device) if weighted else None

    def reference(x, weight, bias=None):
        logits = F.linear(x, weight, bias)
        return torch_cross_entropy(logits, targets, class_weight=class_weight, **options)

    def ours(x, weight, bias=None):
        return tfkern.linear_cross_entropy(
            x, weight, targets, bias=bias, class_weight=class_weight, backend=backend, **options
        )

    scale = dict.fromkeys(("weight", "bias"), math.sqrt(targets.numel()))
    validate(ours, reference, inputs, floor_scale=scale).check()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_match_torch(backend, dtype, device, small_pieces, options, bias):
    inputs, targets = make(37, 24, 101, dtype, device, bias)
    check(inputs, targets, backend, reduction="none", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reductions(backend, device, small_pieces, options, reduction):
    inputs, targets = make(41, 16, 131, torch.float32, device, bias=True)
    check(inputs, targets, backend, reduction=reduction, **options)


@pytest.mark.parametrize("sizes", [(1, 3, 1), (2, 1, 17), (300, 8, 600)], ids=str)
def test_sizes(backend, dtype, device, sizes):
    inputs, targets = make(*sizes, dtype, device)
    targets[0] = 0
    check(inputs, targets, backend, reduction="none")


def test_no_rows(backend, dtype, device):
    x = torch.empty(0, 2, 4, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 4, device=device, dtype=dtype, requires_grad=True)
    targets = torch.empty(0, 2, device=device, dtype=torch.int64)
    loss = tfkern.linear_cross_entropy(x, weight, targets, z_loss=0.1, backend=backend)
    loss.backward()
    assert loss == 0 and x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_features(backend, dtype, device, reduction):
    x = torch.empty(3, 0, device=device, dtype=dtype, requires_grad=True)
    weight = torch.empty(5, 0, device=device, dtype=dtype, requires_grad=True)
    targets = torch.tensor([4, -100, 0], device=device)
    loss = tfkern.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend)
    loss.sum().backward()
    expected = torch.tensor([1.0, 0.0, 1.0] if reduction == "none" else 1.0, device=device)
    torch.testing.assert_close(loss, expected.to(loss.dtype) * math.log(5))
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


def test_log_sum_exp(backend, dtype, device, small_pieces):
    inputs, targets = make(19, 8, 70, dtype, device)
    validate(
        lambda x, weight: tfkern.linear_cross_entropy(
            x, weight, targets, return_lse=True, backend=backend
        ),
        lambda x, weight: (
            torch_cross_entropy(F.linear(x, weight), targets),
            F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)).logsumexp(-1),
        ),
        inputs,
        floor_scale={"weight": 5},
    ).check()


def test_a_batch_without_targets(backend, device):
    inputs, targets = make(6, 4, 9, torch.float32, device, bias=True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    loss = tfkern.linear_cross_entropy(
        **leaves, targets=torch.full_like(targets, -100), z_loss=0.1, backend=backend
    )
    loss.backward()
    assert loss == 0 and not any(t.grad.any() for t in leaves.values())


def test_the_layer_of_tied_embeddings(backend, device):
    """The table's gradient is the sum of both uses, also when it has one already."""
    table = torch.randn(30, 8, device=device, requires_grad=True)
    tokens = torch.randint(30, (2, 7), device=device)
    for _ in range(2):
        x = F.embedding(tokens[:, :-1], table)
        tfkern.linear_cross_entropy(x, table, tokens[:, 1:], backend=backend).backward()
    wide = table.detach().double().requires_grad_()
    logits = F.linear(F.embedding(tokens[:, :-1], wide), wide)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(table.grad.double(), 2 * wide.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tensors_get_no_gradient(backend, device, reduction):
    inputs, targets = make(20, 6, 40, torch.float32, device, bias=True)

    def grads(**frozen):
        leaves = {n: t.clone().requires_grad_(n not in frozen) for n, t in inputs.items()}
        loss = tfkern.linear_cross_entropy(
            **leaves, targets=targets, reduction=reduction, backend=backend
        )
        loss.sum().backward()
        return {n: t.grad for n, t in leaves.items()}

    every = grads()
    for name in inputs:
        others = grads(**{name: True})
        assert others.pop(name) is None
        for n, grad in others.items():
            torch.testing.assert_close(grad, every[n])


def test_factors_and_second_backwards(backend, device):
    """A loss that is scaled, and a graph that is walked twice, one pass after the other."""
    inputs, targets = make(20, 6, 40, torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    loss = tfkern.linear_cross_entropy(*leaves, targets, z_loss=0.1, backend=backend)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    kept = [d.clone() for d in first]
    second = torch.autograd.grad(-0.5 * loss, leaves)
    expected = torch_cross_entropy(F.linear(*(t.double() for t in leaves)), targets, z_loss=0.1)
    expected = torch.autograd.grad(expected, leaves)
    for a, b, again, c in zip(first, kept, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c)
        torch.testing.assert_close(again, -0.5 * c)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, device, reentrant, reduction):
    inputs, targets = make(20, 6, 40, torch.float32, device, bias=True)
    leaves = [t.requires_grad_() for t in inputs.values()]

    def call(x, weight, bias):
        return tfkern.linear_cross_entropy(
            x, weight, targets, bias=bias, reduction=reduction, backend=backend
        ).sum()

    expected = torch.autograd.grad(call(*leaves), leaves)
    checkpoint(call, *leaves, use_reentrant=reentrant).backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("new_vmap", [False, True])
def test_several_gradients_of_one_loss(device, new_vmap, reduction):
    inputs, targets = make(20, 6, 40, torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    loss = tfkern.linear_cross_entropy(*leaves, targets, reduction=reduction).sum()
    factors = torch.tensor([1.0, -3.0], device=device)

    def grads(factor, **options):
        return torch.autograd.grad(loss, leaves, factor, retain_graph=True, **options)

    for _ in range(2):  # the first pass takes what the forward has formed
        ours = torch.vmap(grads)(factors) if new_vmap else grads(factors, is_grads_batched=True)
        for several, one in zip(ours, grads(factors[0]), strict=True):
            torch.testing.assert_close(several, torch.stack([one, -3 * one]))


def test_exported_with_parameters_that_require_a_gradient():
    class Head(torch.nn.Linear):
        def forward(self, x, targets):
            return tfkern.linear_cross_entropy(x, self.weight, targets, bias=self.bias)

    head, args = Head(6, 40), (torch.randn(20, 6), torch.randint(40, (20,)))
    program = torch.export.export(head, args)
    torch.testing.assert_close(program.module()(*args), head(*args))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(device, reduction):
    inputs, targets = make(5, 4, 9, torch.float32, device)
    x, weight = (t.requires_grad_() for t in inputs.values())
    loss = tfkern.linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        dx.sum().backward()


def test_autocast(backend, device):
    inputs, targets = make(20, 16, 40, torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    with torch.autocast(device, torch.bfloat16):
        loss = tfkern.linear_cross_entropy(*leaves, targets, backend=backend)
    loss.backward()
    narrow = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = tfkern.linear_cross_entropy(*narrow, targets, backend=backend)
    expected.backward()
    assert torch.equal(loss, expected)
    for a, b in zip(leaves, narrow, strict=True):
        assert a.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad.float())


def test_strides(backend, device, small_pieces):
    inputs, targets = make(24, 12, 60, torch.float32, device)
    x = torch.randn(3, 9, 24, device=device)[:, 1:, ::2]
    weight = inputs["weight"].t().contiguous().t()
    check({"x": x, "weight": weight}, targets.view(3, 8), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_over_lengths(device, dtype, reduction):
    inputs, _ = make(1, 16, 1100, dtype, device)
    weight = inputs["weight"].requires_grad_()

    def loss(x, targets):
        return tfkern.linear_cross_entropy(x, weight, targets, reduction=reduction)

    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counted)
    graphs = []
    for M in (300, 700, 1000):
        x = torch.randn(M, 16, device=device).to(dtype).requires_grad_()
        targets = torch.randint(1100, (M,), device=device)
        results = []
        for call in (loss, compiled):
            value = call(x, targets)
            results.append((value, *torch.autograd.grad(2 * value.sum(), (x, weight))))
        torch.testing.assert_close(*results)
        graphs.append(counted.frame_count)
    assert graphs[0] == graphs[-1] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(())}, "x must have at least one axis"),
        ({"weight": torch.zeros(7, 4)}, r"weight has shape \(7, 4\), expected \(\*, 3\)"),
        ({"weight": torch.zeros(0, 3)}, "weight must have rows"),
        ({"weight": torch.zeros(7, 3).double()}, "weight is torch.float64, but x is torch.float32"),
        ({"bias": torch.zeros(6)}, r"bias has shape \(6,\), expected \(7,\)"),
        ({"targets": torch.full((4,), 7)}, "targets must lie in 0 to 6, got 7"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "but x is on cpu"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"shape \(5,\), expected \(4,\)"),
        ({"class_weight": torch.ones(3)}, r"class_weight has shape \(3,\), expected \(7,\)"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
    ],
)
def test_refused_arguments(changes, message):
    args = {"x": torch.zeros(4, 3), "weight": torch.zeros(7, 3)}
    args |= {"targets": torch.zeros(4, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=message):
        tfkern.linear_cross_entropy(**args)


def peak_bytes(call) -> int:
    """The most bytes that were allocated at once during a call, by torch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes = [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.nbytes()]
    total = most = 0
    for change in changes:
        total += change
        most = max(most, total)
    return most


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts allocations of the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_beyond_inputs_and_gradients(dtype, reduction):
    M, K, V = 4096, 128, 32000
    inputs, targets = make(M, K, V, dtype, "cpu", bias=True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}

    def call():
        loss = tfkern.linear_cross_entropy(**leaves, targets=targets, reduction=reduction)
        loss.sum().backward()

    torch.utils.deterministic.fill_uninitialized_memory = False
    peak = peak_bytes(call)
    gradients = sum(t.nbytes for t in leaves.values())
    assert gradients < peak < gradients + 0.1 * M * V * dtype.itemsize


def test_operators_are_what_their_schemas_say(device):
    """The loops over pieces are operators of torch: no result is an argument or a view of one."""
    inputs, targets = make(5, 4, 9, torch.float32, device, bias=True)
    x, weight, bias = inputs.values()
    backend = "native" if tfkern.backends("cross_entropy")["native"] is None else "reference"
    options, every = (-100, 0.1, 2.0), (True, True, True)
    one = torch.ones((), device=device)
    tensors = x, weight, bias, targets, None
    loss, lse, rest = logit_pieces.forward(*tensors, *options, True, backend, None)
    calls = {
        logit_pieces.forward: (*tensors, *options, True, backend, None),
        logit_pieces.backward: (*tensors, lse, rest, loss, None, *options, backend, None, *every),
        logit_pieces.formed: (*tensors, one, 0.1 * one, *options, backend, None, *every),
    }
    for operator, args in calls.items():
        torch.library.opcheck(operator, args)


def test_the_first_loss_of_a_fresh_model_is_that_of_uniform_classes():
    model = Transformer(
        TransformerConfig(vocab_size=1000, dim=64, layers=2, heads=2, max_length=32)
    )
    tokens = torch.randint(1000, (4, 33))
    assert cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).item() == pytest.approx(
        math.log(1000), abs=0.3
    )


def test_explained():
    inputs, targets = make(5, 4, 9, torch.float64, "cpu")
    explained = tfkern.explain("linear_cross_entropy", *inputs.values(), targets, z_loss=0.1)
    assert explained.op == "cross_entropy" and explained.backend in ("native", "reference")
    with pytest.raises(ValueError, match="weight has shape"):
        tfkern.explain("linear_cross_entropy", inputs["x"], inputs["x"].T, targets)
