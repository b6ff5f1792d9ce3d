"""Weights in other forms: of eight bits (layers, models, files), and packed (models)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tfkern
from tfkern import models, train
from tfkern.generate import Sampling, generate
from tfkern.models import Transformer, TransformerConfig
from tfkern.nn import Int8Linear, Linear, PackedLinear
from tfkern.nn.linear import WideLinear
from tfkern.ops.linear_int8 import linear_int8

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SMALL = {"dim": 32, "layers": 2, "heads": 4, "vocab_size": 61, "max_length": 24}
MODELS = {
    "gpt2": {},
    "llama": {
        "positions": "rotary", "norm": "rms_norm", "gated": True, "activation": "silu",
        "bias": False, "kv_heads": 2, "tie_embeddings": False, "max_length": None,
    },
    "bert": {
        "architecture": "encoder", "head": "pretraining", "pooler": True, "post_norm": True,
        "token_types": 2, "embedding_norm": True,
    },
    "opt": {"embedding_dim": 16, "vocab_multiple": 8},
    "t5": {
        "architecture": "encoder_decoder", "positions": "relative", "norm": "rms_norm",
        "bias": False, "logit_scale": 0.2, "wide_output": True, "start_token": 0,
        "max_length": None,
    },
    "classes": {"head": "classification", "classes": 3},
}  # fmt: skip


def model_of(name, **changes):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SMALL | MODELS[name] | changes)).eval()


def inputs_of(model, length=12):
    tokens = torch.randint(1, 61, (2, length))
    return {"tokens": tokens} | (
        {"source": torch.randint(1, 61, (2, 7))} if model.encoder and model.decoder else {}
    )


def results(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@torch.no_grad()
def widened(model, quantized):
    """The model in float64, with the weights that int8 and scales stand for."""
    plain = copy.deepcopy(model).double()
    for name, layer in quantized.named_modules():
        if isinstance(layer, Int8Linear):
            weight = layer.scale.double()[:, None] * layer.weight.double()
            if name == "vocabulary.int8":
                plain.vocabulary.weight = nn.Parameter(weight)
            else:
                plain.get_submodule(name).weight.copy_(weight)
    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, out", [((3, 2, 19), 7), ((19,), 7), ((1, 64), 33), ((0, 5), 4), ((5, 13, 21), 9)]
)
def test_native_layer_is_off_by_half_a_scale(shape, out, dtype):
    x, weight, bias = torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out)
    weight[0] = 0
    layer = Int8Linear(weight, bias)
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.no_grad():
        y = layer(x)
    with tfkern.use_backend("reference"):
        error = (y - layer(x)).abs().max() if y.numel() else 0
    assert error <= 2 * torch.finfo(dtype).eps * (y.abs().max() if y.numel() else 0)
    assert y.dtype == dtype and layer.scale.dtype == torch.float32
    exact = F.linear(x.double(), weight.double(), bias.to(dtype).double())
    bound = x.double().abs().sum(-1, keepdim=True) * layer.scale.double() / 2
    rounding = torch.finfo(dtype).eps * (exact.abs() + 4) + 1e-6
    assert ((y.double() - exact).abs() <= bound + rounding).all()
    assert (y[..., 0] == layer.bias[0]).all()  # the row of zeros


def test_native_weights_that_eight_bits_hold_are_exact():
    weight = torch.randint(-127, 128, (9, 40)).float()
    weight[:, 3] = 127
    x = torch.randint(-50, 50, (5, 40)).float()
    layer = Int8Linear(weight / 16)
    assert torch.equal(layer(x), F.linear(x, weight / 16))
    assert torch.equal(layer(x.repeat(9, 1)), F.linear(x, weight / 16).repeat(9, 1))


@pytest.mark.parametrize("rows", [3, 40])
def test_transforms(rows):
    x, weight = torch.randn(2, rows, 8), torch.randint(-127, 128, (5, 8), dtype=torch.int8)
    scale = torch.rand(5) / 127
    wide = scale[:, None] * weight
    function = lambda x: linear_int8(x, weight, scale)  # noqa: E731
    torch.testing.assert_close(torch.vmap(function)(x), F.linear(x, wide))
    _, tangent = torch.func.jvp(function, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, F.linear(x[1], wide))


def test_strided_scales_and_biases():
    x, weight = torch.randn(3, 8), torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    scale, bias = torch.ones(1).expand(6), torch.randn(12)[::2]
    expected = F.linear(x, weight.float(), bias)
    torch.testing.assert_close(linear_int8(x, weight, scale, bias), expected)


def test_compiles_without_recompiling():
    torch._dynamo.reset()
    weight, scale = torch.randint(-127, 128, (6, 8), dtype=torch.int8), torch.rand(6)
    compiled = torch.compile(linear_int8, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 5, 9):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x, weight, scale), linear_int8(x, weight, scale))


def test_gradients():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight, scale = torch.randint(-127, 128, (3, 8), dtype=torch.int8), torch.rand(3)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    wide = scale.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s, b: linear_int8(x, weight, s, b), (x, wide, bias))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"x": torch.ones(2, 8, dtype=torch.int8)}, "x must be float32.*int8"),
        ({"x": torch.tensor(1.0)}, "x must have at least one axis"),
        ({"weight": torch.zeros(3, 8)}, "weight must be int8, got torch.float32"),
        ({"weight": torch.zeros(3, 7, dtype=torch.int8)}, r"\(3, 7\), expected \(\*, 8\)"),
        ({"scale": torch.ones(4)}, r"scale has shape \(4,\), expected \(3,\)"),
        ({"bias": torch.ones(3, 1)}, r"bias has shape \(3, 1\), expected \(3,\)"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, "bias must be float32.*int32"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    given = {"x": torch.ones(2, 8), "weight": torch.zeros(3, 8, dtype=torch.int8)}
    with pytest.raises(ValueError, match=words):
        linear_int8(**given | {"scale": torch.ones(3)} | changes)


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_with_the_weights_that_int8_stands_for(name):
    model = model_of(name)
    quantized = models.quantize(copy.deepcopy(model))
    left = [n for n, m in quantized.named_modules() if isinstance(m, nn.Linear)]
    assert all(isinstance(quantized.get_submodule(n), WideLinear) for n in left)
    assert bool(left) == (name == "t5")
    inputs = inputs_of(model)
    with torch.no_grad():
        outputs = results(quantized(**inputs))
        expected = results(widened(model, quantized)(**inputs))
        floats = results(model(**inputs))
    for ours, golden, unlike in zip(outputs, expected, floats, strict=True):
        torch.testing.assert_close(ours.double(), golden, atol=2e-5, rtol=2e-5)
        assert not torch.equal(ours, unlike)


def test_half_models_keep_scales_and_wide_layers():
    model = models.quantize(model_of("t5")).half()
    kinds = {name.rpartition(".")[2]: x.dtype for name, x in model.named_buffers()}
    assert kinds["weight"] == torch.int8 and kinds["scale"] == torch.float32
    assert model.decoder.blocks[0].mlp.fc2.weight.dtype == torch.float32
    with torch.no_grad():
        assert model(**inputs_of(model)).isfinite().all()


def test_generation_writes_what_the_widened_model_writes():
    model = model_of("llama")
    quantized = models.quantize(copy.deepcopy(model))
    prompts, greedy = torch.randint(61, (3, 5)), Sampling(temperature=0.0)
    ours = generate(quantized.double(), prompts, 12, sampling=greedy)
    theirs = generate(widened(model, quantized), prompts, 12, sampling=greedy)
    assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


def test_perplexity_stays_within_one_percent():
    text = "the cat sat on the mat. the dog lay on the rug. a bird sang in the tree. " * 40
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(c) for c in text])
    rows = tokens[: len(tokens) // 33 * 33].view(-1, 33)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL | {"vocab_size": len(letters), "max_length": 32}))
    batches = [{"tokens": rows[:, :-1], "targets": rows[:, 1:]}]
    list(train.steps(model, batches * 60, train.CrossEntropy(), train.adamw(model, 3e-3), stop=60))
    model.eval()
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(models.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).item())
        model = models.quantize(model) if len(losses) == 1 else model
    assert losses[0] < 1.5  # it has learnt something
    assert abs(losses[1] - losses[0]) < 0.01


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_saved_and_loaded(name, tmp_path):
    model = models.quantize(model_of(name))
    models.save(model, tmp_path, form="tfkern")
    again = models.load(tmp_path)
    assert again.config == model.config
    for (ours, x), (theirs, y) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert ours == theirs and x.dtype == y.dtype and torch.equal(x, y)
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs), again(**inputs))
    assert models.load(tmp_path, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int8 is no change"):
        models.load(tmp_path, int8=False)
    with pytest.raises(ValueError, match="form='tfkern' saves every model"):
        models.save(model, tmp_path / "theirs")


def test_errors():
    model = models.quantize(model_of("gpt2"))
    with pytest.raises(ValueError, match="int8 already"):
        models.quantize(model)
    with pytest.raises(ValueError, match="cannot be drawn"):
        model.reset_parameters()
    with pytest.raises(ValueError, match="weight_norm"):
        models.quantize(model_of("gpt2", norm="weight_norm"))


# ---- weights that are packed ----


@pytest.fixture
def packing(monkeypatch):
    """All that can be packed is packed."""
    native = pytest.importorskip("tfkern.native.linear")
    every = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), native._ALL)
    monkeypatch.setattr(native, "_MOST_ROWS", every)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_packed_models(packing, name, dtype):
    model = model_of(name).to(dtype)
    inputs = inputs_of(model)
    expected = copy.deepcopy(model).double()(**inputs)
    plain = model(**inputs)
    assert models.prepack(model) is model
    layers = [type(layer) for layer in model.modules()]
    assert PackedLinear in layers and nn.Linear not in layers and Linear not in layers
    for found, before, right in zip(*map(results, (model(**inputs), plain, expected)), strict=True):
        error = (before - right).abs().max()
        assert found.dtype == before.dtype
        assert (found - right).abs().max() <= 2 * error + torch.finfo(dtype).eps


def test_packed_models_write_the_same(packing):
    model = model_of("llama")
    prompts, greedy = torch.randint(1, 61, (3, 5)), Sampling(temperature=0)
    expected = generate(model, prompts, 12, sampling=greedy)
    found = generate(models.prepack(model), prompts, 12, sampling=greedy)
    assert all(torch.equal(*rows) for rows in zip(found, expected, strict=True))


def test_packed_models_are_not_saved_drawn_or_made_int8(packing, tmp_path):
    model = models.prepack(model_of("gpt2"))
    with pytest.raises(ValueError, match="save them before"):
        models.save(model, tmp_path / "model", form="tfkern")
    with pytest.raises(ValueError, match="are packed: make them int8 before"):
        models.quantize(model)
    with pytest.raises(ValueError, match="packed weights cannot be drawn"):
        model.reset_parameters()


def test_what_is_not_packed(packing):
    for model in (model_of("gpt2").double(), models.quantize(model_of("gpt2"))):
        layers = list(model.modules())
        assert list(models.prepack(model).modules()) == layers
