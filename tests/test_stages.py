"""Models cut into the stages of a pipeline, and streams of which a device has a part."""

import copy

import pytest
import torch
from torch import nn
from weights import perturb

from tfkern.models import Transformer, TransformerConfig, cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, V = 2, 7, 13
SIZES = {"dim": 16, "layers": 3, "heads": 4, "vocab_size": V, "max_length": 9}
BERT = {
    "architecture": "encoder", "head": "mlm", "post_norm": True, "embedding_norm": True,
    "token_types": 2,
}  # fmt: skip
CONFIGS = {
    "gpt2": {},
    "untied": {"tie_embeddings": False, "vocab_multiple": 8},
    "llama": {"norm": "rms_norm", "gated": True, "positions": "rotary", "kv_heads": 2},
    "neox": {"positions": "rotary", "rotary_fraction": 0.5, "parallel": True},
    "opt": {"embedding_dim": 8, "post_norm": True},
    "gemma": {
        "norm": "zero_centered_rms_norm",
        "norm_place": "both",
        "query_key_norm": "head",
        "gated": True,
        "positions": "rotary",
        "window_rotary_base": 50.0,
        "window": 2,
        "windowed": (True, False),
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "scale_embedding": True,
        "kv_heads": 2,
    },
    "olmo": {
        "norm": "rms_norm",
        "norm_place": "after",
        "query_key_norm": "all",
        "positions": "rotary",
    },
    "batch norm behind": {"norm": "batch_norm", "norm_place": "after"},
    "relative": {"positions": "relative", "kv_heads": 1},
    "sinusoidal": {"positions": "sinusoidal", "post_norm": True, "scale_embedding": True},
    "alibi": {"positions": "alibi", "norm": "batch_norm"},
    "bert": BERT,
    "pretraining": BERT | {"head": "pretraining", "pooler": True},
    "tokens": {"architecture": "encoder", "head": "token", "classes": 3},
}


def make(name, **changes):
    return perturb(Transformer(TransformerConfig(**(SIZES | CONFIGS[name] | changes))).double())


def cut(model, at):
    """Two stages, of the blocks before `at` and of the others, with the parameters of the model."""
    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    first, last = (copy.deepcopy(model, dict(shared)) for _ in range(2))
    first.vocabulary = first.pooler = first.classifier = first.narrow = last.embedding = None
    for stage, absent in ((first, range(at, 3)), (last, range(at))):
        stack = stage.encoder or stage.decoder
        for i in absent:
            stack.blocks[i] = None
    (first.encoder or first.decoder).norm = None
    if last.vocabulary is not None and last.vocabulary.weight is None:
        last.vocabulary.weight = model.embedding.weight
    if model.config.positions == "learned":
        stack = last.encoder or last.decoder
        stack.positions = stack.token_types = stack.embedding_norm = None
    return first, last


def objective(logits):
    if isinstance(logits, tuple):
        return sum(objective(x) for x in logits)
    targets = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % logits.shape[-1]
    return cross_entropy(logits, targets)


@pytest.mark.parametrize("padding", [None, "mask", "lengths", "documents"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_stages_are_the_model(name, at, padding):
    """One after the other they give the logits and the gradients of the whole."""
    model = make(name)
    tokens = torch.randint(V, (B, T))
    options, positions = {}, torch.arange(T)[None]
    if padding == "mask":  # on the left, where positions are not counted
        options["mask"] = torch.arange(T) >= torch.tensor([[0], [3]])
        positions = (options["mask"].cumsum(1) - 1).clamp(min=0)
    elif padding == "lengths":
        options["mask"] = torch.tensor([T, 4])
    elif padding == "documents":  # of which later stages count their positions
        if model.config.norm == "batch_norm" or model.config.head == "pretraining":
            pytest.skip("takes no documents")
        options["documents"] = torch.tensor([[0] * 3 + [1] * 4, [0] * 6 + [1]])
        positions = None
    parameters = list(model.parameters())
    # batch norm in evaluation: its statistics would take in the batch twice
    model.train(model.config.norm != "batch_norm")
    expected = model(tokens, **options)
    first, last = cut(model, at)
    stream = first(tokens, **options)
    assert stream.shape == (B, T, 16)
    logits = last(stream, positions=positions, **options)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(objective(logits), parameters)
    for g, e in zip(grads, torch.autograd.grad(objective(expected), parameters), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-11)


def test_names_of_a_stage_are_those_of_the_model():
    model = make("untied")
    first, last = cut(model, 2)
    state = model.state_dict()
    assert first.state_dict().keys() | last.state_dict().keys() == state.keys()
    assert "decoder.blocks.2.norm1.weight" in last.state_dict()
    assert not first.state_dict().keys() & last.state_dict().keys()


def test_dropout_at_the_cut():
    """With a probability near 1 nothing of the blocks is left, but of the stream all."""
    model = make("gpt2", dropout=1 - 1e-9)
    _, last = cut(model, 1)
    stream = torch.randn(B, T, 16, dtype=torch.float64)
    expected = last.project(last.decoder.norm(stream))
    torch.testing.assert_close(last(stream, positions=torch.arange(T)[None]), expected)


def test_positions_are_counted_in_tokens():
    model, tokens = make("llama"), torch.randint(V, (B, T))
    moved = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    expected = model(tokens, positions=torch.arange(T)[None])
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
    assert not torch.allclose(model(tokens, positions=moved), expected)
    _, last = cut(model, 1)
    with pytest.raises(ValueError, match="a model without embedding needs positions"):
        last(torch.randn(B, T, 16, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [(T,), (1, T + 1), (B + 1, T), (1, 1, T)], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_that_do_not_fit(name, wrong):
    with pytest.raises(ValueError, match="positions has shape"):
        make(name)(torch.randint(V, (B, T)), positions=torch.zeros(wrong, dtype=torch.int64))


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_the_length_is_not_that_of_the_stream(positions):
    """Which is spread over devices where sequences are parallel: here one has 3 of 6 rows."""
    model = make("gpt2", positions=positions)
    told = []

    class Recorder(nn.Module):
        def forward(self, x, h, context, memory, cache):
            told.append(context.self_options)
            return x, x

    model.decoder.blocks = nn.ModuleList([Recorder()])
    part = torch.randn(B, 3, 16, dtype=torch.float64)
    assert model.decoder(part, torch.arange(6)[None], embedded=False).shape == part.shape
    (options,) = told
    shape = options["bias"].shape if positions == "relative" else options["rotation"][0].shape
    assert 6 in shape and 3 not in shape


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_equal_parts_of_rows_are_whole_heads(kv_heads):
    """Two devices, each with half of the rows of the layers that read the stream, and half of the
    columns of those that write to it, have terms of the sum."""
    model = make("gpt2", kv_heads=kv_heads, gated=True, bias=False, architecture="encoder_decoder",
                 positions="none", norm="rms_norm", query_key_norm="head",
                 attention_softcap=1.0)  # fmt: skip
    block = model.decoder.blocks[0]
    x, memory = (torch.randn(B, n, 16, dtype=torch.float64) for n in (T, 5))
    cases = (block.attention, (x,)), (block.cross, (x, memory)), (block.mlp, (x,))
    for module, inputs in cases:
        total = 0
        for rank in range(2):
            part = copy.deepcopy(module)
            for name, layer in part.named_children():
                if name.endswith("_norm"):  # one for all heads
                    continue
                axis = 1 if name in ("out", "down") else 0
                layer.weight = nn.Parameter(layer.weight.chunk(2, axis)[rank])
            total = total + part(*inputs)
        torch.testing.assert_close(total, module(*inputs), rtol=0, atol=1e-12)
