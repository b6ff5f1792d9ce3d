"""The decoder-only transformer against the same architecture in plain torch, and in training."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from weights import perturb

import tfkern
from tfkern.generate import GREEDY, generate
from tfkern.models import Transformer, TransformerConfig, cross_entropy, log_probs
from tfkern.ops import OPS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = TransformerConfig(vocab_size=11, dim=24, layers=2, heads=4, max_length=16)
CONFIGS = {
    "gpt2": SMALL,
    "llama": dataclasses.replace(
        SMALL,
        kv_heads=2,
        norm="rms_norm",
        gated=True,
        activation="silu",
        positions="rotary",
        tie_embeddings=False,
        bias=False,
    ),
    "untied": dataclasses.replace(SMALL, tie_embeddings=False, activation="gelu", kv_heads=1),
    "rotary": dataclasses.replace(SMALL, positions="rotary", rotary_base=50.0, activation="relu"),
    "parallel": dataclasses.replace(
        SMALL, positions="rotary", head_dim=8, rotary_fraction=0.5, parallel=True, out_bias=False
    ),
    "gated": dataclasses.replace(SMALL, gated=True, hidden_dim=20, bias=False, layers=1),
    "rms": dataclasses.replace(SMALL, norm="rms_norm", norm_eps=1e-2, hidden_dim=30),
}


@pytest.fixture(params=["default", "reference", "native"])
def forced(request):
    name = None if request.param == "default" else request.param
    if name and any(tfkern.backends(op)[name] for op in OPS):
        pytest.skip(f"{name} does not run all ops here")
    with tfkern.use_backend(name):
        yield


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def make(config):
    return perturb(Transformer(config).double())


def batch(config, B=3, T=13):
    tokens = torch.randint(config.vocab_size, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


def plain_rotary(x, base):
    """x (B, H, T, D) as complex numbers, times e^(i angle)."""
    T, D = x.shape[-2:]
    frequency = torch.tensor([base ** (-2 * i / D) for i in range(D // 2)], dtype=x.dtype)
    angle = torch.outer(torch.arange(T, dtype=x.dtype), frequency)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def plain_loss(config, p, tokens, targets):
    """The architecture in plain torch, the residual addition where textbooks have it."""
    acts = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
    }
    act = acts[config.activation]

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(name, x):
        weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
        if config.norm == "rms_norm":
            return F.rms_norm(x, (config.dim,), weight, config.norm_eps)
        return F.layer_norm(x, (config.dim,), weight, bias, config.norm_eps)

    D = config.head_size
    groups = config.heads // (config.kv_heads or config.heads)
    x = F.embedding(tokens, p["embedding.weight"])
    if config.positions == "learned":
        x = x + F.embedding(torch.arange(tokens.shape[1]), p["decoder.positions.weight"])
    for layer in range(config.layers):
        name = f"decoder.blocks.{layer}"
        qkv = linear(f"{name}.attention.qkv_by_head", norm(f"{name}.norm1", x))
        each = [], [], []
        for part in qkv.chunk(config.heads // groups, -1):  # a key head
            heads = part.split(D, -1)
            each[0].extend(heads[:groups])
            each[1].append(heads[groups])
            each[2].append(heads[groups + 1])
        q, k, v = (torch.stack(heads, 1) for heads in each)
        if config.positions == "rotary":
            turned = int(D * config.rotary_fraction)
            q, k = (
                torch.cat([plain_rotary(y[..., :turned], config.rotary_base), y[..., turned:]], -1)
                for y in (q, k)
            )
        k, v = (y.repeat_interleave(groups, 1) for y in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        read, o = x, o.transpose(1, 2).flatten(-2)
        x = x + linear(f"{name}.attention.out", o)
        y = norm(f"{name}.norm2", read if config.parallel else x)
        if config.gated:
            gate, up = linear(f"{name}.mlp.gate", y), linear(f"{name}.mlp.up", y)
            x = x + linear(f"{name}.mlp.down", act(gate) * up)
        else:
            x = x + linear(f"{name}.mlp.fc2", act(linear(f"{name}.mlp.fc1", y)))
    table = p["embedding.weight" if config.tie_embeddings else "vocabulary.weight"]
    logits = norm("decoder.norm", x) @ table.T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.usefixtures("forced")
def test_loss_and_gradients_match_torch(config):
    model = make(config)
    tokens, targets = batch(config)
    loss = cross_entropy(model(tokens), targets)
    parameters = dict(model.named_parameters())
    expected = plain_loss(config, parameters, tokens, targets)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    grads = torch.autograd.grad(loss, parameters.values())
    plain_grads = torch.autograd.grad(expected, parameters.values())
    for a, b in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.usefixtures("forced")
def test_later_tokens_do_not_reach_earlier_logits(config):
    model = make(config).float()
    tokens, _ = batch(config)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8], after[:, 8])


def test_loss_of_a_fresh_model_is_that_of_guessing(config):
    model = Transformer(dataclasses.replace(config, dim=96))
    tokens, targets = batch(config, B=16)
    loss = cross_entropy(model(tokens), targets)
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.3


def test_state_dict_round_trip(config):
    model = make(config)
    other = Transformer(config).double()
    assert not any(other.load_state_dict(model.state_dict()))
    tokens, _ = batch(config)
    torch.testing.assert_close(model(tokens), other(tokens))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens), other(tokens))
    names = set(model.state_dict())
    assert ("vocabulary.weight" in names) == (not config.tie_embeddings)
    assert ("decoder.positions.weight" in names) == (config.positions == "learned")
    assert config.bias or not any(name.endswith("bias") for name in names)


TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a"
)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_memorises_a_text(name):
    alphabet = sorted(set(TEXT))
    text = torch.tensor([[alphabet.index(c) for c in TEXT]])
    config = dataclasses.replace(
        CONFIGS[name], vocab_size=len(alphabet), dim=64, max_length=text.shape[1]
    )
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = cross_entropy(model(text[:, :-1]), text[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    (new,) = generate(model, text[:, :20], 60, sampling=GREEDY)
    assert torch.equal(new, text[0, 20:80])


def test_dropout_in_training_only():
    model = make(dataclasses.replace(SMALL, dropout=0.2))
    tokens, _ = batch(SMALL)
    without = Transformer(SMALL).double()
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(tokens), without(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens))
    torch.manual_seed(5)
    first = model(tokens)
    torch.manual_seed(5)
    torch.testing.assert_close(model(tokens), first)
    # at the embedding and after every sublayer: with a probability near 1 only zeros are left
    model = make(dataclasses.replace(SMALL, dropout=1 - 1e-9))
    logits = model(tokens)
    expected = F.linear(model.decoder.norm.bias, model.embedding.weight).expand_as(logits)
    torch.testing.assert_close(logits, expected)
    # of the weights of attention: what is left of it is a bias
    model = make(dataclasses.replace(SMALL, attention_dropout=1 - 1e-9))
    logits = model(tokens)
    for block in model.decoder.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    torch.testing.assert_close(logits, model.eval()(tokens))


def test_ignored_targets():
    model = make(SMALL)
    tokens, targets = batch(SMALL)
    padded = targets.clone()
    padded[:, 5:] = -100
    expected = F.cross_entropy(model(tokens)[:, :5].flatten(0, 1), targets[:, :5].flatten())
    torch.testing.assert_close(cross_entropy(model(tokens), padded), expected)


def test_bfloat16_loss_is_float32():
    model = Transformer(SMALL).bfloat16()
    tokens, targets = batch(SMALL)
    assert model(tokens).dtype == torch.bfloat16
    loss = cross_entropy(model(tokens), targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_the_residual_stream_in_float32():
    model = Transformer(SMALL)
    tokens, targets = batch(SMALL)
    streams = []
    model.decoder.norm.register_forward_pre_hook(
        lambda _, args, keywords: streams.append(keywords["residual"]), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens), cross_entropy(model(tokens), targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert streams[0].dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(model(tokens), targets), atol=1e-2, rtol=1e-2)
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiles_without_graph_breaks(name, compiler):
    model = make(CONFIGS[name])
    tokens, targets = batch(CONFIGS[name])
    loss = cross_entropy(model(tokens), targets)
    logits = torch.compile(model, fullgraph=True, backend=compiler)(tokens)
    compiled = cross_entropy(logits, targets)
    torch.testing.assert_close(compiled, loss)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(compiled, parameters),
        torch.autograd.grad(loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_forward_errors():
    model = Transformer(SMALL)
    with pytest.raises(ValueError, match="length up to 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens must be"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets must be class indices .* got torch.float32"):
        cross_entropy(torch.randn(2, 5, 7), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="targets has shape"):
        cross_entropy(torch.zeros(1, 5, 11), torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.usefixtures("forced")
def test_parallel_sublayers_drop_what_each_of_them_writes():
    """Attention and MLP write 1 to every place of the stream, of which either may be lost."""
    config = dataclasses.replace(
        SMALL, layers=1, dropout=0.5, embedding_dropout=0.0, parallel=True, head="none"
    )
    model = Transformer(config)
    (block,) = model.decoder.blocks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in block.residual_outputs():
            layer.bias.fill_(1)
    model.decoder.norm = torch.nn.Identity()
    tokens = torch.zeros(16, 16, dtype=torch.int64)
    for trained, values in ((False, [2]), (True, [0, 2, 4])):
        stream = model.train(trained)(tokens)
        found, counts = stream.unique(return_counts=True)
        assert found.tolist() == values
    shares = (counts / stream.numel()).tolist()
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("architecture, head", [
    ("decoder", "lm"), ("decoder", "lm_classification"), ("encoder", "token"),
    ("encoder", "classification"), ("encoder_decoder", "lm"),
])  # fmt: skip
def test_rows_in_groups_have_their_own_results(architecture, head):
    """Each group alone, as plain rows, has the results that it has beside the others."""
    config = dataclasses.replace(
        SMALL, architecture=architecture, head=head, classes=3, start_token=0
    )
    model = make(config).eval()
    given = {
        "tokens": torch.randint(11, (3, 2, 7)),
        "mask": torch.tensor([[7, 5], [3, 7], [6, 1]]),
        "positions": torch.arange(7).expand(3, 2, 7) + 1,
    }
    if architecture == "encoder_decoder":
        given |= {"source": torch.randint(11, (3, 2, 5)), "source_mask": given["mask"].clamp(max=5)}
    if architecture == "encoder":
        given["mask"] = torch.arange(7) < given["mask"][..., None]
    found = model(**given)
    for i in range(3):
        expected = model(**{name: x[i] for name, x in given.items()})
        several = (
            zip(found, expected, strict=True) if head.startswith("lm_") else [(found, expected)]
        )
        for x, y in several:
            assert x.shape == (3, *y.shape)
            torch.testing.assert_close(x[i], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_log_probs_of_targets(deferred, dtype, share):
    """Those of torch's log-softmax, and their gradients, with few targets and with many."""
    model = make(dataclasses.replace(SMALL, logit_softcap=5.0)).to(dtype)
    model.vocabulary.deferred = deferred
    tokens, targets = (x.clone() for x in batch(SMALL))
    targets[torch.rand(targets.shape) > share] = -100
    exact = copy.deepcopy(model).double().eval()
    exact.vocabulary.deferred = False
    expected = exact(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
    expected = expected.squeeze(-1) * (targets != -100)
    found = log_probs(model(tokens), targets)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    weights = torch.randn(targets.shape, dtype=torch.float64)
    (found.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        limit = tolerance * max(1.0, q.grad.abs().max().item())
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0, atol=limit)
