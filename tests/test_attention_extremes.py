"""Attention where float32 rounds by units or overflows, and where something is NaN."""

import pytest
import torch

import tfkern
from tfkern.validation.attention import torch_attention

# Few rows take other kernels than many, and so do several heads of few rows.
ROWS = [(1, 1, 1), (4, 1, 2), (2, 2, 9), (1, 1, 70)]  # H, Hk, T
LARGEST = torch.finfo(torch.float32).max


def eps(dtype):
    return torch.finfo(dtype).eps


def differentiated(fn, **inputs):
    """The output of fn, and by name its gradients for normally distributed incoming ones."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o = fn(**leaves)
    generator = torch.Generator(o.device).manual_seed(1)
    do = torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
    grads = torch.autograd.grad(o, list(leaves.values()), do)
    return o, do, dict(zip(leaves, grads, strict=True))


def assert_means(o, do, dv, v, factor=1.0):
    """That every query gives all keys the same weight, which add up to `factor`."""
    dtype, group = v.dtype, o.shape[1] // v.shape[1]
    # Sums of as many terms as there are keys, or queries and heads, of about 1.
    mean = v.double().mean(2, keepdim=True).repeat_interleave(group, 1) * factor
    torch.testing.assert_close(o.double(), mean.expand(o.shape), rtol=4 * eps(dtype), atol=1e-6)
    total = do.double().unflatten(1, (v.shape[1], group)).sum((2, 3)) * factor / v.shape[2]
    expected = total[:, :, None].expand(dv.shape)
    atol = 1e-6 + 8 * eps(dtype) * float(total.abs().max())
    torch.testing.assert_close(dv.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("S", [3, 150])
@pytest.mark.parametrize("H, Hk, T", ROWS)
def test_equal_scores_of_any_size(backend, dtype, device, H, Hk, T, S):
    """q k is exact: 2^30, or 2^60 where the dtype has such factors. The scale makes it round."""
    for exponent in (0, 15) if dtype == torch.float16 else (0, 15, 30):
        # Triton's kernels scale differences of scores: lse then has what that rounds off, too.
        D = 4 if exponent and backend == "triton" else 5
        q = torch.full((1, H, T, D), 2.0**exponent, dtype=dtype, device=device)
        k = torch.full((1, Hk, S, D), 2.0**exponent, dtype=dtype, device=device)
        v = torch.randn(1, Hk, S, 8, device=device).to(dtype)
        o, do, grads = differentiated(lambda v: tfkern.attention(q, k, v, backend=backend), v=v)  # noqa: B023
        assert_means(o, do, grads["v"], v)


@pytest.mark.parametrize("value", [-1e10, -LARGEST, 1e38])
@pytest.mark.parametrize("H, Hk, T", ROWS)
def test_one_bias_on_all_scores(backend, dtype, device, H, Hk, T, value):
    """A row that an additive mask hides altogether sees everything alike, as in F.softmax."""
    largest = torch.finfo(dtype).max
    value = max(-largest, min(value, largest))
    q = torch.zeros(2, H, T, 16, dtype=dtype, device=device)
    k = torch.randn(2, Hk, 130, 16, device=device).to(dtype)
    v = torch.randn(2, Hk, 130, 8, device=device).to(dtype)
    mask = torch.full((2, 1, T, 130), value, device=device).to(dtype)
    o, do, grads = differentiated(
        lambda v, bias: tfkern.attention(q, k, v, bias=bias, backend=backend), v=v, bias=mask
    )
    assert_means(o, do, grads["v"], v)


def test_masks_of_finfo_min(backend, dtype, device):
    """Masks are as transformers makes them: the padded rows of the first batch see padding only."""
    T = 40
    low = torch.finfo(dtype).min
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    seen = causal.expand(2, 1, T, T).clone()
    seen[0, :, :, :7] = False
    mask = torch.zeros(2, 1, T, T, dtype=dtype, device=device).masked_fill(~seen, low)
    inputs = {x: torch.randn(2, 2, T, 16, device=device).to(dtype) for x in "qkv"}
    o, _, grads = differentiated(
        lambda **kw: tfkern.attention(**kw, bias=mask, backend=backend), **inputs
    )
    wide = {name: x.double() for name, x in inputs.items()}
    true, _, true_grads = differentiated(
        lambda q, k, v: masked_attention(q, k, v, mask.double()), **wide
    )
    limit = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, 0.05)
    torch.testing.assert_close(o.double(), true, rtol=0, atol=limit)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=0, atol=10 * limit)


def masked_attention(q, k, v, mask):
    """Attention whose masked scores are the mask alone, which is what a float32 sum leaves of them.
    Beside the least number of float16, scores count."""
    s = q @ k.mT / q.shape[-1] ** 0.5
    masked = mask + (s - s.detach() if mask.min() < -1e5 else s)
    return torch.where(mask < 0, masked, s).softmax(-1) @ v


@pytest.mark.parametrize("size", [30.0, 362.0, 1e6])
@pytest.mark.parametrize("H, Hk, T", [*ROWS, (1, 1, 65), (3, 1, 67)])
def test_the_only_key_has_weight_1(backend, dtype, device, H, Hk, T, size):
    """The weight is 1 in the backward as well, although scores are rounded by units."""
    if dtype == torch.float16 and size > 1e3:
        pytest.skip("float16 has no such numbers")
    B, D = 2 if backend == "triton" else 8, 80  # whose scale is no power of two
    q = (torch.randn(B, H, T, D, device=device) * size).to(dtype)
    k = (torch.randn(B, Hk, 1, D, device=device) * size).to(dtype)
    v = torch.randn(B, Hk, 1, 8, device=device).to(dtype)
    o, do, grads = differentiated(lambda v: tfkern.attention(q, k, v, backend=backend), v=v)
    assert_means(o, do, grads["v"], v)


@pytest.mark.parametrize("T", [3, 70, 200])
def test_every_query_sees_its_own_key(backend, dtype, device, T):
    q, k = ((torch.randn(2, 2, T, 80, device=device) * 200).to(dtype) for _ in range(2))
    v = torch.randn(2, 2, T, 80, device=device).to(dtype)
    options = {"window": (0, 0), "backend": backend}
    o, do, grads = differentiated(lambda v: tfkern.attention(q, k, v, **options), v=v)
    torch.testing.assert_close(o, v, rtol=2 * eps(dtype), atol=0)
    torch.testing.assert_close(grads["v"], do, rtol=2 * eps(dtype), atol=0)


@pytest.mark.parametrize("size", [0.0, 1e3, 2.0**20, 2.0**40])
@pytest.mark.parametrize("H, Hk, T", ROWS)
def test_sink_beside_equal_scores(backend, dtype, device, H, Hk, T, size):
    """Three keys and a sink share the weight, whatever their score."""
    q = torch.ones(1, H, T, 1, dtype=dtype, device=device)
    k = torch.full((1, Hk, 3, 1), 4.0, dtype=dtype, device=device)
    v = torch.randn(1, Hk, 3, 8, device=device).to(dtype)
    sink = torch.full((H,), size, device=device)
    o, do, grads = differentiated(
        lambda v, sink: tfkern.attention(q, k, v, scale=size / 4, sink=sink, backend=backend),
        v=v,
        sink=sink,
    )
    assert_means(o, do, grads["v"], v, factor=0.75)
    expected = -(do.double() * o.double()).sum((0, 2, 3)) / 4
    torch.testing.assert_close(grads["sink"].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("T", [1, 5, 70])
def test_weights_add_up_to_1(backend, device, T):
    q = torch.randn(20, 2, T, 64, device=device) * 1000
    k = q[:, :1, :1] * 1.01 + torch.randn(20, 1, 3, 64, device=device) * 0.01
    _, lse = tfkern.attention(q, k, k, return_lse=True, backend=backend)
    total = tfkern.attention_weights(q, k, lse).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("T", [1, 20, 200])
def test_values_of_1e37(backend, dtype, device, T):
    """Weights that are divided at the end only would make infinite sums of them."""
    if dtype == torch.float16:
        pytest.skip("float16 has no such numbers")
    v = ((torch.rand(1, 1, 200, 16, device=device) + 0.5) * 1e37).to(dtype)
    q, k = (torch.randn(1, 1, n, 16, device=device).to(dtype) for n in (T, 200))
    o = tfkern.attention(q, k, v, backend=backend)
    true = torch_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(o.double(), true, rtol=8 * eps(dtype) + 1e-5, atol=0)


# The argument that has a NaN, and its place. Plain math in float64 says what it reaches.
NAN = {
    "a key": ("k", (0, 0, 3, 2)),
    "a value": ("v", (0, 1, 5, 1)),
    "a query": ("q", (0, 1, 2, 0)),
    "an incoming gradient": ("do", (0, 2, 1, 3)),
    "a bias": ("bias", (0, 0, 1, 4)),
    "a sink": ("sink", (1,)),
}


@pytest.mark.parametrize("T, S", [(3, 6), (70, 130)])
@pytest.mark.parametrize("what", NAN)
def test_nan_reaches_what_depends_on_it(backend, dtype, device, what, T, S):
    name, place = NAN[what]
    shapes = {"q": (1, 4, T, 16), "k": (1, 2, S, 16), "v": (1, 2, S, 8), "do": (1, 4, T, 8)}
    inputs = {n: torch.randn(shape, device=device).to(dtype) for n, shape in shapes.items()}
    if what in ("a bias", "a sink"):
        inputs[name] = torch.randn((1, 4, T, S) if name == "bias" else 4, device=device)
    inputs[name][place] = torch.nan
    do = inputs.pop("do")

    def run(fn, wide):
        leaves = {n: x.double() if wide else x for n, x in inputs.items()}
        leaves = {n: x.requires_grad_() for n, x in leaves.items()}
        o, lse = fn(**leaves)
        grads = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        return {"o": o, "lse": lse, **dict(zip(leaves, grads, strict=True))}

    ours = run(lambda **kw: tfkern.attention(**kw, return_lse=True, backend=backend), False)
    plain = run(lambda **kw: plain_attention(**kw), True)
    for output, x in plain.items():
        missing = x.isnan() & ~ours[output].isnan()
        assert not missing.any(), f"{what} is NaN: {output} has {int(missing.sum())} numbers"
        if output == "o" or what in ("a query", "an incoming gradient"):
            spread = ours[output].isnan() & ~x.isnan()
            assert not spread.any(), f"{what} is NaN: {output} has {int(spread.sum())} NaN more"


def plain_attention(q, k, v, bias=None, sink=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    s = s if bias is None else s + bias
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], -1)
    return s.softmax(-1)[..., : k.shape[2]] @ v, s.logsumexp(-1)


@pytest.mark.parametrize("T", [1, 70])
def test_overflow_of_a_score_is_not_hidden(backend, dtype, device, T):
    """q k is infinite in float32: all that depends on it is NaN, as it is in F.softmax."""
    if dtype in (torch.float16, torch.float64):
        pytest.skip("their numbers do not overflow float32, or it is not what computes")
    q, k = (torch.full((1, 1, n, 16), 1e20, dtype=dtype, device=device) for n in (T, 5))
    v = torch.randn(1, 1, 5, 8, device=device).to(dtype)
    o, _, grads = differentiated(
        lambda q, k, v: tfkern.attention(q, k, v, backend=backend), q=q, k=k, v=v
    )
    assert all(x.isnan().all() for x in (o, *grads.values()))
