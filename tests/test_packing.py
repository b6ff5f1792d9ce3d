"""`tfkern.unpad` and `tfkern.pad` against indexing in plain PyTorch, and models on packed documents
against the same models on each document alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from weights import perturb

import tfkern
from tfkern import pad, unpad
from tfkern.data import IGNORED, positions
from tfkern.models import Transformer, TransformerConfig, cross_entropy
from tfkern.nn import KVCache

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


# ---- models on packed documents ----

V, C, L = 13, 24, 14  # tokens of a vocabulary, features, tokens of a row
ROWS = ((5, 1, 4, 4), (7, 7))  # the documents of two rows, the last of row 0 is padding
DOCUMENTS = torch.tensor(  # the first and the third of row 0 are two, though of one number
    [[3] * 5 + [1] + [3] * 4 + [8] * 4, [0] * 7 + [1] * 7]
)
SPANS = [  # row, begin and end of each document
    (b, sum(row[:i]), sum(row[:i]) + n) for b, row in enumerate(ROWS) for i, n in enumerate(row)
]
KINDS = ("learned", "sinusoidal", "sinusoidal_halves", "relative", "rotary", "alibi", "none")
VARIANTS = {kind: {"positions": kind} for kind in KINDS} | {
    "windows": {"positions": "alibi", "window": 3, "windowed": (True, False)},
    "two bases": {"positions": "rotary", "window": 3, "window_rotary_base": 7.0},
    "window and bias": {"positions": "relative", "window": 3},
    "softcap": {"attention_softcap": 1.0, "kv_heads": 1, "parallel": True},
    "normed queries": {"norm": "rms_norm", "query_key_norm": "head", "positions": "rotary"},
    "post norm": {"post_norm": True, "embedding_norm": True, "token_types": 2},
    "without pad": {"skip_pad": True, "pad_token": 4, "position_offset": 5},
}
VALID = [(kind, name) for kind in ("decoder", "encoder") for name, options in VARIANTS.items()
         if not ("window" in options and kind == "encoder")
         and not ("skip_pad" in options and kind == "decoder")]  # fmt: skip


def make(architecture="decoder", **options):
    shape = {"dim": C, "heads": 3, "layers": 2, "vocab_size": V, "max_length": L}
    shape["head"] = "lm" if architecture == "decoder" else "mlm"
    config = TransformerConfig(architecture=architecture, **(shape | options))
    return perturb(Transformer(config).double().eval())


def rows():
    """Tokens, and targets with none at the padding and for a token of the second document."""
    tokens, targets = torch.randint(V, (2, 2, L))
    targets[0, -4:] = targets[0, 5] = IGNORED
    return tokens, targets


def documents_alone(model, tokens):
    """The logits of each document where it stands in its row."""
    return torch.stack([
        torch.cat([model(tokens[i : i + 1, a:b])[0] for i, a, b in SPANS if i == row])
        for row in range(len(tokens))
    ])  # fmt: skip


@pytest.mark.parametrize("architecture, name", VALID)
def test_packed_loss_is_the_mean_over_the_documents(architecture, name):
    """Logits, the loss and all gradients are those of the documents alone, recomputed or not."""
    model = make(architecture, **VARIANTS[name])
    tokens, targets = rows()
    weights = list(model.parameters())
    logits = documents_alone(model, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # its mean weighs by tokens
    expected = logits, loss, *torch.autograd.grad(loss, weights, allow_unused=True)
    for model.recompute in (False, True):
        logits = model(tokens, documents=DOCUMENTS)
        loss = cross_entropy(logits, targets)
        got = logits, loss, *torch.autograd.grad(loss, weights, allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_a_document_does_not_see_another(architecture, dropout):
    """Which it does without `documents`."""
    model = make(architecture, positions="rotary", attention_dropout=dropout).train()
    tokens, _ = rows()
    other = tokens.clone()
    other[1, :7] = (other[1, :7] + 1) % V
    for documents in (DOCUMENTS, None):
        results = []
        for x in (tokens, other):
            torch.manual_seed(3)
            results.append(model(x, documents=documents))
        moved = (results[1] - results[0]).abs()[1].amax(-1)
        assert moved[:7].min() > 1e-3
        assert moved[7:].max() < 1e-12 if documents is not None else moved[7:].max() > 1e-3


def test_dropout_of_documents():
    """Weights of attention are dropped, the same ones where blocks are recomputed."""
    model = make(attention_dropout=0.3).train()
    tokens, targets = rows()
    first, second = (model(tokens, documents=DOCUMENTS) for _ in range(2))
    moved = (second - first).abs().amax(-1)
    assert moved[0, 1:5].min() > 1e-3  # behind the first token, which sees one key
    results = []
    for model.recompute in (False, True):
        torch.manual_seed(3)
        loss = cross_entropy(model(tokens, documents=DOCUMENTS), targets)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_of_documents_is_linear():
    """The largest tensor of a step is twice as large for rows of twice the length."""
    model = make(positions="rotary", max_length=None)
    largest = {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            largest[T] = max(largest.get(T, 0), *found, 0)
            return result

    for T in (512, 1024):
        tokens = torch.randint(V, (1, T))
        with Sizes():
            logits = model(tokens, documents=torch.arange(T)[None] // 10)
            cross_entropy(logits, tokens).backward()
    assert largest[1024] == 2 * largest[512]


@pytest.mark.parametrize("kind", ["learned", "relative", "rotary", "alibi"])
def test_documents_compile(kind):
    """Into one graph for all lengths of documents, gradients included."""
    torch._dynamo.reset()
    model = make(positions=kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, targets = rows()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for documents in (DOCUMENTS, torch.arange(L).expand(2, L) // 3, torch.zeros_like(tokens)):
            results = []
            for f in (compiled, model):
                loss = cross_entropy(f(tokens, documents=documents), targets)
                weights = list(model.parameters())
                results.append([loss, *torch.autograd.grad(loss, weights, allow_unused=True)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["relative", "rotary"])
def test_attention_maps_of_documents(kind):
    """They are those of the documents alone along the diagonal, and 0 elsewhere."""
    model = make(positions=kind)
    tokens, _ = rows()
    maps = model.attention_maps(1, tokens, documents=DOCUMENTS)
    for row in range(2):
        alone = [model.attention_maps(1, tokens[i : i + 1, a:b])[0]
                 for i, a, b in SPANS if i == row]  # fmt: skip
        expected = torch.stack([torch.block_diag(*heads) for heads in zip(*alone, strict=True)])
        torch.testing.assert_close(maps[row], expected, rtol=0, atol=1e-12)


def test_positions_beside_documents():
    """They take the place of those that are counted."""
    model = make(positions="learned")
    tokens, _ = rows()
    expected = model(tokens, documents=DOCUMENTS)
    counted = torch.cat([torch.arange(b - a) for _, a, b in SPANS]).view(2, L)
    assert torch.equal(positions(DOCUMENTS), counted)
    assert torch.equal(model(tokens, documents=DOCUMENTS, positions=counted), expected)
    moved = model(tokens, documents=DOCUMENTS, positions=torch.arange(L)[None])
    assert (moved - expected).abs().max() > 1e-3


def refusals():
    """Calls of models with documents, and words of the errors."""
    tokens = torch.zeros(2, L, dtype=torch.int64)
    options = {"documents": DOCUMENTS}
    both = make("encoder_decoder", head="lm", encoder_layers=1)
    yield lambda: both(tokens, source=tokens, **options), "encoder-decoder takes no documents"
    yield lambda: both.encode(tokens, **options), "encoder-decoder takes no documents"
    yield lambda: both.decode(tokens, both.encode(tokens), **options), "encoder-decoder"
    for head in ("classification", "next_sentence", "pretraining", "span", "choice"):
        model = make("encoder", head=head, pooler=True, classes=2)
        yield lambda m=model: m(tokens, **options), f"head '{head}' takes no documents"
    yield lambda: make(norm="batch_norm")(tokens, **options), "batch norm takes no documents"
    image = TransformerConfig(dim=C, layers=1, heads=3, architecture="encoder", image_size=8,
                              patch_size=4, head="none")  # fmt: skip
    pixels = torch.zeros(2, 3, 8, 8)
    model = Transformer(image)
    yield lambda: model(pixels, documents=DOCUMENTS[:, :5]), "images takes no documents"
    model = make()
    caches = [KVCache(2, 3, C // 3, L, dtype=torch.float64) for _ in range(2)]
    yield lambda: model.decode(tokens, caches=caches, **options), "documents and caches exclude"
    for mask in (torch.ones(2, L, dtype=torch.bool), torch.tensor([L, 3])):
        yield lambda x=mask: model(tokens, mask=x, **options), "documents and a mask exclude"
    for wrong in (DOCUMENTS[:1], DOCUMENTS[:, 1:], DOCUMENTS[0]):
        shape = str(tuple(wrong.shape))
        yield lambda x=wrong: model(tokens, documents=x), f"documents has shape {shape}, expected"
    for dtype in (torch.bool, torch.float32):
        yield lambda d=dtype: model(tokens, documents=DOCUMENTS.to(d)), f"integers, got {dtype}"


def test_refusals_of_documents():
    for call, words in refusals():
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
