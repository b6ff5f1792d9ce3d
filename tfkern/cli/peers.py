"""`tfkern bench infer` and `tfkern bench generate`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import typer

from tfkern import files
from tfkern.benchmarks import environment, measure, report
from tfkern.benchmarks import generate as generating
from tfkern.benchmarks import infer as inferring
from tfkern.benchmarks import peers as benchmark
from tfkern.benchmarks.against import THREADS
from tfkern.cli.options import OUT_OF_FIXED, Out, models_of_transformers
from tfkern.cli.output import console, exit_if_wrong, prepare, with_progress


def _command(suite: benchmark.Suite, told: str) -> Callable[..., None]:
    """A command that times a suite, and with --compiled one more peer. Its help begins with what
    is told."""
    there = ", ".join(suite.models)
    shipped = ("transformers", "tfkern")
    others = " and ".join(p.name for p in suite.peers if p.modules[0] not in shipped)

    def command(
        models: Annotated[
            list[str] | None,
            typer.Argument(help=f"Models, from {there}. The default is all.", show_default=False),
        ] = None,
        with_compiled: Annotated[
            bool, typer.Option("--compiled", help="Also times transformers under torch.compile.")
        ] = False,
        quick: Annotated[
            bool,
            typer.Option(
                "--quick", help=f"Times one round instead of {suite.rounds}, to see what works."
            ),
        ] = False,
        dtype: Annotated[
            list[str] | None,
            typer.Option(
                help=f"Dtype: {' or '.join(benchmark.PRECISIONS)}; both if not given.",
                show_default=False,
            ),
        ] = None,
        out: Out = OUT_OF_FIXED / "peers",
    ) -> None:
        dtypes = tuple(dict.fromkeys(dtype or benchmark.PRECISIONS))
        for name in dtypes:
            if name not in benchmark.PRECISIONS:
                known = ", ".join(benchmark.PRECISIONS)
                raise ValueError(f"unknown dtype {files.shown(name)}: expected one of {known}")
        chosen = models_of_transformers(models, suite.models)
        peers = (*suite.peers, suite.compiled) if with_compiled else suite.peers
        timed = replace(suite, peers=peers)
        torch.set_num_threads(THREADS)
        prepare(out, suite.file_name(environment.facts("cpu")))
        cases = sum(case.model.name in chosen for case in suite.cases)
        steps = len(dtypes) * (cases + len(chosen) * len(peers))
        rounds = 1 if quick else suite.rounds
        paths = []

        def run(progress: Callable[..., None]) -> measure.Results:
            return benchmark.run(
                timed, chosen, dtypes=dtypes, rounds=rounds, progress=progress,
                keep=lambda rows: paths.append(suite.write(rows, out)),
            )  # fmt: skip

        results = with_progress(steps, run)
        screen = console()
        for note in results.notes:
            screen.print(note, style="yellow", soft_wrap=True, markup=False, highlight=False)
        if results.rows:
            for table in report.peers_tables(results.rows):
                screen.print(table)
            screen.print(f"wrote {paths[-1]}", soft_wrap=True, highlight=False)
        exit_if_wrong(results.wrong)

    command.__doc__ = (
        f"{told}\n\nThe others are transformers and, where they are installed, {others}. "
        "Each runs in a process of its own, in turns, with the same weights, dtype and number of "
        "threads. The result is the time of another divided by that of tfkern."
    )
    return command


infer = _command(
    inferring.SUITE,
    "Times an encoder, and a decoder that reads, on a CPU, next to other ways to run them.",
)
generate = _command(
    generating.SUITE,
    "Times decoders that write on a CPU, next to other ways to run them.",
)
