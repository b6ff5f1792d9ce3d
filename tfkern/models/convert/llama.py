"""Llama and its like: rotary positions, RMS norms, gated MLPs, queries that share keys."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tfkern.files import shown
from tfkern.models.config import TransformerConfig
from tfkern.models.convert import rotary
from tfkern.models.convert.family import (
    ACTIVATIONS,
    Family,
    Field,
    Rule,
    activation_name,
    among,
    heads_of,
    like,
    linear,
    only,
    rule,
)


def _check_types(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list or null, got {shown(value)}")
    for kind in value:
        if kind not in _TYPES:
            raise ValueError(f"{name}: {shown(kind)} is not one of {', '.join(_TYPES)}")


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be an integer that is not negative, got {shown(value)}")


FULL, WINDOWED = "full_attention", "sliding_attention"  # blocks without and with the window
_TYPES = (FULL, WINDOWED)
LAYER_TYPES = Field(_check_types, None)


def windows(
    theirs: dict[str, Any], window: int | None, windowed: Callable[[int], bool]
) -> dict[str, Any]:
    """The fields of a configuration for blocks of which some have a window.

    Args:
        windowed: of a block, from its index; asked where config.json has no layer_types.
    """
    layers, types = theirs["num_hidden_layers"], theirs["layer_types"]
    if types is None:
        types = [_TYPES[windowed(i)] for i in range(layers)]
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers is {layers}")
    if WINDOWED not in types:
        return {}
    if window is None:
        raise ValueError(f"layer_types has {WINDOWED}, and there is no sliding_window")
    some = FULL in types
    return {"window": window, "windowed": tuple(x == WINDOWED for x in types) if some else None}


def layer_types(config: TransformerConfig) -> list[str]:
    """The names of the blocks in config.json."""
    return [_TYPES[window is not None] for window in config.windows]


_FIELDS = {
    "hidden_size": like("dim"),
    "num_hidden_layers": like("layers"),
    "num_attention_heads": like("heads"),
    "num_key_value_heads": like("kv_heads", None),
    "head_dim": like("head_dim", None),
    "intermediate_size": like("hidden_dim"),
    "vocab_size": like("vocab_size"),
    "max_position_embeddings": like("max_length", 2048),
    "hidden_act": among(ACTIVATIONS, "silu"),
    "rms_norm_eps": like("norm_eps", 1e-6),
    "attention_dropout": like("attention_dropout", 0.0),
    **rotary.FIELDS,
    "tie_word_embeddings": like("tie_embeddings", False),
    "pad_token_id": like("pad_token", None),
    "bos_token_id": like("start_token", 1, null=True),
    "eos_token_id": like("end_token", 2, null=True),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    dim, heads, size = (theirs[x] for x in ("hidden_size", "num_attention_heads", "head_dim"))
    if size is not None and heads * size == dim:
        size = None  # as in files that leave it out
    return {
        "dim": dim,
        "layers": theirs["num_hidden_layers"],
        "heads": heads,
        "kv_heads": theirs["num_key_value_heads"],
        "head_dim": size,
        "hidden_dim": theirs["intermediate_size"],
        "vocab_size": theirs["vocab_size"],
        "norm": "rms_norm",
        "norm_eps": theirs["rms_norm_eps"],
        "gated": True,
        "activation": ACTIVATIONS[theirs["hidden_act"]],
        "bias": False,
        "attention_dropout": theirs["attention_dropout"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "pad_token": theirs["pad_token_id"],
        "start_token": theirs["bos_token_id"],
        "end_token": theirs["eos_token_id"],
        "init": "normal",
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        **rotary.write(config),
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }


_NORMS = {
    "before": {"norm1": "input", "norm2": "post_attention"},
    "after": {"norm1_out": "post_attention", "norm2_out": "post_feedforward"},
    "both": {
        "norm1": "input",
        "norm1_out": "post_attention",
        "norm2": "pre_feedforward",
        "norm2_out": "post_feedforward",
    },
}


def _rules(answers: str, joined: bool, config: TransformerConfig) -> Iterator[Rule]:
    base = answers if config.head == "span" else "model"
    yield rule("embedding.weight", f"{base}.embed_tokens.weight")
    yield rule("decoder.norm.weight", f"{base}.norm.weight")
    for i in range(config.layers):
        ours, theirs = f"decoder.blocks.{i}", f"{base}.layers.{i}"
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in (("qkv",) if joined else "qkv")]
        heads, biased = heads_of(config), config.qkv_biased
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, biased, heads=heads)
        yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", config.out_biased)
        for name in ("down",) if joined else ("gate", "up", "down"):
            yield from linear(f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}_proj", config.bias)
        if joined:
            pair = [f"{ours}.mlp.{name}.weight" for name in ("gate", "up")]
            yield rule(pair, f"{theirs}.mlp.gate_up_proj.weight")
        for name, place in _NORMS[config.norm_place].items():
            yield rule(f"{ours}.{name}.weight", f"{theirs}.{place}_layernorm.weight")
        if config.query_key_norm != "none":
            for name in ("query", "key"):
                norm = f"{theirs}.self_attn.{name[0]}_norm.weight"
                yield rule(f"{ours}.attention.{name}_norm.weight", norm)
    if config.head == "lm" and not config.tie_embeddings:
        yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head in ("classification", "token"):
        yield from linear("classifier", "score", bias=config.head == "token")
    elif config.head == "span":
        yield from linear("classifier", "qa_outputs")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    tied = config.tie_embeddings and config.head == "lm"
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


_HEADS: dict[str, dict[str, Any]] = {
    "ForCausalLM": {"head": "lm"},
    "Model": {"head": "none"},
    "ForSequenceClassification": {"head": "classification", "classifier_bias": False},
    "ForTokenClassification": {"head": "token"},
    "ForQuestionAnswering": {"head": "span"},
}


def heads(name: str, *kinds: str) -> dict[str, dict[str, Any]]:
    """The classes of transformers whose names begin with this one, and what they mean."""
    return {f"{name}{kind}": _HEADS[kind] for kind in kinds or _HEADS}


def family(
    model_type: str,
    heads: dict[str, dict[str, Any]],
    fields: dict[str, Field],
    read: Callable[[dict[str, Any]], dict[str, Any]],
    write: Callable[[TransformerConfig], dict[str, Any]],
    positions: Callable[[dict[str, Any]], dict[str, Any]] = rotary.read,
    answers: str = "transformer",
    joined: bool = False,
) -> Family:
    """A family that differs from Llama in some fields.

    Args:
        fields, read, write: as in `Family`, in place of Llama's or besides.
        positions: reads the fields of rotary positions.
        answers: prefix of the names of weights in a model that finds answers.
        joined: whether files have queries, keys and values in one layer, and so gate and up.
    """
    return Family(
        model_type,
        "model",
        heads,
        _FIELDS | fields,
        lambda theirs: _read(theirs) | positions(theirs) | read(theirs),
        lambda config: _write(config) | write(config),
        partial(_rules, answers, joined),
        _aliases,
        ignored=(".rotary_emb.inv_freq",),
    )


def _biased(theirs: dict[str, Any]) -> dict[str, Any]:
    bias = theirs["mlp_bias"]
    attention = None if theirs["attention_bias"] == bias else theirs["attention_bias"]
    return {"bias": bias, "qkv_bias": attention, "out_bias": attention}


def _read_phi3(theirs: dict[str, Any]) -> dict[str, Any]:
    dropout = theirs["resid_pdrop"]
    return {
        "dropout": dropout,
        "embedding_dropout": 0.0 if dropout else None,  # no model applies embd_pdrop
        "window": theirs["sliding_window"],
    }


def _write_phi3(config: TransformerConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"resid_pdrop": config.dropout, "sliding_window": config.window}
    scaling = config.rotary_scaling
    if scaling is None or scaling.length is None or config.max_length is None:
        return fields
    fields["original_max_position_embeddings"] = scaling.length
    if scaling.amplitude is None and scaling.factor == config.max_length / scaling.length:
        # transformers 4 takes no other numbers, and the factor follows from the lengths
        numbers = {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        fields["rope_scaling"] = {"type": scaling.kind, **numbers}
    return fields


_QWEN_FIELDS = {
    "use_sliding_window": like("bias", False),
    "sliding_window": like("window", 4096, null=True),
    "max_window_layers": Field(_check_count, 28),
    "layer_types": LAYER_TYPES,
    "num_key_value_heads": like("kv_heads", 32, null=True),
    "max_position_embeddings": like("max_length", 32768),
    "bos_token_id": like("start_token", None),
    "eos_token_id": like("end_token", None),
}


def _read_qwen(theirs: dict[str, Any]) -> dict[str, Any]:
    window = theirs["sliding_window"] if theirs["use_sliding_window"] else None
    first = theirs["max_window_layers"]
    return windows(theirs, window, lambda i: window is not None and i >= first)


def _write_qwen(config: TransformerConfig) -> dict[str, Any]:
    types = layer_types(config)
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": types.index(WINDOWED) if WINDOWED in types else config.layers,
        "layer_types": types,
    }


LLAMA = family(
    "llama",
    heads("Llama"),
    {"attention_bias": like("bias", False), "mlp_bias": like("bias", False)},
    _biased,
    lambda config: {"attention_bias": config.qkv_biased, "mlp_bias": config.bias},
)
MISTRAL = family(
    "mistral",
    heads("Mistral"),
    {
        "sliding_window": like("window", 4096, null=True),
        "num_key_value_heads": like("kv_heads", 8, null=True),
        "max_position_embeddings": like("max_length", 131072),
    },
    lambda theirs: {"window": theirs["sliding_window"]},
    lambda config: {"sliding_window": config.window},
    answers="model",
)
QWEN2 = family(
    "qwen2",
    heads("Qwen2"),
    _QWEN_FIELDS,
    lambda theirs: _read_qwen(theirs) | {"qkv_bias": True},
    _write_qwen,
)
QWEN3 = family(
    "qwen3",
    heads("Qwen3"),
    _QWEN_FIELDS | {"head_dim": like("head_dim", 128), "attention_bias": only(False)},
    lambda theirs: _read_qwen(theirs) | {"query_key_norm": "head"},
    _write_qwen,
)
OLMO2 = family(
    "olmo2",
    heads("Olmo2", "ForCausalLM", "Model", "ForSequenceClassification"),
    {
        "rms_norm_eps": like("norm_eps", 1e-5),
        "attention_bias": only(False),
        "pad_token_id": like("pad_token", 1, null=True),
        "bos_token_id": like("start_token", None),
        "eos_token_id": like("end_token", 50279, null=True),
    },
    lambda theirs: {"norm_place": "after", "query_key_norm": "all"},
    lambda config: {},
)
_SU = {"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}
PHI3 = family(
    "phi3",
    heads("Phi3", "ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification"),
    {
        "max_position_embeddings": like("max_length", 4096),
        "original_max_position_embeddings": like("max_length", 4096),
        "rms_norm_eps": like("norm_eps", 1e-5),
        "resid_pdrop": like("dropout", 0.0),
        "sliding_window": like("window", None),
        "pad_token_id": like("pad_token", 32000, null=True),
        "eos_token_id": like("end_token", 32000, null=True),
    },
    _read_phi3,
    _write_phi3,
    lambda theirs: rotary.read(theirs, partial=True, kinds=_SU),
    joined=True,
)
