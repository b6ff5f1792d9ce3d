"""Attention over ranks against plain PyTorch on one process, in float64."""

from pathlib import Path

import pytest
import torch
from ranks import Ranks

import tfkern
from tfkern.nn.context_parallel import SequenceSplit, context_parallel_attention, traffic
from tfkern.testing import validate
from tfkern.validation.attention import floor_scale, torch_attention, torch_attention_varlen


class Part(torch.autograd.Function):
    """This rank's part of a whole tensor. The gradient is put together from all ranks' parts."""

    @staticmethod
    def forward(ctx, x, split, axis):
        ctx.split, ctx.axis = split, axis
        return split.split(x, axis)

    @staticmethod
    def backward(ctx, dx):
        return ctx.split.gather(dx, ctx.axis), None, None


class Whole(torch.autograd.Function):
    """The whole tensor of all ranks' parts. Each part gets its own gradient."""

    @staticmethod
    def forward(ctx, x, split, axis):
        ctx.split, ctx.axis = split, axis
        return split.gather(x, axis)

    @staticmethod
    def backward(ctx, dx):
        return ctx.split.split(dx, ctx.axis), None, None


class Shared(torch.autograd.Function):
    """A tensor that all ranks have. The gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        torch.distributed.all_reduce(dx := dx.clone())
        return dx


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (7, None)},
    "wide window": {"window": (21, 3)},
    "window of one": {"window": (0, 0)},
    "window beside": {"window": (None, 0)},
    "scale and softcap": {"causal": True, "scale": 0.4, "softcap": 2.0},
    "sink": {"causal": True, "sink": True},
    "alibi": {"causal": True, "alibi": "heads"},
    "alibi both sides": {"alibi": "batch"},
    "alibi and bias": {"alibi": "heads", "bias": (2, 4, "T", "S")},
    "bias": {"bias": (2, 4, "T", "S")},
    "bias of all heads": {"causal": True, "bias": (1, 1, "T", "S")},
    "bias of keys": {"bias": (2, 4, 1, "S")},
    "bias of rows": {"bias": (1, 4, "T", 1)},
    "mask": {"mask": (2, 4, "T", "S")},
    "mask of keys": {"mask": (2, 1, 1, "S"), "sink": True},
    "mask of rows": {"mask": (1, 1, "T", "S"), "causal": True},
    "lengths": {"lengths": [(32, 32), (11, 11)]},
    "causal lengths": {"causal": True, "lengths": [(17, 17), (0, 0)], "sink": True},
    "lengths apart": {"causal": True, "lengths": [(9, 30), (32, 5)], "window": (12, None)},
    "lengths and alibi": {"causal": True, "alibi": "heads", "lengths": [(32, 32), (20, 20)]},
    "documents": {"causal": True, "documents": True},
    "documents and all": {
        "window": (6, 2), "documents": True, "sink": True, "alibi": "batch", "softcap": 3.0,
    },
    "documents and bias": {"causal": True, "documents": True, "bias": (2, 4, "T", "S")},
}  # fmt: skip
SIZES = {  # B, H, Hk, T, S, D, Dv
    "equal": (2, 4, 4, 32, 32, 16, 16),
    "grouped": (2, 4, 2, 32, 32, 16, 8),
    "more keys": (2, 4, 2, 16, 32, 8, 8),
    "more queries": (2, 4, 4, 32, 16, 8, 8),
}


def make(sizes, dtype, options):
    """The inputs that have gradients, and all others."""
    B, H, Hk, T, S, D, Dv = sizes
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape):
        shape = [{"T": T, "S": S}.get(n, n) for n in shape]
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {"q": tensor(B, H, T, D), "k": tensor(B, Hk, S, D), "v": tensor(B, Hk, S, Dv)}
    options = dict(options)
    if (shape := options.pop("bias", None)) is not None:
        inputs["bias"] = tensor(*shape)
    if options.pop("sink", False):
        inputs["sink"] = tensor(H)
    if (shape := options.pop("mask", None)) is not None:
        options["mask"] = tensor(*shape) > -0.3
    if (kind := options.pop("alibi", None)) is not None:
        options["alibi_slopes"] = tensor(*((H,) if kind == "heads" else (B, H))).abs().float()
    if (lengths := options.pop("lengths", None)) is not None:
        rows, keys = torch.tensor(lengths).T
        options |= {"query_lengths": rows, "key_lengths": keys}
        for name, length in (("q", rows), ("k", keys), ("v", keys)):
            x = inputs[name]
            beyond = torch.arange(x.shape[2]) >= length[:, None]
            x.masked_fill_(beyond[:, None, :, None], torch.nan)
    if options.pop("documents", False):
        options["documents"] = torch.tensor([[0] * 3 + [1] * 20 + [2] * 9, [7] * 16 + [3] * 16])
    return inputs, options


def rows_differ(x, T):
    """Whether a bias or mask of the whole has rows, which are then split."""
    return x.shape[2] == T > 1


def over_ranks(split, T, options, return_lse=True, **more):
    """`context_parallel_attention` as a function of whole tensors, for `validate`."""

    def fn(q, k, v, bias=None, sink=None):
        q, k, v = (Part.apply(x, split, 2) for x in (q, k, v))
        if bias is not None:
            bias = Part.apply(bias, split, 2) if rows_differ(bias, T) else Shared.apply(bias)
        named = dict(options)
        if (mask := named.get("mask")) is not None and rows_differ(mask, T):
            named["mask"] = split.split(mask, 2)
        sink = None if sink is None else Shared.apply(sink)
        o, lse = context_parallel_attention(
            q, k, v, split, bias=bias, sink=sink, return_lse=True, **named, **more
        )
        return Whole.apply(o, split, 2), Whole.apply(lse, split, 2)

    return fn


def reference(options):
    options = dict(options)
    documents = options.pop("documents", None)

    def fn(**inputs):
        if documents is None:
            return torch_attention(**inputs, **options, return_lse=True)
        named = dict(options)
        if "bias" in inputs:
            named["mask"] = tfkern.ops.packing.same_document(documents)
            return torch_attention(**inputs, **named, return_lse=True)
        B, T = documents.shape
        limits = tfkern.ops.packing.cu_seqlens(documents)
        if (slopes := named.get("alibi_slopes")) is not None and slopes.dim() == 2:
            named["alibi_slopes"] = slopes[limits[:-1] // T]
        rows = [inputs.pop(x).transpose(1, 2).flatten(0, 1) for x in "qkv"]
        o, lse = torch_attention_varlen(*rows, limits, limits, return_lse=True, **inputs, **named)
        return o.unflatten(0, (B, T)).transpose(1, 2), lse.unflatten(1, (B, T)).transpose(0, 1)

    return fn


def compare(method, placement, sizes, dtype, options, more):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    inputs, options = make(sizes, dtype, options)
    split = SequenceSplit(placement=placement)
    B, _, _, T, S, _, _ = sizes
    validate(
        over_ranks(split, T, options, method=method, **more),
        reference(options),
        inputs,
        floor_scale=floor_scale(inputs, B, T, S),
    ).check()


METHODS = [("ring", "zigzag"), ("ring", "blocks"), ("all_to_all", "zigzag")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("method, placement", METHODS)
def test_matches_one_rank(two, method, placement, sizes, dtype):
    two(compare, method, placement, SIZES[sizes], dtype, {"causal": True}, {})
    two(compare, method, placement, SIZES[sizes], dtype, {}, {})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method, placement", METHODS)
def test_options_match_one_rank(two, method, placement, name):
    two(compare, method, placement, SIZES["grouped"], torch.float64, OPTIONS[name], {})
    two(compare, method, placement, SIZES["grouped"], torch.float32, OPTIONS[name], {})


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method, placement", METHODS)
def test_options_match_one_rank_on_four(four, method, placement, name):
    sizes = (2, 4, 4, 32, 32, 16, 8) if method == "all_to_all" else SIZES["grouped"]
    four(compare, method, placement, sizes, torch.float64, OPTIONS[name], {})
    four(compare, method, placement, sizes, torch.bfloat16, OPTIONS[name], {})


@pytest.mark.parametrize("name", ["plain", "documents and all", "causal lengths"])
@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_reference_backend_matches_one_rank(two, method, name):
    more = {"backend": "reference"}
    two(compare, method, "zigzag", SIZES["grouped"], torch.float64, OPTIONS[name], more)


@pytest.mark.parametrize(
    "name", ["causal", "documents and all", "causal lengths", "lengths apart", "alibi both sides"]
)
def test_dropout_drops_the_elements_of_one_rank(two, name):
    options = OPTIONS[name] | {"dropout_p": 0.4, "seed": 11}
    two(compare, None, "zigzag", SIZES["grouped"], torch.float64, options, {})


def refuse(sizes, method, placement, options, error, message):
    inputs, options = make(sizes, torch.float32, options)
    split = SequenceSplit(placement=placement)
    T = inputs["q"].shape[2]
    with pytest.raises(error, match=message):
        over_ranks(split, T, options, method=method)(**inputs)


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("ring", {"dropout_p": 0.1}, NotImplementedError, "dropout_p by the ring"),
        (
            "all_to_all",
            {"dropout_p": 0.1, "bias": (1, 1, 1, "S")},
            NotImplementedError,
            "dropout_p beside a bias",
        ),
        (
            "ring",
            {"alibi": "heads", "lengths": [(3, 4), (5, 5)]},
            NotImplementedError,
            "as many queries as keys",
        ),
        ("rings", {}, ValueError, "method must be one of ring, all_to_all, got 'rings'"),
        (None, {"lengths": [(3, 3), (5, 40)]}, ValueError, "key_lengths must lie in 0 to 32"),
        (None, {"lengths": [(3, 3), (40, 5)]}, ValueError, "query_lengths must lie in 0 to 32"),
        (None, {"documents": torch.ones(2, 30).long()}, ValueError, "documents has shape"),
        (None, {"documents": torch.ones(2, 32)}, ValueError, "documents must be integers"),
        (None, {"bias": (1, 1, "T", 5)}, ValueError, "bias has shape"),
    ],
    ids=str,
)
def test_bad_arguments(two, method, options, error, message):
    options = dict(options)
    documents = options.get("documents")
    if isinstance(documents, torch.Tensor):
        del options["documents"]
        two(refuse_documents, documents, error, message)
    else:
        two(refuse, SIZES["grouped"], method, "zigzag", options, error, message)


def refuse_documents(documents, error, message):
    inputs, _ = make(SIZES["grouped"], torch.float32, {})
    with pytest.raises(error, match=message):
        over_ranks(SequenceSplit(), 32, {"documents": documents})(**inputs)


def test_heads_that_cannot_be_split(two):
    sizes = (1, 3, 3, 8, 8, 4, 4)
    message = "3 and 3 heads cannot be split over 2 ranks"
    two(refuse, sizes, "all_to_all", "zigzag", {}, NotImplementedError, message)
    two(compare, None, "zigzag", sizes, torch.float64, {"causal": True}, {})  # by the ring


def refuse_lengths():
    split = SequenceSplit()
    with pytest.raises(ValueError, match="30 cannot be split over 2 ranks by 'zigzag'"):
        split.split(torch.zeros(2, 30), 1)
    with pytest.raises(ValueError, match="pad it to a multiple of 4"):
        context_parallel_attention(*torch.zeros(3, 1, 2, 15, 4), split)
    assert SequenceSplit(placement="blocks").split(torch.zeros(2, 30), 1).shape == (2, 15)
    with pytest.raises(ValueError, match="placement must be one of zigzag, blocks, got 'zag'"):
        SequenceSplit(placement="zag")


def test_lengths_that_cannot_be_split(two):
    two(refuse_lengths)


def second_derivative(method):
    q, k, v = torch.randn(3, 1, 2, 8, 4).double().requires_grad_()
    o = context_parallel_attention(q, k, v, SequenceSplit(), method=method)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_second_derivatives_raise(two, method):
    two(second_derivative, method)


def split_and_gather(placement):
    """Each rank scales the sequence by its own weights, and gathers: sums over ranks are known."""
    split = SequenceSplit(placement=placement)
    n = split.ranks
    x = torch.arange(3.0 * 8 * n).view(3, 8 * n).double().requires_grad_()
    part = split.split(x, 1)
    torch.testing.assert_close(part, x[:, split.positions(8 * n)])
    whole = split.gather(part, 1)
    torch.testing.assert_close(whole, x)
    weights = torch.arange(8.0 * n).double() * (split.rank + 1)
    (whole * weights).sum().backward()
    # The sum over the losses of all ranks, at the positions of this rank.
    expected = torch.zeros_like(x)
    mine = split.positions(8 * n)
    expected[:, mine] = torch.arange(8.0 * n).double()[mine] * (n * (n + 1) // 2)
    torch.testing.assert_close(x.grad, expected)
    return mine.tolist()


@pytest.mark.parametrize("placement", ["zigzag", "blocks"])
def test_split_and_gather(two, placement):
    found = two(split_and_gather, placement)
    if placement == "blocks":
        assert found == [list(range(8)), list(range(8, 16))]
    else:
        assert found == [[*range(4), *range(12, 16)], list(range(4, 12))]


def bytes_sent(method, placement, dtype, options):
    split = SequenceSplit(placement=placement)
    q, k, v = (torch.randn(2, 4, 16, size).to(dtype).requires_grad_() for size in (8, 8, 4))
    with traffic() as forward:
        o = context_parallel_attention(q, k, v, split, method=method, **options)
    with traffic() as backward:
        o.sum().backward()
    return forward["bytes"], backward["bytes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_sent(two, dtype):
    size, elements = dtype.itemsize, 2 * 4 * 16
    blocks = elements * (8 + 4)
    options = {"causal": True}
    expected = blocks * size, blocks * size + 2 * blocks * 4
    assert two(bytes_sent, "ring", "zigzag", dtype, options) == [expected] * 2
    assert two(bytes_sent, "ring", "blocks", dtype, {"window": (0, 0)}) == [(0, 0)] * 2
    lse = elements * 4
    half = (elements * (8 + 8 + 4 + 4) * size + lse) // 2
    found = two(bytes_sent, "all_to_all", "zigzag", dtype, options)
    assert found == [(half, half - lse // 2)] * 2  # nothing has asked for lse


@pytest.mark.slow
def test_bytes_sent_by_four(four):
    block = 2 * 4 * 16 * (8 + 4) * 4
    full = 3 * block, 3 * block + 4 * block
    assert four(bytes_sent, "ring", "zigzag", torch.float32, {"causal": True}) == [full] * 4
    # A window of 17 keys reaches into the block before, and no further.
    near = block, block + 2 * block
    options = {"causal": True, "window": (16, None)}
    assert four(bytes_sent, "ring", "blocks", torch.float32, options) == [near] * 4


def peak(method, length, backward):
    """The growth of the resident size, in MiB, while attention of a length runs."""
    torch.use_deterministic_algorithms(False)
    split = SequenceSplit()

    def resident(name):
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines[name].split()[0]) / 1024

    def run(length):
        leaves = [torch.ones(1, 4, length // split.ranks, 64).requires_grad_() for _ in range(3)]
        options = {"causal": True, "window": (63, None), "method": method}
        o = context_parallel_attention(*leaves, split, **options)
        if backward:
            o.sum().backward()

    run(4096)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    run(length)
    return resident("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("method, backward", [("ring", True), ("all_to_all", False)])
def test_memory_falls_with_the_ranks(two, four, method, backward):
    """Backward of attention has memory of its own, as much for one head as for several."""
    one = Ranks(1)
    try:
        (alone,) = one(peak, method, 131072, backward)
    finally:
        one.close()
    for n, ranks in ((2, two), (4, four)):
        assert max(ranks(peak, method, 131072, backward)) < 1.25 * alone / n


def compiled(method):
    """The largest differences between a compiled and an eager call, and its gradients."""
    torch.manual_seed(1)
    split = SequenceSplit()
    leaves = [torch.randn(2, 4, 16, 8).requires_grad_() for _ in range(3)]

    def call(q, k, v):
        return 3 * context_parallel_attention(2 * q, k, v, split, method=method, causal=True)

    found = []
    for fn in (call, torch.compile(call, backend="aot_eager")):
        o = fn(*leaves)
        found.append((o.detach(), *torch.autograd.grad(o.square().sum(), leaves)))
    return [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_compiled_calls_are_those_of_eager_mode(two, method):
    assert two(compiled, method) == [[0.0] * 4] * 2


def chosen(shape, options):
    """Whether a call without a method sends what the ring sends."""
    inputs, options = make(SIZES["equal"], torch.float32, options)
    split = SequenceSplit()
    q, k, v = (split.split(inputs[x], 2) for x in "qkv")
    bias = None if shape is None else torch.zeros(shape)
    sent = []
    for method in (None, "ring", "all_to_all"):
        with traffic() as counted:
            context_parallel_attention(q, k, v, split, method=method, bias=bias, **options)
        sent.append(counted["bytes"])
    assert sent[1] != sent[2]
    return "ring" if sent[0] == sent[1] else "all_to_all"


@pytest.mark.parametrize(
    "shape, options, expected",
    [
        (None, {"causal": True}, "all_to_all"),
        (None, {"documents": True}, "all_to_all"),
        ((1, 4, 16, 32), {}, "all_to_all"),
        ((2, 1, 1, 32), {}, "all_to_all"),
        ((2, 1, 16, 32), {}, "ring"),
        ((1, 4, 16, 32), {"documents": True}, "ring"),
    ],
    ids=str,
)
def test_default_method_is_the_one_whose_memory_falls(two, shape, options, expected):
    assert two(chosen, shape, options) == [expected] * 2
