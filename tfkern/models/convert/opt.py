"""OPT: GPT-2's blocks with ReLU and positions that begin at row 2. The one of 350 million weights
has its norms behind the additions, and smaller vectors of tokens."""

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
    only,
    rule,
)

_FIELDS = {
    "hidden_size": like("dim"),
    "word_embed_proj_dim": like("embedding_dim", None),
    "num_hidden_layers": like("layers"),
    "num_attention_heads": like("heads"),
    "ffn_dim": like("hidden_dim"),
    "vocab_size": like("vocab_size"),
    "max_position_embeddings": like("max_length", 2048),
    "activation_function": among(ACTIVATIONS, "relu"),
    "do_layer_norm_before": like("post_norm", True),
    "dropout": like("dropout", 0.1),
    "attention_dropout": like("attention_dropout", 0.0),
    "tie_word_embeddings": like("tie_embeddings", True),
    "pad_token_id": like("pad_token", 1, null=True),
    "bos_token_id": like("start_token", 2, null=True),
    "eos_token_id": like("end_token", 2, null=True),
    "enable_bias": only(True),
    "layer_norm_elementwise_affine": only(True),
    "layerdrop": only(0.0),
    "_remove_final_layer_norm": only(False),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    dim, narrow, dropout = (theirs[x] for x in ("hidden_size", "word_embed_proj_dim", "dropout"))
    return {
        "dim": dim,
        "embedding_dim": None if narrow == dim else narrow,
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "hidden_dim": theirs["ffn_dim"],
        "vocab_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "position_offset": 2,
        "activation": ACTIVATIONS[theirs["activation_function"]],
        "post_norm": not theirs["do_layer_norm_before"],
        "dropout": dropout,
        "embedding_dropout": 0.0 if dropout else None,
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
        "word_embed_proj_dim": config.embedding_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "activation_function": activation_name(config.activation),
        "do_layer_norm_before": not config.post_norm,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "model.decoder.embed_tokens.weight")
    yield rule("decoder.positions.weight", "model.decoder.embed_positions.weight")
    if config.embedding_dim is not None:
        yield rule("embedding.widen.weight", "model.decoder.project_in.weight")
        yield rule("narrow.weight", "model.decoder.project_out.weight")
    if not config.post_norm:
        yield from linear("decoder.norm", "model.decoder.final_layer_norm")
    for i in range(config.layers):
        ours, theirs = f"decoder.blocks.{i}", f"model.decoder.layers.{i}"
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, heads=heads_of(config))
        yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        yield from linear(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
        yield from linear(f"{ours}.norm2", f"{theirs}.final_layer_norm")
        for name in ("fc1", "fc2"):
            yield from linear(f"{ours}.mlp.{name}", f"{theirs}.{name}")
    if config.head == "lm" and not config.tie_embeddings:
        yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head == "classification":
        yield rule("classifier.weight", "score.weight")
    elif config.head == "span":
        yield from linear("classifier", "qa_outputs")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    tied = config.tie_embeddings and config.head == "lm"
    return {"lm_head.weight": "model.decoder.embed_tokens.weight"} if tied else {}


OPT = Family(
    "opt",
    "model",
    {
        "OPTForCausalLM": {"head": "lm"},
        "OPTModel": {"head": "none"},
        "OPTForSequenceClassification": {"head": "classification", "classifier_bias": False},
        "OPTForQuestionAnswering": {"head": "span"},
    },
    _FIELDS,
    _read,
    _write,
    _rules,
    _aliases,
)
