"""Architectures, presets, positions, norms and heads, beside what the converters compare."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from weights import perturb

from tfkern.models import Transformer, TransformerConfig, preset, presets, report_layers
from tfkern.models.heads import pool
from tfkern.models.positions import alibi_slopes, relative_bucket, sinusoids
from tfkern.nn import BatchNorm, KVCache

pytestmark = pytest.mark.usefixtures("one_thread")

V, C, H, L = 13, 24, 3, 2
TOKENS = {"dim": C, "heads": H, "layers": L, "vocab_size": V, "max_length": 20}
DECODER = TransformerConfig(**TOKENS)
ENCODER = TransformerConfig(**TOKENS, architecture="encoder", head="none")
BOTH = TransformerConfig(**TOKENS, architecture="encoder_decoder", encoder_layers=1)
POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves", "relative", "rotary", "alibi", "none")


def make(config, **changes):
    return perturb(Transformer(replace(config, **changes)).double().eval())


# Published counts. GPT-3 and the sizes of v1.1 beside the base by the formulas below.
COUNTS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base-uncased": 110_106_428,
    "bert-base-cased": 108_932_934,
    "bert-large-uncased": 336_226_108,
    "minilm-l6-h384": 22_713_216,
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-base": 247_577_856,
    "vit-b16": 86_567_656,
    "vit-b32": 88_224_232,
    "vit-l16": 304_326_632,
    "vit-l32": 306_535_400,
    "vit-h14": 632_045_800,
}


def count(name, **changes):
    with torch.device("meta"):
        model = Transformer(preset(name, **changes))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert count(name) == COUNTS[name]


def test_parameter_counts_of_other_heads():
    assert count("bert-base-uncased", head="none") == 109_482_240
    assert count("bert-base-cased", head="none") == 108_310_272
    assert count("bert-large-uncased", head="none") == 335_141_888
    assert count("bert-base-uncased", head="mlm", pooler=False) == 109_514_298
    assert count("bert-large-uncased", head="mlm", pooler=False) == 335_174_458


@pytest.mark.parametrize("name", [n for n in presets() if n not in COUNTS])
def test_parameter_counts_by_formula(name):
    """Of presets without a published integer: products, biases, norms and tables, added up."""
    c = preset(name)
    inner, hidden, d = c.heads * c.head_size, c.hidden_size, c.dim
    attention, mlp = 4 * d * inner, (3 if c.gated else 2) * d * hidden
    norm = d
    if c.bias:
        attention, mlp, norm = attention + 3 * inner + d, mlp + hidden + d, 2 * d
    both = c.architecture == "encoder_decoder"
    expected = c.vocab_size * d * (1 if c.tie_embeddings else 2)
    expected += c.layers * (attention + mlp + 2 * norm)
    if both:
        expected += c.layers * (2 * attention + mlp + 3 * norm)
    if not c.post_norm:
        expected += norm * (2 if both else 1)
    if c.positions == "learned":
        expected += c.max_length * d
    if c.positions == "relative":
        expected += 2 * c.relative_buckets * c.heads
    assert count(name) == expected


def test_sizes_of_gpt3():
    """The names say them; that of the smaller ones counts no positions."""
    for name, size in (("125m", 125e6), ("2.7b", 2.65e9), ("13b", 12.9e9), ("175b", 174.6e9)):
        assert count(f"gpt3-{name}") == pytest.approx(size, rel=0.01)


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'gpt5': expected one of transformer-base"):
        preset("gpt5")


def test_embedding_is_a_product_with_one_hot_rows():
    model = make(DECODER, pad_token=3)
    tokens = torch.randint(V, (2, 5))
    expected = F.one_hot(tokens, V).double() @ model.embedding.weight
    torch.testing.assert_close(model.embedding(tokens), expected)
    tokens[0, 0] = 3
    model = make(DECODER, pad_token=3, tie_embeddings=False)
    model(tokens, tokens).backward()
    assert not model.embedding.weight.grad[3].any() and model.embedding.weight.grad[4:].any()


def test_tied_head_is_one_parameter():
    model = make(DECODER)
    assert sum(x.shape == (V, C) for x in model.state_dict().values()) == 1
    tokens = torch.randint(V, (2, 5))
    model(tokens, tokens).backward()
    untied = make(DECODER, tie_embeddings=False)
    state = model.state_dict()
    untied.load_state_dict(state | {"vocabulary.weight": state["embedding.weight"]})
    untied(tokens, tokens).backward()
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
    """Those of the paper for 8 heads, and of its code for 12."""
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
    """Of a batch with k padded tokens, the outputs at the others are those without padding."""
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
    """Neither the loss nor a gradient, also with dropout."""
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
            loss = model(tokens, tokens, **options)
        loss.backward()
        kept.append(sum(sizes))
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
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


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm", "weight_norm", "none"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_every_norm_trains(norm, post_norm):
    torch.manual_seed(1)
    model = Transformer(replace(DECODER, norm=norm, post_norm=post_norm, max_length=40))
    tokens = (torch.arange(41)[None] * torch.tensor([[1], [2], [3]])) % V
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 < math.log(V) - 1


@pytest.mark.parametrize("post_norm", [False, True])
def test_report_of_layers(post_norm):
    """The size of the stream behind each block, and of the gradients in it."""
    model = make(DECODER, post_norm=post_norm)
    tokens = torch.randint(V, (2, 6))
    reports = report_layers(model, lambda: model(tokens, tokens))
    assert [r.name for r in reports] == ["decoder.blocks.0", "decoder.blocks.1"]
    places = torch.arange(6)
    x, h = model.embedding(tokens) + model.decoder.positions(places), None
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
        sizes[norm] = report_layers(model, lambda m=model, t=tokens: m(t, t))
    growth = {norm: r[-1].activation / r[0].activation for norm, r in sizes.items()}
    assert growth["layer_norm"] < 20 and growth["none"] > 1e3


def test_batch_norm_counts_no_padding():
    """As torch's on the packed tokens, and in evaluation as torch's."""
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
    linear = model.decoder.blocks[0].attention.qkv
    g = linear.parametrizations.weight.original0
    torch.testing.assert_close(linear.weight.norm(dim=1, keepdim=True), g.abs())
    before = linear.weight.clone()
    torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")
    torch.testing.assert_close(linear.weight, before)


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


def test_initial_deviations():
    """Of every tensor, by the published rules."""
    big = {"dim": 256, "layers": 2, "heads": 4, "vocab_size": 1000, "max_length": 128}

    def deviations(**changes):
        state = Transformer(TransformerConfig(**(big | changes))).state_dict()
        return {n: x.std().item() for n, x in state.items() if x.dim() > 1}

    for init in ("gpt2", "normal", "truncated"):
        for name, std in deviations(init=init, architecture="encoder", head="mlm").items():
            # cut off at two deviations a normal distribution keeps 0.88 of its own
            expected = 0.02 * (0.8796 if init == "truncated" else 1)
            if init == "gpt2" and name.endswith(("attention.out.weight", "fc2.weight")):
                expected /= math.sqrt(4)
            assert std == pytest.approx(expected, rel=0.03), (init, name)
    t5 = deviations(
        init="t5", architecture="encoder_decoder", positions="relative", head_dim=32, bias=False,
        gated=True, norm="rms_norm", hidden_dim=512, tie_embeddings=False,
    )  # fmt: skip
    block = "decoder.blocks.1"
    for name, expected in {
        "embedding": 1.0, "vocabulary": 1.0, f"{block}.cross.q": (256 * 32) ** -0.5,
        f"{block}.cross.kv": 256**-0.5, f"{block}.attention.out": (4 * 32) ** -0.5,
        f"{block}.mlp.gate_up": 256**-0.5, f"{block}.mlp.down": 512**-0.5,
    }.items():  # fmt: skip
        assert t5[f"{name}.weight"] == pytest.approx(expected, rel=0.03), name
    assert t5["encoder.positions.weight"] == pytest.approx(256**-0.5, rel=0.3)
    weight = Transformer(TransformerConfig(**big, init="t5")).decoder.blocks[0].attention.qkv.weight
    q, k, v = weight.chunk(3)
    assert q.std().item() == pytest.approx((256 * 64) ** -0.5, rel=0.03)
    assert k.std().item() == pytest.approx(256**-0.5, rel=0.03)
    xavier = deviations(init="xavier")
    assert xavier["decoder.blocks.0.mlp.fc1.weight"] == pytest.approx(
        math.sqrt(2 / (256 + 1024)), rel=0.03
    )
    assert xavier["embedding.weight"] == pytest.approx(256**-0.5, rel=0.03)


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
    torch.testing.assert_close(model(tokens, targets, **options), -chosen.mean())


def test_pretraining_head_adds_its_losses():
    model = make(ENCODER, head="pretraining", pooler=True)
    tokens, follows = torch.randint(V, (3, 6)), torch.randint(2, (3,))
    masked, next_sentence = model(tokens)
    expected = F.cross_entropy(masked.flatten(0, 1), tokens.flatten())
    expected = expected + F.cross_entropy(next_sentence, follows)
    torch.testing.assert_close(model(tokens, (tokens, follows)), expected)
    with pytest.raises(ValueError, match="targets must be 2 tensors"):
        model(tokens, tokens)


IMAGES = TransformerConfig(
    dim=C, heads=H, layers=1, architecture="encoder", image_size=12, patch_size=4,
    head="classification", classes=5,
)  # fmt: skip


def test_patches_are_products():
    """A convolution whose stride is its size: every patch times one matrix."""
    model = make(IMAGES)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2)
    projection = model.embedding.projection
    expected = patches @ projection.weight.flatten(1).T + projection.bias
    y = model.embedding(x) - model.embedding.positions
    torch.testing.assert_close(y[:, 1:], expected)
    torch.testing.assert_close(y[:, 0], model.embedding.first[0].expand(2, -1))


def test_other_image_sizes():
    """The positions are those that transformers interpolates."""
    huggingface = pytest.importorskip("huggingface")
    theirs = huggingface.CASES["vit"].model()
    model = make(IMAGES)
    with torch.no_grad():
        model.embedding.positions.copy_(theirs.vit.embeddings.position_embeddings)
        for height, width in ((20, 20), (12, 24), (8, 4)):
            x = torch.zeros(1, 3, height, width, dtype=torch.float64)
            patches = torch.zeros(1, 1 + height * width // 16, C, dtype=torch.float64)
            expected = theirs.vit.embeddings.interpolate_pos_encoding(patches, height, width)
            y = model.embedding(x) - model.embedding.projection.bias
            torch.testing.assert_close(y[:, 1:], expected[:, 1:], rtol=0, atol=1e-10)
            assert model(x).shape == (1, 5)


@pytest.mark.slow
def test_handwritten_digits():
    """A small ViT reads the digits that come with scikit-learn."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    targets, order = torch.tensor(digits.target), torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    config = TransformerConfig(
        dim=64, layers=4, heads=4, architecture="encoder", image_size=8, patch_size=2, channels=1,
        activation="gelu", head="classification", classes=10, init="truncated",
    )  # fmt: skip
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.2e6, rel=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=600)
    for _ in range(600):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        model(images[batch], targets[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(-1) == targets[test]).float().mean().item()
    assert accuracy >= 0.94


def test_config_errors():
    images = {"patch_size": 4, "image_size": 12, "vocab_size": None, "architecture": "encoder"}
    for change, message in (
        ({"architecture": "both"}, "architecture must be one of"),
        ({"vocab_size": None}, "vocab_size .* or patch_size .* is needed"),
        ({"max_length": None}, "learned positions need max_length"),
        ({"pad_token": 13}, r"pad_token must lie in \[0, vocab_size = 13\), got 13"),
        ({"head": "classification"}, "head 'classification' needs classes"),
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
        ({"dim": 24.0}, "dim must be int, got 24.0"),
        ({"layers": None}, "layers must be int, got None"),
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
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 10, 12\)"):
        Transformer(IMAGES)(torch.zeros(1, 3, 10, 12))
    caches = [KVCache(2, H, C // H, 8) for _ in range(L)]
    with pytest.raises(ValueError, match="with caches a mask must be lengths"):
        decoder.decode(tokens, mask=tokens.bool(), caches=caches)
