"""What the commands print, and the files that they are about to write."""

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
    """Makes the folder for these files, or fails now, not after minutes.

    Raises:
        ValueError: they cannot be written, or what is there is no CSV to add rows to.
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
    """Where tables are printed."""
    # 80 columns, which rich takes for a pipe, are too few
    return Console(width=None if sys.stdout.isatty() else 120)


def exit_if_wrong(wrong: dict[str, str]) -> None:
    """Exits with status 1 if something was not timed because it is wrong, and says why."""
    for name, problem in wrong.items():
        print(f"tfkern: {name} is wrong and was not timed: {problem}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def with_progress(total: int, run: Callable[[Callable[[str], None]], Any]) -> Any:
    """What `run(progress)` returns, while a bar counts the calls of progress."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=total)
        return run(lambda doing: bar.update(task, advance=1, description=doing))
