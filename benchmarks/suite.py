"""Fixed cases on a GPU, next to everything that PyTorch has: `tfkern bench suite`.

Attention has 16 384 tokens of 2048 features in every case, as in FlashAttention's own benchmarks
(Dao 2023), so that only the quadratic work grows with the length. All variants of a case are timed
in one rotation by the protocol of `timing.py`. Each is first compared with float64 at the same size
(`measure.disagreement`). A row is a pass of a variant of a case; a variant without a time has the
reason in its `status`. The rows of all cases stand in one file for each GPU, which is written after
every case. Running a case replaces its rows.

Cases run in another process. If a kernel ruins its CUDA context or does not end in time, a new
process replaces it, and the variant is left out of all cases of the same kind.
"""

import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import attention, environment, layer_norm, memory, mlp, report, timing
from .case import BACKWARD, BOTH, DTYPES, FORWARD, Case, Variant, prepared
from .measure import MEASURED, disagreement, does_not_fit, measurements
from .worker import Lost, Worker

BACKENDS = ("triton", "native")
PROTOCOL = timing.Protocol(
    warmup=3, min_samples=10, max_samples=50, min_seconds=0.05, long_seconds=0.25
)
BUDGET = 400.0  # seconds
LONGEST = 2.0  # seconds per call: slower variants would leave no time for others
TOKENS, WIDTH = 16384, 2048
FLEX_LENGTHS = (4096, 16384)

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A case, and its name in the file."""

    name: str
    case: Case

    def variants(self) -> list[Variant]:
        """The variants but torch's slowest. "flex" is unavailable where compiling it takes long."""
        found = [v for v in self.case.variants(BACKENDS) if v.name != "sdpa math"]
        if self.case.backward and self.case.length not in FLEX_LENGTHS:
            only = " and ".join(map(str, FLEX_LENGTHS))
            skipped = f"compiling takes long: only for lengths {only}"
            found = [replace(v, unavailable=skipped) if v.name == "flex" else v for v in found]
        return found

    @property
    def kind(self) -> Case:
        """Key under which a crash is remembered: equal for cases that run the same kernels."""
        return self.case.small()


def points(device: str = "cuda") -> list[Point]:
    """All cases. The most telling come first, since time may run out before the last."""
    every = [
        *(_norm(4096, 1024, residual) for residual in (False, True)),
        _mlp(TOKENS, 4096),
        *(_decode(32, 8192, 128, key_heads) for key_heads in (16, 4)),
        *_attentions(128),
        *(_norm(TOKENS, 2**n, residual) for n in range(10, 16) for residual in (False, True)),
        *_attentions(64),
        *_attentions(256),
    ]
    return [replace(p, case=replace(p.case, device=device)) for p in every]


def _attentions(head_dim: int) -> list[Point]:
    lengths = (4096, 16384, 1024, 8192, 2048, 512)
    return [_attention(n, head_dim, causal) for n in lengths for causal in (True, False)]


def _attention(length: int, head_dim: int, causal: bool) -> Point:
    batch, heads = TOKENS // length, WIDTH // head_dim
    mask = "causal" if causal else "full"
    case = attention.OpCase(
        length=length, batch=batch, heads=heads, head_dim=head_dim, causal=causal, **_TRAINING
    )
    return Point(f"B={batch} H={heads} T={length} D={head_dim} {mask}", case)


def _decode(batch: int, length: int, head_dim: int, key_heads: int) -> Point:
    heads = WIDTH // head_dim
    name = f"B={batch} H={heads} Hk={key_heads} T=1 S={length} D={head_dim}"
    sizes = {"length": length, "batch": batch, "heads": heads, "key_heads": key_heads}
    return Point(name, attention.Decode(**sizes, head_dim=head_dim, dtype="bfloat16"))


def _norm(rows: int, hidden: int, residual: bool) -> Point:
    case = layer_norm.OpCase(length=rows, hidden=hidden, residual=residual, **_TRAINING)
    return Point(f"{rows} x {hidden}" + " residual" * residual, case)


def _mlp(rows: int, hidden: int) -> Point:
    return Point(
        f"{rows} x {hidden} x {4 * hidden}", mlp.OpCase(length=rows, hidden=hidden, **_TRAINING)
    )


_TRAINING: dict[str, Any] = {"dtype": "bfloat16", "backward": True}


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)  # what failed -> how
    skipped: list[str] = field(default_factory=list)  # cases that time ran out for


def run(
    cases: Sequence[Point],
    path: Path,
    *,
    budget: float = BUDGET,
    resume: bool = False,
    protocol: timing.Protocol = PROTOCOL,
    progress: Callable[[str], None] = lambda doing: None,
    worker: Worker | None = None,
) -> Results:
    """Times the cases one after the other, and writes the rows of each into the file at `path`.

    After `budget` seconds no further case is begun. With `resume`, cases are skipped that the file
    has from the same device, versions and commit, if the commit is known and without changes.
    """
    device, dtype = cases[0].case.device, cases[0].case.dtype
    facts = environment.facts(device)
    deadline = time.monotonic() + budget
    done = _done(path, facts) if resume else set()
    results = Results()
    session = _Session(worker or Worker(device), protocol, deadline)

    def add(rows: list[Row]) -> None:
        results.rows += [row | facts for row in rows]
        _write(path, [row | facts for row in rows], cases)

    try:
        progress("the best product and copy")
        ceilings = session.worker.ask(probe, dtype, device)
        add(_probed(ceilings, dtype))
        for point in cases:
            name = f"{point.case.op} {point.name}"
            if (point.case.op, point.name) in done:
                continue
            if time.monotonic() > deadline:
                results.skipped.append(name)
                continue
            progress(name)
            rows = session.rows(point, ceilings[point.case.unit])
            results.wrong |= {
                f"{row['variant']}, {name},": row["status"].removeprefix(_WRONG)
                for row in rows
                if row["status"].startswith(_WRONG)
            }
            add(rows)
    finally:
        session.worker.stop()
    return results


_WRONG = "wrong: "


@dataclass
class _Session:
    """A worker, and the variants that have ended its processes."""

    worker: Worker
    protocol: timing.Protocol
    deadline: float
    ruinous: dict[tuple[str, Case], str] = field(default_factory=dict)  # variant, kind -> how
    uncaptured: int = 0  # processes that were stopped after a failed capture

    def rows(self, point: Point, ceiling: float) -> list[Row]:
        """The rows of a case; variants that have ended a process of the worker get no times."""
        variants, kind = [v.name for v in point.variants()], point.kind
        while True:
            left_out = {v: self.ruinous[v, kind] for v in variants if (v, kind) in self.ruinous}
            graphs = self.uncaptured < 3
            try:
                rows = self.worker.ask(measure, point, left_out, ceiling, self.protocol, graphs)
            except Lost as lost:
                unclear = lost.doing not in variants or lost.doing in left_out
                if unclear or time.monotonic() > self.deadline:
                    failures = dict.fromkeys(variants, f"{lost.doing or 'start'}: {lost}")
                    return _as_rows(point, point.variants(), {}, failures, {}, ceiling)
                self.ruinous[lost.doing, kind] = f"at {point.name}: {lost}"
                continue
            if any(row["graph_failure"] for row in rows):
                self.uncaptured += 1
                self.worker.stop()
            return rows


def probe(dtype: str, device: str, tell: Callable[[str], None]) -> dict[str, float]:
    """The ceilings of this GPU now, by unit of the rate: FLOP/s of a product, bytes/s of a copy."""
    return {
        "TFLOP/s": timing.product_ceiling(DTYPES[dtype], device),
        "GB/s": timing.copy_ceiling(device),
    }


def measure(
    point: Point,
    left_out: dict[str, str],
    ceiling: float,
    protocol: timing.Protocol,
    graphs: bool,
    tell: Callable[[str], None],
) -> list[Row]:
    """Measures a case in this process. Returns its rows. `left_out`: variant -> why not to run."""
    case, variants = point.case, point.variants()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # every call would first check code compiled for other cases
    _free(case.device)
    inputs = case.inputs()
    failures, steps = dict(left_out), {}
    for variant in variants:
        if variant.name in failures:
            continue
        tell(variant.name)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                failure = variant.unavailable or does_not_fit(case, variant)
                failure = failure or _wrong(point, variant)
                if failure is None:
                    step = prepared(case, variant, inputs)
                    seconds = timing.warm_up(step, protocol, case.device)
                    if seconds < LONGEST:
                        steps[variant.name] = step
                    else:
                        failure = f"takes {seconds:.1f} s a call"
            except Exception as error:  # torch gives its reasons in warnings
                told = [str(w.message).partition(" (Triggered")[0] for w in warned]
                failure = "; ".join([timing.reason(error), *dict.fromkeys(told)])[:600]
        timing.synchronize(case.device)  # raises if the context is lost
        if failure is not None:
            failures[variant.name] = failure
            _free(case.device)
    tell("timing")
    timings = timing.interleaved(steps, case.device, protocol, graphs=graphs)
    failures |= {name: t.failure for name, t in timings.items() if t.failure is not None}
    steps.clear()
    peaks = {}
    for variant in variants:
        if variant.name not in failures:
            tell(variant.name)
            peaks[variant.name] = _peak(case, variant)
    return _as_rows(point, variants, timings, failures, peaks, ceiling)


def _free(device: str) -> None:
    """Gives memory that former variants have freed back to the device."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def _wrong(point: Point, variant: Variant) -> str | None:
    torch.manual_seed(0)  # all variants, and all runs, get the same inputs
    problem = disagreement(point.case.excerpt(), variant, point.case)
    return None if problem is None else _WRONG + problem


def _peak(case: Case, variant: Variant) -> int | None:
    try:
        return memory.peak(case, variant)
    except RuntimeError:
        timing.synchronize(case.device)
        return None


def _as_rows(
    point: Point,
    variants: Iterable[Variant],
    timings: dict[str, timing.Timing],
    failures: dict[str, str],
    peaks: dict[str, int | None],
    ceiling: float,
) -> list[Row]:
    case = point.case
    timings = {name: t for name, t in timings.items() if name not in failures}
    rows = []
    for which in case.passes:
        medians = {name: t.quantiles(which)[1] for name, t in timings.items() if _of_torch(name)}
        fastest = min(medians, key=medians.__getitem__, default=None)
        for variant in variants:
            time = timings.get(variant.name)
            row = {
                "op": case.op,
                "case": point.name,
                "dtype": case.dtype,
                "pass": which,
                "variant": variant.name,
                "status": failures.get(variant.name, MEASURED),
                **measurements(case, which, time, ceiling),
                "against": fastest if time else None,
                "ratio": None,
                "peak_bytes": peaks.get(variant.name) if which == case.passes[-1] else None,
                "graph_failure": time.uncaptured if time else None,
            }
            if time and fastest:
                row["ratio"] = timing.ratio(timings[fastest], time, which)[1]
            rows.append({k: _rounded(v) for k, v in row.items()})
    return rows


def _of_torch(variant: str) -> bool:
    return not variant.startswith(("tfkern ", "liger"))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _probed(ceilings: dict[str, float], dtype: str) -> list[Row]:
    """Rows with the ceilings of this GPU, measured along with the cases."""
    cases = {"TFLOP/s": ("product of 8192 x 8192", dtype), "GB/s": ("copy of 1 GiB", "float32")}
    scales = {"TFLOP/s": 1e12, "GB/s": 1e9}
    return [
        {"op": "probe", "case": name, "dtype": kind, "pass": FORWARD, "variant": "torch"}
        | {"status": MEASURED, "rate": _rounded(ceilings[unit] / scales[unit]), "unit": unit}
        for unit, (name, kind) in cases.items()
    ]


def _write(path: Path, rows: list[Row], cases: Sequence[Point]) -> None:
    """Replaces the rows of these cases in the file, and drops cases that the suite has no more."""
    order = [(p.case.op, p.name) for p in points()]
    order += [(p.case.op, p.name) for p in cases]
    new = {(row["op"], row["case"]) for row in rows}

    def position(row: Row) -> int:
        key = row["op"], row["case"]
        return order.index(key) if key in order else -1

    def keep(row: Row) -> bool:
        key = row["op"], row["case"]
        return key not in new and (key in order or row["op"] == "probe")

    report.update(path, rows, keep, position)


def _done(path: Path, facts: dict[str, str]) -> set[tuple[str, str]]:
    """The cases in the file that were run with the same device, versions and code as now."""
    if not facts["commit"] or facts["commit"].endswith("+changes"):
        return set()
    same = [name for name in facts if name not in ("date", "command")]
    rows = report.read(path) if path.exists() else []
    return {(r["op"], r["case"]) for r in rows if all(r[n] == facts[n] for n in same)}


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each op: rates, times of calls that start and end with an idle GPU, and memory."""
    made = []
    for op in dict.fromkeys(row["op"] for row in rows if row["op"] != "probe"):
        own = [row for row in rows if row["op"] == op]
        for title, column, scale in (
            ("TFLOP/s, or GB/s of layer norm and decoding", "rate", 1.0),
            (
                "ms from an idle GPU to an idle GPU, where the GPU needs under 0.2 ms",
                "host_ms",
                1.0,
            ),
            ("peak memory beyond the inputs, MB", "peak_bytes", 1e-6),
        ):
            chosen = [row for row in own if row[column] not in (None, "")]
            if column == "host_ms":
                short = {row["case"] for row in chosen if float(row["p50_ms"]) < 0.2}
                chosen = [row for row in chosen if row["case"] in short]
            if chosen:
                made.append(_table(f"{op}: {title}", chosen, column, scale))
    return made


def failures(rows: Sequence[Row]) -> list[str]:
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


def _table(title: str, rows: Sequence[Row], column: str, scale: float) -> Table:
    made = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for name in ("case", "pass", *variants):
        made.add_column(name, justify="right" if name in variants else "left", no_wrap=True)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["case"], row["pass"].replace(BOTH, "both")), {})
        line[row["variant"]] = report.digits(scale * float(row[column]))
    for key, line in lines.items():
        made.add_row(*key, *(line.get(v, "-") for v in variants))
    return made


def charts(path: Path, cases: Sequence[Point]) -> list[Path]:
    """Draws charts of the cases beside the file: attention over the length, with a panel for each
    head size and mask, and layer norm over the width."""
    rows = [row for row in report.read(path) if row["status"] == MEASURED]
    known = {(p.case.op, p.name): p.case for p in cases if p.case.backward}
    longest = max((c.length for c in known.values() if c.op == "layer_norm"), default=0)
    figures: dict[str, dict[tuple, report.Panel]] = {}
    for row in rows:
        case, which = known.get((row["op"], row["case"])), row["pass"]
        if isinstance(case, attention.OpCase) and which != BOTH:
            stem, key, x = f"attention-{which}", (case.causal, case.head_dim), case.length
            title = f"D={case.head_dim}, {'causal' if case.causal else 'full'}"
        elif isinstance(case, layer_norm.OpCase) and which != BOTH and case.length == longest:
            stem, key, x = "layer_norm", (case.residual, which == BACKWARD), case.hidden
            title = f"{'addition and ' * case.residual}layer norm, {which}"
        else:
            continue
        panel = figures.setdefault(stem, {}).setdefault(key, report.Panel(title))
        panel.ceiling = float(row["ceiling"])
        panel.lines.setdefault(row["variant"], []).append((x, float(row["rate"])))
    told = {
        "layer_norm": (f"layer norm, {longest} rows", ("width", "GB/s")),
        **{
            f"attention-{which}": (
                f"attention {which}, {TOKENS} tokens of {WIDTH} features",
                ("context length (tokens)", "TFLOP/s"),
            )
            for which in (FORWARD, BACKWARD)
        },
    }
    drawn = []
    for stem, found in figures.items():
        title, axes = told[stem]
        panels = [found[key] for key in sorted(found)]
        target = path.with_name(f"{path.stem}-{stem}.png")
        drawn.append(report.rate_chart(panels, axes, f"{title}, bfloat16", rows[-1], target))
    return drawn
