"""`tfkern bench train`."""

from typing import Annotated

import torch
import typer

from tfkern import files
from tfkern.benchmarks import environment, report, train
from tfkern.benchmarks.against import THREADS
from tfkern.cli.options import OUT_OF_FIXED, Out
from tfkern.cli.output import console, exit_if_wrong, prepare, with_progress

_CASES = {case.name: case for case in train.CASES}


def command(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Cases, from {', '.join(_CASES)}. The default is all.", show_default=False
        ),
    ] = None,
    out: Out = OUT_OF_FIXED / "train",
) -> None:
    """Times whole steps of training a GPT on a CPU, next to PyTorch and transformers.

    The result is the time of the same step in plain PyTorch, eager and compiled, and of
    transformers' model, divided by that of tfkern's.
    """
    chosen = tuple(cases or _CASES)
    for name in chosen:
        if name not in _CASES:
            known = ", ".join(_CASES)
            raise ValueError(f"unknown case {files.shown(name)}: expected one of {known}")
    others = train.available()
    torch.set_num_threads(THREADS)
    prepare(out, train.file_name(environment.facts("cpu")))
    results = with_progress(
        len(chosen) * len(train.PRECISIONS),
        lambda progress: train.run(
            tuple(_CASES[name] for name in chosen), others=others, progress=progress
        ),
    )
    if results.rows:
        console().print(report.models_table(results.rows))
        path = train.write(results.rows, out)
        console().print(f"wrote {path}", soft_wrap=True, highlight=False)
    exit_if_wrong(results.wrong)
