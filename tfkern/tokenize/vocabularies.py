"""Tokenizers of published models, from the files of their vocabularies."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tfkern import files
from tfkern.tokenize.pieces import pieces
from tfkern.tokenize.tokenizer import ROLES, Tokenizer, integer, refusing

_Path = str | Path
Special = Mapping[str, str | AddedToken]
NONE: Special = MappingProxyType({})


def gpt2(
    vocabulary: _Path,
    merges: _Path,
    *,
    prefix_space: bool = False,
    begins: bool = False,
    ends: bool = False,
    special: Special = NONE,
) -> Tokenizer:
    """GPT-2's byte-level BPE: any text, lossless (Radford et al. 2019).

    Args:
        vocabulary: vocab.json (encoder.json), token to id.
        merges: merges.txt (vocab.bpe).
        prefix_space: whether a text begins with a space, so that its first word is like others.
        begins, ends: whether texts have the token "bos" in front and "eos" behind.
        special: tokens by role, in place of <|endoftext|>.

    Raises:
        ValueError: a file cannot be read. All functions of this module raise it.
    """
    backend = byte_level(_read(models.BPE.from_file, vocabulary, merges), prefix_space)
    end = "<|endoftext|>"
    default = {"bos": end, "eos": end}
    tokenizer = with_special(backend, {**default, "pad": special.get("eos", end), **special})
    if begins or ends:
        surround(tokenizer, "bos" if begins else "", "eos" if ends else "")
    return tokenizer


def bart(
    vocabulary: _Path, merges: _Path, *, prefix_space: bool = False, special: Special = NONE
) -> Tokenizer:
    """The BPE of BART and RoBERTa: GPT-2's with other special tokens and ids: <s> text </s>.

    Args:
        prefix_space: whether a text begins with a space, so that its first word is like others.
        special: tokens by role, in place of <s>, </s>, <unk>, <pad> and <mask>.
    """
    backend = byte_level(_read(models.BPE.from_file, vocabulary, merges), prefix_space)
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)  # takes in a space
    default: Special = {
        "bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>",
        "mask": mask,
    }  # fmt: skip
    tokenizer = with_special(backend, {**default, **special})
    cls, sep = ((str(tokenizer.special[r]), tokenizer.special_id(r)) for r in ("cls", "sep"))
    backend.post_processor = processors.RobertaProcessing(
        sep, cls, trim_offsets=True, add_prefix_space=prefix_space
    )
    return tokenizer


def gpt1(vocabulary: _Path, merges: _Path, *, special: Special = NONE) -> Tokenizer:
    """GPT-1's BPE of lower case words without accents, between which spaces are (Radford 2018)."""
    unk = str(special.get("unk", "<unk>"))
    names = [str(files.regular(Path(path))) for path in (vocabulary, merges)]
    with refusing(", ".join(names)):
        model = models.BPE.from_file(*names, unk_token=unk, end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return with_special(backend, {"unk": unk, **special})


def bert(
    vocabulary: _Path,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese: bool = True,
    special: Special = NONE,
) -> Tokenizer:
    """BERT's WordPiece: [CLS] text [SEP] (Devlin et al. 2019).

    Args:
        vocabulary: vocab.txt, a token a line.
        lowercase: normalise as for the uncased models: lower case, no accents.
        strip_accents: whether letters lose their accents; as lowercase if None.
        chinese: whether each Chinese character is a word.
        special: tokens by role, in place of [UNK], [SEP], [PAD], [CLS] and [MASK].
    """
    unk = str(special.get("unk", "[UNK]"))
    model = _read(lambda file: models.WordPiece.from_file(file, unk_token=unk), vocabulary)
    return word_piece(model, lowercase, strip_accents, chinese, special)


def t5(model: _Path, sentinels: int = 100, *, special: Special = NONE) -> Tokenizer:
    """T5's Unigram: text </s> (Raffel et al. 2020; Kudo 2018).

    Args:
        model: spiece.model, a file of SentencePiece.
        sentinels: how many tokens <extra_id_...> follow the vocabulary, with <extra_id_0> last.
        special: tokens by role, in place of those that the file tells.
    """
    found = sentencepiece(model)
    count = integer("sentinels", sentinels, 0)
    backend = found.backend
    backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(count))])
    tokenizer = with_special(backend, {**found.special, **special})
    surround(tokenizer, "", "eos")
    return tokenizer


def llama(
    model: _Path, *, begins: bool = True, ends: bool = False, special: Special = NONE
) -> Tokenizer:
    """The BPE of the first Llamas: <s> text (Touvron et al. 2023).

    Args:
        model: tokenizer.model, a file of SentencePiece.
        begins, ends: whether texts have the token "bos" in front and "eos" behind.
        special: tokens by role, in place of those that the file tells.
    """
    found = sentencepiece(model)
    tokenizer = with_special(found.backend, {**found.special, **special})
    surround(tokenizer, "bos" if begins else "", "eos" if ends else "")
    return tokenizer


def sentencepiece(model: _Path) -> Tokenizer:
    """The tokenizer of a model of SentencePiece, without a template: see `pieces`."""
    path = Path(model)
    try:
        return pieces(files.read(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def surround(tokenizer: Tokenizer, before: str, after: str) -> None:
    """Puts the tokens with these roles, if any, before and after each text of a tokenizer."""
    ids = {role: tokenizer.special_id(role) for role in (before, after) if role}
    names = {role: tokenizer.special[role] for role in ids}
    first, second = (
        " ".join(filter(None, (names.get(before), text, names.get(after)))) for text in ("$A", "$B")
    )
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=first,
        pair=f"{first} {second}",
        special_tokens=[(names[role], ids[role]) for role in ids],
    )


def with_special(backend: tokenizers.Tokenizer, special: Special) -> Tokenizer:
    """A tokenizer with special tokens by role, as names or with what they take in of a text. Tokens
    under other keys are added before them."""
    told = {role: special[role] for role in ROLES if role in special}
    with refusing("the tokens cannot be added"):
        backend.add_tokens([token for key, token in special.items() if key not in told])
        backend.add_special_tokens(list(told.values()))
    return Tokenizer(backend, {role: str(token) for role, token in told.items()})


def _read(read: Callable[..., Any], *paths: _Path) -> Any:
    names = [str(files.regular(Path(path))) for path in paths]
    with refusing(", ".join(names)):
        return read(*names)


def byte_level(model: models.BPE, prefix_space: bool = False) -> tokenizers.Tokenizer:
    """A tokenizer from a BPE of bytes, lossless, that cuts texts into words as GPT-2 does."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def word_piece(
    model: models.WordPiece,
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese: bool = True,
    special: Special = NONE,
) -> Tokenizer:
    """A tokenizer from a WordPiece, with BERT's normalisation, word borders and template."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=strip_accents,
        handle_chinese_chars=chinese,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    default = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    tokenizer = with_special(backend, {**default, **special})
    cls, sep = tokenizer.special["cls"], tokenizer.special["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(t, tokenizer.id(t)) for t in (cls, sep)],
    )
    return tokenizer
