"""Attention over ranks against plain PyTorch on one process, in float64."""

import pytest
import torch
from ranks import Ranks

import tfkern
from tfkern.nn.context_parallel import SequenceSplit, context_parallel_attention, traffic
from tfkern.testing import validate
from tfkern.validation.attention import floor_scale, torch_attention, torch_attention_varlen


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


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
