"""`tfkern.nn.functional` against `torch.nn.functional`."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tfkern
from tfkern.nn.functional import scaled_dot_product_attention
from tfkern.testing import validate


@pytest.fixture(params=["reference", "native", "triton"])
def forced(request):
    if reason := tfkern.backends("attention")[request.param]:
        pytest.skip(reason)
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the tensors of these tests are on the CPU")
    with tfkern.use_backend(request.param):
        yield request.param


# query, key, value, and options of both; tensors among them get a gradient if they are floating
SHAPES = {
    "4-d": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "square": ((2, 3, 7, 8),) * 3,
    "more queries": ((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "3-d": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "2-d": ((5, 8), (7, 8), (7, 6)),
    "6-d": ((2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 6)),
    "one batch of keys": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
    "one head of keys": ((2, 3, 5, 8), (2, 1, 7, 8), (3, 7, 6)),
    "several batches of keys": ((2, 2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 3, 7, 6)),
    "one query": ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "no query": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "no key": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
}


def draw(shapes, dtype=torch.float64):
    names = ("query", "key", "value")
    return {name: torch.randn(x).to(dtype) for name, x in zip(names, shapes, strict=True)}


def compare(inputs, forced=None, **options):
    """Outputs and gradients, inputs in float64: to its rounding, or that of float32 for triton."""
    dtype, tolerance = (torch.float32, 1e-5) if forced == "triton" else (torch.float64, 1e-12)
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        ours = function is scaled_dot_product_attention
        leaves = {
            n: x.to(dtype if ours else x.dtype).requires_grad_() if x.is_floating_point() else x
            for n, x in ((n, x.detach().clone()) for n, x in inputs.items())
        }
        o = function(**leaves, **options)
        torch.manual_seed(1)
        wanted = [x for x in leaves.values() if x.requires_grad]
        do = torch.randn(o.shape, dtype=torch.float64).to(o.dtype)
        results.append((o, *torch.autograd.grad(o, wanted, do)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_signature_is_that_of_torch():
    """As torch's documentation gives it; scale and enable_gqa are keywords there, too."""
    parameters = inspect.signature(scaled_dot_product_attention).parameters.values()
    assert [(p.name, p.default) for p in parameters][3:] == [
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]
    x = torch.ones(2, 2)
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with pytest.raises(TypeError):
            function(x, x, x, None, 0.0, False, 1.0)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(forced, name, is_causal):
    compare(draw(SHAPES[name]), forced, is_causal=is_causal)


MASKS = {
    "of rows": (5, 7),
    "of keys": (1, 7),
    "of queries": (5, 1),
    "of heads": (3, 1, 7),
    "of batches": (2, 1, 1, 7),
    "of all": (2, 3, 5, 7),
    "one": (1, 1),
}


def masks(shape, boolean):
    return torch.rand(shape) < 0.7 if boolean else torch.randn(shape).double()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(forced, name, boolean):
    inputs = draw(SHAPES["4-d"]) | {"attn_mask": masks(MASKS[name], boolean)}
    compare(inputs, forced)


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize(
    "shape", [(5, 7), (2, 5, 7), (3, 1, 5, 7), (1, 3, 2, 1, 7), (2, 1, 1, 2, 5, 1)], ids=str
)
def test_masks_of_many_dimensions(shape, boolean):
    with tfkern.use_backend("reference"):
        compare(draw(SHAPES["6-d"]) | {"attn_mask": masks(shape, boolean)})


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_masks_of_few_dimensions(lead, shape):
    if len(shape) - 2 > len(lead):
        pytest.skip("a mask has no more dimensions than the scores")
    shapes = [(*lead, *x) for x in ((5, 8), (7, 8), (7, 6))]
    with tfkern.use_backend("reference"):
        compare(draw(shapes) | {"attn_mask": masks(shape, True)})


def test_broadcast_masks_are_not_written_out(monkeypatch):
    """The op gets the very memory of the mask, or a batch of it where leading dimensions mix."""
    seen = []
    original = tfkern.nn.functional.attention
    monkeypatch.setattr(
        tfkern.nn.functional,
        "attention",
        lambda *a, **kw: seen.append(kw["mask"]) or original(*a, **kw),
    )
    q, k, v = draw(SHAPES["6-d"], torch.float32).values()
    for shape, elements in (((5, 7), 35), ((2, 5, 7), 70), ((1, 1, 1, 2, 1, 7), 14)):
        mask = torch.ones(shape, dtype=torch.bool)
        with tfkern.use_backend("reference"):
            scaled_dot_product_attention(q, k, v, mask)
        assert seen[-1].numel() == elements and seen[-1].data_ptr() == mask.data_ptr()
    with tfkern.use_backend("reference"):
        scaled_dot_product_attention(q, k, v, torch.ones(3, 1, 1, 7, dtype=torch.bool))
    assert seen[-1].shape == (6, 1, 1, 7)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_grouped_heads(forced, lead, heads, is_causal):
    shapes = [(*lead, *x) for x in ((4, 5, 8), (heads, 7, 8), (heads, 7, 6))]
    if forced == "triton":
        check(draw(shapes, torch.float32), is_causal=is_causal, enable_gqa=True)
    else:
        compare(draw(shapes), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
def test_grouped_heads_with_masks(boolean):
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    for shape in ((5, 7), (4, 5, 7), (2, 1, 5, 7)):
        with tfkern.use_backend("reference"):
            compare(draw(shapes) | {"attn_mask": masks(shape, boolean)}, enable_gqa=True)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("scale", [0.3, -1.0, 0.0])
def test_scale(forced, scale):
    compare(draw(SHAPES["4-d"]), forced, scale=scale)


def check(inputs, **options):
    """The error limits of `validate`. Scores and lse in float32 are off by roundings of some units,
    and the softmax by the same factor."""
    wide = inputs["query"].dtype == torch.float32
    scale = 1 + 2 * math.log(8 + inputs["key"].shape[-2]) if wide else 1

    def of(function):
        return lambda **kw: function(**kw, **options)

    fn, reference = of(scaled_dot_product_attention), of(F.scaled_dot_product_attention)
    scales = dict.fromkeys((*inputs, "output"), scale)
    validate(fn, reference, inputs, floor_scale=scales).check()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_limits(dtype, options):
    heads = 2 if "enable_gqa" in options else 4
    check(draw(((2, 4, 40, 16), (2, heads, 67, 16), (2, heads, 67, 16)), dtype), **options)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_limits_with_masks(dtype):
    inputs = draw(((2, 4, 40, 16), (2, 4, 67, 16), (2, 4, 67, 16)), dtype)
    check(inputs | {"attn_mask": torch.rand(2, 1, 40, 67) < 0.7})
    check(inputs | {"attn_mask": torch.randn(4, 40, 67).to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_under_autocast(dtype):
    q, k, v = draw(SHAPES["4-d"], torch.float32).values()
    mask = torch.randn(5, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), tfkern.use_backend("reference"):
        ours = scaled_dot_product_attention(q, k, v, mask)
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.03)


def test_float32_mask_beside_other_dtypes():
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float64, 1e-12)):
        q, k, v = draw(SHAPES["4-d"], dtype).values()
        mask = torch.randn(5, 7)
        with tfkern.use_backend("reference"):
            ours = scaled_dot_product_attention(q, k, v, mask)
        wide = [x.double() for x in (q, k, v, mask)]
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), F.scaled_dot_product_attention(*wide), atol=tolerance, rtol=tolerance
        )


@pytest.mark.usefixtures("forced")
def test_hidden_rows_are_zero():
    """In output and gradients, by a mask of either kind."""
    q, k, v = (x.requires_grad_() for x in draw(SHAPES["4-d"], torch.float32).values())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    additive = torch.zeros(5, 7).masked_fill(~mask, -torch.inf)
    for given in (mask, additive):
        o = scaled_dot_product_attention(q, k, v, given)
        assert torch.equal(o[:, :, 2], torch.zeros(2, 3, 6)) and o[:, :, :2].all()
        dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
        assert not dq[:, :, 2].any() and dk.isfinite().all() and dv.isfinite().all()
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, given))


@pytest.mark.usefixtures("forced")
def test_dropout():
    """The values are an identity, so that the output is the dropped softmax."""
    q, k = torch.randn(2, 2, 3, 40, 16)
    v = torch.eye(40).expand(2, 3, 40, 40)
    weights = F.scaled_dot_product_attention(q, k, v)
    torch.manual_seed(7)
    o = scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    kept = o != 0
    torch.testing.assert_close(o[kept], weights[kept] / 0.7, atol=1e-5, rtol=1e-4)
    assert 0.68 < kept.float().mean() < 0.72
    assert not torch.allclose(scaled_dot_product_attention(q, k, v, dropout_p=0.3), o)
    torch.manual_seed(7)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, dropout_p=0.3), o)
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


def test_autocast():
    q, k, v = draw(SHAPES["square"], torch.float32).values()
    mask = torch.randn(7, 7)
    with tfkern.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        ours = scaled_dot_product_attention(q, k, v, mask)
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


@pytest.mark.usefixtures("forced")
def test_compiles_without_recompiling():
    """Longer and shorter queries than keys, in one graph."""
    torch._dynamo.reset()
    compiled = torch.compile(
        scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for lengths in (((5, 9), (6, 30)), ((9, 5), (30, 6))):  # a graph for each order of T and S
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for L, S in lengths:
                q, k, v = draw(((2, 3, L, 8), (2, 3, S, 8), (2, 3, S, 8)), torch.float32).values()
                torch.testing.assert_close(
                    compiled(q, k, v, is_causal=True),
                    F.scaled_dot_product_attention(q, k, v, is_causal=True),
                )


q, k, v = (torch.zeros(2, 4, length, 8) for length in (3, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query": q[0, 0, 0]}, ["query", "(8,)"]),
        ({"key": k[:, :2], "value": v[:, :2]}, ["(2, 2, 5, 8)", "enable_gqa"]),
        ({"key": k[:, :3], "value": v[:, :3], "enable_gqa": True}, ["heads", "4", "3"]),
        ({"query": q[0, 0], "key": k[0, 0], "value": v[0, 0], "enable_gqa": True}, ["heads"]),
        ({"key": k.double()}, ["float64", "float32"]),
        ({"key": k[..., :7]}, ["(2, 4, 5, 7)"]),
        ({"value": v[:, :, :4]}, ["(2, 4, 4, 8)"]),
        ({"attn_mask": torch.ones(3, 5).bool(), "is_causal": True}, ["attn_mask", "is_causal"]),
        ({"attn_mask": torch.ones(3, 5, dtype=torch.int64)}, ["attn_mask", "int64", "bool"]),
        ({"attn_mask": torch.ones(3, 5).double()}, ["attn_mask", "float64"]),
        ({"attn_mask": torch.ones(3, 4)}, ["attn_mask", "(3, 4)", "(2, 4, 3, 5)"]),
        ({"attn_mask": torch.ones(2, 2, 4, 3, 5)}, ["attn_mask", "(2, 2, 4, 3, 5)"]),
        ({"dropout_p": 1.1}, ["dropout_p", "1.1"]),
    ],
)
def test_errors(arguments, words):
    """Each is an error of torch's, too, if not of all its kernels."""
    arguments = {"query": q, "key": k, "value": v} | arguments
    with pytest.raises(ValueError) as error:
        scaled_dot_product_attention(**arguments)
    assert all(word in str(error.value) for word in words), error.value
    with sdpa_kernel(SDPBackend.MATH), pytest.raises((RuntimeError, IndexError)):
        F.scaled_dot_product_attention(**arguments)
