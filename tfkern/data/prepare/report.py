"""What each step of a run kept and dropped, as numbers, as a table and as a picture."""

import json
import os
from pathlib import Path
from typing import Any

from tfkern import files


def steps(folder: str | Path) -> list[dict[str, Any]]:
    """The counts of all steps that have run, over all ranks.

    Each has `stage`, `step`, `documents` (that came in), `kept`, `dropped` (by reason), `seconds`
    (of all processes together), `characters` (that came in) and `other` counts of its own.

    Raises:
        ValueError: the folder is not one of `prepare`, or a file of counts is cut off.
    """
    logs = Path(folder) / "logs"
    if not os.path.isdir(logs):  # False for names that are too long, too
        raise ValueError(f"{folder}: no folder of prepared data: it has no logs")
    found: list[dict[str, Any]] = []
    characters = 0.0
    for log in sorted(logs.iterdir()):
        merged: list[dict[str, Any]] = []
        for path in sorted((log / "stats").glob("*.json")):
            content = files.read(path)
            try:
                counts = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{path}: {files.one_line(error)}") from None
            for i, told in enumerate(counts):
                if i == len(merged):
                    merged.append(_row(log.name, told["name"]))
                _add(merged[i], told)
        for row in merged:
            out, without_reason = (row["other"].pop(n, 0) for n in ("doc_len", "dropped"))
            if rest := without_reason - sum(row["dropped"].values()):
                row["dropped"]["duplicate"] = rest
            row["kept"] = row["documents"] - sum(row["dropped"].values())
            row["characters"] = int(characters or out)
            characters = out or characters
        found += [row for row in merged if row["documents"]]
    return found


def draw(folder: str | Path, path: str | Path) -> None:
    """Draws how many documents each step kept, and for which reasons it dropped others.

    Args:
        folder: what `prepare` returned.
        path: the picture to write, in a format that matplotlib knows by its ending.
    """
    from matplotlib.figure import Figure

    rows = [row for row in steps(folder) if row["dropped"] or row["stage"] == "tokens"]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['step']}" for row in rows]
    for y, row in enumerate(rows):
        axes.barh(y, row["kept"], color="#4477aa")
        left = row["kept"]
        for i, (reason, count) in enumerate(sorted(row["dropped"].items(), key=lambda r: -r[1])):
            axes.barh(y, count, left=left, color=_REASONS[i % len(_REASONS)], edgecolor="white")
            if count > 0.06 * rows[0]["documents"]:
                axes.text(left + count / 2, y, reason, ha="center", va="center", fontsize=8)
            left += count
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("documents: kept (blue), dropped by reason")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


_REASONS = ("#ee6677", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")


def _row(log: str, name: str) -> dict[str, Any]:
    stage, step = log.partition("_")[2], name.partition(": ")[2]
    return {
        "stage": stage.replace("_", " "), "step": step, "documents": 0, "kept": 0, "dropped": {},
        "seconds": 0.0, "characters": 0, "other": {},
    }  # fmt: skip


def _add(row: dict[str, Any], told: dict[str, Any]) -> None:
    row["seconds"] += _total(told["time_stats"])
    for name, value in told["stats"].items():
        count = _total(value)
        if name == "total":
            row["documents"] += int(count)
        elif name.startswith("dropped_"):
            reason = name.removeprefix("dropped_")
            row["dropped"][reason] = row["dropped"].get(reason, 0) + int(count)
        elif name != "forwarded":
            row["other"][name] = row["other"].get(name, 0) + int(count)


def _total(value: Any) -> float:
    return value["total"] if isinstance(value, dict) else value
