"""A task on JSON lines: conversations, of which a model learns what the assistant says."""

from collections.abc import Sequence
from pathlib import Path

from tfkern import files
from tfkern.data import Chat, Conversations, Template, read_template
from tfkern.train.tasks import vocabulary
from tfkern.train.tasks.batches import (
    Sizes,
    Task,
    batches_of,
    check_flags,
    check_number,
    decoder,
)
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
        tokenizer: the path of a tokenizer; if None, that of the model that training goes on with.
        template: a file with a chat template; if None, that of the tokenizer. Prompts and
            completions that are texts need none.
        validation: the share of rows that is kept apart, chosen by a hash of what they say.
        packed: whether a row of a batch has several conversations, which do not see each other, and
            not one with padding behind it. Batches have "documents" then.
        truncate: whether the end of a conversation that has more than `length` tokens is cut off;
            if False, such a row is an error.

    Raises:
        ValueError: rows of another form or with more than `length` tokens, no tokenizer, or rows of
            messages without a template.
    """
    check_number("validation", validation, 0, 0.5)
    check_flags(packed=packed, truncate=truncate)
    conversations, text = conversing(sizes.start, tokenizer, template)
    found = conversations.tokenizer
    rows = read_rows(data, lambda row: (row, conversations.item(row)))
    parts = divided(data, [row for row, _ in rows], validation)
    items = [item for _, item in rows]
    if not truncate:
        check_lengths(data, [len(item["tokens"]) for item in items], sizes.length)
    pad = found.special_id("pad" if "pad" in found.special else "eos")

    def make(part: Sequence[int]) -> tuple[Conversations, None]:
        return Conversations([items[i] for i in part], sizes.length, pad, packed=packed), None

    config = decoder(found, sizes.length)
    return Task(*batches_of(make, *parts, sizes), config, found, template=text)


def conversing(
    start: Path | None, tokenizer: str | None, template: str | None
) -> tuple[Chat, str | None]:
    """What makes tokens of rows for a model that answers, and its chat template, if there is one.

    Args:
        start: the folder of the model that training goes on with.
        tokenizer, template: see `chat`.

    Raises:
        ValueError: there is no tokenizer.
    """
    if tokenizer is None and start is None:
        raise ValueError("tokenizer must be the path of one, as there is no model to go on with")
    folder = Path(tokenizer) if tokenizer is not None else start
    assert folder is not None
    found = vocabulary.chosen(None, folder, [])
    try:
        text = read_template(folder) if template is None else files.read(Path(template)).decode()
    except UnicodeDecodeError:
        raise ValueError(f"template: {template} is not UTF-8") from None
    except ValueError as error:
        if template is not None:
            raise
        # Rows of texts need no template. Those of messages tell what is missing.
        return Chat(found, Template(f"{{{{ raise_exception({str(error)!r}) }}}}")), None
    return Chat(found, Template(text)), text
