"""Presets have the published sizes, and fresh models the published deviations."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tfkern.models import Transformer, TransformerConfig, preset, presets

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
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "xlm-roberta-base": 278_295_186,
    "xlm-roberta-large": 560_142_482,
    "distilbert-base-uncased": 66_985_530,
    "mbart-large-cc25": 610_851_840,
    "mbart-large-50": 610_879_488,
    "opus-mt-en-de": 73_886_208,  # without the two tables of sinusoids in its files
    "pegasus-large": 568_699_904,
    "pegasus-xsum": 568_699_904,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "phi3-mini": 3_821_079_552,
    "phi3-medium": 13_960_238_080,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
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
    assert count("roberta-base", head="none", pooler=True) == 124_645_632
    assert count("xlm-roberta-large", head="none", pooler=True) == 559_890_432
    assert count("distilbert-base-uncased", head="none") == 66_362_880
    assert count("distilbert-base-cased", head="none") == 65_190_912


@pytest.mark.parametrize("name", [n for n in presets() if n not in COUNTS and "distil" not in n])
def test_parameter_counts_by_formula(name):
    """Products, biases, norms and tables add up, for presets without a published integer."""
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
        expected += (c.max_length + c.position_offset) * d
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


def test_initial_deviations():
    """Every tensor has the deviation of the published rules."""
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
        f"{block}.cross.kv_by_head": 256**-0.5, f"{block}.attention.out": (4 * 32) ** -0.5,
        f"{block}.mlp.gate": 256**-0.5, f"{block}.mlp.up": 256**-0.5,
        f"{block}.mlp.down": 512**-0.5,
    }.items():  # fmt: skip
        assert t5[f"{name}.weight"] == pytest.approx(expected, rel=0.03), name
    assert t5["encoder.positions.weight"] == pytest.approx(256**-0.5, rel=0.3)
    grouped = (
        Transformer(TransformerConfig(**big, init="t5", kv_heads=2)).decoder.blocks[0].attention
    )
    q, k, _ = grouped.qkv_by_head.weight.unflatten(0, (2, 4 * 64)).split((128, 64, 64), 1)
    assert q.std().item() == pytest.approx((256 * 64) ** -0.5, rel=0.03)
    assert k.std().item() == pytest.approx(256**-0.5, rel=0.03)
    xavier = deviations(init="xavier")
    assert xavier["decoder.blocks.0.mlp.fc1.weight"] == pytest.approx(
        math.sqrt(2 / (256 + 1024)), rel=0.03
    )
    assert xavier["embedding.weight"] == pytest.approx(256**-0.5, rel=0.03)


def test_fresh_models():
    """The last weight of a gated MLP is smaller, too; norms and biases change nothing."""
    config = TransformerConfig(dim=96, layers=8, heads=4, vocab_size=11, max_length=16, gated=True)
    state = Transformer(config).state_dict()
    padded = Transformer(replace(config, pad_token=3)).embedding.weight
    assert torch.equal(padded.any(1), torch.arange(11) != 3)
    std = state["decoder.blocks.3.mlp.down.weight"].std().item()
    assert std == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.1)
    norms = {n: x for n, x in state.items() if "norm" in n and n.endswith("weight")}
    biases = {n: x for n, x in state.items() if n.endswith("bias")}
    assert len(norms) == 17 and all(torch.equal(x, torch.ones(96)) for x in norms.values())
    assert len(biases) == 17 + 8 * 5 and not any(x.any() for x in biases.values())


def test_fresh_norms_that_are_stored_less_1():
    """All of them, those of queries and keys too, change nothing at first."""
    small = {"layers": 1, "dim": 16, "heads": 2, "head_dim": 8, "vocab_size": 11, "hidden_dim": 8}
    for name, kept in (("gemma3-1b", 0.0), ("olmo2-1b", 1.0)):
        config = preset(name, kv_heads=1, pad_token=0, start_token=None, end_token=None, **small)
        state = Transformer(config).state_dict()
        norms = {n: x for n, x in state.items() if "norm" in n}
        assert len(norms) == (7 if kept == 0 else 5)
        assert all(torch.equal(x, torch.full_like(x, kept)) for x in norms.values())


@pytest.mark.parametrize("name", ["qwen3-4b", "olmo2-32b", "gemma-2b", "gemma2-27b", "gemma3-1b"])
def test_presets_of_decoders_are_those_of_transformers(name, tmp_path):
    """What is written of a preset, transformers builds with as many parameters, names and sizes."""
    pytest.importorskip("huggingface")
    from transformers import AutoConfig, AutoModelForCausalLM

    from tfkern.models.convert import FAMILIES

    config = preset(name)
    told = [theirs for f in FAMILIES.values() if (theirs := f.describe(config)) is not None]
    assert len(told) == 1
    (tmp_path / "config.json").write_text(json.dumps(told[0]))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in theirs.parameters()) == COUNTS[name]
    kinds = getattr(theirs.config, "layer_types", None) or ["full_attention"] * config.layers
    assert [kind == "sliding_attention" for kind in kinds] == [
        w is not None for w in config.windows
    ]
