"""Tokenizers whose control tokens no text can spell."""

import json
import secrets
from collections.abc import Callable
from typing import Any

import tokenizers


def unspellable(backend: tokenizers.Tokenizer, control: frozenset[str]) -> tokenizers.Tokenizer:
    """A copy of a tokenizer, with the same ids, in which these tokens have secret names.

    The library can stop looking for special tokens in texts, but those that are part of the
    vocabulary are found by the model all the same: by a Unigram, which has them as pieces, by
    merges of a BPE, or as whole words. The copy writes ids; it is not for decoding.
    """
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] == "Unigram":
        if (unknown := model.get("unk_id")) is not None:
            control = control | {model["vocab"][unknown][0]}  # it stands for itself by its id
    else:
        unknown = model.get("unk_token")
        if unknown in control:  # the model keeps it for unknown text, but its name is no token
            added = described["added_tokens"]
            described["added_tokens"] = [t for t in added if t["content"] != unknown]
        control = control - {unknown}
    secret = secrets.token_hex(16)
    new = {name: f"{secret}-{i}" for i, name in enumerate(sorted(control))}
    for token in described["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    if model["type"] == "Unigram":
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {new.get(token, token): i for token, i in model["vocab"].items()}
    if model["type"] == "BPE":
        result = _joiner(model)
        model["merges"] = [
            merge for merge in model["merges"] if control.isdisjoint((*merge, result(merge)))
        ]
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def _joiner(model: dict[str, Any]) -> Callable[[list[str]], str]:
    """What a merge of a BPE gives: the second part loses the mark of parts that continue."""
    mark = model.get("continuing_subword_prefix") or ""
    return lambda merge: merge[0] + merge[1].removeprefix(mark)
