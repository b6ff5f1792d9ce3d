"""DistilBERT: BERT without segments, whose heads have dense layers of their own."""

from collections.abc import Iterator
from typing import Any

from tfkern.models.config import TransformerConfig
from tfkern.models.convert.family import (
    ACTIVATIONS,
    Family,
    Rule,
    activation_name,
    among,
    heads_of,
    like,
    linear,
    rule,
)

_FIELDS = {
    "dim": like("dim"),
    "n_layers": like("layers"),
    "n_heads": like("heads"),
    "hidden_dim": like("hidden_dim"),
    "vocab_size": like("vocab_size"),
    "max_position_embeddings": like("max_length"),
    "activation": among(ACTIVATIONS, "gelu"),
    "dropout": like("dropout", 0.1),
    "attention_dropout": like("attention_dropout", 0.1),
    "tie_word_embeddings": like("tie_embeddings", True),
    "pad_token_id": like("pad_token", 0, null=True),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "encoder",
        "dim": theirs["dim"],
        "layers": theirs["n_layers"],
        "heads": theirs["n_heads"],
        "hidden_dim": theirs["hidden_dim"],
        "vocab_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "embedding_norm": True,
        "post_norm": True,
        "norm_eps": 1e-12,
        "activation": ACTIVATIONS[theirs["activation"]],
        "dropout": theirs["dropout"],
        "attention_dropout": theirs["attention_dropout"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "pad_token": theirs["pad_token_id"],
        "init": "normal",
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "dim": config.dim,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "hidden_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "activation": activation_name(config.activation),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    embeddings = "distilbert.embeddings"
    yield rule("embedding.weight", f"{embeddings}.word_embeddings.weight")
    yield rule("encoder.positions.weight", f"{embeddings}.position_embeddings.weight")
    yield from linear("encoder.embedding_norm", f"{embeddings}.LayerNorm")
    for i in range(config.layers):
        ours, theirs = f"encoder.blocks.{i}", f"distilbert.transformer.layer.{i}"
        qkv = [f"{theirs}.attention.{x}_lin" for x in "qkv"]
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, heads=heads_of(config))
        yield from linear(f"{ours}.attention.out", f"{theirs}.attention.out_lin")
        yield from linear(f"{ours}.norm1", f"{theirs}.sa_layer_norm")
        yield from linear(f"{ours}.mlp.fc1", f"{theirs}.ffn.lin1")
        yield from linear(f"{ours}.mlp.fc2", f"{theirs}.ffn.lin2")
        yield from linear(f"{ours}.norm2", f"{theirs}.output_layer_norm")
    if config.head == "mlm":
        yield from linear("vocabulary.dense", "vocab_transform")
        yield from linear("vocabulary.norm", "vocab_layer_norm")
        yield rule("vocabulary.bias", "vocab_projector.bias")
        if not config.tie_embeddings:
            yield rule("vocabulary.weight", "vocab_projector.weight")
    elif config.head in ("classification", "choice"):
        yield from linear("pooler.dense", "pre_classifier")
        yield from linear("classifier", "classifier")
    elif config.head in ("token", "span"):
        yield from linear("classifier", "qa_outputs" if config.head == "span" else "classifier")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    if config.head != "mlm" or not config.tie_embeddings:
        return {}
    return {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}


_POOLED = {"pooler": True, "pooler_activation": "relu"}
DISTILBERT = Family(
    "distilbert",
    "distilbert",
    {
        "DistilBertModel": {"head": "none"},
        "DistilBertForMaskedLM": {"head": "mlm"},
        "DistilBertForSequenceClassification": {"head": "classification", **_POOLED},
        "DistilBertForMultipleChoice": {"head": "choice", **_POOLED},
        "DistilBertForTokenClassification": {"head": "token"},
        "DistilBertForQuestionAnswering": {"head": "span"},
    },
    _FIELDS,
    _read,
    _write,
    _rules,
    _aliases,
    ignored=("embeddings.position_ids",),
)
