"""Tasks on the shards of a folder that `tfkern.data.prepare.prepare` made.

All functions of this module build a task: `data` is the folder, `sizes` what `task` was told, and
the rest are options.
"""

from pathlib import Path

from tfkern import tokenize
from tfkern.data import Packed, Shards, Windows, span_lengths, span_window
from tfkern.data.order import Source
from tfkern.tokenize import Tokenizer
from tfkern.train.tasks import vocabulary
from tfkern.train.tasks.batches import (
    Change,
    Sizes,
    Task,
    batches_of,
    check_flags,
    check_number,
    decoder,
    decoder_tokens,
    encoder_decoder,
    sized,
)
from tfkern.train.tasks.changes import Denoise, Mask, Pretrain, Spans, Split
from tfkern.train.tasks.parts import Parts

_Made = tuple[Source, Change | None]


def causal(data: Path, sizes: Sizes, *, documents: bool = False) -> Task:
    """A decoder that tells the next token (Radford et al. 2019).

    Rows are windows of the whole stream, of `length` tokens each.

    Args:
        documents: whether rows are whole documents side by side, which do not see each other.
            Batches have "documents" then.
    """
    check_flags(documents=documents)
    train, validation, tokenizer = _opened(data)
    end = tokenizer.special_id("eos")

    def make(shards: Shards) -> _Made:
        rows = Packed(shards, sizes.length, end) if documents else Windows(shards, sizes.length)
        return rows, None

    config = decoder(tokenizer, sizes.length)
    return Task(*batches_of(make, train, validation, sizes), config, tokenizer)


def masked(
    data: Path,
    sizes: Sizes,
    *,
    rate: float = 0.15,
    whole_words: bool = False,
    static: bool = False,
) -> Task:
    """An encoder that tells masked tokens (Devlin et al. 2019).

    Rows are windows of the whole stream. Control tokens in it, such as the end of a document, are
    never masked.

    Args:
        rate: the share of tokens, or of words, that is chosen.
        whole_words: whether all tokens of a word are chosen, or none.
        static: whether a row has the same masks in every epoch.
    """
    check_flags(whole_words=whole_words, static=static)
    check_number("rate", rate, 0, 1)
    train, validation, tokenizer = _opened(data, "mask")
    mask = _mask(tokenizer, rate, whole_words)
    config = {"architecture": "encoder", "head": "mlm"} | sized(tokenizer, sizes.length)

    def make(shards: Shards) -> _Made:
        return Windows(shards, sizes.length), mask

    return Task(*batches_of(make, train, validation, sizes, static=static), config, tokenizer)


def pretraining(
    data: Path,
    sizes: Sizes,
    *,
    sentence_order: bool = False,
    rate: float = 0.15,
    whole_words: bool = False,
    static: bool = False,
) -> Task:
    """An encoder that tells masked tokens and whether two texts follow each other (Devlin et al.
    2019). A text of one sentence is parted in its middle.

    Args:
        sentence_order: whether both texts always follow each other, and the model tells in which
            order (Lan et al. 2020).
        rate, whole_words, static: see `masked`.

    Raises:
        ValueError: a part of the data has but one document, and there has to be another text.
    """
    check_flags(sentence_order=sentence_order, whole_words=whole_words, static=static)
    check_number("rate", rate, 0, 1)
    if sizes.length < 5:
        raise ValueError(f"length must be at least 5 for two texts, got {sizes.length}")
    train, validation, tokenizer = _opened(data, "pad", "cls", "sep", "mask")
    mask = _mask(tokenizer, rate, whole_words)
    ends = vocabulary.sentence_ends(tokenizer)
    ids = {role: tokenizer.special_id(role) for role in ("cls", "sep", "pad")}

    def make(shards: Shards) -> _Made:
        # a text that begins near the end of a part goes on in the next one
        parts = Parts(shards, sizes.length, least=2, beyond=sizes.length)
        if not sentence_order:
            parts.check_others()
        return parts, Pretrain(mask, ends, sizes.length, None if sentence_order else parts, **ids)

    config = {"architecture": "encoder", "head": "pretraining", "pooler": True, "token_types": 2}
    config |= sized(tokenizer, sizes.length) | vocabulary.padding(tokenizer)
    return Task(*batches_of(make, train, validation, sizes, static=static), config, tokenizer)


def denoising(
    data: Path,
    sizes: Sizes,
    *,
    rate: float = 0.3,
    mean: float = 3.0,
    permutation: bool = True,
    deletion: float = 0.0,
    rotation: float = 0.0,
) -> Task:
    """An encoder-decoder that restores corrupted texts (Lewis et al. 2020).

    Rows are documents, or parts of them that fit with the end token into `length`.

    Args:
        rate: the share of tokens that spans with one mask each stand for.
        mean: the mean length of a span.
        permutation: whether sentences change places.
        deletion: the share of tokens that is deleted.
        rotation: the share of rows that begin with another token, and go on at the start.
    """
    check_flags(permutation=permutation)
    for name, value in (("rate", rate), ("deletion", deletion), ("rotation", rotation)):
        check_number(name, value, 0, 1)
    check_number("mean", mean, 1)
    if sizes.length < 2:
        raise ValueError(f"length must be at least 2, with the end token, got {sizes.length}")
    train, validation, tokenizer = _opened(data, "pad", "bos", "mask")
    tokenizer = vocabulary.with_template(tokenizer, [], ["eos"])
    change = Denoise(
        length=sizes.length, ends=vocabulary.sentence_ends(tokenizer) if permutation else None,
        rate=rate, mean=mean, deletion=deletion, rotation=rotation,
        mask=tokenizer.special_id("mask"), **decoder_tokens(tokenizer),
    )  # fmt: skip

    def make(shards: Shards) -> _Made:
        return Parts(shards, sizes.length - 1), change

    config = encoder_decoder(tokenizer, sizes.length)
    return Task(*batches_of(make, train, validation, sizes), config, tokenizer)


def spans(data: Path, sizes: Sizes, *, rate: float = 0.15, mean: float = 3.0) -> Task:
    """An encoder-decoder that tells what the sentinels in a text stand for (Raffel et al. 2020).

    Rows are windows of the whole stream, as long as fits into a source of `length` tokens.

    Args:
        rate: the share of tokens that is lost.
        mean: the mean length of a span.
    """
    check_number("rate", rate, 0, 1)
    check_number("mean", mean, 1)
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    window = span_window(sizes.length, rate, mean)
    source, target = span_lengths(window, rate, mean)
    count = (source + target - window) // 2 - 1
    train, validation, tokenizer = _opened(data, "pad", "bos", sentinels=count)
    tokenizer = vocabulary.with_template(tokenizer, [], ["eos"])
    sentinels = tuple(map(tokenizer.id, vocabulary.sentinel_names(count)))
    ids = decoder_tokens(tokenizer)
    change = Spans(sentinels, rate, mean, start=ids["start"], end=ids["end"])

    def make(shards: Shards) -> _Made:
        return Windows(shards, window), change

    config = encoder_decoder(tokenizer, max(source, target))
    return Task(*batches_of(make, train, validation, sizes), config, tokenizer)


def prefix(data: Path, sizes: Sizes) -> Task:
    """An encoder-decoder that goes on with a text, whose start the encoder reads (Raffel et al.
    2020).

    Rows are windows of the whole stream, parted at any place.
    """
    train, validation, tokenizer = _opened(data, "pad", "bos")
    ids = decoder_tokens(tokenizer)
    change = Split(sizes.length, start=ids["start"], pad=ids["pad"])

    def make(shards: Shards) -> _Made:
        return Windows(shards, sizes.length), change

    config = encoder_decoder(tokenizer, sizes.length)
    return Task(*batches_of(make, train, validation, sizes), config, tokenizer)


def _opened(folder: Path, *roles: str, sentinels: int = 0) -> tuple[Shards, Shards, Tokenizer]:
    """The shards of training and of validation, and their tokenizer with what a task needs.

    Raises:
        ValueError: a part is missing or empty, or the tokenizer is of other shards.
    """
    for name in ("train", "validation", "tokenizer"):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name}: prepare a text with validation: 0.05")
    parts = Shards(folder / "train"), Shards(folder / "validation")
    tokenizer = tokenize.load(folder / "tokenizer")
    for shards in parts:
        if not shards.tokens:
            raise ValueError(f"{shards.folder} has no tokens: prepare more text")
        if shards.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{shards.folder} has a vocabulary of {shards.vocab_size} tokens, and "
                f"{folder / 'tokenizer'} one of {tokenizer.vocab_size}"
            )
    return *parts, vocabulary.extended(tokenizer, *roles, sentinels=sentinels)


def _mask(tokenizer: Tokenizer, rate: float, whole_words: bool) -> Mask:
    return Mask(
        mask=tokenizer.special_id("mask"),
        vocab_size=tokenizer.vocab_size,
        special=vocabulary.control(tokenizer),
        rate=rate,
        starts=vocabulary.word_starts(tokenizer) if whole_words else None,
    )
