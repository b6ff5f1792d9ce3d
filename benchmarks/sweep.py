"""A sweep over context lengths: checks every variant, then times it and measures its memory."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import environment, measure, memory, timing
from .case import BOTH, FORWARD, Case, Variant, prepared
from .measure import MEASURED, size

_FAILURES = (RuntimeError, MemoryError)  # in one variant, others go on


@dataclass
class Results:
    """The rows of a sweep, one for each length, variant and pass, and the facts of the run."""

    case: Case
    environment: dict[str, str]
    ceiling: float  # FLOP/s or bytes/s
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)  # variant -> how it failed the comparison
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def main_pass(self) -> str:
        """The pass that the chart shows, and for which memory and FLOPs are given."""
        return BOTH if self.case.backward else FORWARD


def run(
    case: Case,
    lengths: Sequence[int],
    backends: Iterable[str] | None = None,
    *,
    protocol: timing.Protocol | None = None,
    max_seconds: float = 20.0,
    progress: Callable[[str], None] = lambda doing: None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Runs all variants of `case` at all lengths, in ascending order.

    A variant that differs from the float64 reference is not timed. A variant that would not fit in
    memory, or whose call would take longer than `max_seconds`, gets a row that says this. `keep` is
    called with the results so far after each variant.
    """
    backends = None if backends is None else list(backends)
    progress("matrix product" if case.unit == "TFLOP/s" else "copy")
    results = Results(case, environment.facts(case.device), _ceiling(case))
    usable = _checked(case.at(max(lengths)), backends, results, progress)
    previous: dict[str, tuple[int, float]] = {}  # variant -> length and seconds of its last call
    for length in sorted(set(lengths)):
        point = case.at(length)
        variants = [v for v in point.variants(backends) if v.name in usable]
        left_out = {}
        for variant in variants:
            seconds = _predicted_seconds(point, previous.get(variant.name), results.ceiling)
            left_out[variant.name] = measure.does_not_fit(point, variant) or (
                f"would take {_duration(seconds)} a call" if seconds > max_seconds else None
            )
        running = [v for v in variants if left_out[v.name] is None]
        timings, failures = _timed(point, running, protocol, progress)
        for variant in variants:
            failure = left_out[variant.name] or failures.get(variant.name)
            if failure is None:
                progress(f"{variant.name}, length {length}: memory")
                time = timings[variant.name]
                previous[variant.name] = length, time.quantiles(point.passes[-1])[1]
            _add_rows(results, point, variant, timings.get(variant.name), failure)
            keep(results)
    return results


def check_memory(case: Case, backends: Iterable[str] | None = None) -> None:
    """Refuses a case if no variant fits in memory, or if the comparison does not fit.

    Raises:
        ValueError: the message says how much memory is needed and how much there is.
    """
    there = memory.available(case.device)
    wide = replace(case.small(), dtype="float64")
    calls = {
        f"at length {case.length}": [(case, v) for v in case.variants(backends)],
        "in the comparison with float64": [(wide, Variant("float64", wide.reference))],
    }
    for what, pairs in calls.items():
        need = min((memory.footprint(*pair)[0] for pair in pairs), default=0)
        if need > there:
            sizes = f"at least {size(need)}, and {size(there)} of memory are free"
            raise ValueError(f"{case.op} does not fit: {what} it needs {sizes}")


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The exponent of the growth over length, fitted to logarithms without zeros."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else None


def slopes(results: Results, longest: int = 4) -> dict[str, dict[str, float | None]]:
    """By variant, the exponents of time, FLOPs and memory over its longest lengths."""
    rows = [r for r in results.rows if r["pass"] == results.main_pass and r["status"] == MEASURED]
    fitted = {}
    for name in dict.fromkeys(r["variant"] for r in rows):
        last = [r for r in rows if r["variant"] == name][-longest:]
        fitted[name] = {
            column: slope([r["length"] for r in last], [r[column] or 0 for r in last])
            for column in ("p50_ms", "counted_flops", "peak_bytes")
        }
    return fitted


def _ceiling(case: Case) -> float:
    if case.unit == "TFLOP/s":
        return timing.product_ceiling(case.torch_dtype, case.device)
    return timing.copy_ceiling(case.device)


def _checked(case: Case, backends, results: Results, progress) -> set[str]:
    """The names of the variants that run here and agree with float64. Notes why others do not."""
    small = case.small()
    usable = set()
    for variant in small.variants(backends):
        progress(f"{variant.name}: comparing with float64")
        unavailable, problem = variant.unavailable, None
        if unavailable is None:
            try:
                problem = measure.disagreement(small, variant)
            except _FAILURES as error:  # it does not serve these sizes
                unavailable = timing.reason(error)
                timing.synchronize(small.device)
        if unavailable is not None:
            note = f"{variant.name} left out: {unavailable}"
            if backends is not None and variant.name.startswith("tfkern "):
                raise NotImplementedError(note)  # the user named it
            results.note(note)
        elif problem is not None:
            results.wrong[variant.name] = problem
        else:
            usable.add(variant.name)
    return usable


def _predicted_seconds(case: Case, previous: tuple[int, float] | None, ceiling: float) -> float:
    """Seconds of a call: predicted from the previous length, else the least by the ceiling."""
    if previous is None:
        return case.work(case.passes[-1]) / ceiling
    length, seconds = previous
    return seconds * (case.length / length) ** case.growth


def _timed(case: Case, variants, protocol, progress):
    """Timings by variant, and the reasons why tried variants have none."""
    steps, failures = {}, {}
    try:
        inputs = case.inputs()
    except _FAILURES as error:
        return {}, {variant.name: timing.reason(error) for variant in variants}
    for variant in variants:
        progress(f"{variant.name}, length {case.length}: warm-up")
        step = prepared(case, variant, inputs)
        try:
            timing.warm_up(step, protocol or timing.Protocol.of(case.device), case.device)
            steps[variant.name] = step
        except _FAILURES as error:  # no memory, or an operator refuses
            failures[variant.name] = timing.reason(error)
            timing.synchronize(case.device)
    progress(f"length {case.length}: timing")
    timings = timing.interleaved(steps, case.device, protocol)
    failed = {name: t.failure for name, t in timings.items() if t.failure is not None}
    return timings, failures | failed


def _add_rows(results: Results, case: Case, variant: Variant, time, failure: str | None) -> None:
    peak = None
    if failure is None:
        try:
            peak = memory.peak(case, variant)
        except RuntimeError as error:
            results.note(str(error))
    # The facts have a "device", too, its model; the pass says whether there was a backward.
    sizes = {k: v for k, v in asdict(case).items() if k not in ("device", "backward")}
    time = time if failure is None else None
    for which in case.passes:
        main = which == results.main_pass
        row = {
            "op": case.op,
            **sizes,
            "variant": variant.name,
            "pass": which,
            "status": failure or MEASURED,
            **measure.measurements(case, which, time, results.ceiling),
            "counted_flops": _counted(results, case, variant) if main else None,
            "peak_bytes": peak if main else None,
            "predicted_bytes": variant.scratch if main else None,
        }
        results.rows.append(row | results.environment)


def _counted(results: Results, case: Case, variant: Variant) -> int | None:
    try:
        return measure.count_flops(case, variant)
    except Exception as error:  # an operator cannot be traced
        results.note(f"FLOPs of {variant.name} are not counted: {timing.reason(error)}")
        return None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
