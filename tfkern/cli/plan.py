"""`tfkern plan`."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tfkern import files
from tfkern.cli.options import number, values
from tfkern.cli.output import console

if TYPE_CHECKING:
    from tfkern.models import TransformerConfig
    from tfkern.train.parallel.plan import Plan

_RATES = (float, 1.0, 1e21)


def command(
    model: Annotated[str, typer.Argument(help="A preset, or a folder with config.json.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Fields of the configuration, as max_length=8192, in YAML."),
    ] = None,
    gpus: Annotated[int, number("Processes.", int, 1, 2**20, "--gpus")] = 8,
    memory: Annotated[str, typer.Option(help="Of each process, such as 80GB or 64GiB.")] = "80GB",
    length: Annotated[int, number("Tokens of a row.", int, 1, 2**31, "--length")] = 2048,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of all processes together; as many as these if left out."),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    optimiser: Annotated[str, typer.Option(help="adamw or lion.")] = "adamw",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keeps only the inputs of blocks.")
    ] = False,
    flops: Annotated[float, number("Operations a second of a process.", *_RATES, "--flops")] = 4e14,
    inside: Annotated[float, number("Bytes a second in a machine.", *_RATES, "--inside")] = 450e9,
    between: Annotated[
        float, number("Bytes a second between machines.", *_RATES, "--between")
    ] = 50e9,
    show: Annotated[int, number("Meshes to show.", int, 1, 10**6, "--show")] = 5,
) -> None:
    """Lists the meshes of processes on which a model can be trained, the fastest first.

    Memory and traffic are those of the process that has most. Seconds are a lower bound, by the
    rates that are given. Nothing is run. Weights and their gradients are float32.
    """
    from tfkern.train.parallel import plan

    limit = _bytes(memory)
    work = plan.Work(
        config=_config(model, changes or []), length=length, batch=batch or gpus,
        precision=precision, optimiser=optimiser, recompute=recompute, flops=flops, inside=inside,
        between=between,
    )  # fmt: skip
    found = plan.plans(work, gpus, limit)
    console().print(table(found[:show]))
    print("GB that a rank holds, and that it sends in a step by axis of the mesh")
    print(f"{len(found)} meshes fit; {plan.flops(work):.3g} operations a step")


def table(found: "list[Plan]") -> Table:
    """Plans, one a row, in GB and seconds."""
    from tfkern.train.parallel.plan import shown

    first = found[0]
    axes = [axis for axis in first.sent if any(p.sent[axis] for p in found)]
    made = Table("seconds", "GB", *first.memory, *axes, box=None)
    made.add_column("mesh", no_wrap=True)
    for p in found:
        numbers = [p.total, *p.memory.values(), *(p.sent[axis] for axis in axes)]
        cells = (f"{n / 1e9:.1f}" for n in numbers)
        made.add_row(f"{p.seconds:.2f}", *cells, shown(p.sizes))
    return made


def _bytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ValueError(f"memory must be as 80GB or 64GiB, got {files.shown(text)}")
    power = " KMGT".index(match[2] or " ")
    return float(match[1]) * (1024 if match[3] else 1000) ** power


def _config(model: str, changes: list[str]) -> "TransformerConfig":
    from dataclasses import replace

    from tfkern import models
    from tfkern.models.convert import read_config

    told = values(changes)
    known = models.TransformerConfig.__dataclass_fields__
    for name in told:
        if name not in known:
            raise ValueError(f"the configuration has no field {files.shown(name)}")
    if model in models.presets():
        return models.preset(model, **told)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{files.shown(model)} is no preset, and no folder with config.json")
    return replace(read_config(Path(model)), **told)
