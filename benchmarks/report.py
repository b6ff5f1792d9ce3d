"""Writes results: a table, CSV, JSON and charts of time, memory and rates over length."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tfkern import files

from .case import BOTH
from .measure import MEASURED, size
from .sweep import Results, slopes

# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart. A variant keeps
# its colour and marker in every chart.
_STYLES = {
    "tfkern": ("#0072B2", "o"),
    "tfkern native": ("#0072B2", "o"),
    "tfkern triton": ("#CC79A7", "P"),
    "tfkern reference": ("#56B4E9", "v"),
    "plain": ("#D55E00", "s"),
    "torch": ("#D55E00", "s"),
    "torch plain": ("#D55E00", "s"),
    "torch.compile": ("#009E73", "D"),
    "sdpa flash": ("#009E73", "D"),
    "torch sdpa": ("#009E73", "D"),
    "sdpa math": ("#E69F00", "^"),
    "sdpa efficient": ("#000000", "X"),
    "sdpa cudnn": ("#999999", "*"),
    "flex": ("#F0E442", "h"),
    "liger": ("#F0E442", "h"),
}
_INK = "#333333"


SUFFIXES = (".csv", ".json", ".png")


def write(results: Results, folder: Path) -> list[Path]:
    """Writes <op>.csv, <op>.json and <op>.png into `folder`, and returns their paths."""
    paths = [folder / f"{results.case.op}{suffix}" for suffix in SUFFIXES]
    write_rows(results, folder)
    content = {"rows": results.rows, "slopes": slopes(results), "notes": results.notes}
    files.write(paths[1], json.dumps(content, indent=1) + "\n")
    chart(results, paths[2])
    return paths


def write_rows(results: Results, folder: Path) -> None:
    """Writes <op>.csv with the rows so far."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / f"{results.case.op}{SUFFIXES[0]}", list(results.rows[0]), results.rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with files.replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def file_name(*facts: str) -> str:
    """A file name from facts, such as cpu-intel-xeon-processor-avx512-amx.csv."""
    words = re.sub(r"\((R|TM)\)", "", " ".join(facts)).lower()
    return "-".join(re.findall(r"[a-z0-9]+", words)) + ".csv"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file.

    Raises:
        ValueError: the file is damaged; the message names the line.
    """
    rows: list[dict[str, str]] = []
    try:
        text = files.read(path).decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: it is no text in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"expected {len(reader.fieldnames or ())} fields, as in line 1")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from None
    return rows


def update(
    path: Path,
    rows: Sequence[dict[str, Any]],
    keep: Callable[[dict[str, str]], bool],
    order: Callable[[dict[str, Any]], Any],
) -> Path:
    """Writes a file with the given rows and those of its former rows for which `keep` is true."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read(path) if keep(row)] if path.exists() else []
    every = sorted([*kept, *rows], key=order)
    _write_csv(path, list(dict.fromkeys(name for row in [*rows, *kept] for name in row)), every)
    return path


def table(results: Results) -> Table:
    """The rows as a table, one block for each length."""
    case = results.case
    flops = case.unit == "TFLOP/s"
    measured = [row["rate"] for row in results.rows if row["rate"] is not None]
    small = flops and max(measured, default=0) < 10  # low rates read better in GFLOP/s
    columns = ["length", "variant", "p20 ms", "p50 ms", "p80 ms"]
    columns += ["GFLOP/s" if small else case.unit, "ceiling", "memory"]
    columns += ["GFLOP"] if flops else []
    if case.backward:
        columns.insert(2, "pass")
    made = Table(title=title(results), title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        text = column in ("variant", "pass")
        made.add_column(column, justify="left" if text else "right", no_wrap=True)
    previous: dict[str, Any] = {"length": None, "variant": None}
    for row in results.rows:
        if row["length"] != previous["length"]:
            made.add_section()
            previous = {"length": None, "variant": None}
        repeated = row["variant"] == previous["variant"]
        if repeated and row["status"] != MEASURED:
            continue
        cells = ["" if previous["length"] else str(row["length"])]
        cells.append("" if repeated else row["variant"])
        cells += [row["pass"].replace(BOTH, "both")] if case.backward else []
        if row["status"] == MEASURED:
            rate = row["rate"] * (1e3 if small else 1)
            cells += [digits(row[q]) for q in ("p20_ms", "p50_ms", "p80_ms")]
            cells += [digits(rate), f"{row['fraction_of_ceiling']:.0%}"]
            cells.append("" if row["peak_bytes"] is None else size(row["peak_bytes"]))
        else:
            cells += ["-"] * 6  # the reason stands below the table
        if flops:
            count = row["counted_flops"]
            cells.append("" if count is None else digits(count / 1e9))
        made.add_row(*cells)
        previous = row
    return made


def digits(value: float) -> str:
    """Three digits, or all digits before the point from 1000 on."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def slope_table(results: Results) -> Table:
    """The exponents of growth over length, by variant."""
    made = Table(
        title="growth: exponents over the longest lengths", header_style="bold", box=SIMPLE_HEAD
    )
    for column in ("variant", "time", "FLOPs", "memory"):
        made.add_column(column, justify="left" if column == "variant" else "right")
    for name, fitted in slopes(results).items():
        made.add_row(name, *("" if s is None else f"{s:.2f}" for s in fitted.values()))
    return made


def show(results: Results, console: Console) -> None:
    """Prints both tables and what was left out."""
    console.print(table(results))
    if len({row["length"] for row in results.rows}) > 1:
        console.print(slope_table(results))
    for row in results.rows:
        if row["status"] != MEASURED and row["pass"] == results.main_pass:
            told = f"{row['variant']} at {row['length']}: {row['status']}"
            console.print(told, style="yellow", markup=False)
    for note in results.notes:
        console.print(note, style="dim", markup=False)


def title(results: Results) -> str:
    """What was run, in one line."""
    row = results.rows[0]
    names = list(row)
    told = [f"{row['op']} {results.main_pass}", row["dtype"]]
    for name in names[names.index("op") + 1 : names.index("variant")]:
        value = row[name]
        if value is True:
            told.append(name)
        elif value not in (False, None) and name not in ("length", "dtype"):
            told.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(told)


def chart(results: Results, path: Path) -> None:
    """Time and peak memory against length on logarithmic axes, beside slopes of 1 and 2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results.rows if r["pass"] == results.main_pass]
    lengths = sorted({r["length"] for r in rows})
    figure, panels = pyplot.subplots(1, 2, figsize=(10.5, 5.2))
    figure.subplots_adjust(left=0.055, right=0.985, top=0.83, bottom=0.18, wspace=0.13)
    names = ("time (ms)", "peak memory beyond the inputs (MB)")
    for panel, name in zip(panels, names, strict=True):
        panel.set_title(name, loc="left", color=_INK, fontsize=10)
        panel.set_xlabel("context length (tokens)", color=_INK, fontsize=9)
    for name in dict.fromkeys(r["variant"] for r in rows):
        own = [r for r in rows if r["variant"] == name]
        style = _style(name)
        _time_line(panels[0], own, name, style)
        _memory_line(panels[1], own, style)
    for panel in panels:
        _axes(panel, lengths)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", frameon=False, ncols=7, fontsize=9)
    figure.text(0.0125, 0.945, title(results), fontsize=12, fontweight="bold", color=_INK)
    figure.text(0.0125, 0.905, _where(rows[0]), fontsize=8.5, color="#666666")
    with files.replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")
    pyplot.close(figure)


def _style(variant: str) -> dict[str, Any]:
    colour, marker = _STYLES.get(variant, ("#F0E442", "h"))
    # tfkern's kernels are drawn on top, in heavier lines.
    ours = variant.startswith("tfkern") and variant != "tfkern reference"
    width = {"linewidth": 2.4, "zorder": 3} if ours else {"linewidth": 1.4, "zorder": 2}
    return {"color": colour, "marker": marker, "markersize": 5, **width}


@dataclass
class Panel:
    """Rates over a size, by variant."""

    title: str
    lines: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    ceiling: float = 0.0  # the measured ceiling, in the unit of the rates


def rate_chart(
    panels: Sequence[Panel], axes: tuple[str, str], title: str, row: dict[str, Any], path: Path
) -> Path:
    """Draws the panels in two lines, with the facts of `row`; `axes` are the labels of x and y."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = -(-len(panels) // 2)
    size = (3.6 * columns + 0.4, 7.4)
    figure, grid = pyplot.subplots(2, columns, figsize=size, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.86, bottom=0.14, wspace=0.17, hspace=0.16)
    every = sorted({x for panel in panels for line in panel.lines.values() for x, _ in line})
    for panel, place in zip(panels, grid.flat, strict=False):
        place.set_title(panel.title, loc="left", color=_INK, fontsize=10)
        for name, points in panel.lines.items():
            place.plot(*zip(*sorted(points), strict=True), label=name, **_style(name))
        if panel.ceiling:
            line: dict[str, Any] = {"color": "#b0b0b0", "linewidth": 1, "linestyle": (0, (4, 3))}
            place.axhline(panel.ceiling, label="measured ceiling", **line)
        _frame(place, every)
        place.set_ylim(bottom=0)
    for place in grid[-1]:
        place.set_xlabel(axes[0], color=_INK, fontsize=9)
    for place in grid[:, 0]:
        place.set_ylabel(axes[1], color=_INK, fontsize=9)
    found = {}
    for place in grid.flat:
        handles, labels = place.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    legend: dict[str, Any] = {"loc": "lower left", "frameon": False, "fontsize": 9}
    figure.legend(found.values(), found, ncols=2 + columns, **legend)
    figure.text(0.0125, 0.955, title, fontsize=12, fontweight="bold", color=_INK)
    figure.text(0.0125, 0.925, _where(row), fontsize=8.5, color="#666666")
    with files.replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")
    pyplot.close(figure)
    return path


def _where(row: dict[str, Any]) -> str:
    """The machine and the versions, in one line."""
    facts = [row["device"]]
    facts += [f"{row['threads']} threads, {row['instructions']}"] if row["instructions"] else []
    facts += [f"torch {row['torch']}", f"tfkern {row['tfkern']}"]
    facts += [f"commit {row['commit']}"] if row["commit"] else []
    return ", ".join([*facts, row["date"][:10]])


def _time_line(panel: Any, rows: list[dict[str, Any]], name: str, style: dict[str, Any]) -> None:
    measured = [r for r in rows if r["status"] == MEASURED]
    x = [r["length"] for r in measured]
    panel.plot(x, [r["p50_ms"] for r in measured], label=name, **style)
    low, high = ([r[q] for r in measured] for q in ("p20_ms", "p80_ms"))
    panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _memory_line(panel: Any, rows: list[dict[str, Any]], style: dict[str, Any]) -> None:
    weighed = [r for r in rows if r["status"] == MEASURED and r["peak_bytes"]]
    panel.plot([r["length"] for r in weighed], [r["peak_bytes"] / 1e6 for r in weighed], **style)
    missing = [r for r in rows if r["status"].startswith("would need")]
    for row in missing:  # hollow markers: predicted, not run
        point = row["length"], row["predicted_bytes"] / 1e6
        panel.plot(*point, linestyle="none", markerfacecolor="white", **style)
        if row["status"] not in {label.get_text() for label in panel.texts}:
            offset: dict[str, Any] = {"xytext": (-9, 0), "textcoords": "offset points"}
            panel.annotate(row["status"], point, ha="right", va="center", fontsize=8, **offset)


def _frame(panel: Any, lengths: list[int]) -> None:
    """Sets what all panels share: a logarithmic axis of lengths, the grid and the frame."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(n) for n in lengths])
    panel.minorticks_off()
    panel.tick_params(labelsize=8, labelcolor=_INK, color="#999999")
    panel.grid(True, color="#ececec", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _axes(panel: Any, lengths: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter

    if any(len(line.get_xdata()) for line in panel.lines):  # log scales need values
        panel.set_yscale("log")
    _frame(panel, lengths)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if len(lengths) < 2:
        return
    low, high = panel.get_ylim()
    start, end, bottom = lengths[0], lengths[-1], low * 1.3
    for exponent in (1, 2):  # lines to compare with, from the lower left corner
        inside = min(end, start * (high / bottom) ** (1 / exponent))
        line: dict[str, Any] = {"color": "#b0b0b0", "linewidth": 1, "linestyle": (0, (4, 3))}
        panel.plot(
            [start, inside], [bottom, bottom * (inside / start) ** exponent], zorder=1, **line
        )
        middle = (inside / start) ** 0.6
        label: dict[str, Any] = {"xytext": (6, -2), "textcoords": "offset points", "va": "top"}
        point = start * middle, bottom * middle**exponent
        panel.annotate(f"slope {exponent}", point, fontsize=8, color="#808080", **label)
    panel.set_ylim(low, high)
