"""Decoding with `KVCache` against attention over the whole sequence, in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import tfkern
from tfkern.nn import KVCache

B, H, HK, D, DV, N = 3, 4, 2, 8, 6, 23
KINDS = ("static", "growing", "ring")


@pytest.fixture(params=["reference", "native"])
def forced(request):
    if reason := tfkern.backends("attention")[request.param]:
        pytest.skip(reason)
    with tfkern.use_backend(request.param):
        yield


def draw(dtype=torch.float64, lengths=N):
    shapes = ((B, H, lengths, D), (B, HK, lengths, D), (B, HK, lengths, DV))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def make(kind, capacity=None, dtype=torch.float64, **options):
    capacity = {"static": N, "growing": 2, "ring": 5}[kind] if capacity is None else capacity
    return KVCache(B, HK, D, capacity, DV, kind=kind, dtype=dtype, **options)


def window_of(cache):
    return (cache.capacity - 1, None) if cache.kind == "ring" else None


def full(q, k, v, left=None):
    """Causal attention over the whole sequence by torch."""
    t, s = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    mask = s <= t
    mask = mask if left is None else mask & (s >= t - left)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def decode(cache, q, k, v, chunks):
    """The same, chunk by chunk through the cache."""
    out = []
    for qi, ki, vi in zip(*(x.split(chunks, 2) for x in (q, k, v)), strict=True):
        keys, values, lengths = cache.append(ki, vi)
        out.append(
            tfkern.attention(
                qi, keys, values, causal=True, window=window_of(cache), key_lengths=lengths
            )
        )
    return torch.cat(out, 2)


CHUNKS = {
    "tokens": [1] * N,
    "prompt": [9] + [1] * (N - 9),
    "chunks": [4, 1, 7, 2, 1, 1, 5, 2],  # shorter and longer than the ring
    "fives": [5, 5, 1, 5, 5, 2],
    "all": [N],
}


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_full_attention(kind, chunks):
    cache, inputs = make(kind), draw()
    left = cache.capacity - 1 if kind == "ring" else None
    o = decode(cache, *inputs, CHUNKS[chunks])
    torch.testing.assert_close(o, full(*inputs, left), atol=1e-12, rtol=1e-12)
    assert cache.lengths.tolist() == [N] * B


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("capacity", [1, 2, 7, 30])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_rings_of_other_sizes(chunks, capacity):
    inputs = draw()
    o = decode(make("ring", capacity), *inputs, CHUNKS[chunks])
    torch.testing.assert_close(o, full(*inputs, capacity - 1), atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ragged(kind, dtype):
    """Each sequence has its own number of tokens in each call; padding is NaN and overwritten."""
    q, k, v = draw()
    cache, done = make(kind), torch.zeros(B, dtype=torch.int64)
    left = cache.capacity - 1 if kind == "ring" else None
    expected = full(q, k, v, left)
    steps = [(8, (8, 3, 0)), (1, (1, 1, 1)), (3, (0, 2, 3)), (1, (0, 1, 0)), (6, (1, 6, 2))]
    steps += [(1, (1, 1, 1))] * 3 + [(7, (7, 2, 5)), (1, (0, 1, 1))]
    for T, counts in steps:
        lengths = torch.tensor(counts, dtype=dtype)
        chunk = [torch.full((B, x.shape[1], T, x.shape[3]), torch.nan).double() for x in (q, k, v)]
        for x, whole in zip(chunk, (q, k, v), strict=True):
            for b, n in enumerate(counts):
                x[b, :, :n] = whole[b, :, done[b] : done[b] + n]
        keys, values, key_lengths = cache.append(*chunk[1:], lengths)
        o = tfkern.attention(
            chunk[0],
            keys,
            values,
            causal=True,
            window=window_of(cache),
            query_lengths=lengths,
            key_lengths=key_lengths,
        )
        for b, n in enumerate(counts):
            own = expected[b, :, done[b] : done[b] + n]
            torch.testing.assert_close(o[b, :, :n], own, atol=1e-12, rtol=1e-12)
        done += lengths
        assert torch.equal(cache.lengths, done)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", KINDS)
def test_padding_reaches_beyond_the_capacity(kind):
    """Only tokens need room, not the padding beside them."""
    cache, (q, k, v) = make(kind, 6), draw()
    cache.append(k[:, :, :4], v[:, :, :4])
    keys, values, lengths = cache.append(k[:, :, 4:9], v[:, :, 4:9], torch.tensor([2, 1, 0]))
    o = tfkern.attention(
        q[:, :, 4:9],
        keys,
        values,
        causal=True,
        window=window_of(cache),
        query_lengths=torch.tensor([2, 1, 0]),
        key_lengths=lengths,
    )
    left = 5 if kind == "ring" else None
    expected = full(q[:, :, :6], k[:, :, :6], v[:, :, :6], left)[:, :, 4:]
    torch.testing.assert_close(o[0, :, :2], expected[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(o[1, :, :1], expected[1, :, :1], atol=1e-12, rtol=1e-12)
    assert cache.lengths.tolist() == [6, 5, 4]


@pytest.mark.parametrize("window", [1, 4, 9])
def test_window_narrower_than_a_static_cache(window):
    q, k, v = draw()
    cache, out = make("static", N + 3), []
    for chunk in zip(*(x.split(2, 2) for x in (q, k, v)), strict=True):
        keys, values, lengths = cache.append(*chunk[1:])
        options = {"causal": True, "window": (window - 1, None), "key_lengths": lengths}
        out.append(tfkern.attention(chunk[0], keys, values, **options, backend="reference"))
    expected = full(q, k, v, window - 1)
    torch.testing.assert_close(torch.cat(out, 2), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", KINDS)
def test_reorder(kind):
    """Sequences go on as those whose beam they took over."""
    q, k, v = draw()
    cache, order = make(kind), torch.tensor([2, 0, 0])
    left = cache.capacity - 1 if kind == "ring" else None
    counts = torch.tensor([7, 9, 4])
    cache.append(k[:, :, :9], v[:, :, :9], counts)
    cache.reorder(order.int())
    assert cache.lengths.tolist() == [4, 7, 7]
    more = draw(lengths=4)
    o = decode(cache, *more, [1, 2, 1])
    for b, source in enumerate(order.tolist()):
        n = int(counts[source])
        whole = [
            torch.cat([x[source : source + 1, :, :n], y[b : b + 1]], 2)
            for x, y in zip((q, k, v), more, strict=True)
        ]
        expected = full(*whole, left)[0, :, n:]
        torch.testing.assert_close(o[b], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind):
    """Nothing of the tokens before is left, and the memory stays."""
    cache = make(kind)
    left = cache.capacity - 1 if kind == "ring" else None
    decode(cache, *draw(), CHUNKS["prompt"])
    before = cache.capacity
    cache.reset()
    assert cache.lengths.tolist() == [0] * B
    again = draw()
    o = decode(cache, *again, [3] + [1] * 20)
    torch.testing.assert_close(o, full(*again, left), atol=1e-12, rtol=1e-12)
    assert cache.capacity == before


def test_growth():
    """A growing cache doubles, or takes the size of a long chunk; other kinds keep theirs."""
    cases = {(1,) * 9: [2, 2, 4, 4, 8, 8, 8, 8, 16], (2, 1, 9, 5): [2, 4, 12, 24]}
    for chunks, capacities in cases.items():
        cache, got = make("growing"), []
        _, k, v = draw(lengths=sum(chunks))
        for ki, vi in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
            keys, values, _ = cache.append(ki, vi)
            got.append(cache.capacity)
            assert keys.shape == (B, HK, got[-1], D) and values.shape == (B, HK, got[-1], DV)
        assert got == capacities


@pytest.mark.parametrize("kind", KINDS)
def test_modes_may_change_between_calls(kind):
    """A tensor that inference mode has made may not be written to outside of it."""
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for first in modes:
        for second in modes:
            q, k, v = draw()
            with first():
                cache = make(kind)
                for t in range(3):  # past the first buffer of the growing one
                    cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            with second():
                for t in range(3, 7):
                    keys, values, lengths = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
                o = tfkern.attention(q[:, :, 6:7], keys, values, causal=True, key_lengths=lengths)
                left = window_of(cache) and window_of(cache)[0]
                expected = full(q[:, :, :7], k[:, :, :7], v[:, :, :7], left)[:, :, 6:]
                torch.testing.assert_close(o, expected)
                cache.reorder(torch.zeros(B, dtype=torch.int64))
                cache.reset()


def test_static_and_ring_stay_where_they_are():
    """One address for ever, which is what CUDA graphs need."""
    _, k, v = draw()
    for kind in ("static", "ring"):
        cache = make(kind)
        addresses = set()
        for t in range(N):
            keys, values, _ = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            addresses.add((keys.data_ptr(), values.data_ptr(), cache._lengths.data_ptr()))
            assert keys.shape[2] == cache.capacity
        cache.reorder(torch.arange(B))
        cache.reset()
        keys, values, _ = cache.append(k[:, :, :1], v[:, :, :1])
        assert addresses == {(keys.data_ptr(), values.data_ptr(), cache._lengths.data_ptr())}


def test_lengths_do_not_change_afterwards():
    cache, (_, k, v) = make("static"), draw()
    _, _, key_lengths = cache.append(k[:, :, :3], v[:, :, :3])
    lengths = cache.lengths
    cache.append(k[:, :, 3:4], v[:, :, 3:4])
    assert key_lengths.tolist() == lengths.tolist() == [3] * B


@pytest.mark.parametrize("kind", ["static", "ring"])
def test_compiles_without_recompiling(kind):
    """A step of decoding is one graph, for all positions."""
    torch._dynamo.reset()
    cache, (q, k, v) = make(kind), draw()

    def step(cache, q, k, v):
        k, v, lengths = cache.append(k, v)
        window = window_of(cache)
        return tfkern.attention(
            q, k, v, causal=True, window=window, key_lengths=lengths, backend="reference"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = full(q, k, v, cache.capacity - 1 if kind == "ring" else None)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for t in range(N):
            o = compiled(cache, *(x[:, :, t : t + 1].contiguous() for x in (q, k, v)))
            torch.testing.assert_close(o, expected[:, :, t : t + 1], atol=1e-12, rtol=1e-12)


def test_no_gradient_flows():
    cache, (_, k, v) = make("static"), draw()
    k.requires_grad_()
    with pytest.raises(ValueError, match="k requires a gradient"):
        cache.append(k, v)
    with torch.no_grad():
        keys, _, _ = cache.append(k, v)
    assert not keys.requires_grad
    with torch.inference_mode():
        KVCache(B, HK, D, N, DV, dtype=torch.float64).append(k, v)


def token(**change):
    shapes = {"k": (B, HK, 1, D), "v": (B, HK, 1, DV)} | change
    return [x if torch.is_tensor(x) else torch.zeros(x).double() for x in shapes.values()]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KVCache(0, 1, 1, 1), ["batch", "0"]),
        (lambda: KVCache(1, 1, 1, 0), ["capacity", "0"]),
        (lambda: KVCache(1, 1, 1, 1, 0), ["value_size", "0"]),
        (lambda: KVCache(1, 1, 1, 1, kind="paged"), ["kind", "'paged'", "ring"]),
        (lambda: make("static").append(*token(k=(B, H, 1, D))), ["k", "(3, 4, 1, 8)", "(3, 2, 1"]),
        (lambda: make("static").append(*token(v=(B, HK, 2, DV))), ["v", "(3, 2, 2, 6)"]),
        (lambda: make("static").append(*token(k=(HK, 1, D))), ["k", "(2, 1, 8)"]),
        (lambda: make("ring").append(*token(k=(B, HK, 0, D))), ["k", "T >= 1"]),
        (lambda: make("ring").append(*token(v=torch.zeros(B, HK, 1, DV))), ["v", "float32"]),
        (
            lambda: make("static").append(*token(k=torch.zeros(B, HK, 1, D, device="meta"))),
            ["k", "meta"],
        ),
        (lambda: make("static").append(*token(), torch.ones(B)), ["lengths", "float32"]),
        (lambda: make("static").append(*token(), torch.tensor([1, 1])), ["lengths", "(2,)"]),
        (lambda: make("static").append(*token(), torch.tensor([1, 2, 0])), ["lengths", "0 to 1"]),
        (lambda: make("static").append(*token(), torch.tensor([1, -1, 0])), ["lengths", "-1"]),
        (lambda: make("static").reorder(torch.tensor([0, 1])), ["indices", "(2,)", "(3,)"]),
        (lambda: make("static").reorder(torch.ones(B)), ["indices", "float32"]),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_overflow():
    """A static cache that would overflow writes nothing: the caller may go on with it."""
    cache, (_, k, v) = make("static", 6), draw()
    keys, _, _ = cache.append(k[:, :, :4], v[:, :, :4])
    before = keys.clone()
    for chunk in ((k[:, :, :3], v[:, :, :3]), (k[:, :, :3], v[:, :, :3], torch.tensor([0, 3, 2]))):
        with pytest.raises(ValueError, match="7 tokens .* cache of 6"):
            cache.append(*chunk)
    with pytest.raises(ValueError, match="23 rows .* cache of 6"):
        cache.append(k, v)
    assert torch.equal(keys, before) and cache.lengths.tolist() == [4] * B
    cache.append(k[:, :, :3], v[:, :, :3], torch.tensor([2, 0, 1]))
    assert cache.lengths.tolist() == [6, 4, 5]
