"""What a run of training learns: batches and the fields of a model that follow from data.

    from tfkern.train.tasks import task

    found = task("causal", "out/1234", length=256, batch=32)
    model = Transformer(TransformerConfig(dim=128, layers=4, heads=4, **found.config))
    for record in steps(model, found.batches, CrossEntropy(), optimiser, stop=1000):
        ...

All batches are pure functions of the seed and the step.
"""

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tfkern.train.tasks import answers, chat, images, preferences, prompts, rows, tagging, texts
from tfkern.train.tasks.batches import Task, check_sizes

KINDS: dict[str, Callable[..., Task]] = {
    "causal": texts.causal,
    "masked": texts.masked,
    "pretraining": texts.pretraining,
    "denoising": texts.denoising,
    "spans": texts.spans,
    "prefix": texts.prefix,
    "pairs": rows.pairs,
    "classification": rows.classification,
    "tagging": tagging.tagging,
    "answers": answers.answers,
    "chat": chat.chat,
    "preferences": preferences.preferences,
    "rewards": preferences.rewards,
    "unpaired": preferences.unpaired,
    "prompts": prompts.prompts,
    "images": images.images,
}


def task(
    kind: str,
    data: str | Path,
    *,
    length: int,
    batch: int,
    seed: int = 0,
    validation_batches: int = 50,
    rank: int = 0,
    world: int = 1,
    start: str | Path | None = None,
    **options: Any,
) -> Task:
    """The batches of a kind of training, and what a model needs for them.

    Args:
        kind: one of `KINDS`. The function there tells the options.
        data: a folder that `tfkern.data.prepare.prepare` returned; for tasks on rows a file of JSON
            lines; for "images" a file, or "digits".
        length: most tokens of a row.
        batch: rows of a batch, or images, of all data ranks together.
        seed: of the order and of whatever is random, in [0, 2**32).
        validation_batches: the greatest number of batches in an evaluation.
        rank, world: which part of each batch this process has, and how many parts there are.
        start: the folder of a model that training goes on with, as `tfkern.models.load` reads it.
            Its tokenizer makes the tokens of JSON lines, and rows begin and end as it writes them.

    Raises:
        ValueError: an unknown kind or option, a value out of its range, or data that are missing
            or too short.
    """
    check_options(kind, options)
    sizes = check_sizes(length, batch, seed, validation_batches, rank, world, start)
    return KINDS[kind](Path(data), sizes, **options)


def check_options(kind: str, options: Collection[str]) -> None:
    """Raises a ValueError unless there is this kind, and it has options of these names."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    known = list(inspect.signature(KINDS[kind]).parameters)[2:]
    for name in options:
        if name not in known:
            raise ValueError(f"{kind} has no option {name!r}; it has {', '.join(known) or 'none'}")


__all__ = ["KINDS", "Task", "check_options", "task"]
