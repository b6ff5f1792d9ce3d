"""T5 and T5 v1.1: no division of the scores, relative positions of the first block for all."""

from collections.abc import Iterator
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
    rule,
    same_number,
)

# What follows "gated-", where "gelu" means its tanh form, and what stands alone.
_GATED = {"gelu": "gelu_tanh", "silu": "silu", "relu": "relu"}
_ACTIVATIONS = [*ACTIVATIONS, *(f"gated-{name}" for name in _GATED)]

_FIELDS = {
    "d_model": like("dim"),
    "num_layers": like("layers"),
    "num_decoder_layers": like("layers", None),
    "num_heads": like("heads"),
    "d_kv": like("head_dim"),
    "d_ff": like("hidden_dim"),
    "vocab_size": like("vocab_size"),
    "relative_attention_num_buckets": like("relative_buckets", 32),
    "relative_attention_max_distance": like("relative_distance", 128),
    "layer_norm_epsilon": like("norm_eps", 1e-6),
    "feed_forward_proj": among(_ACTIVATIONS, "relu"),
    "dense_act_fn": among(ACTIVATIONS, ABSENT),
    "is_gated_act": like("gated", ABSENT),
    "dropout_rate": like("dropout", 0.1),
    "tie_word_embeddings": like("tie_embeddings", True),
    "scale_decoder_outputs": like("scale_embedding", True),
    "pad_token_id": like("pad_token", 0, null=True),
    "decoder_start_token_id": like("start_token", ABSENT, null=True),
    "eos_token_id": like("end_token", 1, null=True),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    act = theirs["feed_forward_proj"]
    # transformers 5 writes tie_word_embeddings = true for all models, and tells T5 from v1.1 by
    # scale_decoder_outputs. Whether a vocabulary of v1.1 is tied, only the weights tell.
    tied = theirs["tie_word_embeddings"] and theirs["scale_decoder_outputs"]
    pad = theirs["pad_token_id"]
    gated = act.startswith("gated-")
    # config.json may tell both once more, and transformers then follows what it tells
    plain = "gelu_new" if act == "gated-gelu" else act.removeprefix("gated-")
    same_number(theirs | {"feed_forward_proj": plain}, "dense_act_fn", "feed_forward_proj")
    same_number(theirs | {"feed_forward_proj": gated}, "is_gated_act", "feed_forward_proj")
    return {
        "architecture": "encoder_decoder",
        "dim": theirs["d_model"],
        "layers": theirs["num_decoder_layers"] or theirs["num_layers"],
        "encoder_layers": theirs["num_layers"],
        "heads": theirs["num_heads"],
        "head_dim": theirs["d_kv"],
        "hidden_dim": theirs["d_ff"],
        "vocab_size": theirs["vocab_size"],
        "positions": "relative",
        "relative_buckets": theirs["relative_attention_num_buckets"],
        "relative_distance": theirs["relative_attention_max_distance"],
        "norm": "rms_norm",
        "norm_eps": theirs["layer_norm_epsilon"],
        "gated": gated,
        "wide_output": True,
        "activation": _GATED[act.removeprefix("gated-")] if gated else ACTIVATIONS[act],
        "attention_scale": 1.0,
        "bias": False,
        "dropout": theirs["dropout_rate"],
        "attention_dropout": theirs["dropout_rate"],
        "tie_embeddings": tied,
        "logit_scale": theirs["d_model"] ** -0.5 if tied else 1.0,
        "pad_token": pad,
        "pad_trained": True,
        "start_token": theirs.get("decoder_start_token_id", pad),
        "end_token": theirs["eos_token_id"],
        "init": "t5",
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    names = _GATED if config.gated else None
    act = activation_name(config.activation, names) if names else activation_name(config.activation)
    both = config.architecture == "encoder_decoder"
    return {
        "is_encoder_decoder": both,
        "d_model": config.dim,
        "num_decoder_layers": config.layers,
        "num_layers": config.encoder_layers or config.layers,
        "num_heads": config.heads,
        "d_kv": config.head_size,
        "d_ff": config.hidden_size,
        "vocab_size": config.vocab_size,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{act}" if config.gated else act,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1,
        "pad_token_id": config.pad_token,
        "decoder_start_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    prefix = "transformer." if config.head in ("classification", "token") else ""
    yield rule("embedding.weight", f"{prefix}shared.weight")
    depth = {"encoder": config.encoder_layers or config.layers, "decoder": config.layers}
    if config.architecture == "encoder":
        del depth["decoder"]
    for side, layers in depth.items():
        theirs = f"{prefix}{side}"
        first = f"{theirs}.block.0.layer.0.SelfAttention"
        yield rule(f"{side}.positions.weight", f"{first}.relative_attention_bias.weight")
        yield rule(f"{side}.norm.weight", f"{theirs}.final_layer_norm.weight")
        for i in range(layers):
            ours, layer = f"{side}.blocks.{i}", f"{theirs}.block.{i}.layer"
            q, k, v, o = (f"{layer}.0.SelfAttention.{x}.weight" for x in "qkvo")
            heads = heads_of(config)
            yield rule(f"{ours}.attention.qkv_by_head.weight", (q, k, v), heads=heads)
            yield rule(f"{ours}.attention.out.weight", o)
            yield rule(f"{ours}.norm1.weight", f"{layer}.0.layer_norm.weight")
            last = 1
            if side == "decoder":
                last = 2
                q, k, v, o = (f"{layer}.1.EncDecAttention.{x}.weight" for x in "qkvo")
                yield rule(f"{ours}.cross.q.weight", q)
                yield rule(f"{ours}.cross.kv_by_head.weight", (k, v), heads=heads)
                yield rule(f"{ours}.cross.out.weight", o)
                yield rule(f"{ours}.norm_cross.weight", f"{layer}.1.layer_norm.weight")
            mlp = f"{layer}.{last}.DenseReluDense"
            if config.gated:
                yield rule(f"{ours}.mlp.gate.weight", f"{mlp}.wi_0.weight")
                yield rule(f"{ours}.mlp.up.weight", f"{mlp}.wi_1.weight")
                yield rule(f"{ours}.mlp.down.weight", f"{mlp}.wo.weight")
            else:
                yield rule(f"{ours}.mlp.fc1.weight", f"{mlp}.wi.weight")
                yield rule(f"{ours}.mlp.fc2.weight", f"{mlp}.wo.weight")
            yield rule(f"{ours}.norm2.weight", f"{layer}.{last}.layer_norm.weight")
    if config.head == "lm" and not config.tie_embeddings:
        yield rule("vocabulary.weight", "lm_head.weight")
    elif config.head == "classification":
        yield from linear("pooler.dense", "classification_head.dense")
        yield from linear("classifier", "classification_head.out_proj")
    elif config.head in ("token", "span"):
        yield from linear("classifier", "qa_outputs" if config.head == "span" else "classifier")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    prefix = "transformer." if config.head in ("classification", "token") else ""
    names = [f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    if config.tie_embeddings:
        names.append("lm_head.weight")
    return dict.fromkeys(names, f"{prefix}shared.weight")


T5 = Family(
    "t5",
    "",
    {
        "T5ForConditionalGeneration": {"head": "lm"},
        "T5Model": {"head": "none"},
        "T5EncoderModel": {"head": "none", "architecture": "encoder"},
        "T5ForSequenceClassification": {"head": "classification", "pooler": True},
        "T5ForTokenClassification": {"head": "token", "architecture": "encoder"},
        "T5ForQuestionAnswering": {"head": "span"},
    },
    _FIELDS,
    _read,
    _write,
    _rules,
    _aliases,
    # of the published files; cross-attention has no positions
    ignored=("EncDecAttention.relative_attention_bias.weight",),
    vocabulary="lm_head.weight",
)


def _read_mt5(theirs: dict[str, Any]) -> dict[str, Any]:
    return _read(theirs | {"scale_decoder_outputs": False})


def _write_mt5(config: TransformerConfig) -> dict[str, Any]:
    theirs = _write(config)
    del theirs["scale_decoder_outputs"]
    return theirs


# mT5 is v1.1 with more tokens; transformers 5 never scales what its decoder returns.
MT5 = replace(
    T5,
    model_type="mt5",
    heads={f"M{name}": fields for name, fields in T5.heads.items()},
    fields={name: known for name, known in _FIELDS.items() if name != "scale_decoder_outputs"}
    | {
        "feed_forward_proj": among(_ACTIVATIONS, "gated-gelu"),
        "decoder_start_token_id": like("start_token", 0, null=True),
    },
    read=_read_mt5,
    write=_write_mt5,
)
