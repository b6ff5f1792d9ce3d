"""BART, and its relatives mBART, Marian and Pegasus. Their files have a bias of the logits, and
learned positions begin at row 2."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tfkern.models.config import TransformerConfig
from tfkern.models.convert.family import (
    ABSENT,
    ACTIVATIONS,
    Family,
    Rule,
    activation_name,
    among,
    heads_of,
    like,
    linear,
    only,
    rule,
    same_number,
)

_FIELDS = {
    "d_model": like("dim"),
    "decoder_layers": like("layers"),
    "encoder_layers": like("layers"),
    "decoder_attention_heads": like("heads"),
    "encoder_attention_heads": like("heads", ABSENT),
    "decoder_ffn_dim": like("hidden_dim"),
    "encoder_ffn_dim": like("hidden_dim", ABSENT),
    "vocab_size": like("vocab_size"),
    "max_position_embeddings": like("max_length"),
    "scale_embedding": like("scale_embedding", False),
    "activation_function": among(ACTIVATIONS, "gelu"),
    "dropout": like("dropout", 0.1),
    "attention_dropout": like("attention_dropout", 0.0),
    "tie_word_embeddings": like("tie_embeddings", True),
    "pad_token_id": like("pad_token", 1, null=True),
    "decoder_start_token_id": like("start_token", 2, null=True),
    "eos_token_id": like("end_token", 2, null=True),
    "bos_token_id": like("start_token", 0, null=True),
    "forced_bos_token_id": like("forced_first", None),
    "force_bos_token_to_be_generated": like("scale_embedding", False),  # BART's earliest files
    "forced_eos_token_id": like("forced_last", 2, null=True),
    "normalize_before": only(False),
    "add_final_layer_norm": only(False),
    "normalize_embedding": only(True),
    "static_position_embeddings": only(False),
}


def _shape(theirs: dict[str, Any]) -> dict[str, Any]:
    if theirs.get("decoder_vocab_size") is not None:
        same_number(theirs, "decoder_vocab_size", "vocab_size")
    for size in ("attention_heads", "ffn_dim"):
        same_number(theirs, f"encoder_{size}", f"decoder_{size}")
    start = theirs["decoder_start_token_id"]
    begins = theirs["force_bos_token_to_be_generated"] and theirs["forced_bos_token_id"] is None
    return {
        "architecture": "encoder_decoder",
        "dim": theirs["d_model"],
        "layers": theirs["decoder_layers"],
        "encoder_layers": theirs["encoder_layers"],
        "heads": theirs["decoder_attention_heads"],
        "hidden_dim": theirs["decoder_ffn_dim"],
        "vocab_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "scale_embedding": theirs["scale_embedding"],
        "activation": ACTIVATIONS[theirs["activation_function"]],
        "dropout": theirs["dropout"],
        "attention_dropout": theirs["attention_dropout"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "pad_token": theirs["pad_token_id"],
        "start_token": theirs["bos_token_id"] if start is None else start,
        "forced_first": theirs["bos_token_id"] if begins else theirs["forced_bos_token_id"],
        "forced_last": theirs["forced_eos_token_id"],
        "end_token": theirs["eos_token_id"],
        "init": "normal",
    }


def _read(**fixed: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What reads a config.json, where a family has some fields that its config.json does not."""
    return lambda theirs: _shape(theirs) | fixed


def _write(config: TransformerConfig) -> dict[str, Any]:
    sizes = {"attention_heads": config.heads, "ffn_dim": config.hidden_size}
    return {
        "is_encoder_decoder": True,
        "d_model": config.dim,
        "decoder_layers": config.layers,
        "encoder_layers": config.encoder_layers or config.layers,
        **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sizes.items()},
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "scale_embedding": config.scale_embedding,
        "activation_function": activation_name(config.activation),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
        "decoder_start_token_id": config.start_token,
        **({"bos_token_id": None} if config.start_token is None else {}),
        "eos_token_id": config.end_token,
        "forced_bos_token_id": config.forced_first,
        "forced_eos_token_id": config.forced_last,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "model.shared.weight")
    depth = {"encoder": config.encoder_layers or config.layers, "decoder": config.layers}
    for side, layers in depth.items():
        if config.positions == "learned":
            yield rule(f"{side}.positions.weight", f"model.{side}.embed_positions.weight")
        if config.embedding_norm:
            yield from linear(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding")
        if not config.post_norm:
            yield from linear(f"{side}.norm", f"model.{side}.layer_norm")
        for i in range(layers):
            ours, theirs = f"{side}.blocks.{i}", f"model.{side}.layers.{i}"
            q, k, v = (f"{theirs}.self_attn.{x}_proj" for x in "qkv")
            yield from linear(f"{ours}.attention.qkv_by_head", (q, k, v), heads=heads_of(config))
            yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
            yield from linear(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                q, k, v = (f"{theirs}.encoder_attn.{x}_proj" for x in "qkv")
                yield from linear(f"{ours}.cross.q", q)
                yield from linear(f"{ours}.cross.kv_by_head", (k, v), heads=heads_of(config))
                yield from linear(f"{ours}.cross.out", f"{theirs}.encoder_attn.out_proj")
                yield from linear(f"{ours}.norm_cross", f"{theirs}.encoder_attn_layer_norm")
            yield from linear(f"{ours}.mlp.fc1", f"{theirs}.fc1")
            yield from linear(f"{ours}.mlp.fc2", f"{theirs}.fc2")
            yield from linear(f"{ours}.norm2", f"{theirs}.final_layer_norm")
    if config.head == "lm":
        yield rule("vocabulary.bias", "final_logits_bias", shape=(1,), optional=True)
        if not config.tie_embeddings:
            yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head == "classification":
        yield from linear("pooler.dense", "classification_head.dense")
        yield from linear("classifier", "classification_head.out_proj")
    elif config.head == "span":
        yield from linear("classifier", "qa_outputs")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    names = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    if config.tie_embeddings:
        names.append("lm_head.weight")
    return dict.fromkeys(names, "model.shared.weight")


BART = Family(
    "bart",
    "model",
    {
        "BartForConditionalGeneration": {"head": "lm", "logit_bias": True},
        "BartModel": {"head": "none"},
        "BartForSequenceClassification": {"head": "classification", "pooler": True},
        "BartForQuestionAnswering": {"head": "span"},
    },
    _FIELDS | {"extra_pos_embeddings": only(2)},
    _read(position_offset=2, embedding_norm=True, post_norm=True),
    _write,
    _rules,
    _aliases,
    ignored=("encoder.version", "decoder.version"),
)
MBART = replace(
    BART,
    model_type="mbart",
    heads={f"M{name}": fields for name, fields in BART.heads.items()},
    fields=_FIELDS
    | {
        "decoder_start_token_id": like("start_token", None),
        "normalize_before": only(True),
        "add_final_layer_norm": only(True),
    },
    read=_read(position_offset=2, embedding_norm=True),
)
_TABLES = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
MARIAN = replace(
    BART,
    model_type="marian",
    heads={
        "MarianMTModel": {"head": "lm", "logit_bias": True},
        "MarianModel": {"head": "none"},
    },
    fields=_FIELDS
    | {
        "pad_token_id": like("pad_token", 58100, null=True),
        "decoder_start_token_id": like("start_token", 58100, null=True),
        "bos_token_id": like("start_token", None),
        "eos_token_id": like("end_token", 0, null=True),
        "forced_eos_token_id": like("forced_last", 0, null=True),
        "decoder_vocab_size": like("vocab_size", None),
        "share_encoder_decoder_embeddings": only(True),
        "normalize_embedding": only(False),
        "static_position_embeddings": only(True),
    },
    read=_read(positions="sinusoidal_halves", post_norm=True),
    sinusoids=_TABLES,
)
PEGASUS = replace(
    BART,
    model_type="pegasus",
    heads={
        "PegasusForConditionalGeneration": {"head": "lm", "logit_bias": True},
        "PegasusModel": {"head": "none"},
    },
    fields=_FIELDS
    | {
        "pad_token_id": like("pad_token", 0, null=True),
        "decoder_start_token_id": like("start_token", 0, null=True),
        "bos_token_id": like("start_token", None),
        "eos_token_id": like("end_token", 1, null=True),
        "forced_eos_token_id": like("forced_last", 1, null=True),
        "normalize_before": only(True),
        "add_final_layer_norm": only(True),
        "normalize_embedding": only(False),
        "static_position_embeddings": only(True),
    },
    read=_read(positions="sinusoidal_halves"),
    sinusoids=_TABLES,
)
