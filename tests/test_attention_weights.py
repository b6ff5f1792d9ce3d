"""`tfkern.attention_weights` against the softmax of plain PyTorch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tfkern
from tfkern import attention_weights

B, H, HK, T, S, D = 2, 4, 2, 6, 9, 8
LENGTHS = {"query_lengths": torch.tensor([4, 6]), "key_lengths": torch.tensor([9, 5])}


@pytest.fixture(params=["reference", "native"])
def forced(request):
    if reason := tfkern.backends("attention")[request.param]:
        pytest.skip(reason)
    with tfkern.use_backend(request.param):
        yield


def draw(dtype=torch.float64):
    q, k, v = (torch.randn(B, h, n, D) for h, n in ((H, T), (HK, S), (HK, S)))
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def plain(q, k, *, left=None, right=None, scale=D**-0.5, softcap=0.0, bias=None, mask=None,
          alibi_slopes=None, sink=None, query_lengths=None, key_lengths=None):  # fmt: skip
    """All weights, by torch's softmax, one batch at a time; with the sink as one more key."""
    out = []
    for b in range(B):
        n = T if query_lengths is None else int(query_lengths[b])
        m = S if key_lengths is None else int(key_lengths[b])
        s = scale * q[b] @ k[b].repeat_interleave(H // HK, 0).mT
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + bias.expand(B, H, T, S)[b]
        t, u = torch.arange(T)[:, None] + m - n, torch.arange(S)
        if alibi_slopes is not None:
            s = s - alibi_slopes.expand(B, H)[b, :, None, None] * (t - u).abs()
        hidden = (torch.arange(T)[:, None] >= n) | (u >= m)
        hidden = hidden if left is None else hidden | (u < t - left)
        hidden = hidden if right is None else hidden | (u > t + right)
        hidden = hidden if mask is None else hidden | ~mask.expand(B, H, T, S)[b]
        s = s.masked_fill(hidden, -torch.inf)
        one = s.new_full((H,), -torch.inf) if sink is None else sink
        s = torch.cat([s, one[:, None, None].expand(H, T, 1)], -1)
        nothing = (s == -torch.inf).all(-1, keepdim=True)
        out.append(s.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)[..., :-1])
    return torch.stack(out)


def options_of(name):
    """The options that attention takes, and those that `plain` takes."""
    torch.manual_seed(4)
    both = {
        "scale": {"scale": -0.4},
        "softcap": {"softcap": 0.7},
        "bias": {"bias": torch.randn(B, H, T, S).double().requires_grad_()},
        "bias of rows": {"bias": torch.randn(T, S).double().requires_grad_()},
        "bias of heads": {"bias": torch.randn(H, 1, 1).double().requires_grad_()},
        "mask": {"mask": torch.rand(B, H, T, S) < 0.5},
        "mask of rows": {"mask": torch.rand(T, 1) < 0.5},
        "alibi": {"alibi_slopes": torch.rand(H).double()},
        "alibi of batches": {"alibi_slopes": torch.rand(B, H).double(), **LENGTHS},
        "sink": {"sink": torch.randn(H).double().requires_grad_()},
        "lengths": LENGTHS,
        "no key": {"key_lengths": torch.tensor([0, 2])},
    }
    if name in both:
        return both[name], both[name]
    return {
        "plain": ({}, {}),
        "causal": ({"causal": True}, {"right": 0}),
        "window": ({"window": (2, 1)}, {"left": 2, "right": 1}),
        "all": (
            {"causal": True, "window": (3, None), **LENGTHS, **both["bias"], **both["softcap"]},
            {"right": 0, "left": 3, **LENGTHS, **both["bias"], **both["softcap"]},
        ),
    }[name]


NAMES = [
    *("plain", "scale", "softcap", "bias", "bias of rows", "bias of heads", "mask", "mask of rows"),
    *("alibi", "alibi of batches", "sink", "lengths", "no key", "causal", "window", "all"),
]
CHOICES = [
    ({}, (range(H), range(T))),
    ({"heads": [3, 0], "rows": [-1, 2, 2]}, ((3, 0), (5, 2, 2))),
    ({"heads": slice(1, None), "rows": torch.tensor([0, 4])}, ((1, 2, 3), (0, 4))),
    ({"heads": (-2,), "rows": range(1, 6, 2)}, ((2,), (1, 3, 5))),
    ({"rows": slice(-2, None)}, (range(H), (4, 5))),
]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("choice", range(len(CHOICES)))
@pytest.mark.parametrize("name", NAMES)
def test_matches_softmax(name, choice):
    """Values and gradients, those through lse included."""
    ours, theirs = options_of(name)
    choice, (heads, rows) = CHOICES[choice]
    q, k, v = draw()
    _, lse = tfkern.attention(q, k, v, **ours, return_lse=True)
    p = attention_weights(q, k, lse, **{n: x for n, x in ours.items() if n != "sink"}, **choice)
    expected = plain(q, k, **theirs)[:, list(heads)][:, :, list(rows)]
    torch.testing.assert_close(p, expected, atol=1e-12, rtol=1e-12)
    extra = (x for x in ours.values() if torch.is_tensor(x) and x.requires_grad)
    leaves, dp = [q, k, *extra], torch.randn(p.shape, dtype=p.dtype)
    grads = (torch.autograd.grad(x, leaves, dp) for x in (p, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    """float32, with the precision of float32, whatever the inputs."""
    q, k, v = draw(dtype)
    _, lse = tfkern.attention(q, k, v, causal=True, return_lse=True)
    p = attention_weights(q, k, lse, causal=True)
    assert p.dtype == torch.float32
    expected = plain(q.double(), k.double(), right=0)
    torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-5)


def test_padding_may_be_nan():
    q, k, v = draw()
    with torch.no_grad():
        q[0, :, 4:], k[1, :, 5:] = torch.nan, torch.nan
        _, lse = tfkern.attention(q, k, v, **LENGTHS, return_lse=True, backend="reference")
    p = attention_weights(q, k, lse, **LENGTHS)
    assert p.isfinite().all() and not p[0, :, 4:].any() and not p[1, :, :, 5:].any()
    for dx in torch.autograd.grad(p.square().sum(), (q, k)):
        assert dx.isfinite().all()


def test_memory_is_that_of_what_is_asked():
    """No new tensor is larger than two rows of one head, or one head of the keys."""
    T = S = 400
    q, k = torch.randn(2, 1, 3, T, 4)
    bias, mask = torch.zeros(1, 3, T, S), torch.ones(3, T, S, dtype=torch.bool)
    inputs = [q, k, torch.zeros(1, 3, T)]
    known = {x.untyped_storage().data_ptr() for x in (*inputs, bias, mask)}
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in known:
                sizes.append(out.numel())
            return out

    with Watch():
        attention_weights(*inputs, heads=[1], rows=[5, 7], bias=bias, mask=mask, causal=True)
    assert max(sizes) <= max(2 * S, S * 4, 2 * T)
    with Watch():
        attention_weights(*inputs)
    assert max(sizes) == 3 * T * S


def test_autocast():
    q, k, v = draw(torch.float32)
    with tfkern.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        _, lse = tfkern.attention(q, k, v, return_lse=True)
        p = attention_weights(q, k, lse)
    expected = plain(q.bfloat16().double(), k.bfloat16().double())
    torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-5)


def test_compile():
    def fn(q, k, v, rows):
        o, lse = tfkern.attention(q, k, v, causal=True, return_lse=True, backend="reference")
        return o, attention_weights(q, k, lse, heads=[1, 2], rows=rows, causal=True)

    q, k, v = draw()
    rows = torch.tensor([1, 5])
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    _, p = compiled(q, k, v, rows)
    expected = plain(q, k, right=0)[:, 1:3][:, :, rows]
    torch.testing.assert_close(p, expected, atol=1e-12, rtol=1e-12)
    grads = (torch.autograd.grad(x.square().sum(), (q, k)) for x in (p, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(H, T, D)}, ["q", "(4, 6, 8)"]),
        ({"k": torch.zeros(B, 3, S, D)}, ["heads", "4", "3"]),
        ({"lse": torch.zeros(B, H, S)}, ["lse", "(2, 4, 9)", "(2, 4, 6)"]),
        ({"lse": torch.zeros(B, H, T).double()}, ["lse", "float64", "float32"]),
        ({"heads": [4]}, ["heads", "-4 to 3", "4"]),
        ({"rows": torch.tensor([-7])}, ["rows", "-6 to 5", "-7"]),
        ({"rows": torch.tensor([[1]])}, ["rows", "1-d"]),
        ({"rows": torch.ones(T).bool()}, ["rows", "bool"]),
        ({"rows": [0.5]}, ["rows", "float32"]),
        ({"heads": 1}, ["heads", "sequence", "0 dimensions"]),
        ({"mask": torch.ones(T, T).bool()}, ["mask", "(6, 6)"]),
        ({"window": (-1, 0)}, ["window", "-1"]),
    ],
)
def test_errors(change, words):
    inputs = {
        "q": torch.zeros(B, H, T, D),
        "k": torch.zeros(B, HK, S, D),
        "lse": torch.zeros(B, H, T),
    }
    with pytest.raises(ValueError) as error:
        attention_weights(**(inputs | change))
    assert all(word in str(error.value) for word in words), error.value


def test_nothing_chosen():
    q, k, _ = draw()
    lse = torch.zeros(B, H, T).double()
    assert attention_weights(q, k, lse, heads=[]).shape == (B, 0, T, S)
    assert attention_weights(q, k, lse, rows=slice(3, 3)).shape == (B, H, 0, S)
