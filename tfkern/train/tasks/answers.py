"""A task on JSON lines: questions whose answers are parts of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfkern import files
from tfkern.data import padded
from tfkern.models.convert import read_config
from tfkern.train.tasks import vocabulary
from tfkern.train.tasks.batches import Item, Sizes, Task, batches_of, check_number, sized
from tfkern.train.tasks.lines import divided, only, read_rows


def answers(
    data: Path,
    sizes: Sizes,
    *,
    tokenizer: str | None = None,
    validation: float = 0.1,
    stride: int | None = None,
) -> Task:
    """An encoder that tells where in a context the answer to a question begins and ends (Rajpurkar
    et al. 2016; Devlin et al. 2019).

    Rows of the file are those of SQuAD: {"question": text, "context": text, "answers": {"text":
    [text], "answer_start": [place of its first character]}}, of which the first answer counts. A
    question without an answer has empty lists; its targets are the first token of the row.

    A context that does not fit is cut into several rows, each of which repeats `stride` tokens of
    the one before. Where the answer is not whole in a row, it has no answer there.

    Args:
        tokenizer, validation: see `tfkern.train.tasks.rows.pairs`.
        stride: tokens; a quarter of `length` if None.

    Raises:
        ValueError: rows of another form, or an answer that is not where the row says.
    """
    check_number("validation", validation, 0, 0.5)
    stride = sizes.length // 4 if stride is None else stride
    rows = read_rows(data, _checked)
    parts = divided(data, rows, validation)
    questions, contexts = ([row[name] for row in rows] for name in ("question", "context"))
    found = vocabulary.chosen(
        tokenizer, sizes.start, questions + contexts, "eos", "pad", before=["cls"], after=["sep"]
    )
    try:
        encoded = found.batch(
            questions, contexts, length=sizes.length, truncate=True, stride=stride
        )
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from None
    kept: list[list[Any]] = [[] for _ in rows]
    for source, encoding in zip(encoded.source.tolist(), encoded.encodings, strict=True):
        ids, types = (np.array(x, np.int64) for x in (encoding.ids, encoding.type_ids))
        kept[source].append((ids, types, np.array(_place(rows[source], encoding))))
    pad = found.special_id("pad")
    segments = sizes.start is None or read_config(sizes.start).token_types > 1

    def make(part: Sequence[int]) -> tuple["Questions", None]:
        return Questions([row for i in part for row in kept[i]], sizes.length, pad, segments), None

    config = {
        "architecture": "encoder", "head": "span", "token_types": 2,
        **sized(found, sizes.length), **vocabulary.padding(found),
    }  # fmt: skip
    return Task(*batches_of(make, *parts, sizes), config, found)


@dataclass(frozen=True)
class Questions:
    """Questions with their contexts, padded to one length.

    Attributes:
        rows: tokens and segments (n,), and the first and the last token of the answer (2,).
        segments: whether the model takes segments.
    """

    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    length: int
    pad: int
    segments: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        tokens, types, place = self.rows[i]
        item = {"tokens": padded(tokens, self.length, self.pad), "mask": np.array(len(tokens))}
        if self.segments:
            item["token_types"] = padded(types, self.length, 0)
        return item | {"targets": place}


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    row = only(row, question=str, context=str, answers=dict)
    told = only(row["answers"], text=list, answer_start=list)
    texts, starts = told["text"], told["answer_start"]
    if len(texts) != len(starts):
        raise ValueError(f"answers has {len(texts)} texts and {len(starts)} places")
    found = {name: row[name] for name in ("question", "context")} | {"answer": None}
    if texts:
        text, start = texts[0], starts[0]
        only({"answers.text": text}, **{"answers.text": str})
        only({"answers.answer_start": start}, **{"answers.answer_start": int})
        there = row["context"][start : start + len(text)] if start >= 0 else ""
        if not text or there != text:
            where = f"context has {files.shown(there)} at {start}"
            raise ValueError(f"the answer is {files.shown(text)}, and the {where}")
        found["answer"] = [start, start + len(text)]
    return found


def _place(row: Mapping[str, Any], encoding: Any) -> tuple[int, int]:
    """The first and the last token of the answer, (0, 0) if the row does not have all of it."""
    if row["answer"] is None:
        return 0, 0
    start, end = row["answer"]
    spans = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    inside = [i for i, ((a, b), which) in enumerate(spans) if which == 1 and a < end and b > start]
    if not inside:
        return 0, 0
    first, last = inside[0], inside[-1]
    whole = encoding.offsets[first][0] <= start and end <= encoding.offsets[last][1]
    return (first, last) if whole else (0, 0)
