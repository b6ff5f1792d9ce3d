"""Tasks on the shards of a folder that `tfkern.data.prepare.prepare` made."""

from pathlib import Path

from tfkern import tokenize
from tfkern.data import Packed, Shards, Windows
from tfkern.data.order import Source
from tfkern.tokenize import Tokenizer
from tfkern.train.tasks.batches import Sizes, Task, divided


def opened(folder: Path) -> tuple[Shards, Shards, Tokenizer]:
    """The shards of training and of validation, and their tokenizer.

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
    return *parts, tokenizer


def causal(folder: Path, sizes: Sizes, *, documents: bool = False) -> Task:
    """A language model that tells the next token (Radford et al. 2019).

    Rows are windows of the whole stream, of `length` tokens each.

    Args:
        documents: whether rows are whole documents side by side that do not see each other. A batch
            has "documents" then.
    """
    train, validation, tokenizer = opened(folder)
    end = tokenizer.special_id("eos")

    def source(shards: Shards) -> Source:
        if documents:
            return Packed(shards, sizes.length, pad=end)
        return Windows(shards, sizes.length)

    batches, held = divided(source(train), source(validation), sizes)
    config = {
        "architecture": "decoder",
        "head": "lm",
        "vocab_size": tokenizer.vocab_size,
        "end_token": end,
        "max_length": sizes.length,
    }
    return Task(batches, held, config, tokenizer)
