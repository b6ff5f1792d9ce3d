"""Tokenizers of published models, from the files of their vocabularies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tfkern import files
from tfkern.tokenize.tokenizer import Tokenizer, refusing

_Path = str | Path


def gpt2(vocabulary: _Path, merges: _Path) -> Tokenizer:
    """GPT-2's byte-level BPE: any text, lossless (Radford et al. 2019).

    Args:
        vocabulary: vocab.json (encoder.json), token to id.
        merges: merges.txt (vocab.bpe).

    Raises:
        ValueError: a file cannot be read. All functions of this module raise it.
    """
    backend = byte_level(_read(models.BPE.from_file, vocabulary, merges))
    end = "<|endoftext|>"
    return Tokenizer(backend, {"bos": end, "eos": end, "pad": end})


def bart(vocabulary: _Path, merges: _Path) -> Tokenizer:
    """BART's BPE: GPT-2's with other special tokens and ids: <s> text </s>."""
    backend = byte_level(_read(models.BPE.from_file, vocabulary, merges))
    special = {
        "bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>"
    }  # fmt: skip
    tokenizer = Tokenizer(backend, special)
    # The mask token takes in a space in front of it.
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    backend.add_special_tokens([mask])
    tokenizer.special["mask"] = "<mask>"
    ids = {token: backend.token_to_id(token) for token in ("<s>", "</s>")}
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=list(ids.items())
    )
    return tokenizer


def bert(vocabulary: _Path, *, lowercase: bool = True) -> Tokenizer:
    """BERT's WordPiece: [CLS] text [SEP] (Devlin et al. 2019).

    Args:
        vocabulary: vocab.txt, a token a line.
        lowercase: normalise as for the uncased models: lower case, no accents.
    """
    model = _read(lambda file: models.WordPiece.from_file(file, unk_token="[UNK]"), vocabulary)
    return word_piece(model, lowercase)


def t5(model: _Path, sentinels: int = 100) -> Tokenizer:
    """T5's Unigram: text </s> (Raffel et al. 2020; Kudo 2018).

    Args:
        model: spiece.model, a file of SentencePiece, which has to be installed to read it.
        sentinels: how many tokens <extra_id_...> follow the vocabulary, with <extra_id_0> last.
    """
    import sentencepiece

    tokenizer = _read(lambda file: unigram(sentencepiece.SentencePieceProcessor(file)), model)
    backend = tokenizer.backend
    backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", tokenizer.special_id("eos"))],
    )
    return tokenizer


def _read(read: Callable[..., Any], *paths: _Path) -> Any:
    names = [str(files.regular(Path(path))) for path in paths]
    with refusing(", ".join(names)):
        return read(*names)


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer from a BPE of bytes, lossless, that cuts texts into words as GPT-2 does."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def word_piece(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    """A tokenizer from a WordPiece, with BERT's normalisation, word borders and template."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    tokenizer = Tokenizer(backend, special)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def unigram(processor: Any) -> Tokenizer:
    """A Unigram tokenizer with the pieces and the normalisation of a SentencePieceProcessor: NFKC,
    and one space between words, written as U+2581."""
    ids = range(processor.get_piece_size())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id()))
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), space, normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = {"pad": processor.pad_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    return Tokenizer(backend, {role: pieces[i][0] for role, i in special.items() if i >= 0})
