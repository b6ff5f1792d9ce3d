"""Llama and its like: rotary positions, RMS norms, gated MLPs, queries that share keys."""

from collections.abc import Callable, Iterator
from typing import Any

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


def _rules(config: TransformerConfig, joined: bool) -> Iterator[Rule]:
    yield rule("embedding.weight", "model.embed_tokens.weight")
    yield rule("decoder.norm.weight", "model.norm.weight")
    for i in range(config.layers):
        ours, theirs = f"decoder.blocks.{i}", f"model.layers.{i}"
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in (("qkv",) if joined else "qkv")]
        heads, biased = heads_of(config), config.qkv_biased
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, biased, heads=heads)
        yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", config.out_biased)
        for name in ("down",) if joined else ("gate", "up", "down"):
            yield from linear(f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}_proj", config.bias)
        if joined:
            pair = [f"{ours}.mlp.{name}.weight" for name in ("gate", "up")]
            yield rule(pair, f"{theirs}.mlp.gate_up_proj.weight")
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
    positions: Callable[[dict[str, Any]], dict[str, Any]] = rotary.read,
    joined: bool = False,
) -> Family:
    """With `joined`, files have queries, keys and values in one layer, and so gate and up."""
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
        lambda theirs: _read(theirs) | positions(theirs) | read(theirs),
        lambda config: _write(config) | write(config),
        lambda config: _rules(config, joined),
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


LLAMA = _family(
    "llama",
    "Llama",
    {"attention_bias": like("bias", False), "mlp_bias": like("bias", False)},
    _biased,
    lambda config: {"attention_bias": config.qkv_biased, "mlp_bias": config.bias},
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
_SU = {"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}
PHI3 = _family(
    "phi3",
    "Phi3",
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
