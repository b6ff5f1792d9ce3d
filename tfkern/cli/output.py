"""How the commands print, and checks of the files that they will write."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tfkern import files
from tfkern.benchmarks import report


def prepare(folder: Path, *names: str) -> None:
    """Makes the folder for the named files, or fails now rather than after minutes of work.

    Raises:
        ValueError: a file cannot be written, or an existing one is no CSV that can take rows.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    for name in names:
        path = files.replaceable(folder / name)
        if path.suffix == ".csv" and path.exists():
            report.read(path)


def console() -> Console:
    """The console that tables are printed on."""
    # rich assumes 80 columns for a pipe, which are too few
    return Console(width=None if sys.stdout.isatty() else 120)


def exit_if_wrong(wrong: dict[str, str]) -> None:
    """If variants were wrong and so not timed, says why and exits with status 1."""
    for name, problem in wrong.items():
        print(f"tfkern: {name} is wrong and was not timed: {problem}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def with_progress(total: int | None, run: Callable[[Callable[..., None]], Any]) -> Any:
    """Returns `run(progress)`, and shows a bar while it runs.

    `progress(doing)` tells what is done now, and counts one more of the total;
    `progress(doing, done, total)` tells how many are done, and of how many.
    """
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    screen = Console(file=sys.stderr)  # the stderr of now: what runs may send its own elsewhere
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def progress(doing: str, done: int | None = None, total: int | None = None) -> None:
            if done is None:
                bar.update(task, advance=1, description=doing)
            else:
                bar.update(task, completed=done, total=total, description=doing)

        return run(progress)
