"""A sweep over context lengths: the variants of an op at each length, and their memory."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace

from . import environment, measure, memory, timing
from .case import Case, Variant
from .measure import Results, Timed, size

_FAILURES = (RuntimeError, MemoryError)  # in one variant, others go on


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
    protocol = protocol or timing.Protocol.of(case.device)
    results, facts = Results(), environment.facts(case.device)
    progress("matrix product" if case.unit == "TFLOP/s" else "copy")
    ceiling = measure.highest_rate(case.unit, case.device, case.dtype)
    usable = _checked(case.at(max(lengths)), backends, results, progress)
    previous: dict[str, tuple[int, float]] = {}  # variant -> length and seconds of its last call
    for length in sorted(set(lengths)):
        point = case.at(length)
        variants = [v for v in point.variants(backends) if v.name in usable]
        found = measure.timed(
            point,
            variants,
            protocol,
            admit=functools.partial(_refusal, point, previous, ceiling, max_seconds),
            tell=lambda doing, length=length: progress(f"length {length}: {doing}"),
        )
        # The facts have a "device", too, its model; the pass says whether there was a backward.
        sizes = {k: v for k, v in asdict(point).items() if k not in ("device", "backward")}
        for variant in variants:
            if variant.name in found.timings:
                progress(f"length {length}: memory of {variant.name}")
                seconds = found.timings[variant.name].quantiles(point.passes[-1])[1]
                previous[variant.name] = length, seconds
            _weigh(point, variant, found, results)
            rows = measure.rows({"op": case.op, **sizes}, point, [variant], found, ceiling)
            results.rows += [row | facts for row in rows]
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


def _refusal(
    case: Case,
    previous: dict[str, tuple[int, float]],
    ceiling: float,
    max_seconds: float,
    variant: Variant,
) -> str | None:
    """Why a variant is not run: it would not fit in memory, or take too long. None if it is."""
    unfit = measure.does_not_fit(case, variant)
    if variant.name in previous:
        length, seconds = previous[variant.name]
        seconds *= (case.length / length) ** case.growth
    else:
        seconds = case.work(case.passes[-1]) / ceiling  # no machine is faster
    if unfit is not None or seconds <= max_seconds:
        return unfit
    return f"would take {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'} a call"


def _weigh(case: Case, variant: Variant, found: Timed, results: Results) -> None:
    """Adds the FLOPs of a variant, and its peak memory if it was timed."""
    try:
        found.flops[variant.name] = measure.count_flops(case, variant)
    except Exception as error:  # an operator cannot be traced
        results.note(f"FLOPs of {variant.name} are not counted: {timing.reason(error)}")
    if variant.name in found.timings:
        try:
            found.peaks[variant.name] = memory.peak(case, variant)
        except RuntimeError as error:
            results.note(str(error))
