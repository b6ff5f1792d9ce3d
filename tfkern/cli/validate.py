"""`tfkern validate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from tfkern import files
from tfkern.cli.options import SEEDS, Device, Dtype, check_device, check_dtype, check_op, number
from tfkern.cli.output import console
from tfkern.dispatch import check_backend
from tfkern.ops import OPS
from tfkern.validation import cases


def command(
    op: Annotated[
        str, typer.Argument(help=f"Op to check: {', '.join(OPS)}. The default is all.")
    ] = "",
    backend: Annotated[
        str, typer.Option(help="Backend to check. The default is the one that serves a call.")
    ] = "",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[
        int, number("Seed from which the cases and their inputs are drawn.", *SEEDS)
    ] = 0,
    count: Annotated[int, number("Number of cases for each op.", int, 1, 100_000)] = 8,
    file: Annotated[
        Path | None, typer.Option("--json", help="File into which the results are written as JSON.")
    ] = None,
) -> None:
    """Compares outputs and gradients of random cases with float64, next to PyTorch's own errors.

    The exit status is 1 if an error is more than twice that of PyTorch in the same dtype.
    """
    checked = check_dtype(dtype)
    ops = (check_op(op),) if op else OPS
    device = check_device(device)
    if file is not None:
        files.replaceable(file)
    if not run(ops, checked, device, backend or None, seed, count, file):
        raise typer.Exit(1)


def run(
    ops: Sequence[str],
    dtype: torch.dtype,
    device: str,
    backend: str | None,
    seed: int,
    count: int,
    file: Path | None,
) -> bool:
    """Runs the random cases of `ops`, prints a table of the errors, and says whether all passed."""
    if backend is not None:
        check_backend(backend)
    table = Table("case", "tensor", box=None, header_style="bold", pad_edge=False)
    for column in ("ours", "torch", "ratio", "limit", ""):
        table.add_column(column, justify="right")
    results: list[dict] = []
    for op in ops:
        for case in cases(op, dtype, device, backend, seed, count):
            for i, result in enumerate(case.run(seed).as_dicts()):
                results.append({"op": op, "case": case.label} | result)
                errors = [f"{result[name]:.2g}" for name in ("error", "torch_error")]
                verdict = "ok" if result["ok"] else f"FAILED {result['problem'] or ''}".rstrip()
                table.add_row(
                    Text(f"{op} {case.label}" if i == 0 else ""),
                    result["name"],
                    *errors,
                    f"{result['ratio']:.2f}",
                    f"{result['limit']:.2g}",
                    Text(verdict, style="" if result["ok"] else "bold red"),
                )
    console().print(table)
    failed = sum(not result["ok"] for result in results)
    console().print(f"{len(results)} comparisons, {failed} failed")
    if file is not None:
        settings = {"dtype": str(dtype), "device": device, "backend": backend, "seed": seed}
        files.write(file, json.dumps(settings | {"results": results}, indent=1) + "\n")
    return failed == 0
