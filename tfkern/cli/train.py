"""`tfkern train`."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tfkern.benchmarks.timing import product_ceiling
from tfkern.cli.launch import launch, reported
from tfkern.cli.options import check_device, values
from tfkern.cli.output import console
from tfkern.memory import keep_memory

if TYPE_CHECKING:
    from tfkern.train import Recipe


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe (.yaml), or the name of one.")] = "",
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Values of the recipe, as name=value or model.dim=value, in YAML."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Lists the recipes that come with the package.")
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Starts so many processes, which share the work by parallel."),
    ] = None,
) -> None:
    """Trains a model by a recipe, and goes on where the last checkpoint of its folder is.

    The folder `out` of the recipe gets the model with the best evaluation, checkpoints, all values
    of the recipe, metrics.jsonl and a chart of the loss. Ctrl-C saves and ends; the same command
    goes on. All values of a recipe: see tfkern.train.Recipe.

    With --nproc, or under torchrun or srun, many processes share the work, as the value `parallel`
    of the recipe tells: parallel.tp=2 parallel.fsdp=2, for instance. If one of them fails, all end.
    """
    from tfkern.train.parallel.mesh import check_sizes
    from tfkern.train.recipe import load, shipped

    if list_:
        if recipe or changes:
            raise ValueError(f"--list takes nothing beside it, got {recipe}")
        table = Table("recipe", "what it trains", box=None)
        for name, what in shipped().items():
            table.add_row(name, what)
        console().print(table)
        return
    if not recipe:
        raise ValueError("a recipe is needed: see tfkern train --list")
    found = load(recipe, values(changes or []))
    if nproc is not None:
        if "RANK" in os.environ:
            raise ValueError("--nproc starts processes, and torchrun has started this one already")
        check_sizes(found.parallel, nproc)
        raise typer.Exit(launch(nproc, ["train", recipe, *(changes or [])]))
    with reported():
        _train(found)


def _train(found: "Recipe") -> None:
    from tfkern.train.run import run

    device = check_device(found.device or "")
    dtype = getattr(torch, found.precision)
    keep_memory()
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    with _Screen(found.steps, first) as screen, _Interrupt() as interrupt:
        outcome = run(
            found,
            told=screen.show,
            stopped=interrupt.asked,
            ceiling=lambda: product_ceiling(dtype, device),
            preparing=screen.prepare,
        )
    if outcome.reason == "stopped":
        if first:
            told = f"interrupted after step {outcome.step}: the same command goes on"
            print(told, file=sys.stderr)
        raise typer.Exit(128 + (interrupt.number or signal.SIGTERM))
    if first:
        print(f"ended after step {outcome.step} ({outcome.reason}), ", end="")
        print(f"best validation loss {outcome.validation_loss:.4f}")
        print(outcome.model)


class _Interrupt:
    """Ctrl-C, SIGTERM or the end of the terminal as a wish to save and end after the current step,
    however long that takes.

    A second one ends the program as it does elsewhere, and so does one before the first step, when
    there is nothing to save.
    """

    def __init__(self) -> None:
        self.number = 0
        self._watcher: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        if self._watcher is None:
            self._watcher = signal.set_wakeup_fd(-1)  # would end the program after some seconds
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows lacks the last one
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return bool(self.number)

    def __enter__(self) -> "_Interrupt":
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._watcher, warn_on_full_buffer=False)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
        self.number = number


class _Screen:
    """A bar with the loss of the last step, and a line for each evaluation."""

    def __init__(self, steps: int, shown: bool) -> None:
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        screen = Console(stderr=True)
        self._bar = Progress(
            *columns,
            TextColumn("{task.description}"),
            console=screen,
            transient=True,
            redirect_stdout=False,  # else lines for a file would go to the terminal
            disable=not (shown and screen.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps)
        self._loss = float("nan")

    def __enter__(self) -> "_Screen":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def prepare(self, doing: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=f"{doing}: {done} of {total}")

    def show(self, line: dict[str, Any]) -> None:
        if "validation_loss" in line:
            told = f"step {line['step']}: training {self._loss:.4f}, validation "
            told += f"{line['validation_loss']:.4f}"
            if "accuracy" in line:
                told += f", accuracy {line['accuracy']:.4f}"
            with contextlib.suppress(OSError):  # nobody reads it any more; the run goes on
                if sys.stdout.isatty():
                    self._bar.console.print(told, highlight=False)
                else:
                    print(told, flush=True)
            return
        self._loss = line["loss"]
        share = line.get("share_of_ceiling")
        doing = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
        if share:
            doing += f", {share:.0%} of the product ceiling"
        self._bar.update(self._task, completed=line["step"], description=doing)
