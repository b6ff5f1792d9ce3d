"""BERT, and what has its shape, such as MiniLM."""

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
)

FIELDS = {
    "hidden_size": like("dim"),
    "num_hidden_layers": like("layers"),
    "num_attention_heads": like("heads"),
    "intermediate_size": like("hidden_dim"),
    "vocab_size": like("vocab_size"),
    "type_vocab_size": like("token_types", 2),
    "max_position_embeddings": like("max_length"),
    "layer_norm_eps": like("norm_eps", 1e-12),
    "hidden_act": among(ACTIVATIONS, "gelu"),
    "hidden_dropout_prob": like("dropout", 0.1),
    "attention_probs_dropout_prob": like("attention_dropout", 0.1),
    "tie_word_embeddings": like("tie_embeddings", True),
    "pad_token_id": like("pad_token", 0, null=True),
    "add_pooling_layer": like("pooler", ABSENT),
    "position_embedding_type": only("absolute"),
    "is_decoder": only(False),
}


def read(theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "encoder",
        "dim": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "hidden_dim": theirs["intermediate_size"],
        "vocab_size": theirs["vocab_size"],
        "token_types": theirs["type_vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "embedding_norm": True,
        "post_norm": True,
        "norm_eps": theirs["layer_norm_eps"],
        "activation": ACTIVATIONS[theirs["hidden_act"]],
        "dropout": theirs["hidden_dropout_prob"],
        "attention_dropout": theirs["attention_probs_dropout_prob"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "pad_token": theirs["pad_token_id"],
        "init": "normal",
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "type_vocab_size": config.token_types,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
    }


def body(config: TransformerConfig, prefix: str) -> Iterator[Rule]:
    """The rules of what is in front of the head."""
    embeddings = f"{prefix}.embeddings"
    yield rule("embedding.weight", f"{embeddings}.word_embeddings.weight")
    yield rule("encoder.positions.weight", f"{embeddings}.position_embeddings.weight")
    if config.token_types:
        yield rule("encoder.token_types.weight", f"{embeddings}.token_type_embeddings.weight")
    yield from linear("encoder.embedding_norm", f"{embeddings}.LayerNorm")
    for i in range(config.layers):
        ours, theirs = f"encoder.blocks.{i}", f"{prefix}.encoder.layer.{i}"
        qkv = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, heads=heads_of(config))
        yield from linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        yield from linear(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
        yield from linear(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
        yield from linear(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
        yield from linear(f"{ours}.norm2", f"{theirs}.output.LayerNorm")


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from body(config, "bert")
    if config.pooler:
        yield from linear("pooler.dense", "bert.pooler.dense")
    if config.head in ("mlm", "pretraining"):
        yield from linear("vocabulary.dense", "cls.predictions.transform.dense")
        yield from linear("vocabulary.norm", "cls.predictions.transform.LayerNorm")
        yield rule("vocabulary.bias", "cls.predictions.bias")
        if not config.tie_embeddings:
            yield rule("vocabulary.weight", "cls.predictions.decoder.weight")
    if config.head in ("pretraining", "next_sentence"):
        yield from linear("classifier", "cls.seq_relationship")
    elif config.head in ("classification", "choice", "token", "span"):
        yield from linear("classifier", "qa_outputs" if config.head == "span" else "classifier")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    aliases = {}
    if config.head in ("mlm", "pretraining"):
        aliases["cls.predictions.decoder.bias"] = "cls.predictions.bias"
        if config.tie_embeddings:
            aliases["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
    return aliases


BERT = Family(
    "bert",
    "bert",
    {
        "BertModel": {"head": "none", "pooler": True},
        "BertForPreTraining": {"head": "pretraining", "pooler": True},
        "BertForMaskedLM": {"head": "mlm", "pooler": False},
        "BertForNextSentencePrediction": {"head": "next_sentence", "pooler": True},
        "BertForSequenceClassification": {"head": "classification", "pooler": True},
        "BertForMultipleChoice": {"head": "choice", "pooler": True},
        "BertForTokenClassification": {"head": "token", "pooler": False},
        "BertForQuestionAnswering": {"head": "span", "pooler": False},
    },
    FIELDS,
    read,
    write,
    _rules,
    _aliases,
    ignored=("embeddings.position_ids",),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
