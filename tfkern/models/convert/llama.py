"""Llama, Mistral and Qwen2: rotary positions, RMS norms, gated MLPs, queries that share keys."""

from collections.abc import Callable, Iterator
from typing import Any

from tfkern.files import shown
from tfkern.models.config import TransformerConfig
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
from tfkern.nn import RotaryScaling

# These are the names that transformers has for the numbers of a scaling.
_NUMBERS = {
    "factor": "factor",
    "length": "original_max_position_embeddings",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
}
_NEEDED = {"linear": ["factor"], "llama3": list(_NUMBERS)}


def _check_rotary(name: str, value: Any) -> None:
    """Transformers 5 writes base and scaling into rope_parameters, and 4 wrote the base into
    rope_theta and the scaling into rope_scaling."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object or null, got {shown(value)}")
    try:
        _scaling(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    fraction = value.get("partial_rotary_factor", 1.0)
    if fraction != 1:
        raise ValueError(f"{name}: partial_rotary_factor = {shown(fraction)} is not supported")
    like("rotary_base").check(f"rope_theta of {name}", value.get("rope_theta", 10000.0))


def _scaling(told: dict[str, Any]) -> RotaryScaling | None:
    kind = told.get("rope_type", told.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _NEEDED:
        known = ", ".join(["default", *_NEEDED])
        raise ValueError(f"the scaling {shown(kind)} is not one of {known}")
    numbers: dict[str, Any] = {ours: told.get(_NUMBERS[ours]) for ours in _NEEDED[kind]}
    return RotaryScaling(kind=kind, **numbers)


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
    "rope_theta": like("rotary_base", 10000.0),
    "rope_scaling": Field(_check_rotary, None),
    "rope_parameters": Field(_check_rotary, None),
    "partial_rotary_factor": only(1.0),
    "tie_word_embeddings": like("tie_embeddings", False),
    "pad_token_id": like("pad_token", None),
    "bos_token_id": like("start_token", 1, null=True),
    "eos_token_id": like("end_token", 2, null=True),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    rotary = theirs["rope_parameters"] or theirs["rope_scaling"] or {}
    return {
        "dim": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "kv_heads": theirs["num_key_value_heads"],
        "head_dim": theirs["head_dim"],
        "hidden_dim": theirs["intermediate_size"],
        "vocab_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "positions": "rotary",
        "rotary_base": rotary.get("rope_theta", theirs["rope_theta"]),
        "rotary_scaling": _scaling(rotary),
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
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if (scaling := config.rotary_scaling) is not None:
        numbers = {_NUMBERS[n]: getattr(scaling, n) for n in _NEEDED[scaling.kind]}
        rotary |= {"rope_type": scaling.kind, **numbers}
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_dropout,
        "rope_theta": config.rotary_base,
        "rope_parameters": rotary,
        **({"rope_scaling": rotary} if scaling is not None else {}),
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "model.embed_tokens.weight")
    yield rule("decoder.norm.weight", "model.norm.weight")
    for i in range(config.layers):
        ours, theirs = f"decoder.blocks.{i}", f"model.layers.{i}"
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        heads, biased = heads_of(config), config.qkv_biased
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, biased, heads=heads)
        yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", config.bias)
        for name in ("gate", "up", "down"):
            yield from linear(f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}_proj", config.bias)
        yield rule(f"{ours}.norm1.weight", f"{theirs}.input_layernorm.weight")
        yield rule(f"{ours}.norm2.weight", f"{theirs}.post_attention_layernorm.weight")
    if config.head == "lm" and not config.tie_embeddings:
        yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head in ("classification", "token"):
        yield from linear("classifier", "score", bias=config.head == "token")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    tied = config.tie_embeddings and config.head == "lm"
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def _family(
    model_type: str,
    name: str,
    fields: dict[str, Field],
    read: Callable[[dict[str, Any]], dict[str, Any]],
    write: Callable[[TransformerConfig], dict[str, Any]],
) -> Family:
    heads: dict[str, dict[str, Any]] = {
        "ForCausalLM": {"head": "lm"},
        "Model": {"head": "none"},
        "ForSequenceClassification": {"head": "classification", "classifier_bias": False},
        "ForTokenClassification": {"head": "token"},
    }
    return Family(
        model_type,
        "model",
        {f"{name}{kind}": meaning for kind, meaning in heads.items()},
        _FIELDS | fields,
        lambda theirs: _read(theirs) | read(theirs),
        lambda config: _write(config) | write(config),
        _rules,
        _aliases,
        ignored=(".rotary_emb.inv_freq",),
    )


def _biased(theirs: dict[str, Any]) -> dict[str, Any]:
    if theirs["attention_bias"] != theirs["mlp_bias"]:
        raise ValueError("attention_bias and mlp_bias must be equal")
    return {"bias": theirs["attention_bias"]}


LLAMA = _family(
    "llama",
    "Llama",
    {"attention_bias": like("bias", False), "mlp_bias": like("bias", False)},
    _biased,
    lambda config: {"attention_bias": config.bias, "mlp_bias": config.bias},
)
MISTRAL = _family(
    "mistral",
    "Mistral",
    {"sliding_window": like("window", 4096, null=True)},
    lambda theirs: {"window": theirs["sliding_window"]},
    lambda config: {"sliding_window": config.window},
)
QWEN2 = _family(
    "qwen2",
    "Qwen2",
    {"use_sliding_window": only(False), "bos_token_id": like("start_token", None)},
    lambda theirs: {"qkv_bias": True},
    lambda config: {"use_sliding_window": False},
)
