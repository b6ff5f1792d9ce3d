"""Small inputs on a CPU are left to the module's own code, and large ones are not."""

from types import SimpleNamespace

import pytest
import torch
from huggingface import transformers
from torch import nn

import tfkern
from tfkern.integrations import hf
from tfkern.integrations.hf import attention, layers, norms, plain, residual, wholes, worth

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that are called."""
    names = []
    for module in (attention, layers, norms, wholes):
        for name in ("attention", "mlp", "gated_mlp", "layer_norm", "rms_norm"):
            if hasattr(module, name):
                op = getattr(module, name)
                monkeypatch.setattr(
                    module, name, lambda *a, op=op, n=name, **k: names.append(n) or op(*a, **k)
                )
    return names


def gpt2(width):
    config = transformers.GPT2Config(n_embd=width, n_inner=width)
    return transformers.models.gpt2.modeling_gpt2.GPT2MLP(width, config).eval()


def llama(width):
    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=width)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


def phi(width):
    config = transformers.Phi3Config(hidden_size=width, intermediate_size=width, pad_token_id=0)
    return transformers.models.phi3.modeling_phi3.Phi3MLP(config)


def vit(width):
    config = transformers.ViTConfig(hidden_size=width, intermediate_size=width)
    return transformers.models.vit.modeling_vit.ViTMLP(config).eval()


# The op and the least number of elements with which it is called, without and with gradient. None:
# never, since one operator of torch computes the activation or the norm.
CASES = {
    "RMS norm": (nn.RMSNorm, "rms_norm", worth.NORM, worth.NORM),
    "layer norm": (nn.LayerNorm, "layer_norm", worth.LAYER_NORM, None),
    "gelu of eight operators": (gpt2, "mlp", worth.MLP // 7, worth.MLP // 7),
    "gated": (llama, "gated_mlp", worth.MLP, worth.MLP),
    "gated, joined": (phi, "gated_mlp", None, None),
    "gelu of one operator": (vit, "mlp", None, None),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_size(case, grad, calls):
    make, op, *least = CASES[case]
    width = 64
    module = make(width)
    own = type(module).forward
    assert hf.patch(module).names == [""]
    rows = (least[grad] or 1 << 20) // width
    for count, called in ((1, False), (rows // 2, False), (2 * rows, least[grad] is not None)):
        x = torch.randn(count, width)
        calls.clear()
        with torch.set_grad_enabled(grad):
            y, expected = module(x), own(module, x)
        assert calls == [op] * called
        torch.testing.assert_close(y, expected)


def test_a_sum_with_its_norm(calls):
    for norm, expected in ((nn.RMSNorm(64), ["rms_norm"]), (nn.LayerNorm(64), [])):
        a, b = torch.randn(2, 4 * worth.LAYER_NORM // 64, 64)
        for rows, called in ((1, []), (len(a), expected)):
            calls.clear()
            y, h = residual.add_norm(norm, a[:rows], b[:rows])
            assert calls == called
            torch.testing.assert_close(h, a[:rows] + b[:rows])
            torch.testing.assert_close(y, norm(h))


def test_a_forced_backend_runs_at_every_size(calls):
    modules = [make(64) for make, *_ in CASES.values()]
    with tfkern.use_backend("reference"):
        for module in modules:
            with hf.patch(module):
                module(torch.randn(1, 64))
    assert calls == [op for _, op, *_ in CASES.values()]


def test_dtypes_at_which_torch_is_slow(calls, monkeypatch):
    """The products of an MLP are tfkern's where they are faster, whatever its activation saves."""
    module = vit(64).bfloat16()
    hf.patch(module)
    for backend, expected in ((None, []), ("native", ["mlp"])):
        chosen = SimpleNamespace(find=lambda *a, b=backend: b, is_forced=lambda: False)
        monkeypatch.setattr(worth, "dispatch", chosen)
        module(torch.randn(worth.MLP // 64, 64, dtype=torch.bfloat16))
        module(torch.randn(1, 64, dtype=torch.bfloat16))
        assert calls == expected


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal, calls):
    """Few scores in float32 are torch's, with equal results; what torch lacks never is."""
    module = nn.Module()
    module.is_causal = causal
    for heads, keys, dtype, T, S, ours in (
        (2, 2, torch.float32, 5, 5, False),
        (2, 2, torch.float32, 1, 9, False),
        (2, 2, torch.float32, 5, 9, False),  # room in a static cache
        (2, 2, torch.float32, 9, 5, causal),  # torch would align these queries otherwise
        (2, 2, torch.float32, 200, 200, True),
        (2, 1, torch.float32, 5, 5, True),
        (2, 2, torch.bfloat16, 5, 5, True),
    ):
        q = torch.randn(1, heads, T, 8, dtype=dtype)
        k, v = torch.randn(2, 1, keys, S, 8, dtype=dtype)
        calls.clear()
        got, _ = hf.attention_forward(module, q, k, v, None, scaling=0.3)
        assert calls == ["attention"] * ours
        with tfkern.use_backend("reference"):
            expected, _ = hf.attention_forward(module, q, k, v, None, scaling=0.3)
        torch.testing.assert_close(got, expected)
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    for options in (
        {"softcap": 2.0},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.randn(1, 2, 5, 5)},
        {"dropout": 0.5},
        {"output_attentions": True},
    ):
        calls.clear()
        hf.attention_forward(module, q, k, v, None, **options)
        assert calls == ["attention"], options


def test_operators_of_activations_are_counted():
    kinds = transformers.activations.ACT2FN
    for name, count in (("gelu", 1), ("silu", 1), ("relu", 1), ("quick_gelu", 3), ("gelu_new", 8)):
        assert plain.named_activation(kinds[name]).operators == count, name


def test_compiled():
    """Sizes are asked while Dynamo traces, without a break of the graph."""
    module = nn.Sequential(nn.RMSNorm(64), llama(64))
    expected = {rows: module(torch.ones(rows, 64)) for rows in (1, 2 * worth.MLP // 64)}
    hf.patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows, y in expected.items():
        torch.testing.assert_close(compiled(torch.ones(rows, 64)), y)
