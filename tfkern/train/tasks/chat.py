"""A task on JSON lines: conversations, of which a model learns what the assistant says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfkern.data import IGNORED, Conversations
from tfkern.train.tasks.batches import (
    Sizes,
    Task,
    batches_of,
    check_flags,
    check_number,
    decoder,
)
from tfkern.train.tasks.conversing import conversing
from tfkern.train.tasks.lines import check_lengths, divided, read_rows


def chat(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    validation: float = 0.1,
    packed: bool = False,
    truncate: bool = False,
) -> Task:
    """A decoder that answers: supervised fine-tuning (Ouyang et al. 2022). Only what the assistant
    says has targets.

    Rows of the file are {"messages": [{"role": text, "content": text}, ...]}, or {"prompt": ...,
    "completion": ...} of two texts or two lists of messages: see `tfkern.data.Chat`.

    Args:
        tokenizer: the path of a tokenizer, or one to train on the rows, such as "bpe:8192"; if
            None, that of the model that training goes on with, or "bpe:8192".
        template: a file with a chat template, or a folder with one; that of the tokenizer if None.
            Prompts and completions that are texts need none.
        validation: the share of rows that is kept apart, chosen by a hash of what they say.
        packed: whether a row of a batch has several conversations, which do not see each other, and
            not one with padding behind it. Batches have "documents" then.
        truncate: whether the end of a conversation that has more than `length` tokens is cut off;
            if False, such a row is an error.

    Raises:
        ValueError: rows of another form or with more than `length` tokens, rows of messages
            without a template, or nothing to learn in what `truncate` leaves.
    """
    check_number("validation", validation, 0, 0.5)
    check_flags(packed=packed, truncate=truncate)
    rows = read_rows(data, _checked)
    conversations, text = conversing(rows, sizes.start, tokenizer, template)
    found = conversations.tokenizer
    items = read_rows(data, conversations.item)
    parts = divided(data, rows, validation)
    if not truncate:
        check_lengths(data, [len(item["tokens"]) for item in items], sizes.length)
    elif all((item["targets"][: sizes.length] == IGNORED).all() for item in items):
        raise ValueError(
            f"{data}: the assistant says nothing in the first length = {sizes.length} tokens of "
            "any row"
        )
    pad = found.special_id("pad" if "pad" in found.special else "eos")

    def make(part: Sequence[int]) -> tuple[Conversations, None]:
        return Conversations([items[i] for i in part], sizes.length, pad, packed=packed), None

    config = decoder(found, sizes.length)
    return Task(*batches_of(make, *parts, sizes), config, found, template=text)


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in row and not {"prompt", "completion"} <= row.keys():
        told = ", ".join(row) or "nothing"
        raise ValueError(f'a row must have "messages", or "prompt" and "completion", got {told}')
    return row
