"""`tfkern bench patched`."""

from typing import Annotated

import torch
import typer

from tfkern.benchmarks import environment, patched, report
from tfkern.benchmarks.against import THREADS
from tfkern.cli.options import OUT_OF_FIXED, Out, models_of_transformers
from tfkern.cli.output import console, exit_if_wrong, prepare, with_progress

_MODELS = ", ".join(patched.MODELS)


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(help=f"Models, from {_MODELS}. The default is all.", show_default=False),
    ] = None,
    out: Out = OUT_OF_FIXED / "transformers",
) -> None:
    """Times models of transformers on a CPU, with tfkern's kernels and without.

    Each model runs on tfkern's attention and is patched (`tfkern.integrations.hf`). The result is
    the time with transformers' own code divided by that time.
    """
    chosen = models_of_transformers(models, patched.MODELS)
    torch.set_num_threads(THREADS)
    prepare(out, patched.file_name(environment.facts("cpu")))
    total = len(patched.DTYPES_OF_MODELS) * sum(len(patched.CALLS[name]) for name in chosen)
    results = with_progress(total, lambda progress: patched.run(chosen, progress=progress))
    if results.rows:
        console().print(report.models_table(results.rows))
        path = patched.write(results.rows, out)
        console().print(f"wrote {path}", soft_wrap=True, highlight=False)
    exit_if_wrong(results.wrong)
