"""`tfkern bench suite`."""

import sys
from typing import Annotated

import typer

from tfkern.benchmarks import environment, report, suite
from tfkern.cli.options import OUT_OF_FIXED, SECONDS, Out, check_device, check_op, number
from tfkern.cli.output import console, exit_if_wrong, prepare, with_progress
from tfkern.ops import OPS


def command(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Ops to time, from {', '.join(OPS)}. The default is all.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to time: cuda or cuda:N.")] = "cuda",
    budget: Annotated[
        float, number("Time in seconds after which no further case is begun.", *SECONDS)
    ] = suite.BUDGET,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Leaves out cases that the file has from this device, versions and commit.",
        ),
    ] = False,
    out: Out = OUT_OF_FIXED,
) -> None:
    """Times fixed cases on a GPU, next to everything that PyTorch has.

    The results are written to <gpu>.csv, and drawn in charts beside it.
    """
    chosen = [check_op(op) for op in ops or OPS]
    if not device.startswith("cuda"):
        raise ValueError(
            f"the suite's cases are for a GPU, got device {device!r}; those for a CPU run by "
            "tfkern bench <op> --against torch"
        )
    device = check_device(device)
    path = out / report.file_name(environment.device_name(device))
    prepare(out, path.name)
    cases = [p for p in suite.points(device) if p.case.kernels in chosen]
    results = with_progress(
        1 + len(cases),
        lambda progress: suite.run(cases, path, budget=budget, resume=resume, progress=progress),
    )
    screen = console()
    for table in report.suite_tables(results.rows):
        screen.print(table)
    for line in report.suite_failures(results.rows):
        screen.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
    known = {(p.case.op, p.name): p.case for p in suite.points(device)}
    for written in (path, *report.suite_charts(path, known)):
        screen.print(f"wrote {written}", soft_wrap=True, highlight=False)
    for name in results.skipped:
        print(f"tfkern: no time was left for {name}", file=sys.stderr)
    exit_if_wrong(results.wrong)
