"""Models of SentencePiece as tokenizers, from the files that it writes (Kudo, Richardson 2018).

The package sentencepiece does not give the map of characters that a model normalises with, so the
file is read here: it is one message of protocol buffers, of which few fields matter.
"""

import io
import struct
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tfkern.tokenize.tokenizer import Tokenizer, refusing

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_ROLES = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}  # fields of the trainer that hold an id
_IDS = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}  # and their defaults
# Two code points that no character has, and which stand alone in every division into characters.
_APART, _KEPT = "\ufff0\ufff1", "\ufff1\ufff0"
_SPACE = "▁"


def pieces(content: bytes) -> Tokenizer:
    """The tokenizer of a model of SentencePiece, a Unigram or a BPE, without a template.

    Its normalisation is that of the model, except for marks in another order than the canonical
    one, which are put into it.

    Args:
        content: the model's file.

    Raises:
        ValueError: the content is no such model, or a model with a setting that is not understood.
    """
    with refusing("it is no model of SentencePiece"):
        model = _message(content)
        rows = [_message(row) for row in model[1]]
        names = [row[1][0].decode() for row in rows]
        scores = [struct.unpack("<f", row[2][0])[0] if 2 in row else 0.0 for row in rows]
        kinds = [row[3][0] if 3 in row else _NORMAL for row in rows]
        trainer, normaliser = (_message(model[i][-1]) if i in model else {} for i in (2, 3))
        prefix, squeeze, escape = (bool(normaliser.get(i, [1])[-1]) for i in (3, 4, 5))
        rule = normaliser.get(1, [b""])[-1].decode()
        characters = normaliser.get(2, [b""])[-1]
    kind, fallback = trainer.get(3, [_UNIGRAM])[-1], bool(trainer.get(35, [0])[-1])
    wrong = {
        "a model_type other than unigram and bpe": kind not in (_UNIGRAM, _BPE),
        "spaces at the end of words": trainer.get(24, [0])[-1],
        "spaces that are not escaped": not escape,
        "unused pieces": _UNUSED in kinds,
        "symbols defined by users beside changed spaces": _USER in kinds and (prefix or squeeze),
        f"the rules {rule!r}": characters and not rule.removeprefix("nmt_").startswith("nfkc"),
    }
    for what, found in wrong.items():
        if found:
            raise ValueError(f"it has {what}, which are not supported")

    signed = {role: trainer[i][-1] for i, role in _ROLES.items() if i in trainer}
    ids = _IDS | {role: i - 2**64 if i >= 2**63 else i for role, i in signed.items()}
    with refusing("it is no model of SentencePiece"):
        if kind == _UNIGRAM:
            listed = list(zip(names, scores, strict=True))
            found = models.Unigram(listed, unk_id=ids["unk"], byte_fallback=fallback)
        else:
            vocabulary = {name: i for i, name in enumerate(names)}
            plain = {n: s for n, s, k in zip(names, scores, kinds, strict=True) if k == _NORMAL}
            found = models.BPE(
                vocabulary, _merges(plain, vocabulary), unk_token=names[ids["unk"]],
                byte_fallback=fallback, fuse_unk=True,
            )  # fmt: skip
        backend = tokenizers.Tokenizer(found)
        backend.normalizer = _normaliser(characters, squeeze, prefix)
    if kind == _UNIGRAM and trainer.get(22, [1])[-1]:  # no piece has spaces between its words
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bytes_ = [decoders.ByteFallback()] if fallback else []
    first = [decoders.Strip(" ", 1, 0)] if prefix or squeeze else []
    spaces = decoders.Replace(_SPACE, " ")
    backend.decoder = decoders.Sequence([spaces, *bytes_, decoders.Fuse(), *first])
    for special, of in ((True, _CONTROL), (False, _USER)):
        new = [n for n, k in zip(names, kinds, strict=True) if k == of]
        backend.add_tokens([AddedToken(n, special=special, normalized=False) for n in new])
    return Tokenizer(backend, {role: names[i] for role, i in ids.items() if 0 <= i < len(names)})


def _normaliser(characters: bytes, squeeze: bool, prefix: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if characters:
        # The library's map replaces a character together with the marks that follow it, which it
        # loses. So all characters are set apart, and what belongs together is put together after.
        other = r"[^\x00-\x7f]"
        steps.append(
            normalizers.Replace(Regex(rf"(?<={other})(?=[\s\S])|(?=(?!\A){other})"), _APART)
        )
        # The two marks of U+0344 stay apart from the letter in front.
        steps.append(normalizers.Replace("\u0344", f"{_KEPT}\u0308\u0301"))
        steps += [normalizers.Precompiled(characters), normalizers.Replace(_APART, "")]
        steps += [normalizers.NFC(), normalizers.Replace(_KEPT, "")]
    if squeeze:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the piece with the highest score first."""
    pairs = [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=lambda piece: (-scores[piece], ids[piece]))
        for i in range(1, len(piece))
    ]
    return [(left, right) for left, right in pairs if left in scores and right in scores]


def _message(content: bytes) -> dict[int, list[Any]]:
    """The values of a message by the numbers of its fields: integers, or bytes of other things."""
    found: dict[int, list[Any]] = {}
    stream = io.BytesIO(content)
    while stream.tell() < len(content):
        number, kind = divmod(_integer(stream), 8)
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"unknown kind {kind} of a field")
        if kind == 0:
            value: Any = _integer(stream)
        else:
            size = {1: 8, 5: 4}.get(kind) or _integer(stream)
            value = stream.read(size)
            if len(value) < size:
                raise ValueError("it ends within a field")
        found.setdefault(number, []).append(value)
    return found


def _integer(stream: io.BytesIO) -> int:
    """An integer of seven bits a byte, the lowest first; the last byte is below 128."""
    value = shift = 0
    while True:
        (byte,) = stream.read(1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
