"""BART. Its learned positions begin at row 2, and its files have a bias of the logits."""

from collections.abc import Iterator
from typing import Any

from tfkern.models.config import TransformerConfig
from tfkern.models.convert.family import (
    Family,
    Rule,
    activation,
    activation_name,
    linear,
    rule,
    supported,
)


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    supported(theirs, normalize_before=False, add_final_layer_norm=False, normalize_embedding=True)
    supported(theirs, static_position_embeddings=False, extra_pos_embeddings=2)
    for size in ("attention_heads", "ffn_dim"):
        supported(theirs, **{f"encoder_{size}": theirs[f"decoder_{size}"]})
    return {
        "architecture": "encoder_decoder",
        "dim": theirs["d_model"],
        "layers": theirs["decoder_layers"],
        "encoder_layers": theirs["encoder_layers"],
        "heads": theirs["decoder_attention_heads"],
        "hidden_dim": theirs["decoder_ffn_dim"],
        "vocab_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "position_offset": 2,
        "embedding_norm": True,
        "post_norm": True,
        "scale_embedding": theirs.get("scale_embedding", False),
        "activation": activation(theirs.get("activation_function", "gelu")),
        "dropout": theirs.get("dropout", 0.1),
        "attention_dropout": theirs.get("attention_dropout", 0.0),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "pad_token": theirs.get("pad_token_id", 1),
        "start_token": theirs.get("decoder_start_token_id", 2),
        "end_token": theirs.get("eos_token_id", 2),
        "init": "normal",
    }


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
        "eos_token_id": config.end_token,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "model.shared.weight")
    depth = {"encoder": config.encoder_layers or config.layers, "decoder": config.layers}
    for side, layers in depth.items():
        yield rule(f"{side}.positions.weight", f"model.{side}.embed_positions.weight")
        yield from linear(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding")
        for i in range(layers):
            ours, theirs = f"{side}.blocks.{i}", f"model.{side}.layers.{i}"
            q, k, v = (f"{theirs}.self_attn.{x}_proj" for x in "qkv")
            yield from linear(f"{ours}.attention.qkv", (q, k, v))
            yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
            yield from linear(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                q, k, v = (f"{theirs}.encoder_attn.{x}_proj" for x in "qkv")
                yield from linear(f"{ours}.cross.q", q)
                yield from linear(f"{ours}.cross.kv", (k, v))
                yield from linear(f"{ours}.cross.out", f"{theirs}.encoder_attn.out_proj")
                yield from linear(f"{ours}.norm_cross", f"{theirs}.encoder_attn_layer_norm")
            yield from linear(f"{ours}.mlp.fc1", f"{theirs}.fc1")
            yield from linear(f"{ours}.mlp.fc2", f"{theirs}.fc2")
            yield from linear(f"{ours}.norm2", f"{theirs}.final_layer_norm")
    if config.head == "lm":
        yield rule("vocabulary.bias", "final_logits_bias", shape=(1,))
        if not config.tie_embeddings:
            yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head == "classification":
        yield from linear("pooler.dense", "classification_head.dense")
        yield from linear("classifier", "classification_head.out_proj")


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
    },
    _read,
    _write,
    _rules,
    _aliases,
    ignored=("encoder.version", "decoder.version"),
)
