"""The task of answering prompts, whose answers a reward tells good from bad."""

from pathlib import Path
from typing import Any

from tfkern import files
from tfkern.data import order
from tfkern.train.kinds import check_integer
from tfkern.train.policy.prompts import Columns, Numbers
from tfkern.train.tasks.batches import Sizes, Task, Validation, check_number, sized
from tfkern.train.tasks.conversing import conversing
from tfkern.train.tasks.lines import divided, read_rows

_TAKEN = ("prompts", "answers")  # arguments of a reward beside columns


def prompts(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    longest: int | None = None,
    validation: float = 0.1,
) -> Task:
    """Prompts for `tfkern.train.Rollouts`, which makes batches of training of them: the batches
    here have lists in place of tensors.

    Rows of the file are {"prompt": text, or a list of messages}. Whatever else they have, such as
    "answer", becomes a column for the reward; where a row lacks it, it is None there. "tools" are
    also told to the template.

    Args:
        tokenizer, template: see `tfkern.train.tasks.chat.chat`.
        longest: the most tokens of a prompt; half of `length`, which is for prompt and answer
            together, if None.
        validation: the share of rows that is kept apart, chosen by a hash of the row.

    Raises:
        ValueError: a line is no object with a prompt, or has one that the template refuses or that
            is too long. The message names the file, the line and the field.
    """
    check_number("validation", validation, 0, 0.5)
    if longest is None:
        longest = max(1, sizes.length // 2)
    check_integer("longest", longest, 1, sizes.length)
    rows = read_rows(data, _checked)
    chat, text = conversing(
        [{"prompt": row["prompt"]} for row in rows], sizes.start, tokenizer, template
    )
    found = chat.tokenizer

    def encode(row: dict[str, Any]) -> list[int]:
        try:
            tokens = chat.prompt(row).tolist()
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from None
        if not 0 < len(tokens) <= longest:
            raise ValueError(
                f"prompt: it must have 1 to longest = {longest} tokens, got {len(tokens)}"
            )
        return tokens

    encoded = read_rows(data, encode)
    names = sorted({name for row in rows for name in row} - {"prompt"})
    columns = {name: [row.get(name) for row in rows] for name in names} | {"prompt": encoded}
    training, held = divided(data, rows, validation)
    part: dict[str, Any] = {"rank": sizes.rank, "world": sizes.world}

    def of(rows: list[int]) -> dict[str, list[Any]]:
        return {name: [column[i] for i in rows] for name, column in columns.items()}

    batches = order([Numbers(len(training))], sizes.batch, sizes.seed, **part)
    tests = Validation(Numbers(len(held)), sizes.batch, sizes.validation_batches, **part)
    config: dict[str, Any] = {"architecture": "decoder", "head": "lm"}
    config |= sized(found, sizes.length)
    if "eos" in found.special:
        config["end_token"] = found.special_id("eos")
    batched = Columns(of(training), batches), Columns(of(held), tests)
    return Task(*batched, config, found, template=text)


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), str | list):
        told = files.shown(row.get("prompt"))
        raise ValueError(f"prompt must be a string or a list of messages, got {told}")
    if taken := [name for name in _TAKEN if name in row]:
        raise ValueError(f"{taken[0]} is what a reward is told already: choose another name")
    return row
