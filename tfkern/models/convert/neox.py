"""GPT-NeoX, of which Pythia is: rotary positions of a part of each head, parallel sublayers."""

from collections.abc import Iterator
from typing import Any

from tfkern.models.config import TransformerConfig
from tfkern.models.convert import rotary
from tfkern.models.convert.family import (
    ACTIVATIONS,
    Family,
    Rule,
    activation_name,
    among,
    like,
    linear,
    rule,
)

# These are the names that base and fraction have here.
_RENAMED = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_FIELDS = {
    "hidden_size": like("dim"),
    "num_hidden_layers": like("layers"),
    "num_attention_heads": like("heads"),
    "intermediate_size": like("hidden_dim"),
    "vocab_size": like("vocab_size"),
    "max_position_embeddings": like("max_length", 2048),
    "hidden_act": among(ACTIVATIONS, "gelu"),
    "layer_norm_eps": like("norm_eps", 1e-5),
    "hidden_dropout": like("dropout", 0.0),
    "attention_dropout": like("attention_dropout", 0.0),
    "attention_bias": like("bias", True),
    "use_parallel_residual": like("parallel", True),
    **{_RENAMED.get(name, name): known for name, known in rotary.FIELDS.items()},
    "rotary_pct": like("rotary_fraction", 0.25),
    "tie_word_embeddings": like("tie_embeddings", False),
    "pad_token_id": like("pad_token", None),
    "bos_token_id": like("start_token", 0, null=True),
    "eos_token_id": like("end_token", 2, null=True),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    renamed = {name: theirs[here] for name, here in _RENAMED.items()}
    attention_bias = None if theirs["attention_bias"] else False  # as the other layers
    return {
        "dim": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "hidden_dim": theirs["intermediate_size"],
        "vocab_size": theirs["vocab_size"],
        **rotary.read(theirs | renamed, partial=True),
        "activation": ACTIVATIONS[theirs["hidden_act"]],
        "norm_eps": theirs["layer_norm_eps"],
        "dropout": theirs["hidden_dropout"],
        "attention_dropout": theirs["attention_dropout"],
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "parallel": theirs["use_parallel_residual"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "pad_token": theirs["pad_token_id"],
        "pad_trained": True,
        "start_token": theirs["bos_token_id"],
        "end_token": theirs["eos_token_id"],
        "init": "normal",
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    positions = {_RENAMED.get(name, name): x for name, x in rotary.write(config).items()}
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        **positions,
        "rotary_pct": config.rotary_fraction,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "attention_bias": config.qkv_biased,
        "use_parallel_residual": config.parallel,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embedding.weight", "gpt_neox.embed_in.weight")
    yield from linear("decoder.norm", "gpt_neox.final_layer_norm")
    for i in range(config.layers):
        ours, theirs = f"decoder.blocks.{i}", f"gpt_neox.layers.{i}"
        qkv = f"{theirs}.attention.query_key_value"
        yield from linear(f"{ours}.attention.qkv_by_head", qkv, config.qkv_biased)
        yield from linear(f"{ours}.attention.out", f"{theirs}.attention.dense", config.out_biased)
        yield from linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.dense_h_to_4h")
        yield from linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.dense_4h_to_h")
        yield from linear(f"{ours}.norm1", f"{theirs}.input_layernorm")
        yield from linear(f"{ours}.norm2", f"{theirs}.post_attention_layernorm")
    if config.head == "lm" and not config.tie_embeddings:
        yield rule("vocabulary.weight", "embed_out.weight")
    elif config.head == "classification":
        yield rule("classifier.weight", "score.weight")
    elif config.head in ("token", "span"):
        yield from linear("classifier", "qa_outputs" if config.head == "span" else "classifier")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    tied = config.tie_embeddings and config.head == "lm"
    return {"embed_out.weight": "gpt_neox.embed_in.weight"} if tied else {}


GPT_NEOX = Family(
    "gpt_neox",
    "gpt_neox",
    {
        "GPTNeoXForCausalLM": {"head": "lm"},
        "GPTNeoXModel": {"head": "none"},
        "GPTNeoXForSequenceClassification": {"head": "classification", "classifier_bias": False},
        "GPTNeoXForTokenClassification": {"head": "token"},
        "GPTNeoXForQuestionAnswering": {"head": "span"},
    },
    _FIELDS,
    _read,
    _write,
    _rules,
    _aliases,
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    renamed={"lm_head.weight": "embed_out.weight"},  # as the module is named today
)
