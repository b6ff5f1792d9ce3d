"""RoBERTa and XLM-R: BERT whose positions begin behind the one of pad_token, with other heads."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tfkern.models.config import TransformerConfig
from tfkern.models.convert import bert
from tfkern.models.convert.family import Family, Rule, like, linear, only, rule

_FIELDS = bert.FIELDS | {
    "pad_token_id": like("pad_token", 1),
    "hidden_act": only("gelu"),  # which the head always has
    "add_cross_attention": only(False),
}


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    offset = theirs["pad_token_id"] + 1
    return bert.read({"hidden_act": "gelu"} | theirs) | {
        "max_length": theirs["max_position_embeddings"] - offset,
        "position_offset": offset,
        "skip_pad": True,
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    length = (config.max_length or 0) + config.position_offset
    return bert.write(config) | {"max_position_embeddings": length}


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from bert.body(config, "roberta")
    if config.head == "mlm":
        yield from linear("vocabulary.dense", "lm_head.dense")
        yield from linear("vocabulary.norm", "lm_head.layer_norm")
        yield rule("vocabulary.bias", "lm_head.bias")
        if not config.tie_embeddings:
            yield rule("vocabulary.weight", "lm_head.decoder.weight")
    elif config.head == "classification":
        yield from linear("pooler.dense", "classifier.dense")
        yield from linear("classifier", "classifier.out_proj")
    elif config.head in ("choice", "token", "span"):
        yield from linear("classifier", "qa_outputs" if config.head == "span" else "classifier")
    if config.pooler and config.head != "classification":
        yield from linear("pooler.dense", "roberta.pooler.dense")


def _aliases(config: TransformerConfig) -> dict[str, str]:
    if config.head != "mlm":
        return {}
    aliases = {"lm_head.decoder.bias": "lm_head.bias"}
    if config.tie_embeddings:
        aliases["lm_head.decoder.weight"] = "roberta.embeddings.word_embeddings.weight"
    return aliases


ROBERTA = Family(
    "roberta",
    "roberta",
    {
        "RobertaModel": {"head": "none", "pooler": True},
        "RobertaForMaskedLM": {"head": "mlm", "pooler": False},
        "RobertaForSequenceClassification": {"head": "classification", "pooler": True},
        "RobertaForMultipleChoice": {"head": "choice", "pooler": True},
        "RobertaForTokenClassification": {"head": "token", "pooler": False},
        "RobertaForQuestionAnswering": {"head": "span", "pooler": False},
    },
    _FIELDS,
    _read,
    _write,
    _rules,
    _aliases,
    ignored=bert.BERT.ignored,
    renamed=bert.BERT.renamed,
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    heads={f"XLM{name}": fields for name, fields in ROBERTA.heads.items()},
)
