"""Published models as configurations, by name."""

from dataclasses import replace
from typing import Any

from tfkern.models.config import TransformerConfig as Config
from tfkern.nn import RotaryScaling

_VASWANI = Config(
    architecture="encoder_decoder", dim=512, layers=6, heads=8, vocab_size=37000,
    positions="sinusoidal", scale_embedding=True, post_norm=True, activation="relu", dropout=0.1,
    init="xavier",
)  # fmt: skip
_GPT1 = Config(
    dim=768, layers=12, heads=12, vocab_size=40478, max_length=512, post_norm=True, dropout=0.1,
    attention_dropout=0.1, init="normal",
)  # fmt: skip
_GPT2 = Config(
    dim=768, layers=12, heads=12, vocab_size=50257, max_length=1024, dropout=0.1,
    attention_dropout=0.1, start_token=50256, end_token=50256,
)  # fmt: skip
_GPT3 = replace(_GPT2, max_length=2048)
_BERT = Config(
    architecture="encoder", dim=768, layers=12, heads=12, vocab_size=30522, pad_token=0,
    token_types=2, embedding_norm=True, max_length=512, norm_eps=1e-12, post_norm=True,
    activation="gelu", dropout=0.1, attention_dropout=0.1, head="pretraining", pooler=True,
    init="normal",
)  # fmt: skip
_ROBERTA = replace(
    _BERT, vocab_size=50265, pad_token=1, token_types=1, position_offset=2, skip_pad=True,
    norm_eps=1e-5, head="mlm", pooler=False,
)  # fmt: skip
_XLM_ROBERTA = replace(_ROBERTA, vocab_size=250002)
_DISTILBERT = replace(_BERT, layers=6, token_types=0, head="mlm", pooler=False)
_BART = Config(
    architecture="encoder_decoder", dim=768, layers=6, heads=12, vocab_size=50265, pad_token=1,
    start_token=2, end_token=2, embedding_norm=True, max_length=1024, position_offset=2,
    post_norm=True, activation="gelu", dropout=0.1, logit_bias=True, init="normal",
    forced_last=2,
)  # fmt: skip
_BART_LARGE = replace(_BART, layers=12, dim=1024, heads=16)
_MBART = replace(
    _BART_LARGE, vocab_size=250027, post_norm=False, scale_embedding=True, start_token=0
)
_MARIAN = Config(
    architecture="encoder_decoder", dim=512, layers=6, heads=8, vocab_size=58101, pad_token=58100,
    start_token=58100, end_token=0, forced_last=0, max_length=512, positions="sinusoidal_halves",
    scale_embedding=True, post_norm=True, activation="silu", dropout=0.1, logit_bias=True,
    init="normal",
)  # fmt: skip
_PEGASUS = Config(
    architecture="encoder_decoder", dim=1024, layers=16, heads=16, vocab_size=96103, pad_token=0,
    start_token=0, end_token=1, forced_last=1, max_length=1024, positions="sinusoidal_halves",
    scale_embedding=True, activation="relu", dropout=0.1, attention_dropout=0.1, logit_bias=True,
    init="normal",
)  # fmt: skip
_T5 = Config(
    architecture="encoder_decoder", dim=768, layers=12, heads=12, head_dim=64, hidden_dim=3072,
    vocab_size=32128, pad_token=0, pad_trained=True, start_token=0, end_token=1,
    positions="relative", norm="rms_norm", norm_eps=1e-6, activation="relu", wide_output=True,
    attention_scale=1.0,
    bias=False, dropout=0.1, attention_dropout=0.1, logit_scale=768**-0.5, init="t5",
)  # fmt: skip
_T5_V1_1 = replace(
    _T5, gated=True, activation="gelu_tanh", hidden_dim=2048, tie_embeddings=False, logit_scale=1.0
)
_MT5 = replace(_T5_V1_1, vocab_size=250112)
_LLAMA = Config(
    dim=4096, layers=32, heads=32, hidden_dim=11008, vocab_size=32000, max_length=4096,
    start_token=1, end_token=2, positions="rotary", norm="rms_norm", gated=True, activation="silu",
    bias=False, tie_embeddings=False, init="normal",
)  # fmt: skip
_LLAMA3 = replace(
    _LLAMA, hidden_dim=14336, kv_heads=8, vocab_size=128256, max_length=8192, start_token=128000,
    end_token=128001, rotary_base=500000.0,
)  # fmt: skip
_LLAMA31 = replace(
    _LLAMA3, max_length=131072, rotary_scaling=RotaryScaling(kind="llama3", factor=8, length=8192)
)
_LLAMA32 = replace(
    _LLAMA31, tie_embeddings=True, hidden_dim=8192,
    rotary_scaling=RotaryScaling(kind="llama3", factor=32, length=8192),
)  # fmt: skip
_QWEN = replace(
    _LLAMA, vocab_size=152064, max_length=32768, norm_eps=1e-6, rotary_base=1e6, qkv_bias=True,
    start_token=151643, end_token=151643,
)  # fmt: skip
_SMALL_QWEN = replace(_QWEN, vocab_size=151936, tie_embeddings=True)
_QWEN3 = replace(
    _LLAMA, head_dim=128, kv_heads=8, vocab_size=151936, max_length=40960, norm_eps=1e-6,
    rotary_base=1e6, query_key_norm="head", start_token=151643, end_token=151645,
)  # fmt: skip
_SMALL_QWEN3 = replace(_QWEN3, tie_embeddings=True)
_OLMO2 = replace(
    _LLAMA, vocab_size=100352, norm_eps=1e-6, norm_place="after", query_key_norm="all",
    rotary_base=500000.0, pad_token=100277, start_token=None, end_token=100257,
)  # fmt: skip
_GEMMA = replace(
    _LLAMA, head_dim=256, vocab_size=256000, max_length=8192, pad_token=0, start_token=2,
    end_token=1, scale_embedding=True, norm="zero_centered_rms_norm", norm_eps=1e-6,
    activation="gelu_tanh", tie_embeddings=True,
)  # fmt: skip
_GEMMA2 = replace(
    _GEMMA, norm_place="both", window=4096, windowed=(True, False), attention_softcap=50.0,
    logit_softcap=30.0,
)  # fmt: skip
_GEMMA3 = replace(
    _GEMMA, heads=4, kv_heads=1, vocab_size=262144, max_length=32768, norm_place="both",
    query_key_norm="head", window=512, windowed=(True,) * 5 + (False,), rotary_base=1e6,
    window_rotary_base=1e4,
)  # fmt: skip
_MISTRAL = replace(_LLAMA, hidden_dim=14336, kv_heads=8, max_length=32768, window=4096)
_PHI3 = replace(
    _LLAMA, dim=3072, hidden_dim=8192, vocab_size=32064, window=2047, pad_token=32000,
    end_token=32000,
)  # fmt: skip
_OPT = replace(
    _GPT2, vocab_size=50272, max_length=2048, position_offset=2, pad_token=1, start_token=2,
    end_token=2, activation="relu", embedding_dropout=0.0, attention_dropout=0.0, init="normal",
)  # fmt: skip
_NEOX = Config(
    dim=768, layers=12, heads=12, vocab_size=50304, max_length=2048, start_token=0, end_token=0,
    positions="rotary", rotary_fraction=0.25, parallel=True, activation="gelu",
    tie_embeddings=False, init="normal",
)  # fmt: skip
_VIT = Config(
    architecture="encoder", dim=768, layers=12, heads=12, image_size=224, patch_size=16,
    norm_eps=1e-12, activation="gelu", head="classification", classes=1000, init="truncated",
)  # fmt: skip


def _sized(base: Config, *shapes: tuple) -> list[Config]:
    """The base in other sizes: layers, dim, heads, and hidden_dim where it is not 4 dim."""
    return [
        replace(base, layers=n, dim=dim, heads=heads, hidden_dim=hidden[0] if hidden else None)
        for n, dim, heads, *hidden in shapes
    ]


def _grouped(*shapes: tuple) -> list[Config]:
    """Configurations by base, layers, dim, heads, key heads, hidden_dim."""
    return [
        replace(base, layers=n, dim=dim, heads=heads, kv_heads=kv_heads, hidden_dim=hidden)
        for base, n, dim, heads, kv_heads, hidden in shapes
    ]


def _t5(base: Config, *shapes: tuple) -> list[Config]:
    sized = _sized(base, *shapes)
    return [replace(c, logit_scale=c.dim**-0.5) if c.tie_embeddings else c for c in sized]


def _named(names: str, configs: list[Config]) -> dict[str, Config]:
    return dict(zip(names.split(), configs, strict=True))


_PRESETS: dict[str, Config] = {
    "transformer-base": _VASWANI,
    "transformer-big": replace(_VASWANI, dim=1024, heads=16, dropout=0.3),
    "gpt1": _GPT1,
    **_named(
        "gpt2 gpt2-medium gpt2-large gpt2-xl",
        _sized(_GPT2, (12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25)),
    ),
    **_named(
        "gpt3-125m gpt3-350m gpt3-760m gpt3-1.3b gpt3-2.7b gpt3-6.7b gpt3-175b",
        _sized(
            _GPT3, (12, 768, 12), (24, 1024, 16), (24, 1536, 16), (24, 2048, 16), (32, 2560, 32),
            (32, 4096, 32), (96, 12288, 96)
        ),
    ),
    "gpt3-13b": replace(_GPT3, layers=40, dim=5140, heads=40, head_dim=128),
    "bert-base-uncased": _BERT,
    "bert-base-cased": replace(_BERT, vocab_size=28996),
    "bert-large-uncased": replace(_BERT, layers=24, dim=1024, heads=16),
    "minilm-l6-h384": replace(_BERT, layers=6, dim=384, heads=12, head="none"),
    **_named("roberta-base roberta-large", _sized(_ROBERTA, (12, 768, 12), (24, 1024, 16))),
    **_named(
        "xlm-roberta-base xlm-roberta-large",
        _sized(_XLM_ROBERTA, (12, 768, 12), (24, 1024, 16)),
    ),
    "distilbert-base-uncased": _DISTILBERT,
    "distilbert-base-cased": replace(_DISTILBERT, vocab_size=28996),
    "bart-base": _BART,
    "bart-large": _BART_LARGE,
    "mbart-large-cc25": _MBART,
    "mbart-large-50": replace(_MBART, vocab_size=250054, start_token=2, activation="relu"),
    "opus-mt-en-de": _MARIAN,
    "pegasus-large": _PEGASUS,
    "pegasus-xsum": replace(_PEGASUS, max_length=512),
    **_named(
        "t5-small t5-base t5-large",
        _t5(_T5, (6, 512, 8, 2048), (12, 768, 12, 3072), (24, 1024, 16, 4096)),
    ),
    **_named(
        "t5-3b t5-11b",
        _t5(replace(_T5, head_dim=128), (24, 1024, 32, 16384), (24, 1024, 128, 65536)),
    ),
    **_named(
        "t5-v1.1-small t5-v1.1-base t5-v1.1-large t5-v1.1-xl t5-v1.1-xxl",
        _t5(
            _T5_V1_1, (8, 512, 6, 1024), (12, 768, 12, 2048), (24, 1024, 16, 2816),
            (24, 2048, 32, 5120), (24, 4096, 64, 10240)
        ),
    ),
    **_named(
        "mt5-small mt5-base mt5-large mt5-xl mt5-xxl",
        _t5(
            _MT5, (8, 512, 6, 1024), (12, 768, 12, 2048), (24, 1024, 16, 2816),
            (24, 2048, 32, 5120), (24, 4096, 64, 10240)
        ),
    ),
    **_named(
        "llama-2-7b llama-2-13b", _sized(_LLAMA, (32, 4096, 32, 11008), (40, 5120, 40, 13824))
    ),
    "llama-2-70b": replace(_LLAMA, layers=80, dim=8192, heads=64, kv_heads=8, hidden_dim=28672),
    **_named(
        "llama-3-8b llama-3-70b", _sized(_LLAMA3, (32, 4096, 32, 14336), (80, 8192, 64, 28672))
    ),
    "llama-3.1-8b": _LLAMA31,
    "llama-3.1-70b": replace(_LLAMA31, layers=80, dim=8192, heads=64, hidden_dim=28672),
    "llama-3.2-1b": replace(_LLAMA32, layers=16, dim=2048, head_dim=64),
    "llama-3.2-3b": replace(_LLAMA32, layers=28, dim=3072, heads=24, head_dim=128),
    "tinyllama-1.1b": replace(
        _LLAMA, layers=22, dim=2048, kv_heads=4, hidden_dim=5632, max_length=2048
    ),
    **_named(
        "qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b",
        _grouped(
            (_SMALL_QWEN, 24, 896, 14, 2, 4864),
            (_SMALL_QWEN, 28, 1536, 12, 2, 8960),
            (_SMALL_QWEN, 36, 2048, 16, 2, 11008),
            (_QWEN, 28, 3584, 28, 4, 18944),
            (replace(_QWEN, norm_eps=1e-5), 48, 5120, 40, 8, 13824),
            (replace(_QWEN, norm_eps=1e-5), 64, 5120, 40, 8, 27648),
            (replace(_QWEN, norm_eps=1e-5), 80, 8192, 64, 8, 29568),
        ),
    ),
    **_named(
        "qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b",
        _grouped(
            (_SMALL_QWEN3, 28, 1024, 16, 8, 3072),
            (_SMALL_QWEN3, 28, 2048, 16, 8, 6144),
            (_SMALL_QWEN3, 36, 2560, 32, 8, 9728),
            (_QWEN3, 36, 4096, 32, 8, 12288),
            (_QWEN3, 40, 5120, 40, 8, 17408),
            (_QWEN3, 64, 5120, 64, 8, 25600),
        ),
    ),
    **_named(
        "olmo2-1b olmo2-7b olmo2-13b olmo2-32b",
        _grouped(
            (_OLMO2, 16, 2048, 16, 16, 8192),
            (_OLMO2, 32, 4096, 32, 32, 11008),
            (_OLMO2, 40, 5120, 40, 40, 13824),
            (_OLMO2, 64, 5120, 40, 8, 27648),
        ),
    ),
    **_named(
        "gemma-2b gemma-7b gemma2-2b gemma2-9b gemma2-27b gemma3-270m gemma3-1b",
        _grouped(
            (_GEMMA, 18, 2048, 8, 1, 16384),
            (_GEMMA, 28, 3072, 16, 16, 24576),
            (_GEMMA2, 26, 2304, 8, 4, 9216),
            (_GEMMA2, 42, 3584, 16, 8, 14336),
            (replace(_GEMMA2, head_dim=128, attention_scale=144**-0.5), 46, 4608, 32, 16, 36864),
            (_GEMMA3, 18, 640, 4, 1, 2048),
            (_GEMMA3, 26, 1152, 4, 1, 6912),
        ),
    ),
    "mistral-7b-v0.1": _MISTRAL,
    "mistral-7b-v0.3": replace(_MISTRAL, vocab_size=32768, rotary_base=1e6, window=None),
    "phi3-mini": _PHI3,
    "phi3-medium": replace(_PHI3, layers=40, dim=5120, heads=40, kv_heads=10, hidden_dim=17920),
    **_named(
        "pythia-70m pythia-160m pythia-410m pythia-1b pythia-1.4b pythia-2.8b",
        _sized(
            _NEOX, (6, 512, 8), (12, 768, 12), (24, 1024, 16), (16, 2048, 8), (24, 2048, 16),
            (32, 2560, 32)
        ),
    ),
    "pythia-6.9b": replace(_NEOX, layers=32, dim=4096, heads=32, vocab_size=50432),
    "pythia-12b": replace(_NEOX, layers=36, dim=5120, heads=40, vocab_size=50688),
    "gpt-neox-20b": replace(
        _NEOX, layers=44, dim=6144, heads=64, vocab_size=50432, activation="gelu_tanh"
    ),
    **_named(
        "opt-125m opt-1.3b opt-2.7b opt-6.7b opt-13b opt-30b opt-66b",
        _sized(
            _OPT, (12, 768, 12), (24, 2048, 32), (32, 2560, 32), (32, 4096, 32), (40, 5120, 40),
            (48, 7168, 56), (64, 9216, 72)
        ),
    ),
    "opt-350m": replace(_OPT, layers=24, dim=1024, heads=16, embedding_dim=512, post_norm=True),
    **_named("vit-b16 vit-l16", _sized(_VIT, (12, 768, 12), (24, 1024, 16))),
    **_named(
        "vit-b32 vit-l32", _sized(replace(_VIT, patch_size=32), (12, 768, 12), (24, 1024, 16))
    ),
    "vit-h14": replace(_VIT, layers=32, dim=1280, heads=16, patch_size=14),
}  # fmt: skip


def presets() -> list[str]:
    """The names that `preset` knows."""
    return list(_PRESETS)


def preset(name: str, **changes: Any) -> Config:
    """The configuration of a published model.

    The 2017 base and big (Vaswani et al.), GPT-1 (Radford et al. 2018), GPT-2 (Radford et al.
    2019), GPT-3 (Brown et al. 2020; its sizes alone: every second of its layers is sparse, which
    these are not, and the 1.3b has 16 heads, since 24 of 128 would not fit its size), BERT (Devlin
    et al. 2019), MiniLM (Wang et al. 2020), RoBERTa (Liu et al. 2019), XLM-R (Conneau et al. 2020),
    DistilBERT (Sanh et al. 2019), BART (Lewis et al. 2020), mBART (Liu et al. 2020), Marian's
    OPUS-MT (Tiedemann, Thottingal 2020), Pegasus (Zhang et al. 2020), T5 and v1.1 (Raffel et al.
    2020), mT5 (Xue et al. 2021), Llama 2 (Touvron et al. 2023) and 3 (Grattafiori et al. 2024),
    TinyLlama (Zhang et al. 2024), Mistral (Jiang et al. 2023), Qwen2.5 (Yang et al. 2024) and 3
    (Yang et al. 2025), OLMo 2 (Team OLMo 2025), Gemma 1, 2 and 3 (Gemma Team 2024, 2025), GPT-NeoX
    (Black et al. 2022), Pythia (Biderman et al. 2023), Phi-3 (Abdin et al. 2024; that of 4096
    tokens), OPT (Zhang et al. 2022), ViT (Dosovitskiy et al. 2021; with classes of ImageNet).

        model = Transformer(preset("bert-base-uncased", head="classification", classes=3))

    Args:
        name: one of `presets()`.
        changes: fields of `TransformerConfig` to be changed.

    Raises:
        ValueError: an unknown name, or changes that do not fit.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(_PRESETS)}")
    return replace(_PRESETS[name], **changes)
