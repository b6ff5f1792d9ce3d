"""Shows results: files, tables and charts of the sweeps, of the pairs with PyTorch on a CPU, and
of the suite on a GPU. Everything here is made from rows (`measure.rows`)."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tfkern import files

from .case import BACKWARD, BOTH, FORWARD, Case
from .measure import MEASURED, Results, Row, size

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
_GREY: dict[str, Any] = {"color": "#b0b0b0", "linewidth": 1, "linestyle": (0, (4, 3))}

SUFFIXES = (".csv", ".json", ".png")


def write(results: Results, folder: Path) -> list[Path]:
    """Writes <op>.csv, <op>.json and <op>.png into `folder`, and returns their paths."""
    paths = [folder / f"{results.rows[0]['op']}{suffix}" for suffix in SUFFIXES]
    write_rows(results.rows, folder)
    content = {"rows": results.rows, "slopes": slopes(results.rows), "notes": results.notes}
    files.write(paths[1], json.dumps(content, indent=1) + "\n")
    sweep_chart(results.rows, paths[2])
    return paths


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """Writes <op>.csv with the rows of a sweep so far."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / f"{rows[0]['op']}{SUFFIXES[0]}", list(rows[0]), rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
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
    rows: Sequence[Row],
    keep: Callable[[dict[str, str]], bool],
    order: Callable[[Row], Any],
) -> Path:
    """Writes a file with the given rows and those of its former rows for which `keep` is true."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read(path) if keep(row)] if path.exists() else []
    every = sorted([*kept, *rows], key=order)
    _write_csv(path, list(dict.fromkeys(name for row in [*rows, *kept] for name in row)), every)
    return path


def replace_rows(path: Path, rows: Sequence[Row], column: str, order: Sequence[str]) -> Path:
    """Puts rows into a file, in place of its former rows with the same values in a column.

    Args:
        order: all values of the column, in the order of the rows.
    """
    ran = {row[column] for row in rows}
    return update(
        path, rows, lambda row: row[column] not in ran, lambda row: order.index(row[column])
    )


def digits(value: float) -> str:
    """Three digits, or all digits before the point from 1000 on."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rows, whose columns are first texts and then numbers."""
    made = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for name in text:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def _main_pass(rows: Sequence[Row]) -> str:
    """The pass that the chart of a sweep shows, and for which memory and FLOPs are given."""
    return rows[-1]["pass"]


def sweep_table(rows: Sequence[Row]) -> Table:
    """The rows of a sweep as a table, one block for each length."""
    unit, backward = rows[0]["unit"], _main_pass(rows) != FORWARD
    flops = unit == "TFLOP/s"
    highest = max((row["rate"] for row in rows if row["rate"] is not None), default=0)
    small = flops and highest < 10  # low rates read better in GFLOP/s
    columns = ["p20 ms", "p50 ms", "p80 ms", "GFLOP/s" if small else unit, "ceiling", "memory"]
    text = ["length", "variant", *(["pass"] if backward else [])]
    made = _table(_title(rows), text, columns + ["GFLOP"] * flops)
    made.columns[0].justify = "right"
    previous: Row = {"length": None, "variant": None}
    for row in rows:
        if row["length"] != previous["length"]:
            made.add_section()
            previous = {"length": None, "variant": None}
        repeated = row["variant"] == previous["variant"]
        if repeated and row["status"] != MEASURED:
            continue
        cells = ["" if previous["length"] else str(row["length"])]
        cells.append("" if repeated else row["variant"])
        cells += [row["pass"].replace(BOTH, "both")] if backward else []
        if row["status"] == MEASURED:
            cells += [digits(row[q]) for q in ("p20_ms", "p50_ms", "p80_ms")]
            cells.append(digits(row["rate"] * (1e3 if small else 1)))
            cells.append(f"{row['fraction_of_ceiling']:.0%}")
            cells.append("" if row["peak_bytes"] is None else size(row["peak_bytes"]))
        else:
            cells += ["-"] * 6  # the reason stands below the table
        if flops:
            count = row["counted_flops"]
            cells.append("" if count is None else digits(count / 1e9))
        made.add_row(*cells)
        previous = row
    return made


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The exponent of the growth over length, fitted to logarithms without zeros."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else None


def slopes(rows: Sequence[Row], longest: int = 4) -> dict[str, dict[str, float | None]]:
    """By variant of a sweep, the exponents of time, FLOPs and memory over its longest lengths."""
    rows = [r for r in rows if r["pass"] == _main_pass(rows) and r["status"] == MEASURED]
    fitted = {}
    for name in dict.fromkeys(r["variant"] for r in rows):
        last = [r for r in rows if r["variant"] == name][-longest:]
        fitted[name] = {
            column: slope([r["length"] for r in last], [r[column] or 0 for r in last])
            for column in ("p50_ms", "counted_flops", "peak_bytes")
        }
    return fitted


def slope_table(rows: Sequence[Row]) -> Table:
    """The exponents of growth over length, by variant."""
    title = "growth: exponents over the longest lengths"
    made = _table(title, ["variant"], ["time", "FLOPs", "memory"])
    for name, fitted in slopes(rows).items():
        made.add_row(name, *("" if s is None else f"{s:.2f}" for s in fitted.values()))
    return made


def show_sweep(results: Results, console: Console) -> None:
    """Prints both tables of a sweep and what was left out."""
    rows = results.rows
    console.print(sweep_table(rows))
    if len({row["length"] for row in rows}) > 1:
        console.print(slope_table(rows))
    for row in rows:
        if row["status"] != MEASURED and row["pass"] == _main_pass(rows):
            told = f"{row['variant']} at {row['length']}: {row['status']}"
            console.print(told, style="yellow", markup=False)
    for note in results.notes:
        console.print(note, style="dim", markup=False)


def pairs_table(rows: Sequence[Row]) -> Table:
    """The ratios of an op, from rows that are compared with PyTorch on a CPU."""
    text = ("case", "pass", "dtype", "against")
    numbers = ("p20", "ratio", "p80", "target", "torch ms", "tfkern ms", "ceiling")
    title = f"{rows[0]['op']}: time of torch / time of tfkern native"
    made = _table(title, text, numbers)
    for row in rows:
        ratios = [f"{row[f'ratio_p{p}']:.2f}" for p in (20, 50, 80)]
        times = [f"{row[name]:.3g}" for name in ("against_ms", "p50_ms")]
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        fraction = f"{row['fraction_of_ceiling']:.0%}"
        facts = (row[column].replace(BOTH, "both") for column in text)
        made.add_row(*facts, *ratios, target, *times, fraction)
    return made


def models_table(rows: Sequence[Row]) -> Table:
    """The ratios of whole models, from rows that are compared with other code."""
    text, numbers = ("op", "case", "dtype", "against"), ("p20", "ratio", "p80", "theirs", "tfkern")
    made = _table("time of others / time with tfkern, both in ms", text, numbers)
    for row in rows:
        ratios = [f"{row[f'ratio_p{p}']:.2f}" for p in (20, 50, 80)]
        times = [f"{row[name]:.3g}" for name in ("against_ms", "p50_ms")]
        made.add_row(*(row[name] for name in text), *ratios, *times)
    return made


def peers_tables(rows: Sequence[Row]) -> list[Table]:
    """The ratios of whole models, from rows that are compared with other ways to run them; and for
    all of them the errors of their results and the memory that they took."""
    text, ratios = ("case", "pass", "dtype", "against"), ("ratio_p20", "ratio_p50", "ratio_p80")
    title = f"{rows[0]['op']}: time of the other / time of tfkern, both in ms"
    numbers = ("p20", "ratio", "p80", "theirs", "tfkern", "tokens/s")
    times = _table(title, text, numbers)
    title = "error relative to a more precise model, and peak memory with weights"
    results = _table(title, ("case", "dtype", "variant"), ("error", "memory"))
    known = {}
    for row in rows:
        cells = [f"{row[name]:.2f}" for name in ratios]
        cells += [digits(row[name]) for name in ("against_ms", "p50_ms", "tokens_per_second")]
        times.add_row(*(row[name] for name in text), *cells)
        for who, error, peak in (
            ("variant", "error", "peak_bytes"),
            ("against", "against_error", "against_peak_bytes"),
        ):
            known[row["case"], row["dtype"], row[who]] = f"{row[error]:.1e}", size(row[peak])
    for key, cells in known.items():
        results.add_row(*key, *cells)
    return [times, results]


def suite_tables(rows: Sequence[Row]) -> list[Table]:
    """For each op of the suite: rates, times from an idle GPU to an idle GPU, and memory."""
    made = []
    for op in dict.fromkeys(row["op"] for row in rows if row["op"] != "probe"):
        own = [row for row in rows if row["op"] == op]
        for title, column, scale in (
            ("TFLOP/s, or GB/s of layer norm and decoding", "rate", 1.0),
            ("ms from idle GPU to idle GPU, where the GPU needs under 0.2 ms", "host_ms", 1.0),
            ("peak memory beyond the inputs, MB", "peak_bytes", 1e-6),
        ):
            chosen = [row for row in own if row[column] not in (None, "")]
            if column == "host_ms":
                short = {row["case"] for row in chosen if float(row["p50_ms"]) < 0.2}
                chosen = [row for row in chosen if row["case"] in short]
            if chosen:
                made.append(_rates(f"{op}: {title}", chosen, column, scale))
    return made


def suite_failures(rows: Sequence[Row]) -> list[str]:
    """Why variants have no times: each reason once, with its cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != MEASURED:
            names = found.setdefault((row["variant"], row["status"]), [])
            name = f"{row['op']} {row['case']}"
            names += [] if name in names else [name]
    return [
        f"{variant}: {why} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
        for (variant, why), names in found.items()
    ]


def _rates(title: str, rows: Sequence[Row], column: str, scale: float) -> Table:
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    made = _table(title, ("case", "pass"), variants)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["case"], row["pass"].replace(BOTH, "both")), {})
        line[row["variant"]] = digits(scale * float(row[column]))
    for key, line in lines.items():
        made.add_row(*key, *(line.get(v, "-") for v in variants))
    return made


def _title(rows: Sequence[Row]) -> str:
    """What was swept, in one line."""
    row = rows[0]
    names = list(row)
    told = [f"{row['op']} {_main_pass(rows)}", row["dtype"]]
    for name in names[names.index("op") + 1 : names.index("variant")]:
        value = row[name]
        if value is True:
            told.append(name)
        elif value not in (False, None) and name not in ("length", "dtype"):
            told.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(told)


@contextmanager
def _figure(title: str, row: Row, path: Path, shape: tuple[int, int], **options: Any) -> Iterator:
    """A figure and its panels. At the end of the block the figure is drawn into the file, under the
    title and the facts of `row`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(*shape, squeeze=False, **options)
    yield figure, panels
    height = figure.get_figheight()
    figure.text(0.0125, 1 - 0.3 / height, title, fontsize=12, fontweight="bold", color=_INK)
    figure.text(0.0125, 1 - 0.52 / height, _where(row), fontsize=8.5, color="#666666")
    with files.replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")
    pyplot.close(figure)


def sweep_chart(rows: Sequence[Row], path: Path) -> None:
    """Time and peak memory against length on logarithmic axes, beside slopes of 1 and 2."""
    main = [r for r in rows if r["pass"] == _main_pass(rows)]
    lengths = sorted({r["length"] for r in main})
    with _figure(_title(rows), rows[0], path, (1, 2), figsize=(10.5, 5.2)) as (figure, grid):
        figure.subplots_adjust(left=0.055, right=0.985, top=0.83, bottom=0.18, wspace=0.13)
        names = ("time (ms)", "peak memory beyond the inputs (MB)")
        for panel, name in zip(grid[0], names, strict=True):
            panel.set_title(name, loc="left", color=_INK, fontsize=10)
            panel.set_xlabel("context length (tokens)", color=_INK, fontsize=9)
        for name in dict.fromkeys(r["variant"] for r in main):
            own = [r for r in main if r["variant"] == name]
            _time_line(grid[0, 0], own, name, _style(name))
            _memory_line(grid[0, 1], own, _style(name))
        for panel in grid[0]:
            _axes(panel, lengths)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower left", frameon=False, ncols=7, fontsize=9)


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
    panels: Sequence[Panel], axes: tuple[str, str], title: str, row: Row, path: Path
) -> Path:
    """Draws the panels in two lines, with the facts of `row`; `axes` are the labels of x and y."""
    columns = -(-len(panels) // 2)
    options: dict[str, Any] = {"figsize": (3.6 * columns + 0.4, 7.4), "sharex": True}
    every = sorted({x for panel in panels for line in panel.lines.values() for x, _ in line})
    with _figure(title, row, path, (2, columns), **options) as (figure, grid):
        margins = {"top": 0.86, "bottom": 0.14, "wspace": 0.17, "hspace": 0.16}
        figure.subplots_adjust(left=0.075, right=0.985, **margins)
        for panel, place in zip(panels, grid.flat, strict=False):
            place.set_title(panel.title, loc="left", color=_INK, fontsize=10)
            for name, points in panel.lines.items():
                place.plot(*zip(*sorted(points), strict=True), label=name, **_style(name))
            if panel.ceiling:
                place.axhline(panel.ceiling, label="measured ceiling", **_GREY)
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
    return path


def suite_charts(path: Path, cases: dict[tuple[str, str], Case]) -> list[Path]:
    """Draws charts of the suite beside its file: attention over the length, with a panel for each
    head size and mask, and layer norm over the width. `cases`: by op and name in the file."""
    rows = [row for row in read(path) if row["status"] == MEASURED]
    longest = max((c.length for c in cases.values() if c.op == "layer_norm"), default=0)
    figures: dict[str, dict[tuple, Panel]] = {}
    heads: dict[str, tuple[str, tuple[str, str]]] = {}  # stem -> title and labels of the axes
    for row in rows:
        case, pass_ = cases.get((row["op"], row["case"])), row["pass"]
        if case is None or not case.backward or pass_ == BOTH:
            continue
        sizes: Any = case  # each op has sizes of its own
        if case.op == "attention":
            stem, key, x = f"attention-{pass_}", (sizes.causal, sizes.head_dim), case.length
            title = f"D={sizes.head_dim}, {'causal' if sizes.causal else 'full'}"
            tokens, width = sizes.batch * case.length, sizes.heads * sizes.head_dim
            told = f"attention {pass_}, {tokens} tokens of {width} features"
            heads[stem] = told, ("context length (tokens)", "TFLOP/s")
        elif case.op == "layer_norm" and case.length == longest:
            stem, key, x = "layer_norm", (sizes.residual, pass_ == BACKWARD), sizes.hidden
            title = f"{'addition and ' * sizes.residual}layer norm, {pass_}"
            heads[stem] = f"layer norm, {longest} rows", ("width", "GB/s")
        else:
            continue
        panel = figures.setdefault(stem, {}).setdefault(key, Panel(title))
        panel.ceiling = float(row["ceiling"])
        panel.lines.setdefault(row["variant"], []).append((x, float(row["rate"])))
    drawn = []
    for stem, found in figures.items():
        title, axes = heads[stem]
        panels = [found[key] for key in sorted(found)]
        target = path.with_name(f"{path.stem}-{stem}.png")
        drawn.append(rate_chart(panels, axes, f"{title}, bfloat16", rows[-1], target))
    return drawn


def _where(row: Row) -> str:
    """The machine and the versions, in one line."""
    facts = [row["device"]]
    facts += [f"{row['threads']} threads, {row['instructions']}"] if row["instructions"] else []
    facts += [f"torch {row['torch']}", f"tfkern {row['tfkern']}"]
    facts += [f"commit {row['commit']}"] if row["commit"] else []
    return ", ".join([*facts, row["date"][:10]])


def _time_line(panel: Any, rows: list[Row], name: str, style: dict[str, Any]) -> None:
    measured = [r for r in rows if r["status"] == MEASURED]
    x = [r["length"] for r in measured]
    panel.plot(x, [r["p50_ms"] for r in measured], label=name, **style)
    low, high = ([r[q] for r in measured] for q in ("p20_ms", "p80_ms"))
    panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _memory_line(panel: Any, rows: list[Row], style: dict[str, Any]) -> None:
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
        heights = [bottom, bottom * (inside / start) ** exponent]
        panel.plot([start, inside], heights, zorder=1, **_GREY)
        middle = (inside / start) ** 0.6
        label: dict[str, Any] = {"xytext": (6, -2), "textcoords": "offset points", "va": "top"}
        point = start * middle, bottom * middle**exponent
        panel.annotate(f"slope {exponent}", point, fontsize=8, color="#808080", **label)
    panel.set_ylim(low, high)
