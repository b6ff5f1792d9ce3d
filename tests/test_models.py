"""Architectures, positions, norms and heads, beside what the converters compare."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from weights import perturb

from tfkern.models import Transformer, TransformerConfig, cross_entropy, report_layers
from tfkern.models.heads import pool
from tfkern.models.positions import alibi_slopes, relative_bucket, sinusoids
from tfkern.nn import BatchNorm, KVCache, RotaryScaling

pytestmark = pytest.mark.usefixtures("one_thread")

V, C, H, L = 13, 24, 3, 2
TOKENS = {"dim": C, "heads": H, "layers": L, "vocab_size": V, "max_length": 20}
DECODER = TransformerConfig(**TOKENS)
ENCODER = TransformerConfig(**TOKENS, architecture="encoder", head="none")
BOTH = TransformerConfig(**TOKENS, architecture="encoder_decoder", encoder_layers=1)
POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves", "relative", "rotary", "alibi", "none")


def make(config, **changes):
    return perturb(Transformer(replace(config, **changes)).double().eval())


def test_embedding_is_a_product_with_one_hot_rows():
    model = make(DECODER, pad_token=3)
    tokens = torch.randint(V, (2, 5))
    expected = F.one_hot(tokens, V).double() @ model.embedding.weight
    torch.testing.assert_close(model.embedding(tokens), expected)
    tokens[0, 0] = 3
    model = make(DECODER, pad_token=3, tie_embeddings=False)
    cross_entropy(model(tokens), tokens).backward()
    assert not model.embedding.weight.grad[3].any() and model.embedding.weight.grad[4:].any()


def test_tied_head_is_one_parameter():
    model = make(DECODER)
    assert sum(x.shape == (V, C) for x in model.state_dict().values()) == 1
    tokens = torch.randint(V, (2, 5))
    cross_entropy(model(tokens), tokens).backward()
    untied = make(DECODER, tie_embeddings=False)
    state = model.state_dict()
    untied.load_state_dict(state | {"vocabulary.weight": state["embedding.weight"]})
    cross_entropy(untied(tokens), tokens).backward()
    both = untied.embedding.weight.grad + untied.vocabulary.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, both)


def test_sinusoids():
    """The closed form in both layouts, and that a shift is one rotation of all positions."""
    table = sinusoids(torch.arange(50), 16)
    for t, i in ((0, 0), (7, 3), (49, 7)):
        angle = t / 10000 ** (2 * i / 16)
        assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
        assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    halves = sinusoids(torch.arange(50), 16, halves=True)
    assert torch.equal(halves, torch.cat([table[:, 0::2], table[:, 1::2]], 1))
    shift = torch.linalg.lstsq(table[:40], table[5:45]).solution
    torch.testing.assert_close(table[:45] @ shift, table[5:50], rtol=0, atol=1e-9)


def test_alibi_slopes():
    """The slopes are those of the paper for 8 heads, and of its code for 12."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected))


@pytest.mark.parametrize("causal", [False, True])
def test_relative_buckets(causal):
    """T5's for all distances up to 1024, as transformers has them."""
    pytest.importorskip("huggingface")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-1024, 1025)
    expected = T5Attention._relative_position_bucket(distance, not causal, 32, 128)
    assert torch.equal(relative_bucket(distance, causal, 32, 128), expected)


def reversed_inputs(model, order, T=9):
    tokens = torch.arange(T)[None] % V
    y = model.encode(tokens)
    return y[:, order], model.encode(tokens[:, order])


@pytest.mark.parametrize("positions", POSITIONS)
def test_permuted_tokens(positions):
    """Without positions an encoder cannot see the order, with any of them it can."""
    expected, y = reversed_inputs(make(ENCODER, positions=positions, head_dim=8), torch.randperm(9))
    if positions == "none":
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    else:
        assert (y - expected).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["relative", "rotary", "alibi"])
def test_relative_positions_do_not_see_a_shift(positions):
    model = make(DECODER, positions=positions)
    tokens = torch.randint(V, (1, 8))
    shifted = F.pad(tokens, (4, 0))
    mask = torch.arange(12)[None] >= 4
    torch.testing.assert_close(model(shifted, mask=mask)[:, 4:], model(tokens), rtol=0, atol=1e-12)


ARCHITECTURES = {"decoder": DECODER, "encoder": ENCODER, "both": BOTH}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right", "lengths"])
def test_padding_changes_nothing(architecture, positions, side):
    """The outputs at tokens that are not padding are those of a batch without padding."""
    model = make(ARCHITECTURES[architecture], positions=positions)
    T, k = 7, 3
    tokens = torch.randint(V, (2, T))
    where = slice(k, None) if side == "left" else slice(None, T)
    padded = torch.randint(V, (2, T + k))
    padded[:, where] = tokens
    mask = torch.zeros(2, T + k, dtype=torch.bool)
    mask[:, where] = True
    if side == "lengths":
        mask = torch.full((2,), T)
    if architecture == "both":
        source = torch.randint(V, (2, 5))
        a = model(tokens, source=source)
        b = model(padded, source=source, mask=mask)[:, where]
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
        a, b = (model(source, source=x, source_mask=m) for x, m in ((tokens, None), (padded, mask)))
    else:
        a, b = model(tokens), model(padded, mask=mask)[:, where]
    torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "both"])
def test_caches(architecture, positions, kind):
    """Token by token, in pieces, and prompts of two lengths: as without a cache."""
    model = make(ARCHITECTURES[architecture], positions=positions, kv_heads=1)
    tokens, memory, source_mask = torch.randint(V, (2, 11)), None, None
    expected_options = {}
    if architecture == "both":
        source, source_mask = torch.randint(V, (2, 6)), torch.tensor([6, 4])
        expected_options = {"source": source, "source_mask": source_mask}
        hidden = model.encode(source, source_mask)
        memory = [block.cross.keys_values(hidden) for block in model.decoder.blocks]
    expected = model(tokens, **expected_options)

    def caches():
        capacity = 11 if kind == "static" else 2
        return [KVCache(2, 1, C // H, capacity, kind=kind, dtype=torch.float64) for _ in range(L)]

    with torch.no_grad():
        for sizes in ([1] * 11, [5, 1, 5], [11]):
            c, out = caches(), []
            for part in tokens.split(sizes, 1):
                y = model.decode(part, memory, memory_mask=source_mask, caches=c)
                out.append(model.project(y))
            torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-12)
        c, lengths = caches(), torch.tensor([6, 3])
        prompt = tokens[:, :6].clone()
        prompt[1, 3:] = 0
        model.decode(prompt, memory, lengths, source_mask, caches=c)
        next_tokens = torch.stack([tokens[0, 6:8], tokens[1, 3:5]])
        y = model.project(model.decode(next_tokens, memory, memory_mask=source_mask, caches=c))
    torch.testing.assert_close(y[0], expected[0, 6:8], rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1], expected[1, 3:5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_changes_nothing(architecture, post_norm):
    """Neither the loss nor a gradient changes, also with dropout."""
    config = replace(ARCHITECTURES[architecture], post_norm=post_norm, dropout=0.3, head="lm")
    config = replace(config, attention_dropout=0.2)
    model = make(config).train()
    tokens = torch.randint(V, (2, 9))
    options = {"source": tokens} if architecture == "both" else {}
    results, kept = [], []
    for recompute in (False, True):
        model.recompute = recompute
        torch.manual_seed(4)
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x
        ):
            loss = cross_entropy(model(tokens, **options), tokens)
        loss.backward()
        kept.append(sum(sizes))
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_graph_breaks(architecture, post_norm):
    positions = {"decoder": "alibi", "encoder": "learned", "both": "relative"}[architecture]
    model = make(ARCHITECTURES[architecture], post_norm=post_norm, positions=positions)
    tokens, lengths = torch.randint(V, (2, 9)), torch.tensor([9, 4])
    options = {"source": tokens, "source_mask": lengths} if architecture == "both" else {}
    options["mask"] = torch.arange(9) < lengths[:, None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, **options), model(tokens, **options))


def test_compiles_with_a_mask_for_lengths_that_vary():
    """It compiles where sizes of tokens are symbols, and those of the first mask numbers."""
    torch._dynamo.reset()
    model = make(DECODER)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for T in (13, 9):
        tokens = torch.randint(V, (2, T))
        torch.testing.assert_close(compiled(tokens), model(tokens))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    torch.testing.assert_close(compiled(tokens, mask=mask), model(tokens, mask=mask))


@pytest.mark.parametrize(
    "norm",
    ["layer_norm", "rms_norm", "zero_centered_rms_norm", "batch_norm", "weight_norm", "none"],
)
@pytest.mark.parametrize("place", ["before", "both", "post"])
def test_every_norm_trains(norm, place):
    """To less than half of what the last token alone leaves open: which of three comes next."""
    torch.manual_seed(1)
    where = {"post_norm": True} if place == "post" else {"norm_place": place}
    model = Transformer(replace(DECODER, norm=norm, max_length=40, **where))
    tokens = (torch.arange(41)[None] * torch.tensor([[1], [2], [3]])) % V
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < math.log(3) / 2  # without norms some later steps lead up again


@pytest.mark.parametrize("where", [{}, {"post_norm": True}, {"norm_place": "both"}], ids=str)
def test_norms_of_others_in_the_place_of_ours(where):
    """They take the sum alone, and the model is the same, dropout included."""
    ours = make(DECODER, dropout=0.5, **where)
    theirs = copy.deepcopy(ours)
    for module in list(theirs.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.LayerNorm):
                norm = torch.nn.LayerNorm(DECODER.dim, DECODER.norm_eps, dtype=torch.float64)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, torch.nn.Sequential(norm))
    tokens, results = torch.randint(V, (2, 9)), []
    for model in (ours, theirs):
        loss = cross_entropy(model(tokens), tokens)
        weights = list(model.parameters())
        results.append([loss, *torch.autograd.grad(loss, weights, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    theirs.train()
    assert not torch.allclose(theirs(tokens), theirs(tokens))


@pytest.mark.parametrize("where", [{}, {"post_norm": True}, {"norm_place": "after"}], ids=str)
def test_report_of_layers(where):
    """The size of the stream behind each block, and of the gradients in it."""
    model = make(DECODER, **where)
    tokens = torch.randint(V, (2, 6))
    reports = report_layers(model, lambda: cross_entropy(model(tokens), tokens))
    assert [r.name for r in reports] == ["decoder.blocks.0", "decoder.blocks.1"]
    positions = torch.arange(6)
    x, h = model.embedding(tokens) + model.decoder.positions(positions), None
    for block, r in zip(model.decoder.blocks, reports, strict=True):
        x, h = block(x, h)
        stream = x if h is None else x + h
        assert r.activation == pytest.approx(stream.square().mean().sqrt().item(), rel=1e-5)
        total = sum(p.grad.square().sum() for p in block.parameters())
        assert r.gradient == pytest.approx(total.sqrt().item(), rel=1e-5)


def test_norms_keep_layers_of_one_size():
    """24 blocks with large weights: without a norm the stream explodes, with one it does not."""
    sizes = {}
    for norm in ("layer_norm", "none"):
        torch.manual_seed(0)
        model = Transformer(replace(DECODER, layers=24, norm=norm, init="normal"))
        for p in model.parameters():
            if p.dim() > 1:
                p.data *= 8
        tokens = torch.randint(V, (2, 16))
        sizes[norm] = report_layers(model, lambda m=model, t=tokens: cross_entropy(m(t), t))
    growth = {norm: r[-1].activation / r[0].activation for norm, r in sizes.items()}
    assert growth["layer_norm"] < 20 and growth["none"] > 1e3


def test_batch_norm_counts_no_padding():
    """It computes what torch's does on the packed tokens, in training and in evaluation."""
    ours, theirs = (kind(6).double() for kind in (BatchNorm, nn.BatchNorm1d))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.data.copy_(p.data.normal_())
    lengths = torch.tensor([5, 2, 4])
    mask = torch.arange(5) < lengths[:, None]
    for _ in range(3):
        x = 3 + 2 * torch.randn(3, 5, 6, dtype=torch.float64)
        torch.testing.assert_close(ours(x, mask=mask)[mask], theirs(x[mask]))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x)[mask], theirs(x[mask]))
    for wrong, hidden in ((x[..., :1], None), (x, mask[:, 1:]), (x, lengths)):
        with pytest.raises(ValueError, match="has shape|must be a bool tensor"):
            ours(wrong, mask=hidden)
    before = ours.state_dict()["running_var"].clone()
    ours.train()(x, mask=torch.zeros_like(mask))  # no token at all
    assert torch.equal(ours.eval().state_dict()["running_var"], before)
    residual = torch.randn_like(x)
    y, h = ours(x, residual=residual, return_residual=True)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y[mask], theirs((x + residual)[mask]))


def test_batch_norm_in_a_padded_model():
    """In training the statistics of a batch are those of the tokens that exist."""
    model = make(ENCODER, norm="batch_norm").train()
    tokens = torch.randint(V, (2, 6))
    padded = torch.cat([tokens, torch.randint(V, (2, 3))], 1)
    mask = torch.arange(9)[None] < torch.tensor([[6], [6]])
    for m in (mask, torch.tensor([6, 6])):
        torch.testing.assert_close(model(padded, mask=m)[:, :6], model(tokens), rtol=0, atol=1e-12)


def test_weight_norm():
    """Rows of the length g, and products with them."""
    model = make(DECODER, norm="weight_norm")
    linear = model.decoder.blocks[0].attention.qkv_by_head
    g = linear.parametrizations.weight.original0
    torch.testing.assert_close(linear.weight.norm(dim=1, keepdim=True), g.abs())
    before = linear.weight.clone()
    torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")
    torch.testing.assert_close(linear.weight, before)


@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_places_of_norms(place):
    """What a block adds to the stream, sublayer by sublayer."""
    block = make(BOTH, norm_place=place).decoder.blocks[0]
    x, memory = (torch.randn(2, n, C, dtype=torch.float64) for n in (5, 7))
    h = x
    for name, sublayer, more in (
        ("norm1", block.attention, ()), ("norm_cross", block.cross, (memory,)),
        ("norm2", block.mlp, ()),
    ):  # fmt: skip
        y = h if place == "after" else getattr(block, name)(h)
        y = sublayer(y, *more)
        h = h + (y if place == "before" else getattr(block, f"{name}_out")(y))
    last, stream = block(x, memory=memory)
    torch.testing.assert_close(stream + last, h, rtol=0, atol=1e-12)
    block.dropout = 1 - 1e-9  # which spares only the stream, so that the next block reads x
    block.train()
    last, stream = block(x, memory=memory)
    torch.testing.assert_close(stream, x)


@pytest.mark.parametrize("heads", ["none", "head", "all"])
@pytest.mark.parametrize("cross", [False, True])
def test_norms_of_queries_and_keys(heads, cross):
    """They take away the length of all that they are a norm of, and of no less."""
    model = make(BOTH, norm="rms_norm", norm_eps=0.0, query_key_norm=heads, bias=False)
    block = model.decoder.blocks[0]
    x, memory = (torch.randn(2, n, C, dtype=torch.float64) for n in (5, 7))
    layer, inputs = (block.cross, (x, memory)) if cross else (block.attention, (x,))
    expected = layer(*inputs)
    with torch.no_grad():
        queries = layer.query_rows(layer.query_layer.weight)
        for of, same in ((slice(None), heads != "none"), (slice(1), heads == "head")):
            queries.view(H, -1)[of] *= 7
            assert torch.allclose(layer(*inputs), expected, rtol=0, atol=1e-12) == same
            queries.view(H, -1)[of] /= 7


@pytest.mark.parametrize("post_norm", [False, True])
def test_zeroed_sublayers_leave_the_stream(post_norm):
    model = make(DECODER, post_norm=post_norm)
    for block in model.decoder.blocks:
        for layer in (block.attention.out, block.mlp.fc2):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    x = torch.randn(2, 5, C, dtype=torch.float64)
    y, h = model.decoder.blocks[0](x)
    if post_norm:
        block = model.decoder.blocks[0]
        torch.testing.assert_close(y, block.norm2(block.norm1(x)))
    else:
        assert torch.equal(y + h, x)


def test_vanishing_gradients():
    """24 GELU layers: the ratio of the gradients' norms of the first and the last layer is near 1
    with residuals or norms, and vanishes without both."""

    def ratio(residual, norm):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64) for _ in range(24)]
        x = torch.randn(32, 64)
        for layer in layers:
            y = F.gelu(layer(F.layer_norm(x, (64,)) if norm else x))
            x = x + y if residual else y
        x.square().mean().backward()
        return (layers[0].weight.grad.norm() / layers[-1].weight.grad.norm()).item()

    for residual, norm in ((True, True), (True, False), (False, True)):
        assert 0.1 < ratio(residual, norm) < 10
    assert ratio(False, False) < 1e-6


def test_feed_forward_is_position_wise():
    model = make(ENCODER)
    x, order = torch.randn(1, 8, C, dtype=torch.float64), torch.randperm(8)
    torch.testing.assert_close(
        model.encoder.blocks[0].mlp(x)[:, order], model.encoder.blocks[0].mlp(x[:, order])
    )


def test_pooling():
    y = torch.arange(24.0).view(2, 4, 3)
    right = torch.tensor([[True, True, False, False], [True] * 4])
    left = right.flip(1)
    for mask in (right, torch.tensor([2, 4])):
        assert torch.equal(pool(y, mask, "first"), y[:, 0])
        assert torch.equal(pool(y, mask, "last"), torch.stack([y[0, 1], y[1, 3]]))
        torch.testing.assert_close(pool(y, mask, "mean")[0], y[0, :2].mean(0))
    assert torch.equal(pool(y, left, "first"), torch.stack([y[0, 2], y[1, 0]]))
    assert torch.equal(pool(y, left, "last"), y[:, 3])
    assert torch.equal(pool(y, None, "last"), y[:, 3])
    with pytest.raises(ValueError, match="first, last or mean, got 'max'"):
        pool(y, None, "max")


HEADS = {
    "mlm": (V, "tokens"), "token": (5, "tokens"), "classification": (5, "sequence"),
    "next_sentence": (2, "sequence"), "span": (None, "span"),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads(architecture, head):
    classes, kind = HEADS[head]
    model = make(ARCHITECTURES[architecture], head=head, classes=5, pooler=True)
    tokens = torch.randint(V, (3, 6))
    options = {"source": tokens} if architecture == "both" else {}
    logits = model(tokens, **options)
    shape = {"tokens": (3, 6, classes), "sequence": (3, classes), "span": (3, 2, 6)}[kind]
    assert logits.shape == shape
    targets = torch.randint(shape[-1], shape[:-1])
    targets.view(-1)[0] = -100
    p = logits.log_softmax(-1).flatten(0, -2)
    chosen = p[torch.arange(len(p)), targets.flatten().clamp(min=0)][1:]
    torch.testing.assert_close(cross_entropy(model(tokens, **options), targets), -chosen.mean())


def test_pretraining_head_adds_its_losses():
    model = make(ENCODER, head="pretraining", pooler=True)
    tokens, follows = torch.randint(V, (3, 6)), torch.randint(2, (3,))
    masked, next_sentence = model(tokens)
    expected = F.cross_entropy(masked.flatten(0, 1), tokens.flatten())
    expected = expected + F.cross_entropy(next_sentence, follows)
    torch.testing.assert_close(cross_entropy(model(tokens), (tokens, follows)), expected)
    with pytest.raises(ValueError, match="targets must be 2 tensors"):
        cross_entropy(model(tokens), tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lm_classification_is_two_heads(architecture):
    base = ARCHITECTURES[architecture]
    both = make(base, head="lm_classification", classes=5, pad_token=2)
    language, classes = (
        make(base, head=head, classes=5, pad_token=2) for head in ("lm", "classification")
    )
    for model in (language, classes):
        assert not model.load_state_dict(both.state_dict(), strict=False).missing_keys
    tokens = torch.randint(3, V, (3, 6))
    tokens[1, 4:] = 2  # a decoder's class is that of the last token before the padding
    options = {"source": tokens} if architecture == "both" else {}
    for mask in (None, torch.tensor([6, 4, 5])):
        logits, chosen = both(tokens, mask=mask, **options)
        torch.testing.assert_close(logits, language(tokens, mask=mask, **options))
        torch.testing.assert_close(chosen, classes(tokens, mask=mask, **options))


def test_config_errors():
    images = {"patch_size": 4, "image_size": 12, "vocab_size": None, "architecture": "encoder"}
    rotary = {"positions": "rotary"}
    for change, message in (
        ({"architecture": "both"}, "architecture must be one of"),
        ({"vocab_size": None}, "vocab_size .* or patch_size .* is needed"),
        ({"max_length": None}, "learned positions need max_length"),
        ({"pad_token": 13}, r"pad_token must lie in \[0, vocab_size = 13\), got 13"),
        ({"forced_last": 13}, r"forced_last must lie in \[0, vocab_size = 13\), got 13"),
        ({"skip_pad": True, "pad_token": 1}, "skip_pad needs an encoder with pad_token"),
        ({"skip_pad": True, "architecture": "encoder"}, "skip_pad needs an encoder with pad_token"),
        ({"rotary_scaling": RotaryScaling(kind="linear", factor=2.0)}, "rotary_scaling is for rot"),
        ({"wide_output": True, "norm": "none"}, "wide_output needs a norm before each sublayer"),
        ({"embedding_dim": 8, "pooler": True}, "embedding_dim goes neither with a pooler"),
        ({"embedding_dim": 8, "head": "mlm"}, "embedding_dim goes neither with a pooler"),
        ({"pooler_activation": "gelu"}, "pooler_activation must be one of tanh, relu"),
        ({"head": "choice"}, "head 'choice' needs architecture 'encoder'"),
        ({"head": "classification"}, "head 'classification' needs classes"),
        ({"head": "lm_classification"}, "head 'lm_classification' needs classes"),
        ({"head": "pretraining"}, "needs pooler=True"),
        ({"patch_size": 4}, "patch_size needs architecture 'encoder'"),
        (images, "head 'lm' needs tokens"),
        (images | {"image_size": 13}, "image_size must be a multiple of patch_size, got 13 and 4"),
        (images | {"head": "none", "positions": "rotary"}, "images have learned positions"),
        ({"dim": 27, "positions": "sinusoidal"}, "sinusoidal positions need an even dim, got 27"),
        ({"relative_buckets": 30}, "relative_buckets must be a multiple of 4, got 30"),
        ({"relative_distance": 16}, "relative_distance must exceed half"),
        ({"token_types": -1}, "token_types must not be negative"),
        ({"vocab_multiple": 0}, "vocab_multiple must be positive"),
        ({"attention_dropout": 1.0}, "attention_dropout must lie in"),
        ({"init": "zeros"}, "init must be one of"),
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"kv_heads": 0}, "kv_heads must be positive"),
        ({"heads": 5}, "dim must be a multiple of heads, got 24 and 5"),
        ({"kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"norm": "group_norm"}, "norm must be one of .*, got 'group_norm'"),
        ({"rotary_scaling": {"kind": "su", "factor": 2.0}}, "rotary_scaling: kind must be one"),
        ({"rotary_scaling": {"kind": "x" * 10**6, "factor": 2.0}}, "kind must be one of .{,300}$"),
        ({"rotary_scaling": {"kind": "longrope", "short": 5}}, "rotary_scaling: .*factor"),
        ({"rotary_fraction": 0.5}, "rotary_fraction is for rotary positions, not learned"),
        (rotary | {"rotary_fraction": 0.0}, "rotary_fraction must be positive"),
        (rotary | {"rotary_fraction": 0.1}, "even number of features of a head of 8, got 0.1"),
        (rotary | {"rotary_fraction": 0.4}, "even number of features of a head of 8, got 0.4"),
        (rotary | {"rotary_fraction": 1.5}, "even number of features of a head of 8, got 1.5"),
        (
            rotary
            | {"rotary_base": 1, "rotary_scaling": {"kind": "yarn", "factor": 2, "length": 9}},
            "yarn needs a rotary_base above 1, got 1",
        ),
        (
            rotary
            | {
                "rotary_scaling": {
                    "kind": "longrope",
                    "factor": 2,
                    "length": 9,
                    "short": [1],
                    "long": [2],
                }
            },
            "rotary_scaling must have 4 numbers short and long, got 1",
        ),
        ({"parallel": True, "post_norm": True}, "parallel is for a model with one stack"),
        ({"parallel": True, "architecture": "encoder_decoder"}, "parallel is for a model with one"),
        ({"embedding_dim": 0}, "embedding_dim must be positive"),
        ({"embedding_dim": 8, "architecture": "encoder"}, "embedding_dim needs architecture 'dec"),
        (images | {"head": "none", "embedding_dim": 8}, "embedding_dim is for tokens"),
        ({"embedding_dropout": 1.0}, "embedding_dropout must lie in"),
        ({"rotary_scaling": {"kind": "linear"}}, "rotary_scaling: .*factor"),
        (
            {"rotary_scaling": {"kind": "linear", "factor": 0}},
            "factor must be positive and finite",
        ),
        ({"rotary_scaling": {"kind": "linear", "factor": 10**400}}, "factor must be positive"),
        ({"rotary_scaling": {"kind": "llama3", "factor": 2}}, "length must be a positive integer"),
        ({"rotary_scaling": 2.0}, "rotary_scaling must be "),
        ({"window": 0}, "window must be positive, got 0"),
        ({"window": 2, "architecture": "encoder"}, "window is for self-attention of a decoder"),
        ({"windowed": (True, False)}, "windowed needs a window"),
        ({"window": 2, "windowed": ()}, "windowed must have one entry at least"),
        ({"window": 2, "windowed": (1, 0)}, r"windowed must be tuple\[bool, ...\] .*, got 1"),
        ({"window": 2, "windowed": [None]}, "windowed must be .*, got None"),
        ({"window": 2, "windowed": True}, "windowed must be .*, got True"),
        ({"window_rotary_base": 5.0, "positions": "rotary"}, "window_rotary_base needs a window"),
        ({"window_rotary_base": 5.0, "window": 2}, "needs rotary positions, not 'learned'"),
        ({"window_rotary_base": 0.0}, "window_rotary_base must be positive"),
        ({"attention_softcap": 0.0}, "attention_softcap must be positive"),
        ({"logit_softcap": -1.0}, "logit_softcap must be positive"),
        ({"norm_place": "behind"}, "norm_place must be one of before, after, both"),
        ({"norm_place": "after", "post_norm": True}, "post_norm has no norm_place, got 'after'"),
        ({"norm_place": "after", "wide_output": True}, "wide_output needs a norm before"),
        ({"query_key_norm": "keys"}, "query_key_norm must be one of none, head, all"),
        ({"query_key_norm": "head"}, "query_key_norm needs norm 'rms_norm', got 'layer_norm'"),
        ({"positions": "absolute"}, "positions must be one of"),
        ({"activation": "tanh"}, "activation must be one of relu, .*, silu, quick_gelu, got"),
        ({"head": "next"}, "head must be one of"),
        ({"positions": "rotary", "head_dim": 5}, "even head size, got 5"),
        ({"rotary_base": 0.0}, "rotary_base must be positive"),
        ({"norm_eps": -1.0}, "norm_eps must not be negative"),
        ({"dim": 24.0}, "dim must be int, got 24.0"),
        ({"layers": None}, "layers must be int, got None"),
        ({"dim": True}, "dim must be int, got True"),
        ({"norm_eps": True}, "norm_eps must be float, got True"),
        ({"bias": 1}, "bias must be bool, got 1"),
        ({"positions": ["rotary"]}, "positions must be str, got"),
        ({"dim": 2**63}, "dim must be less than 2147483648, got 9223372036854775808"),
        ({"vocab_size": 2**31}, "vocab_size must be less than"),
        ({"layers": 10**9}, "layers must be less than"),
        ({"rotary_base": float("inf")}, "rotary_base must be finite, got inf"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite, got nan"),
        ({"logit_scale": 10**400}, "logit_scale must be finite"),
        ({"dropout": float("nan")}, "dropout must be finite"),
        ({"init": "x" * 10**7}, "init must be one of .{,300}$"),
        ({"attention_scale": "1"}, r"attention_scale must be float \| None, got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(DECODER, **change)


def test_call_errors():
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    decoder, encoder, both = Transformer(DECODER), Transformer(ENCODER), Transformer(BOTH)
    with pytest.raises(ValueError, match="encoder-decoders need source"):
        both(tokens)
    with pytest.raises(ValueError, match="other models do not take one"):
        decoder(tokens, source=tokens)
    with pytest.raises(ValueError, match="a decoder-only model has no encoder"):
        decoder.encode(tokens)
    with pytest.raises(ValueError, match="an encoder-only model has no decoder"):
        encoder.decode(tokens)
    memory = torch.zeros(2, 3, C)
    for model, arguments in ((both, ()), (decoder, (memory,))):
        with pytest.raises(ValueError, match="behind an encoder needs memory, and others do not"):
            model.decode(tokens, *arguments)
    with pytest.raises(ValueError, match="source_mask needs source"):
        decoder(tokens, source_mask=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="takes no token_types"):
        encoder(tokens, token_types=torch.zeros_like(tokens))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), expected \(2, 5\) or \(2,\)"):
        decoder(tokens, mask=torch.ones(2, 4, dtype=torch.bool))
    caches = [KVCache(2, H, C // H, 8) for _ in range(L)]
    with pytest.raises(ValueError, match="with caches a mask must be lengths"):
        decoder.decode(tokens, mask=tokens.bool(), caches=caches)


def test_the_last_token_of_a_decoder_is_no_padding():
    """With or without a mask, on either side of the padding, which is the end of texts as well."""
    model = make(DECODER, pad_token=3, pad_trained=True, head="classification", classes=2)
    text = torch.tensor([[5, 6, 3, 7]])
    expected = model(text)
    right = torch.tensor([[5, 6, 3, 7, 3, 3]])
    for mask in (None, right != 3, torch.ones_like(right).bool(), torch.tensor([4])):
        if mask is None or mask.dim() == 1 or mask.all():
            torch.testing.assert_close(model(right, mask=mask), expected)
    left = torch.tensor([[3, 3, 5, 6, 3, 7]])
    mask = torch.tensor([[False, False, True, True, True, True]])
    torch.testing.assert_close(model(left, mask=mask), expected)


def test_choices():
    """Each is computed as if it were alone, with masks of both kinds."""
    config = replace(DECODER, architecture="encoder", token_types=2)
    model = make(config, head="choice", pooler=True)
    tokens, types = torch.randint(13, (2, 3, 6)), torch.randint(2, (2, 3, 6))
    lengths = torch.tensor([[6, 4, 2], [1, 6, 5]])
    logits = model(tokens, mask=lengths, token_types=types)
    assert logits.shape == (2, 3)
    mask = torch.arange(6) < lengths[..., None]
    torch.testing.assert_close(model(tokens, mask=mask, token_types=types), logits)
    for b, c in ((0, 1), (1, 0)):
        n = lengths[b, c]
        alone = model(tokens[b, c, :n][None, None], token_types=types[b, c, :n][None, None])
        torch.testing.assert_close(alone[0, 0], logits[b, c])
    with pytest.raises(ValueError, match=r"tokens must be \(batch, choices, length\)"):
        model(tokens[0])
