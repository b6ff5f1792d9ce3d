"""What makes tokens of rows of conversations: a tokenizer and a chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfkern import files, tokenize
from tfkern.data import Chat, Template, read_template
from tfkern.train.tasks import vocabulary


def conversing(
    rows: Sequence[Mapping[str, Any]],
    start: Path | None,
    tokenizer: str | None,
    template: str | None,
) -> tuple[Chat, str | None]:
    """What makes tokens of rows, and the text of its chat template, if there is one.

    Args:
        rows: texts or lists of messages by name, on which a tokenizer may be trained.
        start: the folder of the model that training goes on with, if there is one.
        tokenizer: the folder of a tokenizer, which is taken as it is, or one to train, see
            `vocabulary.made`; if None, that of the model, or "bpe:8192".
        template: a file with a chat template, or a folder with one; that of the tokenizer if None.
            Without any, rows of messages are refused, and texts need none.

    Raises:
        ValueError: a tokenizer or a template that cannot be read.
    """
    if template is not None and not isinstance(template, str | Path):
        raise ValueError(f"template must be a path, got {files.shown(template)}")
    folder = start
    if tokenizer is not None:
        folder = None if vocabulary.is_trained(tokenizer) else Path(tokenizer)
    if folder is not None:
        found = tokenize.load(folder)
    else:
        texts = [text for row in rows for name in row if name != "tools" for text in _of(row[name])]
        found = vocabulary.extended(vocabulary.made(tokenizer, texts), "eos", "pad")
    text = _template(folder if template is None else Path(template), template is not None)
    refusal = "{{ raise_exception('the tokenizer has no chat template, so name one') }}"
    return Chat(found, Template(refusal if text is None else text)), text


def _template(path: Path | None, needed: bool) -> str | None:
    """The text of a chat template in a file or in a folder, None if it is not there."""
    if path is None:
        return None
    try:
        return read_template(path) if path.is_dir() else files.read(path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"template: {path} is not UTF-8") from None
    except ValueError:
        if needed:
            raise
        return None


def _of(value: Any) -> list[str]:
    """A text, or those of messages."""
    messages = value if isinstance(value, list) else [{"content": value}]
    found = [message.get("content") for message in messages if isinstance(message, dict)]
    return [text for text in found if isinstance(text, str)]
