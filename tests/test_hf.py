"""transformers on tfkern's attention, norms and MLPs: the same outputs, gradients and training."""

import copy
import io

import pytest
import torch
from adornments import ADORNMENTS
from huggingface import CASES, V, transformers
from weights import perturb

from tfkern.integrations import hf
from tfkern.integrations.hf import norms, rotation, wholes

pytestmark = pytest.mark.usefixtures("one_thread", "every_size")

MODELS = ("gpt1", "gpt2", "bert", "bart", "t5", "t5-v1.1", "vit")
hf.register()


def llama():
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=24,
        attn_implementation="eager",
    )  # fmt: skip
    return perturb(transformers.LlamaForCausalLM(config)).double().eval()


def twins(name, attention="tfkern"):
    """A model with transformers' attention, and the same with ours."""
    plain = llama() if name == "llama" else CASES[name].model()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(attention)
    return plain, ours


def outputs(name, model):
    if name == "llama":
        return CASES["gpt2"].theirs(model)
    return CASES[name].theirs(model)


def close(name, a, b):
    # T5's and Llama's norms, and GPT-1's and ViT's eager softmax are float32 in transformers
    tolerance = 1e-10 if name in ("gpt2", "bert", "bart") else 1e-5
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in (*MODELS, "llama") if n != "gpt1"])
def test_attention(name):
    """GPT-1 computes its own attention and asks for none."""
    plain, ours = twins(name)
    calls = []
    hf_attention = hf.attention_forward

    def counted(*args, **kwargs):
        calls.append(1)
        return hf_attention(*args, **kwargs)

    transformers.AttentionInterface.register("tfkern", counted)
    try:
        results = outputs(name, ours)
    finally:
        hf.register()
    assert len(calls) >= 2
    expected = outputs(name, plain)
    close(name, results, expected)
    for out in (results, expected):
        torch.stack([x.square().mean() for x in out]).sum().backward()
    for (n, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        close(name, [p.grad] if p.grad is not None else [], [q.grad] if q.grad is not None else [])
        assert p.grad is not None or q.grad is None, n


def test_causality_without_a_mask():
    """The mask function stands behind the same name: changing a later token changes nothing."""
    _, ours = twins("gpt2")
    tokens = torch.randint(V, (2, 9))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    with torch.no_grad():
        a, b = ours(tokens).logits, ours(changed).logits
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6], b[:, 6])


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5", "llama"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(name, cache, monkeypatch):
    with monkeypatch.context() as patch:  # transformers' caches need as many layers on both sides
        patch.setitem(CASES["t5"].config, "num_decoder_layers", 2)
        twin = twins(name)
    plain, ours = (m.float() for m in twin)  # in float64 Llama's own softmax overflows
    tokens = torch.randint(3, V, (2, 5))
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False,
        "cache_implementation": cache, "disable_compile": True, "pad_token_id": 0,
    }  # fmt: skip
    a, b = plain.generate(tokens, **options), ours.generate(tokens, **options)
    assert torch.equal(a, b)


def test_attention_weights():
    plain, ours = twins("bert")
    tokens, mask = torch.randint(V, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.no_grad():
        a, b = (m(tokens, attention_mask=mask, output_attentions=True) for m in (plain, ours))
    assert len(b.attentions) == 2
    for x, y in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_attention_maps_of_our_models(tmp_path):
    """All layers, also of cross-attention, are those that transformers' eager attention has."""
    pytest.importorskip("safetensors")
    from tfkern.models import load

    names = ("qwen2-windows", "qwen3", "olmo2", "gemma2", "gemma3", "gpt2", "bart")
    for name in names:
        narrow = name not in ("gpt2", "bart")  # the norms of transformers are float32
        theirs = CASES[name].model(dtype=torch.float32 if narrow else torch.float64)
        theirs.save_pretrained(tmp_path / name)
        ours = load(tmp_path / name)
        tokens, source = torch.randint(3, V, (2, 6)), torch.randint(3, V, (2, 8))
        with torch.no_grad():
            if name != "bart":
                expected = {"decoder": theirs(tokens, output_attentions=True).attentions}
                options = {}
            else:
                out = theirs(source, decoder_input_ids=tokens, output_attentions=True)
                expected = {
                    "encoder": out.encoder_attentions, "decoder": out.decoder_attentions,
                    "cross": out.cross_attentions,
                }  # fmt: skip
                options = {"source": source}
        for side, maps in expected.items():
            for layer, weights in enumerate(maps):
                where = {"side": "decoder", "cross": True} if side == "cross" else {"side": side}
                result = ours.attention_maps(layer, tokens, **where, **options)
                limit = 1e-5 if narrow else 1e-10
                torch.testing.assert_close(result, weights, rtol=0, atol=limit)
    with pytest.raises(ValueError, match="layer 9 of 'decoder': the model has layers 0 to 2"):
        ours.attention_maps(9, tokens, **options)
    with pytest.raises(ValueError, match="the encoder has no cross-attention"):
        ours.attention_maps(0, tokens, side="encoder", cross=True, **options)


def test_calls_that_models_make_seldom():
    """A floating mask beside a bias, and room in a static cache behind the first tokens."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    mask, bias = torch.randn(1, 1, 3, 5), torch.randn(1, 2, 3, 5)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    o, _ = hf.attention_forward(torch.nn.Module(), q, k, k, mask, position_bias=bias)
    torch.testing.assert_close(o.transpose(1, 2), sdpa(q, k, k, mask + bias))
    o, _ = hf.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=True)
    torch.testing.assert_close(o.transpose(1, 2), sdpa(q, k, k, is_causal=True))


def test_paged_caches_raise():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="paged"):
        hf.attention_forward(torch.nn.Module(), q, q, q, None, cache=object())


COUNTS = {  # norms, MLPs, sums before norms and rotary attention of two blocks, and those beside
    "gpt1": 2 * 4, "gpt2": 2 * 4 + 1, "bert": 2 * 5 + 3, "bart": 2 * 3 + 3 * 4 + 4,
    "t5": 2 * 3 + 3 * 4 + 2, "t5-v1.1": 2 * 3 + 3 * 4 + 2, "vit": 2 * 4 + 1, "llama": 2 * 5 + 1,
}  # fmt: skip


@pytest.mark.parametrize("name", [*MODELS, "llama"])
def test_patch(name):
    plain = llama() if name == "llama" else CASES[name].model()
    ours = copy.deepcopy(plain)
    patched = hf.patch(ours)
    assert len(patched.names) == COUNTS[name], patched.names
    results, expected = outputs(name, ours), outputs(name, plain)
    close(name, results, expected)
    for out in (results, expected):
        torch.stack([x.square().mean() for x in out]).sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            close(name, [p.grad], [q.grad])
    assert ours.state_dict().keys() == plain.state_dict().keys()
    patched.undo()
    assert not any("forward" in vars(m) for m in ours.modules())
    close(name, outputs(name, ours), expected)


SMALL = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 40}


@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        ("GPTNeoModel", {"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 3}, 5),
        ("GPTBigCodeModel", {"n_layer": 1, "n_head": 3, "n_embd": 24}, 5),
        ("CohereModel", {"num_attention_heads": 3}, 4),
        ("Mamba2Model", {"num_heads": 4, "head_dim": 12, "n_groups": 1, "state_size": 8}, 3),
        ("MobileBertModel", {"normalization_type": "layer_norm"}, None),
    ],
)
def test_patch_of_other_forms(kind, config, count):
    """Linear layers in the place of Conv1D, a layer norm of the model's own, norms and outputs with
    further inputs."""
    kind = getattr(transformers, kind)
    names = SMALL if "n_embd" not in config else {"vocab_size": V}
    model = perturb(kind(kind.config_class(**names | config))).eval()
    tokens = torch.randint(3, V, (2, 9))
    with torch.no_grad():
        expected = model(tokens)[0]
        with hf.patch(model) as patched:
            assert count is None or len(patched.names) == count, patched.names
            result = model(tokens)[0]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


HEADS = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}


@pytest.mark.parametrize(
    ("kind", "config", "interleaved"),
    [
        ("LlamaModel", HEADS | {"num_key_value_heads": 2}, False),
        ("MistralModel", HEADS | {"num_key_value_heads": 1}, False),
        ("Qwen3Model", HEADS | {"num_key_value_heads": 2, "head_dim": 8}, False),
        ("GPTNeoXModel", HEADS | {"rotary_pct": 0.5}, False),
        ("CohereModel", HEADS | {"num_key_value_heads": 2}, True),
        ("GPTJModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, True),
        ("GlmModel", HEADS | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}, True),
    ],
)
def test_patch_of_rotary_positions(monkeypatch, kind, config, interleaved):
    kind, calls = getattr(transformers, kind), []
    original = rotation.rotary
    monkeypatch.setattr(rotation, "rotary", lambda *a, **k: calls.append(k) or original(*a, **k))
    model = perturb(kind(kind.config_class(vocab_size=V, **config))).double().eval()
    other = copy.deepcopy(model)
    tokens = torch.randint(3, V, (2, 9))
    expected = model(tokens)[0]
    gradients = torch.autograd.grad(expected.sin().sum(), list(model.parameters()))
    with hf.patch(model):
        calls.clear()
        result = model(tokens)[0]
        ours_each = 2 if kind is transformers.GPTJModel else 1  # queries and keys one by one
        assert [k.get("interleaved", False) for k in calls] == [interleaved] * 2 * ours_each
        ours = torch.autograd.grad(result.sin().sum(), list(model.parameters()))
        patched = len(calls)
        other(tokens)
        assert len(calls) == patched, "another model of this class was changed"
    model(tokens)
    assert len(calls) == patched
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_patch_leaves_replaced_layers_alone():
    """An adapter, say, whose product has more than the weight in it, and weights of two dtypes."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(-1, keepdim=True)

    for name, path in (
        ("llama", "model.layers.0.mlp.gate_proj"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi"),
        ("bart", "model.encoder.layers.0.fc2"),
        ("bert", "bert.encoder.layer.0.output.dense"),
    ):
        model = llama() if name == "llama" else CASES[name].model()
        layer = model.get_submodule(path)
        layer.__class__ = Adapted
        expected = outputs(name, model)
        with hf.patch(model):
            close(name, outputs(name, model), expected)
    mixed = CASES["t5-encoder"].model(dtype=torch.bfloat16)
    for block in mixed.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    tokens = torch.randint(3, V, (2, 9))
    expected = mixed(tokens)[0]
    with hf.patch(mixed):
        torch.testing.assert_close(mixed(tokens)[0], expected, rtol=0.05, atol=0.1)


LAYERS = [  # of every form of an MLP, with what stands beside them
    ("gpt2", "transformer.h.0.mlp", ("c_fc", "c_proj", "act", "dropout")),
    ("bart", "model.encoder.layers.0", ("fc1", "fc2", "activation_fn")),
    ("vit", "vit.layers.0.mlp", ("fc1", "fc2", "activation_fn")),
    ("t5", "encoder.block.0.layer.1.DenseReluDense", ("wi", "wo", "act", "dropout")),
    ("t5-v1.1", "encoder.block.0.layer.1.DenseReluDense", ("wi_0", "wi_1", "wo", "act")),
    ("llama", "model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj", "act_fn")),
    ("bert", "bert.encoder.layer.0.intermediate", ("dense", "intermediate_act_fn")),
    ("bert", "bert.encoder.layer.0.output", ("dense", "dropout", "LayerNorm")),
    ("bert", "bert.encoder.layer.0", ("intermediate", "output")),
]
CHILDREN = [(name, parent, child) for name, parent, children in LAYERS for child in children]


def make(name):
    return llama() if name == "llama" else CASES[name].model()


@pytest.mark.parametrize("adornment", ["forward hook", "forward pre-hook", "own forward"])
@pytest.mark.parametrize("name, parent, child", CHILDREN)
def test_children_of_patched_modules(name, parent, child, adornment):
    """Adorned before and after, they do what they do without a patch; plain again, as well."""
    plain, late = make(name), make(name)
    untouched = outputs(name, plain)
    ADORNMENTS[adornment](plain.get_submodule(parent), child)
    early, expected = copy.deepcopy(plain), outputs(name, plain)
    assert not torch.allclose(expected[0], untouched[0])
    hf.patch(early)
    close(name, outputs(name, early), expected)
    hf.patch(late)
    handle = ADORNMENTS[adornment](late.get_submodule(parent), child)
    close(name, outputs(name, late), expected)
    if handle is not None:
        handle.remove()
        close(name, outputs(name, late), untouched)


@pytest.mark.parametrize("adornment", ["pruning", "weight norm", "adapter", "quantised weight"])
@pytest.mark.parametrize(
    "name, parent, child",
    [case for case in CHILDREN if case[2] in ("fc1", "fc2", "wi", "wi_0", "down_proj", "dense")],
)
def test_layers_of_patched_modules(name, parent, child, adornment):
    """Twice, with gradients; an adapter calls what it has replaced."""
    models = [make(name), make(name)]
    hf.patch(models[1])
    for model in models:
        torch.manual_seed(0)
        ADORNMENTS[adornment](model.get_submodule(parent), child)
        model.parts = []
        for _ in range(2):
            out = outputs(name, model)
            weights = [p for p in model.parameters() if p.requires_grad]
            loss = torch.stack([x.square().mean() for x in out]).sum()
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            model.parts += [*out, *(g for g in grads if g is not None)]
    close(name, models[1].parts, models[0].parts)


@pytest.mark.parametrize("name, parent, child", CHILDREN)
def test_hooks_of_patched_modules(name, parent, child):
    """As many calls as without a patch, with the same inputs, also of a hook that removes
    itself."""
    calls = []
    for patched in (False, True):
        model, seen = make(name), []
        if patched:
            hf.patch(model)
        module = model.get_submodule(parent).get_submodule(child)
        handle = module.register_forward_hook(lambda m, args, y, seen=seen: seen.extend([*args, y]))
        outputs(name, model)
        handle.remove()
        handles = []
        handles.append(
            module.register_forward_hook(lambda *_, handles=handles: handles[0].remove())
        )
        calls.append(seen + outputs(name, model))
    assert len(calls[0]) == len(calls[1])
    close(name, *calls)


@pytest.mark.parametrize(
    "name, path",
    [
        ("t5", "encoder.block.0.layer.1.DenseReluDense.dropout"),
        ("bert", "bert.encoder.layer.0.output.dropout"),
        ("gpt2", "transformer.h.0.mlp.dropout"),
    ],
)
def test_patched_modules_ask_the_dropout_whether_it_drops(name, path):
    model = make(name)
    with hf.patch(model), torch.no_grad():
        expected = outputs(name, model)
        close(name, outputs(name, model), expected)
        model.get_submodule(path).train()
        assert not torch.allclose(outputs(name, model)[0], expected[0])


@pytest.mark.parametrize("name", [*MODELS, "llama"])
def test_copies_of_patched_models_have_their_own_weights(name):
    model = make(name)
    expected = outputs(name, model)
    hf.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), torch.load(file, weights_only=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for other in copies:
        close(name, outputs(name, other), expected)


def test_patched_models_compile_without_graph_breaks():
    for name in ("gpt2", "bart", "bert", "llama"):
        torch._dynamo.reset()
        model = make(name)
        model.set_attn_implementation("sdpa")
        expected = outputs(name, model)
        hf.patch(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(name, outputs(name, compiled), expected)


def test_patch_really_computes(monkeypatch):
    """Each norm and MLP goes through tfkern's functions."""
    model = CASES["bert"].model()
    calls = []
    for file, function in ((norms, "layer_norm"), (wholes, "mlp")):
        original = getattr(file, function)
        monkeypatch.setattr(
            file, function, lambda *a, f=original, n=function, **k: calls.append(n) or f(*a, **k)
        )
    with hf.patch(model), torch.no_grad():
        outputs("bert", model)
    # embedding, two blocks of two, the transform of the head
    assert calls.count("layer_norm") == 6 and calls.count("mlp") == 2


def test_patched_t5_drops_in_training():
    """Between the two layers of its MLP, where the fused one has no dropout."""
    model = CASES["t5"].model(dtype=torch.float32)
    with hf.patch(model):
        tokens = torch.randint(3, V, (1, 6))
        model.train()
        a, b = (model(tokens, decoder_input_ids=tokens).logits for _ in range(2))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", ["gpt2", "bert", "bart", "t5", "vit"])
def test_training(name):
    """Twenty steps of AdamW: the same losses."""
    losses = []
    for ours in (False, True):
        plain, model = twins(name)
        if ours:
            hf.patch(model)
        else:
            model = plain
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(20):
            out = outputs(name, model)
            loss = torch.stack([x.float().logsumexp(-1).mean() for x in out]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
