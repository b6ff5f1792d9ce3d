"""`tfkern.unpad` and `tfkern.pad` against indexing in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import tfkern
from tfkern import pad, unpad

B, T = 4, 5
LENGTHS = torch.tensor([3, 0, 5, 1])
MASKS = {
    "lengths": torch.arange(T) < LENGTHS[:, None],
    "left": torch.arange(T) >= 5 - LENGTHS[:, None],
    "holes": torch.tensor(
        [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool
    ),
    "nothing": torch.zeros(B, T, dtype=torch.bool),
}


@pytest.mark.parametrize("tail", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_unpad(name, tail):
    x, mask = torch.randn(B, T, *tail).double(), MASKS[name]
    got = unpad(x, mask)
    expected = [x[b, t] for b in range(B) for t in range(T) if mask[b, t]]
    assert torch.equal(got.packed, torch.stack(expected) if expected else x.new_zeros(0, *tail))
    assert torch.equal(x.flatten(0, 1)[got.indices], got.packed)
    assert got.indices.dtype == torch.int64
    counts = mask.sum(1).tolist()
    assert got.cu_seqlens.tolist() == [sum(counts[:b]) for b in range(B + 1)]
    assert got.cu_seqlens.dtype == torch.int32
    assert got.max_seqlen == max(counts) and type(got.max_seqlen) is int
    padded = pad(got.packed, got.indices, B, T)
    assert torch.equal(padded, torch.where(mask[(...,) + (None,) * len(tail)], x, 0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_are_a_mask(dtype):
    x = torch.arange(B * T).view(B, T)  # of integers, such as tokens
    for a, b in zip(unpad(x, LENGTHS.to(dtype)), unpad(x, MASKS["lengths"]), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_empty_batch():
    got = unpad(torch.zeros(0, T, 2), torch.zeros(0, dtype=torch.int64))
    assert got.packed.shape == (0, 2) and got.cu_seqlens.tolist() == [0] and got.max_seqlen == 0
    assert pad(got.packed, got.indices, 0, T).shape == (0, T, 2)


def test_gradients():
    x = torch.randn(B, T, 2, requires_grad=True)
    packed, indices, _, _ = unpad(x, MASKS["holes"])
    weight = torch.randn(packed.shape)
    (dx,) = torch.autograd.grad((packed * weight).sum(), x)
    expected = torch.zeros(B, T, 2)
    expected[MASKS["holes"]] = weight
    assert torch.equal(dx, expected)
    packed = packed.detach().requires_grad_()
    weight = torch.randn(B, T, 2)
    (dpacked,) = torch.autograd.grad((pad(packed, indices, B, T) * weight).sum(), packed)
    assert torch.equal(dpacked, weight[MASKS["holes"]])


def test_strided_padding_may_be_nan():
    x = torch.randn(T, B, 3).transpose(0, 1).masked_fill(~MASKS["left"][..., None], torch.nan)
    packed, indices, _, _ = unpad(x, MASKS["left"])
    assert packed.isfinite().all() and pad(packed, indices, B, T).isfinite().all()


def test_around_varlen_attention():
    """What `attention_varlen` gives between them is attention within each sequence."""
    q, k, v = (torch.randn(B, T, 2, 8).double() for _ in range(3))
    packed, indices, cu_seqlens, longest = unpad(torch.stack([q, k, v], 2), LENGTHS)
    o = tfkern.attention_varlen(
        *packed.unbind(1), cu_seqlens, cu_seqlens, longest, longest, backend="reference"
    )
    o = pad(o, indices, B, T)
    for b, n in enumerate(LENGTHS.tolist()):
        own = (x[b, :n].transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*own).transpose(0, 1)
        torch.testing.assert_close(o[b, :n], expected, atol=1e-12, rtol=1e-12)
        assert not o[b, n:].any()


x = torch.zeros(B, T, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: unpad(torch.zeros(B), LENGTHS), ["x", "(4,)"]),
        (lambda: unpad([1], LENGTHS), ["x", "list"]),
        (lambda: unpad(x, [1, 2]), ["keep", "list"]),
        (lambda: unpad(x, LENGTHS.double()), ["keep", "float64"]),
        (lambda: unpad(x, LENGTHS[:3]), ["keep", "(3,)", "(4,)"]),
        (lambda: unpad(x, MASKS["left"].long()), ["keep", "(4, 5)", "bool"]),
        (lambda: unpad(x, MASKS["left"][:, :4]), ["keep", "(4, 4)", "(4, 5)"]),
        (lambda: unpad(x, LENGTHS + 1), ["keep", "0 to 5", "6"]),
        (lambda: unpad(x, LENGTHS - 1), ["keep", "-1"]),
        (lambda: unpad(x, LENGTHS.to("meta")), ["keep", "meta"]),
        (lambda: pad(torch.zeros(()), LENGTHS, 1, 2), ["x", "()"]),
        (lambda: pad(x[0], LENGTHS.int(), B, T), ["indices", "int32"]),
        (lambda: pad(x[0], LENGTHS, B, T), ["indices", "(4,)", "(5,)"]),
        (lambda: pad(x[:, 0], LENGTHS, 1, 5), ["indices", "0 to 4", "5", "batch 1"]),
        (lambda: pad(x[:, 0], LENGTHS - 1, 1, 5), ["indices", "-1"]),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
