"""What tasks ask of a vocabulary: control tokens, where words begin, and where sentences end."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import processors

from tfkern import tokenize
from tfkern.tokenize import Tokenizer

_NAMES = {
    "bos": "<s>",
    "eos": "<|endoftext|>",
    "pad": "<pad>",
    "cls": "<cls>",
    "sep": "<sep>",
    "mask": "<mask>",
}


def extended(tokenizer: Tokenizer, *roles: str, sentinels: int = 0) -> Tokenizer:
    """A tokenizer that also has tokens with these roles, and sentinels <extra_id_0> and so on.

    Those that are missing follow the vocabulary; <extra_id_0> has the largest id of the sentinels,
    as in T5.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    lacking = {role: _NAMES[role] for role in roles if role not in tokenizer.special}
    found = Tokenizer(backend, tokenizer.special | lacking)
    backend.add_special_tokens(sentinel_names(sentinels)[::-1])
    return found


def chosen(
    told: str | None,
    start: Path | None,
    texts: list[str],
    *roles: str,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of rows of text.

    That of a model is taken as it is, template included; where it has no token for padding, that
    is the end token, which masks tell from a text's own. Other tokenizers get what they lack.

    Args:
        told: "characters", one to train on the texts, such as "bpe:8192" (or wordpiece, unigram,
            words), or the path of a tokenizer; if None, that of the model, or "bpe:8192".
        start: the folder of the model that training goes on with, if there is one.
        roles: of the tokens that are needed, beside those of the template.
        before, after: roles of the tokens around each text, for a model that starts from nothing.

    Raises:
        ValueError: a tokenizer that cannot be read or trained, or that lacks the end token.
    """
    if told is None and start is not None:
        found = tokenize.load(start)
        special = {"pad": found.special["eos"]} if "eos" in found.special else {}
        return Tokenizer(found.backend, special | found.special)
    found = extended(made(told, texts), *roles, *before, *after)
    return with_template(found, before, after)


def is_trained(told: str) -> bool:
    """Whether a tokenizer is to be trained, and is no path."""
    from tfkern.data.prepare.tokens import parsed

    return parsed(told)[0] is not None


def made(told: str | None, texts: list[str]) -> Tokenizer:
    """A tokenizer that is trained on texts, or read from a path; "bpe:8192" if None."""
    from tfkern.data.prepare.tokens import parsed

    told = "bpe:8192" if told is None else told
    kind, size = parsed(told)
    if kind is None:
        return tokenize.load(told)
    if kind == "characters":
        return tokenize.characters(texts)
    if size is None:
        raise ValueError(f"tokenizer: {told!r} needs the size of a vocabulary, as in {kind}:8192")
    return tokenize.train(kind, texts, size)


def with_template(tokenizer: Tokenizer, before: Sequence[str], after: Sequence[str]) -> Tokenizer:
    """A tokenizer that puts tokens with these roles around each text, as its model was trained.
    Of a pair, the second text follows the first one and its end."""
    first, last = ([tokenizer.special[role] for role in roles] for roles in (before, after))
    pair = [*first, "$A", *last, "$B:1", *(f"{token}:1" for token in last)]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=pair,
        special_tokens=[(token, tokenizer.id(token)) for token in (*first, *last)],
    )
    return tokenizer


def sentinel_names(count: int) -> list[str]:
    """The sentinels in the order in which they stand in a text."""
    return [f"<extra_id_{i}>" for i in range(count)]


def control(tokenizer: Tokenizer) -> frozenset[int]:
    """All control tokens, which are no part of a text."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


def padding(tokenizer: Tokenizer) -> dict[str, int]:
    """The field pad_token of a configuration. There is none if the token is also used elsewhere,
    such as behind each document, because a model does not train the vector of pad_token."""
    names = list(tokenizer.special.values())
    alone = names.count(tokenizer.special["pad"]) == 1
    return {"pad_token": tokenizer.special_id("pad")} if alone else {}


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) bool: whether a token begins a word.

    White space belongs to the word behind it, if the vocabulary has white space. If it has none,
    each token is a word but for those with the prefix of a continuation, such as BERT's ##. Control
    tokens are words.

    Raises:
        ValueError: the tokens tell where words end, as those of GPT-1 do, and not where they begin.
    """
    model = tokenizer.backend.model
    if getattr(model, "end_of_word_suffix", None):
        raise ValueError("whole_words needs tokens that tell where words begin, not where they end")
    prefix = getattr(model, "continuing_subword_prefix", None)
    starts = np.ones(tokenizer.vocab_size, bool)
    spaced = np.zeros_like(starts)
    special = control(tokenizer)
    for token, i in tokenizer.backend.get_vocab().items():
        if i not in special:
            starts[i] = not (prefix and token.startswith(prefix))
            spaced[i] = token.startswith("▁") or _text(tokenizer, token)[:1].isspace()
    if spaced.any():
        spaced[list(special)] = True
        return spaced
    return starts


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) bool: whether a token ends with a full stop, a mark or the end of a line."""
    ends = np.zeros(tokenizer.vocab_size, bool)
    for token, i in tokenizer.backend.get_vocab().items():
        ends[i] = _text(tokenizer, token).endswith((".", "!", "?", "\n"))
    ends[list(control(tokenizer))] = False
    return ends


def _text(tokenizer: Tokenizer, token: str) -> str:
    decoder = tokenizer.backend.decoder
    return token if decoder is None else decoder.decode([token])
