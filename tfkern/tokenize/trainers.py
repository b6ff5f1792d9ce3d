"""Vocabularies from texts."""

import io
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tfkern.ops import checks
from tfkern.tokenize.pieces import pieces
from tfkern.tokenize.tokenizer import Tokenizer, integer, refusing, strings
from tfkern.tokenize.vocabularies import byte_level, word_piece

_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The kinds, and the tokens that a vocabulary of each has whatever the texts are.
LEAST = {"words": 2, "bpe": 257, "wordpiece": len(_BERT_SPECIAL), "unigram": 3}
KINDS = tuple(LEAST)


def characters(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer with a token for each character of the texts, in the order of Unicode; lossless.

    Other characters raise ValueError in `encode`. The texts are read once, one by one.
    """
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(*strings("texts", [text]))
    with refusing("the texts have a character that no file can hold"):
        model = models.WordLevel({c: i for i, c in enumerate(sorted(alphabet))})
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {})


def train(
    kind: str,
    texts: Sequence[str],
    vocab_size: int,
    *,
    min_frequency: int = 2,
    lowercase: bool = True,
) -> Tokenizer:
    """A tokenizer whose vocabulary comes from texts.

    The same texts give the same vocabulary, in every process.

    Args:
        kind: "words" between white space and punctuation, unknown ones are [UNK]; "bpe" of bytes,
            as for GPT-2 (Sennrich et al. 2016); "wordpiece", as for BERT (Schuster, Nakajima 2012;
            merges by frequency, and among equals in the order of the vocabulary); "unigram" of
            lines, as for T5 (Kudo 2018).
        texts: the texts to learn from.
        vocab_size: at most this many tokens, special ones included.
        min_frequency: rarer words and pairs become no token of their own; "unigram" ignores it.
        lowercase: for "wordpiece", BERT's normalisation without case and accents.

    Raises:
        ValueError: an unknown kind, a vocabulary too small for the alphabet and special tokens, a
            negative min_frequency, or a string in place of several.
    """
    checks.choice("kind", kind, KINDS)
    if isinstance(texts, str):
        raise ValueError(f"texts must be a sequence of strings, got {texts[:40]!r}")
    min_frequency = integer("min_frequency", min_frequency, 0)
    vocab_size = integer("vocab_size", vocab_size, 0)
    texts = list(strings("texts", list(texts)))  # read more than once
    if kind == "bpe":
        return _train_bpe(texts, vocab_size, min_frequency)
    if kind == "wordpiece":
        return _train_word_piece(texts, vocab_size, min_frequency, lowercase)
    if kind == "unigram":
        return _train_unigram(texts, vocab_size)
    return _train_words(texts, vocab_size, min_frequency)


def _train_words(texts: Sequence[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    special = ["[PAD]", "[UNK]"]
    _check_room(vocab_size, LEAST["words"])
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"pad": "[PAD]", "unk": "[UNK]"})


def _train_bpe(texts: Sequence[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_room(vocab_size, LEAST["bpe"])
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"bos": end, "eos": end, "pad": end})  # the last id, as in GPT-2


def _train_word_piece(
    texts: Sequence[str], vocab_size: int, min_frequency: int, lowercase: bool
) -> Tokenizer:
    """Trains a WordPiece with a fixed order of ids.

    The library's own trainer gives ids to the alphabet in the order of a hash table, and breaks
    ties between equally frequent merges by id. So the sorted alphabet comes first here.
    """
    normalise = normalizers.BertNormalizer(lowercase=lowercase)
    found = {c for text in texts for c in normalise.normalize_str(text) if not c.isspace()}
    alphabet = [*sorted(found), *(f"##{c}" for c in sorted(found))]
    _check_room(vocab_size, len(alphabet) + LEAST["wordpiece"])
    backend = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##"))
    backend.normalizer = normalise
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*_BERT_SPECIAL, *alphabet],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    vocabulary = backend.get_vocab()
    return word_piece(models.WordPiece(vocabulary, unk_token="[UNK]"), lowercase)


def _train_unigram(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains by SentencePiece: the trainer of `tokenizers` adds numbers in the order of a hash
    table, so that its results vary."""
    _check_room(vocab_size, LEAST["unigram"])
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines() if line]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=1.0,
            max_sentence_length=1 << 30,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no vocabulary of {vocab_size} from these texts: {error}") from None
    return pieces(model.getvalue())


def _check_room(vocab_size: int, needed: int) -> None:
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size must be at least {needed}, for the alphabet and special tokens, got "
            f"{vocab_size}"
        )
