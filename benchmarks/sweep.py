"""A sweep over context lengths: checks every variant, then times it and measures its memory."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tfkern.testing import validate

from . import environment, memory, timing
from .case import BOTH, FORWARD, Case, Variant, prepared

MEASURED = "measured"
_FAILURES = (RuntimeError, MemoryError)  # of a variant, which costs its own rows only


@dataclass
class Results:
    """The rows of a sweep, one for each length, variant and pass, and what it was run with."""

    case: Case
    environment: dict[str, str]
    ceiling: float  # in the unit of the case's rate, times 1e12 or 1e9
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)  # variant -> how it failed the comparison
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def main_pass(self) -> str:
        """The pass that the chart shows, and that memory and FLOPs belong to."""
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

    A variant that differs from the float64 reference is not timed. One that would not fit in
    memory, or whose call would take longer than `max_seconds`, gets a row that says so. `keep` is
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
            left_out[variant.name] = does_not_fit(point, variant) or (
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
    """Refuses a case of which no variant fits in memory, or not even the comparison.

    Raises:
        ValueError: with what it needs and what there is.
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


def count_flops(case: Case, variant: Variant) -> int:
    """FLOPs of a call as its operators add up, on tensors without memory: any length, no time.

    Plain operators count by their shapes. Fused ones count the tiles that they visit.
    """
    formulas = case.flop_formulas()
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step = prepared(case, variant, case.inputs(), traced=True)
        output = step.forward()
        if step.backward is not None:
            step.backward(output)
    return counter.get_total_flops()


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Exponent of the growth over length, fitted to logarithms; zeros are left out."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else None


def slopes(results: Results, longest: int = 4) -> dict[str, dict[str, float | None]]:
    """By variant the growth of time, FLOPs and memory over its longest lengths."""
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
    """The names of the variants that run here and agree with float64. The others are noted."""
    small = case.small()
    usable = set()
    for variant in small.variants(backends):
        progress(f"{variant.name}: comparing with float64")
        unavailable, problem = variant.unavailable, None
        if unavailable is None:
            try:
                problem = disagreement(small, variant)
            except _FAILURES as error:  # a backend or an operator that does not serve these
                unavailable = timing.reason(error)
                timing.synchronize(small.device)
        if unavailable is not None:
            note = f"{variant.name} left out: {unavailable}"
            if backends is not None and variant.name.startswith("tfkern "):
                raise NotImplementedError(note)  # it was asked for by name
            results.note(note)
        elif problem is not None:
            results.wrong[variant.name] = problem
        else:
            usable.add(variant.name)
    return usable


def disagreement(case: Case, variant: Variant, whole: Case | None = None) -> str | None:
    """How the variant differs from the reference in float64 on this case, None if it agrees.

    With `whole`, of which the case is the excerpt, the variant computes all of that, on repetitions
    of the excerpt's inputs, and the first is compared: the very kernels that are to be timed.
    """
    report = validate(
        variant.call if whole is None else _repeated(variant.call, whole),
        case.reference,
        case.inputs(),
        gradients=case.backward,
        floor_scale=case.floor_scale(),
    )
    for c in report.comparisons:
        if c.problem is not None:
            return f"{c.name}: {c.problem}"
        if not c.ok:
            return f"{c.name} is off by {c.error:.1e}, the limit is {c.limit:.1e}"
    return None


def _repeated(call: Callable[..., Any], whole: Case) -> Callable[..., Any]:
    """The call on inputs repeated to the shapes of the whole case; the part of its outputs that
    belongs to the inputs as they were."""
    shapes = {name: x.shape for name, x in replace(whole, device="meta").inputs().items()}

    def part(**inputs: Tensor) -> Any:
        times = {
            name: [n // m for n, m in zip(shapes[name], x.shape, strict=True)]
            for name, x in inputs.items()
        }
        outputs = call(**{name: x.repeat(times[name]) for name, x in inputs.items()})
        first = times[next(iter(inputs))]  # the outputs have the dimensions of the first input

        def cut(output: Tensor) -> Tensor:
            for dim, count in enumerate(first):
                output = output.narrow(dim, 0, output.shape[dim] // count)
            return output

        return tuple(map(cut, outputs)) if isinstance(outputs, tuple) else cut(outputs)

    return part


def does_not_fit(case: Case, variant: Variant) -> str | None:
    """Why there is too little memory for the variant now, by what it says and by its tensors."""
    # A tenth stays free: the prediction leaves out what allocators and libraries keep.
    there = 0.9 * memory.available(case.device)
    for need in (variant.scratch, memory.footprint(case, variant)[1]):
        if need > there:
            return f"would need {size(need)}"
    return None


def _predicted_seconds(case: Case, previous: tuple[int, float] | None, ceiling: float) -> float:
    """What a call takes at least, since the machine does no more, or if the last one is a guide."""
    if previous is None:
        return case.work(case.passes[-1]) / ceiling
    length, seconds = previous
    return seconds * (case.length / length) ** case.growth


def _timed(case: Case, variants, protocol, progress):
    """Timings by variant, and why a variant has none although it was tried."""
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
        except _FAILURES as error:  # out of memory, or an operator that refuses
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
    # "device" is the model among the facts, and the pass says whether there was a backward
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
            **measurements(case, which, time, results.ceiling),
            "counted_flops": _counted(results, case, variant) if main else None,
            "peak_bytes": peak if main else None,
            "predicted_bytes": variant.scratch if main else None,
        }
        results.rows.append(row | results.environment)


def measurements(
    case: Case, which: str, time: timing.Timing | None, ceiling: float
) -> dict[str, Any]:
    """The columns of a pass that hold what was measured, None where nothing was.

    `ceiling` is in FLOP/s or bytes/s.
    """
    scale = 1e12 if case.unit == "TFLOP/s" else 1e9
    row: dict[str, Any] = {
        "p20_ms": None,
        "p50_ms": None,
        "p80_ms": None,
        "samples": None,
        "host_ms": None,
        "graph_ms": None,
        "rate": None,
        "unit": case.unit,
        "ceiling": ceiling / scale,
        "fraction_of_ceiling": None,
    }
    if time is not None:
        p20, p50, p80 = time.quantiles(which)
        rate = case.work(which) / p50
        row |= {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80}
        row |= {"samples": len(time.samples), "rate": rate / scale}
        row |= {"fraction_of_ceiling": rate / ceiling}
        row |= {"host_ms": _ms(time.host.get(which)), "graph_ms": _ms(time.graph.get(which))}
    return row


def _counted(results: Results, case: Case, variant: Variant) -> int | None:
    try:
        return count_flops(case, variant)
    except Exception as error:  # an operator that cannot be traced on tensors without memory
        results.note(f"FLOPs of {variant.name} are not counted: {timing.reason(error)}")
        return None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def size(count: float) -> str:
    """Bytes as text, such as 34 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
