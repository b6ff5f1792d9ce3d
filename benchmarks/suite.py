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

import operator
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import (
    attention,
    cross_entropy,
    environment,
    layer_norm,
    linear_cross_entropy,
    measure,
    memory,
    mlp,
    report,
    rotary,
    timing,
)
from .case import FORWARD, Case, Variant
from .measure import MEASURED, SCALES, Results, Row, Timed
from .worker import Lost, Worker

BACKENDS = ("triton", "native")
PROTOCOL = timing.Protocol(
    warmup=3, min_samples=10, max_samples=50, min_seconds=0.05, long_seconds=0.25
)
BUDGET = 400.0  # seconds
LONGEST = 2.0  # seconds per call: slower variants would leave no time for others
TOKENS, WIDTH = 16384, 2048
FLEX_LENGTHS = (4096, 16384)


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
        *(_rotary(key_heads) for key_heads in (16, 4)),
        *(_loss(classes) for classes in (32000, 131072)),
        _head(4096, 131072),
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


def _rotary(key_heads: int) -> Point:
    sizes = {"batch": 4, "heads": WIDTH // 128, "key_heads": key_heads, "head_dim": 128}
    case = rotary.OpCase(length=TOKENS // 4, **sizes, **_TRAINING)
    return Point(f"B=4 H={case.heads} Hk={key_heads} T={case.length} D=128", case)


def _loss(classes: int) -> Point:
    case = cross_entropy.OpCase(length=TOKENS // 2, vocabulary=classes, **_TRAINING)
    return Point(f"{case.length} x {classes}", case)


def _head(hidden: int, classes: int) -> Point:
    sizes = {"length": TOKENS // 2, "hidden": hidden, "vocabulary": classes}
    case = linear_cross_entropy.OpCase(**sizes, **_TRAINING)
    return Point(f"{case.length} x {hidden} x {classes}", case)


_TRAINING: dict[str, Any] = {"dtype": "bfloat16", "backward": True}


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
                rows = self.worker.ask(case_rows, point, left_out, ceiling, self.protocol, graphs)
            except Lost as lost:
                unclear = lost.doing not in variants or lost.doing in left_out
                if unclear or time.monotonic() > self.deadline:
                    failures = dict.fromkeys(variants, f"{lost.doing or 'start'}: {lost}")
                    return _rows(point, point.variants(), Timed(failures=failures), ceiling)
                self.ruinous[lost.doing, kind] = f"at {point.name}: {lost}"
                continue
            if any(row["graph_failure"] for row in rows):
                self.uncaptured += 1
                self.worker.stop()
            return rows


def probe(dtype: str, device: str, tell: Callable[[str], None]) -> dict[str, float]:
    """The ceilings of this GPU now, by unit of the rate: FLOP/s of a product, bytes/s of a copy."""
    return {unit: measure.highest_rate(unit, device, dtype) for unit in SCALES}


def case_rows(
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
    measure.free_cached(case.device)

    def admit(variant: Variant) -> str | None:
        why = left_out.get(variant.name) or measure.does_not_fit(case, variant)
        return why or _wrong(point, variant)

    found = measure.timed(
        case, variants, protocol, admit=admit, longest=LONGEST, graphs=graphs, tell=tell
    )
    for name, variant in ((v.name, v) for v in variants if v.name in found.timings):
        tell(name)
        try:
            found.peaks[name] = memory.peak(case, variant)
        except RuntimeError:
            timing.synchronize(case.device)
    return _rows(point, variants, found, ceiling)


def _wrong(point: Point, variant: Variant) -> str | None:
    torch.manual_seed(0)  # all variants, and all runs, get the same inputs
    problem = measure.disagreement(point.case.excerpt(), variant, point.case)
    return None if problem is None else _WRONG + problem


def _rows(point: Point, variants: list[Variant], found: Timed, ceiling: float) -> list[Row]:
    case = point.case
    key = {"op": case.op, "case": point.name, "dtype": case.dtype}
    return measure.rows(key, case, variants, found, ceiling, against=_fastest_of_torch)


def _fastest_of_torch(timings: dict[str, timing.Timing], pass_: str) -> str | None:
    """The variant of PyTorch with the lowest median, None if none was timed."""
    medians = {
        name: t.quantiles(pass_)[1]
        for name, t in timings.items()
        if not name.startswith(("tfkern ", "liger"))
    }
    return min(medians, key=medians.__getitem__, default=None)


def _probed(ceilings: dict[str, float], dtype: str) -> list[Row]:
    """Rows with the ceilings of this GPU, measured along with the cases."""
    cases = {"TFLOP/s": ("product of 8192 x 8192", dtype), "GB/s": ("copy of 1 GiB", "float32")}
    rates = {unit: measure.rounded(ceilings[unit] / scale) for unit, scale in SCALES.items()}
    return [
        {"op": "probe", "case": name, "dtype": kind, "variant": "torch", "pass": FORWARD}
        | {"status": MEASURED, "rate": rates[unit], "unit": unit}
        for unit, (name, kind) in cases.items()
    ]


def _write(path: Path, rows: list[Row], cases: Sequence[Point]) -> None:
    """Replaces the rows of these cases in the file, and drops cases that the suite has no more."""
    key = operator.itemgetter("op", "case")
    order = [(p.case.op, p.name) for p in [*points(), *cases]]
    new = {key(row) for row in rows}
    report.update(
        path,
        rows,
        lambda row: key(row) not in new and (key(row) in order or row["op"] == "probe"),
        lambda row: order.index(key(row)) if key(row) in order else -1,
    )


def _done(path: Path, facts: dict[str, str]) -> set[tuple[str, str]]:
    """The cases in the file that were run with the same device, versions and code as now."""
    if not facts["commit"] or facts["commit"].endswith("+changes"):
        return set()
    same = [name for name in facts if name not in ("date", "command")]
    rows = report.read(path) if path.exists() else []
    return {(r["op"], r["case"]) for r in rows if all(r[n] == facts[n] for n in same)}
