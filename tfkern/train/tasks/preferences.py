"""Tasks on preferences: files of JSON lines with rows as TRL has them (von Werra et al. 2020)."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkern.data import IGNORED, padded
from tfkern.tokenize import Tokenizer
from tfkern.train import kinds
from tfkern.train.tasks import vocabulary
from tfkern.train.tasks.batches import Item, Sizes, Task, batches_of, check_number, sized
from tfkern.train.tasks.conversing import conversing
from tfkern.train.tasks.lines import divided, read_rows

FITS = ("error", "drop", "keep_end", "keep_start")
Row = Mapping[str, Any]


def preferences(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    fit: str = "error",
    validation: float = 0.1,
) -> Task:
    """A decoder that learns which of two answers is preferred, by an objective such as
    `tfkern.train.preferences.DPO`.

    Rows of the file are {"prompt", "chosen", "rejected"}, all texts or all lists of messages, or
    without "prompt", which is then what both others begin with. So it is, too, if "prompt" is a
    text and the others are messages. Rows may have "tools". Texts end with the end token. Messages
    become text by a chat template, see `tfkern.data.Chat`.

    Batches have tokens (B, 2, T), mask (B, 2) lengths, and targets (B, 2, T), the tokens of the
    answers: the chosen row, then the rejected one.

    Args:
        tokenizer: the folder of a model or of a tokenizer, or one to train on the texts, such as
            "bpe:8192"; if None, that of the model that training goes on with, or "bpe:8192".
        template: a file with a chat template, or a folder with one, if it is not the tokenizer's.
        fit: what becomes of rows with more than `length` tokens. "error" refuses the file, "drop"
            leaves them out, and "keep_end" and "keep_start" keep as much of the end or of the start
            of the prompt as fits, the same in both rows of a pair. Answers are never cut.
        validation: the share of rows that is kept apart, chosen by a hash of their content.

    Raises:
        ValueError: rows have another form, or do not fit.
    """
    read = _read(data, sizes, _pair, lambda row: (), tokenizer, template, fit, validation)
    return read.task("lm", lambda part: part)


def rewards(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    fit: str = "error",
    validation: float = 0.1,
) -> Task:
    """A decoder that tells how good an answer is, by `tfkern.train.preferences.Rewards`.

    Rows of the file are those of `preferences`, and may have a number "margin", by how much the
    chosen answer is better. Batches have the same tokens and mask. Their targets (B,) are the
    margins, 0 where there are none.

    Args:
        tokenizer, template, fit, validation: see `preferences`.

    Raises:
        ValueError: rows have another form, or do not fit.
    """
    read = _read(data, sizes, _pair, _margin, tokenizer, template, fit, validation)
    return read.task("classification", lambda part: part)


def unpaired(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    fit: str = "error",
    validation: float = 0.1,
) -> Task:
    """A decoder that learns from answers with a label each, by `tfkern.train.preferences.KTO`.

    Rows of the file are {"prompt", "completion", "label"}, texts or lists of messages, with the
    label true for desirable answers and false for others.

    Batches have rows in groups of two: an answer, and behind the same prompt the answer of the next
    row of the file, cut at `length`. Tokens are (B, 2, T), mask (B, 2) lengths, and targets a tuple
    of (B, 2, T) and of the labels (B,) bool.

    Args:
        tokenizer, template, fit, validation: see `preferences`.

    Raises:
        ValueError: rows have another form, or do not fit, or there is a single one in a part.
    """
    read = _read(data, sizes, _answer, _label, tokenizer, template, fit, validation)

    def mismatched(part: list[_Example]) -> list[_Example]:
        if len(part) < 2:
            raise ValueError(f"{data}: training and validation need two rows each, got one")
        others = [*part[1:], part[0]]
        return [
            one._replace(rows=(*one.rows, _behind(one.rows[0], other.rows[0], sizes.length)))
            for one, other in zip(part, others, strict=True)
        ]

    return read.task("lm", mismatched)


@dataclass(frozen=True)
class Groups:
    """Rows in groups, each padded to one length.

    Attributes:
        examples: the groups.
        language_model: whether the tokens of answers are targets, in front of what is beside them.
    """

    examples: list["_Example"]
    length: int
    pad: int
    language_model: bool

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Item:
        rows, beside = self.examples[i]

        def stacked(name: str, fill: int) -> np.ndarray:
            return np.stack([padded(row[name], self.length, fill) for row in rows])

        targets = (*([stacked("targets", IGNORED)] if self.language_model else []), *beside)
        return {
            "tokens": stacked("tokens", self.pad),
            "mask": np.array([len(row["tokens"]) for row in rows]),
            "targets": targets if len(targets) > 1 else targets[0],
        }


class _Example(NamedTuple):
    """The rows of tokens and targets that a row of a file makes, and its other targets."""

    rows: tuple[Item, ...]
    beside: tuple[np.ndarray, ...]


class _Read(NamedTuple):
    """What there is of a file."""

    sizes: Sizes
    tokenizer: Tokenizer
    template: str | None
    examples: list[_Example]
    parts: tuple[list[int], list[int]]

    def task(self, head: str, change: Callable[[list[_Example]], list[_Example]]) -> Task:
        """The task of a decoder, with a change of the examples of training and of validation."""
        special, length = self.tokenizer.special, self.sizes.length
        language_model = head == "lm"
        pad = self.tokenizer.special_id("pad") if "pad" in special else 0  # which nobody reads

        def make(part: Sequence[int]) -> tuple[Groups, None]:
            examples = change([self.examples[i] for i in part])
            return Groups(examples, length, pad, language_model), None

        config: dict[str, Any] = {"architecture": "decoder", "head": head}
        config |= sized(self.tokenizer, length)
        if "eos" in special:
            config["end_token"] = self.tokenizer.special_id("eos")
        if not language_model:
            config["classes"] = 1
            config |= vocabulary.padding(self.tokenizer) if "pad" in special else {}
        batches, held = batches_of(make, *self.parts, self.sizes)
        return Task(batches, held, config, self.tokenizer, template=self.template)


def _read(
    data: Path,
    sizes: Sizes,
    form: Callable[[Row], Row],
    beside: Callable[[Row], tuple[np.ndarray, ...]],
    tokenizer: str | None,
    template: str | None,
    fit: str,
    validation: float,
) -> _Read:
    """Reads a file, whose rows two functions check: one gives what makes the tokens, and the other
    what else is a target."""
    kinds.check_choice("fit", fit, FITS)
    check_number("validation", validation, 0, 0.5)
    told = read_rows(data, form)  # once for texts that a tokenizer may be trained on
    chat, text = conversing(told, sizes.start, tokenizer, template)

    def example(row: Row) -> _Example:
        item = chat.item(form(row))
        rows = (item["chosen"], item["rejected"]) if "chosen" in item else (item,)
        return _Example(rows, beside(row))

    examples, kept = _fitted(data, read_rows(data, example), sizes.length, fit)
    parts = divided(data, [told[i] for i in kept], validation)
    return _Read(sizes, chat.tokenizer, text, examples, parts)


def _pair(row: Row) -> Row:
    found = _named(row, ("chosen", "rejected"), ("prompt", "tools"))
    answers = [found["chosen"], found["rejected"]]
    if isinstance(found.get("prompt"), str) and all(isinstance(a, list) for a in answers):
        del found["prompt"]  # a text, which the messages begin with
    if found.get("prompt") is None and all(isinstance(a, str) for a in answers):
        prompt = os.path.commonprefix(answers)
        chosen, rejected = (answer[len(prompt) :] for answer in answers)
        found |= {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return found


def _answer(row: Row) -> Row:
    return _named(row, ("prompt", "completion"), ("tools",))


def _named(row: Row, needed: Sequence[str], other: Sequence[str]) -> dict[str, Any]:
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"{missing[0]} is missing, there is {', '.join(row) or 'nothing'}")
    return {name: row[name] for name in (*needed, *other) if name in row}


def _margin(row: Row) -> tuple[np.ndarray]:
    margin = row.get("margin")
    if margin is not None:
        kinds.check_number("margin", margin, -1e6, 1e6)
    return (np.array(margin or 0.0, np.float32),)


def _label(row: Row) -> tuple[np.ndarray]:
    kinds.check_flag("label", row.get("label"))
    return (np.array(row["label"]),)


def _fitted(
    path: Path, examples: list[_Example], length: int, fit: str
) -> tuple[list[_Example], list[int]]:
    """The examples whose rows have at most `length` tokens, with parts of prompts left out, and
    their numbers.

    Raises:
        ValueError: there are others, which may not be left out, or no examples remain.
    """
    if fit in ("keep_end", "keep_start"):
        examples = [e._replace(rows=_cut(e.rows, length, fit == "keep_end")) for e in examples]
    sizes = [max(len(row["tokens"]) for row in example.rows) for example in examples]
    kept = [i for i, size in enumerate(sizes) if size <= length]
    if not kept or len(kept) < len(sizes) and fit != "drop":
        what = "" if fit in ("error", "drop") else " without their prompts"
        raise ValueError(
            f"{path}: {len(sizes) - len(kept)} of {len(sizes)} rows have more than length = "
            f"{length} tokens{what}, up to {max(sizes)}: give a larger length, or another fit than "
            f"{fit!r}"
        )
    return [examples[i] for i in kept], kept


def _cut(rows: tuple[Item, ...], length: int, end: bool) -> tuple[Item, ...]:
    """Rows of a group, which lose as many tokens of their prompts as the longest has too many. One
    token of a prompt remains, which the answer follows."""
    more = max(len(row["tokens"]) for row in rows) - length
    more = min(more, *(_start(row) - 1 for row in rows))
    if more <= 0:
        return rows
    cut = []
    for row in rows:
        first = 0 if end else _start(row) - more
        tokens = np.delete(row["tokens"], slice(first, first + more))
        cut.append({"tokens": tokens, "targets": row["targets"][more:]})
    return tuple(cut)


def _behind(one: Item, other: Item, length: int) -> Item:
    """The prompt of one row, and behind it the answer of another."""
    prompt, start = _start(one), _start(other)
    tokens = np.concatenate([one["tokens"][:prompt], other["tokens"][start:]])
    targets = np.concatenate([one["targets"][: prompt - 1], other["targets"][start - 1 :]])
    return {"tokens": tokens[:length], "targets": targets[:length]}


def _start(row: Item) -> int:
    """The place of an answer's first token."""
    return int((row["targets"] != IGNORED).argmax()) + 1
