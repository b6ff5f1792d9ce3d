"""Gemma 1 and 2 and the text models of Gemma 3.

They have Llama's form with norms that are stored less 1 and scaled embeddings; the later ones also
have norms after sublayers, soft caps, and blocks with a window among others without.
"""

import sys
from typing import Any

from tfkern.files import shown
from tfkern.models.config import TransformerConfig
from tfkern.models.convert import rotary
from tfkern.models.convert.family import ACTIVATIONS, Field, activation_name, among, like, only
from tfkern.models.convert.llama import (
    FULL,
    LAYER_TYPES,
    WINDOWED,
    family,
    heads,
    layer_types,
    windows,
)

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}  # the usual name comes first
_ACTIVATIONS1 = _ACTIVATIONS | {"gelu": "gelu_tanh"}  # it means the tanh form in Gemma 1


def _check_causal(name: str, value: Any) -> None:
    if value is not None and value is not False:
        raise ValueError(f"{name} = {shown(value)} is not supported, only False")


def _check_whole(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max or value % 1:
        raise ValueError(f"{name} must be a positive whole number, got {shown(value)}")


def _check_bases(name: str, value: Any) -> None:
    """Checks an object of rotary positions for each of the two kinds of block."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object or null, got {shown(value)}")
    for kind, told in value.items():
        if kind not in (FULL, WINDOWED):
            raise ValueError(f"{name}: {shown(kind)} is not one of {FULL}, {WINDOWED}")
        rotary.FIELDS[name].check(f"{kind} of {name}", told)
    told = value.get(WINDOWED) or {}
    like("rotary_base").check(f"rope_theta of {name}", told.get("rope_theta", 1e4))
    kind = told.get("rope_type", told.get("type", "default"))
    kinds = kind, told.get("partial_rotary_factor", 1.0)
    if kinds != ("default", 1.0):
        raise ValueError(f"{name}: a scaling of {WINDOWED} is not supported")


def _positions3(theirs: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of the blocks without the window."""
    told = (theirs["rope_parameters"] or {}).get(FULL) or {}
    full = told | (theirs["rope_scaling"] or {})
    return rotary.read(theirs | {"rope_parameters": full, "rope_scaling": None})


_COMMON = {"norm": "zero_centered_rms_norm", "scale_embedding": True}
_FIELDS = {
    "head_dim": like("head_dim", 256),
    "max_position_embeddings": like("max_length", 8192),
    "attention_bias": only(False),
    "use_bidirectional_attention": Field(_check_causal, None),
    "tie_word_embeddings": like("tie_embeddings", True),
    "pad_token_id": like("pad_token", 0, null=True),
    "bos_token_id": like("start_token", 2, null=True),
    "eos_token_id": like("end_token", 1, null=True),
}
_FIELDS1 = _FIELDS | {
    "num_key_value_heads": like("kv_heads", 16),
    "hidden_act": among(_ACTIVATIONS1, "gelu_pytorch_tanh"),
    "hidden_activation": among(ACTIVATIONS, None, null=True),
}
_FIELDS2 = _FIELDS | {
    "num_key_value_heads": like("kv_heads", 4),
    "hidden_activation": among(ACTIVATIONS, "gelu_pytorch_tanh"),
    "query_pre_attn_scalar": Field(_check_whole, 256),
    "sliding_window": like("window", 4096, null=True),
    "layer_types": LAYER_TYPES,
    "attn_logit_softcapping": like("attention_softcap", 50.0, null=True),
    "final_logit_softcapping": like("logit_softcap", 30.0, null=True),
}
_FIELDS3 = _FIELDS2 | {
    "max_position_embeddings": like("max_length", 131072),
    "sliding_window_pattern": like("dim", 6),
    "rope_theta": like("rotary_base", 1e6),
    "rope_local_base_freq": like("rotary_base", 1e4),
    "rope_parameters": Field(_check_bases, None),
    "final_logit_softcapping": like("logit_softcap", None),
}


def _write_activation(config: TransformerConfig, names: dict[str, str]) -> dict[str, Any]:
    name = activation_name(config.activation, names)
    return {"hidden_act": name, "hidden_activation": name}


def _read1(theirs: dict[str, Any]) -> dict[str, Any]:
    activation, other = _ACTIVATIONS1[theirs["hidden_act"]], theirs["hidden_activation"]
    if other is not None and ACTIVATIONS[other] != activation:  # transformers 4 takes the other
        raise ValueError(f"hidden_activation = {other!r} is another than that of hidden_act")
    return _COMMON | {"activation": activation}


def _write1(config: TransformerConfig) -> dict[str, Any]:
    return _write_activation(config, _ACTIVATIONS1)


def _read2(theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        **_COMMON,
        "norm_place": "both",
        "activation": ACTIVATIONS[theirs["hidden_activation"]],
        "attention_scale": theirs["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": theirs["attn_logit_softcapping"],
        "logit_softcap": theirs["final_logit_softcapping"],
        **windows(theirs, theirs["sliding_window"], lambda i: i % 2 == 0),
    }


def _write2(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_write_activation(config, _ACTIVATIONS),
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "sliding_window": config.window,
        "layer_types": layer_types(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _read3(theirs: dict[str, Any]) -> dict[str, Any]:
    """Transformers 4 wrote the base of the blocks with the window into rope_local_base_freq."""
    bases, pattern = theirs["rope_parameters"] or {}, theirs["sliding_window_pattern"]
    local = (bases.get(WINDOWED) or {}).get("rope_theta", theirs["rope_local_base_freq"])
    windowed = windows(theirs, theirs["sliding_window"], lambda i: (i + 1) % pattern != 0)
    if windowed:
        windowed["window_rotary_base"] = local
    return {
        **_COMMON,
        "norm_place": "both",
        "query_key_norm": "head",
        "activation": ACTIVATIONS[theirs["hidden_activation"]],
        "attention_scale": theirs["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": theirs["final_logit_softcapping"],
        **windowed,
    }


def _write3(config: TransformerConfig) -> dict[str, Any]:
    full, local = rotary.write(config)["rope_parameters"], config.window_rotary_base
    if local is None:
        local = config.rotary_base
    return _write2(config) | {
        "rope_local_base_freq": local,
        "rope_parameters": {FULL: full, WINDOWED: {"rope_type": "default", "rope_theta": local}},
        "attn_logit_softcapping": None,
    }


GEMMA = family(
    "gemma",
    heads("Gemma", "ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification"),
    _FIELDS1,
    _read1,
    _write1,
)
GEMMA2 = family(
    "gemma2",
    heads("Gemma2", "ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification"),
    _FIELDS2,
    _read2,
    _write2,
)
GEMMA3 = family(
    "gemma3_text",
    heads("Gemma3", "ForCausalLM") | heads("Gemma3Text", "Model", "ForSequenceClassification"),
    _FIELDS3,
    _read3,
    _write3,
    _positions3,
)
