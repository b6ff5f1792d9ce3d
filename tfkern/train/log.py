"""The record of a run: metrics.jsonl, and what TensorBoard shows if it is installed."""

import json
import math
import os
from pathlib import Path
from typing import Any

from tfkern import files


class Log:
    """Lines of JSON: one for each step, and one for each evaluation.

    Args:
        folder: of the run.
        start: how many steps the run has done. Lines of later ones, of a run that was killed after
            its last checkpoint, are removed, since these steps come again.

    Attributes:
        seconds: that all steps took.
        losses: step and loss of each step.
        evaluations: step and loss of each evaluation. Losses that are no number are infinite here.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= start]
        files.write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.seconds = 0.0
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        for line in kept:
            self._count(line)
        self._file = open(self.path, "a")
        self._board = _board(folder, start)

    def _count(self, line: dict[str, Any]) -> None:
        self.seconds += line.get("seconds", 0)
        for name, found in (("loss", self.losses), ("validation_loss", self.evaluations)):
            if name in line:
                loss = line[name]  # null stands for what is not finite
                number = loss is not None and math.isfinite(loss)
                found.append((line["step"], loss if number else math.inf))

    def add(self, line: dict[str, Any]) -> None:
        self._count(line)
        self._file.write(json.dumps(_finite(line)) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """A line in which numbers that JSON lacks, such as an infinite norm, are null."""
    return {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in line.items()
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last one that was cut off is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: it is no JSON") from None
    return found


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
