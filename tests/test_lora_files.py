"""Adapters on disk, with peft as the oracle of what is written, of what is read and of results."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tfkern.integrations import hf
from tfkern.models import Transformer, adapt, load, load_adapter, save_adapter, without_adapters
from tfkern.models.adapters import adapter_parameters, merge, unload
from tfkern.nn import LoRALinear

transformers = pytest.importorskip("transformers")

VOCAB = 23
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, **_TOKENS,
}  # fmt: skip
FAMILIES = {
    "GPT2LMHeadModel": {
        "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **_TOKENS,
    },
    "LlamaForCausalLM": _WIDE | {"num_key_value_heads": 2},
    "Qwen2ForCausalLM": _WIDE | {"num_key_value_heads": 2},
    "Phi3ForCausalLM": _WIDE,
    "GPTNeoXForCausalLM": _WIDE | {"hidden_size": 32},
    "BertForSequenceClassification": _WIDE | {"num_labels": 3},
    "BertModel": _WIDE,
    "T5ForConditionalGeneration": {
        "vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
SOME = ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForSequenceClassification"]
QKV = {
    "GPT2LMHeadModel": ["c_attn"],
    "LlamaForCausalLM": ["q_proj", "v_proj"],
    "Qwen2ForCausalLM": ["v_proj", "k_proj", "down_proj"],
    "Phi3ForCausalLM": ["qkv_proj", "gate_up_proj"],
    "GPTNeoXForCausalLM": ["query_key_value", "dense"],
    "BertForSequenceClassification": ["query", "value", "intermediate.dense"],
    "BertModel": ["query", "key", "value"],
    "T5ForConditionalGeneration": ["q", "v", "wi"],
}


@pytest.fixture(autouse=True)
def _small(one_thread):
    """All models here are small."""


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def theirs(name, dtype=torch.float64):
    """A small model of transformers whose parameters are all random."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**FAMILIES[name]))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval().to(dtype)


def ours(model, folder):
    """The same model as a `Transformer`."""
    model.save_pretrained(folder)
    return load(folder)


def tokens(seed=0):
    return torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def result(model):
    """The logits, or hidden states, of a model of theirs or ours."""
    x = tokens()
    if not hasattr(model.config, "model_type"):
        return model(x, **({"source": x.flip(1)} if model.encoder and model.decoder else {}))
    if model.config.is_encoder_decoder:
        return model(input_ids=x.flip(1), decoder_input_ids=x).logits
    found = model(x)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def disturb(parameters, size=0.1, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p += size * torch.randn_like(p)


def trained_by_peft(peft, model, **options):
    """A model that peft gave adapters, with other numbers, as training makes them."""
    found = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    disturb([p for p in found.parameters() if p.requires_grad])
    return found


OPTIONS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {r"0\..*": 5, r"1\..*[kv]\w*": 6}, "alpha_pattern": {r"1\..*[qv]\w*": 32.5},
    },
}  # fmt: skip


def same(theirs, ours):
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def near(theirs, ours):
    """Models of transformers compute norms and rotary positions in float32 whatever they are."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# The names of the model itself


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SOME)
def test_adapters_of_peft_are_read(peft, tmp_path, name, options):
    base = theirs(name)
    heads = {"modules_to_save": ["classifier"]} if "Classification" in name else {}
    model = trained_by_peft(
        peft, copy.deepcopy(base), r=4, target_modules=QKV[name], **OPTIONS[options], **heads
    )
    model.save_pretrained(tmp_path)
    found = load_adapter(copy.deepcopy(base), tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        re.sub(r"\.(lora_A|lora_B)\.weight$", r".\1", n.removeprefix("base_model.model.")).replace(
            "lora_magnitude_vector", "magnitude"
        ): x
        for n, x in file.items()
    }
    mine = adapter_parameters(found)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[n], x.to(mine[n].dtype)) for n, x in expected.items())
    same(result(model), result(found))
    with model.disable_adapter(), without_adapters(found):
        same(result(model), result(found))
        same(result(base), result(found))
    same(result(model), result(merge(found)))
    same(result(model.merge_and_unload()), result(unload(found)))


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.1\..*(q|up)_proj"])
def test_targets_mean_what_they_mean_in_peft(peft, targets):
    base = theirs("LlamaForCausalLM")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets))
    expected = {
        n.removeprefix("base_model.model.")
        for n, m in model.named_modules()
        if hasattr(m, "lora_A")
    }
    adapt(base, targets)
    assert {n for n, m in base.named_modules() if isinstance(m, LoRALinear)} == expected


@pytest.mark.parametrize("options", ["plain", "dora", "rslora"])
@pytest.mark.parametrize("name", SOME)
def test_peft_reads_our_adapters(peft, tmp_path, name, options):
    told = OPTIONS[options]
    base = theirs(name)
    heads = ["classifier"] if "Classification" in name else []
    model = adapt(
        copy.deepcopy(base), QKV[name], rank=4, alpha=told.get("lora_alpha", 16), trained=heads,
        rslora="use_rslora" in told, dora="use_dora" in told,
    )  # fmt: skip
    disturb(adapter_parameters(model).values())
    save_adapter(model, tmp_path, base="a name")
    found = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False
    )
    assert found.peft_config["default"].base_model_name_or_path == "a name"
    state = peft.get_peft_model_state_dict(found)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == file.keys()
    assert all(torch.equal(state[n], file[n].to(state[n].dtype)) for n in file)
    same(result(found), result(model))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    mine = adapter_parameters(again)
    for n, p in adapter_parameters(model).items():
        assert torch.equal(p, mine[n])
    assert torch.equal(result(again), result(model))


def test_ranks_of_several_layers_go_through_peft(peft, tmp_path):
    """Names of which one ends in another, and ranks and alphas by layer."""
    names = ["a", "parts.a", "parts.x.a", "parts.x.b", "parts.b"]
    inner = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    parts = nn.ModuleDict({"x": inner, "a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "parts": parts})
    torch.manual_seed(0)
    plain = copy.deepcopy(model)
    for i, (name, rank) in enumerate(zip(names, (3, 1, 1, 2, 2), strict=True)):
        parent, _, own = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, i + 0.5)
        nn.init.normal_(layer.lora_B)
        model.get_submodule(parent)._modules[own] = layer
    save_adapter(model, tmp_path)
    found = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    again = load_adapter(copy.deepcopy(plain), tmp_path)
    x = torch.randn(4, 6)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            expected = found.base_model.model.get_submodule(name)
            assert expected.r["default"] == layer.rank
            assert expected.scaling["default"] == layer.scaling
            torch.testing.assert_close(layer(x), expected(x))
            assert torch.equal(again.get_submodule(name)(x), layer(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", FAMILIES)
def test_patched_models_see_adapters(peft, tmp_path, every_size, name, when):
    base = theirs(name)
    model = trained_by_peft(peft, copy.deepcopy(base), r=4, target_modules="all-linear")
    model.save_pretrained(tmp_path)
    expected = result(model)
    if when == "before":
        with hf.patch(base) as patched:
            assert patched.names
            load_adapter(base, tmp_path)
            near(expected, result(base))
            near(expected, result(merge(base)))
    else:
        load_adapter(base, tmp_path)
        with hf.patch(base):
            near(expected, result(base))
            near(expected, result(unload(base)))
    near(expected, result(base if when == "after" else unload(base)))


# The names of Hugging Face's models, for a `Transformer`


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformer_reads_adapters_of_their_model(peft, tmp_path, name, options):
    base = theirs(name)
    heads = {"modules_to_save": ["classifier"]} if "Classification" in name else {}
    model = trained_by_peft(
        peft, copy.deepcopy(base), r=3, target_modules=QKV[name], **OPTIONS[options], **heads
    )
    model.save_pretrained(tmp_path / "adapter")
    found = ours(base, tmp_path / "base")
    near(result(base), result(found))
    load_adapter(found, tmp_path / "adapter")
    assert (result(model) - result(base)).abs().max() > 1e-3
    near(result(model), result(found))
    with without_adapters(found):
        near(result(base), result(found))
    near(result(model), result(unload(found)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_their_model_reads_adapters_of_a_transformer(peft, tmp_path, name, dora):
    base = theirs(name)
    model = ours(base, tmp_path / "base")
    heads = ["classifier"] if "Classification" in name else []
    adapt(model, rank=3, alpha=8, dora=dora, trained=heads)
    disturb(adapter_parameters(model).values())
    save_adapter(model, tmp_path / "adapter", form="huggingface")
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    expected = result(found)
    assert (expected - result(base)).abs().max() > 1e-3
    near(expected, result(model))
    again = load_adapter(ours(base, tmp_path / "base"), tmp_path / "adapter")
    near(expected, result(again))
    if "Phi3" not in name:  # whose layer for gate and up joins two of ours
        mine = adapter_parameters(again)
        for n, p in adapter_parameters(model).items():
            assert torch.equal(p, mine[n]), n
    save_adapter(model, tmp_path / "own")
    again = load_adapter(ours(base, tmp_path / "base"), tmp_path / "own")
    assert torch.equal(result(again), result(model))


def test_some_layers_of_a_joined_one(peft, tmp_path):
    """Phi-3 has gate and up in one layer; here only one of them has an adapter."""
    base = theirs("Phi3ForCausalLM")
    model = adapt(ours(base, tmp_path / "base"), ["up"], rank=2, dora=True)
    disturb(adapter_parameters(model).values())
    save_adapter(model, tmp_path / "adapter", form="huggingface")
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    near(result(found), result(model))


def test_what_families_lack_is_refused(tmp_path):
    base = theirs("GPT2LMHeadModel")
    model = ours(base, tmp_path / "base")
    save_adapter(adapt(copy.deepcopy(model), trained=["embedding"]), tmp_path / "own")
    with pytest.raises(ValueError, match="embedding.weight is trained whole, and the table"):
        save_adapter(
            adapt(copy.deepcopy(model), trained=["embedding"]), tmp_path, form="huggingface"
        )
    with pytest.raises(ValueError, match="form huggingface needs a tfkern.models.Transformer"):
        save_adapter(adapt(base), tmp_path, form="huggingface")
    with pytest.raises(ValueError, match="form must be own or huggingface, got 'peft'"):
        save_adapter(base, tmp_path, form="peft")
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no adapters"):
        save_adapter(theirs("GPT2LMHeadModel"), tmp_path)
    config = copy.deepcopy(model.config)
    strange = adapt(Transformer(replace(config, norm="batch_norm")))
    with pytest.raises(ValueError, match="no family of Hugging Face has the configuration"):
        save_adapter(strange, tmp_path, form="huggingface")


# Files that do not fit


def written(folder, change=None, **options):
    """A folder with an adapter of Llama, and other values in adapter_config.json."""
    model = adapt(theirs("LlamaForCausalLM"), ["q_proj", "v_proj"], rank=2)
    save_adapter(model, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    if change is not None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = .* is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = .* is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters = .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"invented_later": 1}, "invented_later = 1 is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true, and no weight"),
        ({"r": 3}, r"q_proj has shape \(2, 16\), and its rank is 3"),
        ({"r": "2"}, "r must be a number, got '2'"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern must have numbers by name"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\('"),
        ({"target_modules": ["k_proj"]}, "target_modules do not name model.layers.0.self_attn"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"lora_dropout": 2}, "dropout must lie in"),
    ],
    ids=str,
)
def test_options_that_we_lack_are_refused(tmp_path, options, told):
    model = theirs("LlamaForCausalLM")
    with pytest.raises(ValueError, match=told):
        load_adapter(model, written(tmp_path, **options))
    assert all(p.requires_grad for p in model.parameters())


CHANGES = {
    "is neither of an adapter nor of modules_to_save": lambda s: s.update(
        {"base_model.model.lm_head.weight": torch.ones(2)}
    ),
    "does not begin with base_model.model.": lambda s: s.update({"x": torch.ones(2)}),
    "q_proj has no lora_B.weight": lambda s: s.pop(f"{Q}.lora_B.weight"),
    r"lora_B of .*q_proj has shape \(3, 2\), expected \(16, 2\)": lambda s: s.update(
        {f"{Q}.lora_B.weight": torch.ones(3, 2)}
    ),
    "lora_A of .* has type torch.int8": lambda s: s.update(
        {f"{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)}
    ),
    "lora_embedding_A.* is not supported": lambda s: s.update(
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 3)}
    ),
    "target_modules do not name model.layers.7.self_attn.q_proj": lambda s: s.update(
        {n.replace("0", "7"): s.pop(n) for n in list(s) if ".0." in n}
    ),
    "there are no adapters": lambda s: s.clear(),
}


@pytest.mark.parametrize("told", CHANGES)
def test_weights_that_do_not_fit_are_refused(tmp_path, told):
    model = theirs("LlamaForCausalLM")
    with pytest.raises(ValueError, match=told):
        load_adapter(model, written(tmp_path, CHANGES[told]))
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_a_transformer_tells_what_it_lacks(tmp_path):
    folder = written(tmp_path / "adapter")
    other = ours(theirs("GPT2LMHeadModel"), tmp_path / "base")
    with pytest.raises(
        ValueError, match="q_proj is no layer of the model, nor of Hugging Face's gpt2"
    ):
        load_adapter(other, folder)
    with pytest.raises(ValueError, match="No such file"):
        load_adapter(other, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_adapter(other, folder)
    model = adapt(other)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(model, folder)


def test_a_folder_keeps_its_adapter_if_a_save_fails(tmp_path, monkeypatch):
    model = adapt(theirs("LlamaForCausalLM"))
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    disturb(adapter_parameters(model).values())

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tfkern.models.adapters.disk.json.dumps", fail)  # behind the weights
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
