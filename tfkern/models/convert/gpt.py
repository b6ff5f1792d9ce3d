"""GPT-1 and GPT-2. Their linear layers are Conv1D: weights (in, out)."""

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

# In GPT-1 "gelu" means its tanh form.
_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_FIELDS = {
    "n_embd": like("dim"),
    "n_layer": like("layers"),
    "n_head": like("heads"),
    "vocab_size": like("vocab_size"),
    "n_positions": like("max_length"),
    "layer_norm_epsilon": like("norm_eps", 1e-5),
    "resid_pdrop": like("dropout", 0.1),
    "embd_pdrop": like("dropout", 0.1),
    "attn_pdrop": like("attention_dropout", 0.1),
    "tie_word_embeddings": like("tie_embeddings", True),
    "pad_token_id": like("pad_token", None),
    "bos_token_id": like("start_token", None),
    "eos_token_id": like("end_token", None),
    "add_cross_attention": only(False),
    "scale_attn_by_inverse_layer_idx": only(False),
    "scale_attn_weights": only(True),
}
_FIELDS1 = _FIELDS | {"afn": among(_GPT1_ACTIVATIONS, "gelu")}
_FIELDS2 = _FIELDS | {
    "activation_function": among(ACTIVATIONS, "gelu_new"),
    "n_inner": like("hidden_dim", None),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    dropout, first = theirs["resid_pdrop"], theirs["embd_pdrop"]
    return {
        "dim": theirs["n_embd"],
        "layers": theirs["n_layer"],
        "heads": theirs["n_head"],
        "vocab_size": theirs["vocab_size"],
        "max_length": theirs["n_positions"],
        "norm_eps": theirs["layer_norm_epsilon"],
        "dropout": dropout,
        "embedding_dropout": None if first == dropout else first,
        "attention_dropout": theirs["attn_pdrop"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "pad_token": theirs["pad_token_id"],
        "pad_trained": True,
        "start_token": theirs["bos_token_id"],
        "end_token": theirs["eos_token_id"],
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_embd": config.dim,
        "n_layer": config.layers,
        "n_head": config.heads,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.embedding_drop,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }


def _read1(theirs: dict[str, Any]) -> dict[str, Any]:
    act = _GPT1_ACTIVATIONS[theirs["afn"]]
    return _read(theirs) | {"activation": act, "post_norm": True, "init": "normal"}


def _write1(config: TransformerConfig) -> dict[str, Any]:
    return _write(config) | {"afn": activation_name(config.activation, _GPT1_ACTIVATIONS)}


def _read2(theirs: dict[str, Any]) -> dict[str, Any]:
    act = ACTIVATIONS[theirs["activation_function"]]
    return _read(theirs) | {"activation": act, "hidden_dim": theirs["n_inner"]}


def _write2(config: TransformerConfig) -> dict[str, Any]:
    return _write(config) | {
        "activation_function": activation_name(config.activation),
        "n_inner": config.hidden_dim,
    }


def _blocks(config: TransformerConfig) -> Iterator[Rule]:
    for i in range(config.layers):
        ours, theirs = f"decoder.blocks.{i}", f"transformer.h.{i}"
        yield from linear(
            f"{ours}.attention.qkv_by_head",
            f"{theirs}.attn.c_attn",
            transposed=True,
            heads=heads_of(config),
        )
        yield from linear(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transposed=True)
        yield from linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc", transposed=True)
        yield from linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj", transposed=True)
        yield from linear(f"{ours}.norm1", f"{theirs}.ln_1")
        yield from linear(f"{ours}.norm2", f"{theirs}.ln_2")
    if config.head == "lm" and not config.tie_embeddings:
        yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head == "classification":
        yield rule("classifier.weight", "score.weight")
    elif config.head in ("token", "span"):
        yield from linear("classifier", "qa_outputs" if config.head == "span" else "classifier")


def _rules1(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "transformer.tokens_embed.weight")
    yield rule("decoder.positions.weight", "transformer.positions_embed.weight")
    yield from _blocks(config)


def _rules2(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "transformer.wte.weight")
    yield rule("decoder.positions.weight", "transformer.wpe.weight")
    yield from linear("decoder.norm", "transformer.ln_f")
    yield from _blocks(config)


def _aliases(embedding: str) -> Any:
    def aliases(config: TransformerConfig) -> dict[str, str]:
        return {"lm_head.weight": embedding} if config.tie_embeddings else {}

    return aliases


_SCORE = {"head": "classification", "classifier_bias": False}


GPT1 = Family(
    "openai-gpt",
    "transformer",
    {
        "OpenAIGPTLMHeadModel": {"head": "lm"},
        "OpenAIGPTModel": {"head": "none"},
        "OpenAIGPTForSequenceClassification": _SCORE,
    },
    _FIELDS1,
    _read1,
    _write1,
    _rules1,
    _aliases("transformer.tokens_embed.weight"),
    ignored=(".attn.bias", ".position_ids"),
)
GPT2 = Family(
    "gpt2",
    "transformer",
    {
        "GPT2LMHeadModel": {"head": "lm"},
        "GPT2Model": {"head": "none"},
        "GPT2ForSequenceClassification": _SCORE,
        "GPT2ForTokenClassification": {"head": "token"},
        "GPT2ForQuestionAnswering": {"head": "span"},
    },
    _FIELDS2,
    _read2,
    _write2,
    _rules2,
    _aliases("transformer.wte.weight"),
    ignored=(".attn.bias", ".attn.masked_bias"),
)
