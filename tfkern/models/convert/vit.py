"""ViT."""

from collections.abc import Iterator
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
    "hidden_size": like("dim"),
    "num_hidden_layers": like("layers"),
    "num_attention_heads": like("heads"),
    "intermediate_size": like("hidden_dim"),
    "image_size": like("image_size"),
    "patch_size": like("patch_size"),
    "num_channels": like("channels", 3),
    "layer_norm_eps": like("norm_eps", 1e-12),
    "hidden_act": among(ACTIVATIONS, "gelu"),
    "hidden_dropout_prob": like("dropout", 0.0),
    "attention_probs_dropout_prob": like("attention_dropout", 0.0),
    "pooler_output_size": like("dim", ABSENT),
    "add_pooling_layer": like("pooler", ABSENT),
    "qkv_bias": only(True),
    "pooler_act": only("tanh"),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    same_number(theirs, "pooler_output_size", "hidden_size")
    return {
        "architecture": "encoder",
        "dim": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "hidden_dim": theirs["intermediate_size"],
        "image_size": theirs["image_size"],
        "patch_size": theirs["patch_size"],
        "channels": theirs["num_channels"],
        "norm_eps": theirs["layer_norm_eps"],
        "activation": ACTIVATIONS[theirs["hidden_act"]],
        "dropout": theirs["hidden_dropout_prob"],
        "attention_dropout": theirs["attention_probs_dropout_prob"],
        "init": "truncated",
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.first", "vit.embeddings.cls_token")
    yield rule("embedding.positions", "vit.embeddings.position_embeddings")
    yield from linear("embedding.projection", "vit.embeddings.patch_embeddings.projection")
    for i in range(config.layers):
        ours, theirs = f"encoder.blocks.{i}", f"vit.encoder.layer.{i}"
        qkv = [f"{theirs}.attention.attention.{name}" for name in ("query", "key", "value")]
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, heads=heads_of(config))
        yield from linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        yield from linear(f"{ours}.norm1", f"{theirs}.layernorm_before")
        yield from linear(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
        yield from linear(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
        yield from linear(f"{ours}.norm2", f"{theirs}.layernorm_after")
    yield from linear("encoder.norm", "vit.layernorm")
    if config.pooler:
        yield from linear("pooler.dense", "vit.pooler.dense")
    if config.head == "classification":
        yield from linear("classifier", "classifier")


VIT = Family(
    "vit",
    "vit",
    {
        "ViTForImageClassification": {"head": "classification", "pooler": False},
        "ViTModel": {"head": "none", "pooler": True},
    },
    _FIELDS,
    _read,
    _write,
    _rules,
)
