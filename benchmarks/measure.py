"""Measures variants of a case: whether they are right, how long they take, and their rows.

`sweep.py`, `against.py` and `suite.py` choose the cases, call `timed` and `rows` of this module,
and return `Results`.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tfkern.validation.compare import validate

from . import memory, timing
from .case import DTYPES, Case, Variant, prepared
from .timing import Protocol, Timing

MEASURED = "measured"
SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9}  # FLOP/s or bytes/s in one unit of a rate

Row = dict[str, Any]


@dataclass
class Results:
    """What a run has found. A row is one pass of one variant of one case."""

    rows: list[Row] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)  # what failed the comparison -> how
    notes: list[str] = field(default_factory=list)  # what was left out of the rows, and why
    skipped: list[str] = field(default_factory=list)  # cases for which no time was left

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass
class Timed:
    """What was found out about the variants of a case, by their names."""

    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # why the others have no timing
    peaks: dict[str, int | None] = field(default_factory=dict)  # bytes, filled in by the caller
    flops: dict[str, int | None] = field(default_factory=dict)  # filled in by the caller


def timed(
    case: Case,
    variants: Sequence[Variant],
    protocol: Protocol,
    *,
    admit: Callable[[Variant], str | None] = lambda variant: None,
    longest: float = math.inf,
    graphs: bool = True,
    tell: Callable[[str], None] = lambda doing: None,
) -> Timed:
    """Times the variants of a case in one rotation. One that fails has a reason, the others go on.

    Args:
        admit: says why a variant is not to be run, or None. Called just before its warm-up.
        longest: seconds of a call from which on a variant is not timed.
        graphs: whether CUDA graphs are captured and timed as well.
        tell: called with the name of each variant before it first runs, and with "timing".

    Raises:
        RuntimeError: a failure has ruined the CUDA context of this process.
    """
    try:
        inputs = case.inputs()
    except Exception as error:
        timing.synchronize(case.device)
        return Timed(failures={variant.name: timing.reason(error) for variant in variants})
    steps, failures = {}, {}
    for variant in variants:
        tell(variant.name)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                failure = variant.unavailable or admit(variant)
                if failure is None:
                    step = prepared(case, variant, inputs)
                    seconds = timing.warm_up(step, protocol, case.device)
                    if seconds < longest:
                        steps[variant.name] = step
                    else:
                        failure = f"takes {seconds:.1f} s a call"
            except Exception as error:  # torch gives its reasons in warnings
                told = [str(w.message).partition(" (Triggered")[0] for w in warned]
                failure = "; ".join([timing.reason(error), *dict.fromkeys(told)])[:600]
        timing.synchronize(case.device)
        if failure is not None:
            failures[variant.name] = failure
            free_cached(case.device)
    tell("timing")
    timings = timing.interleaved(steps, case.device, protocol, graphs=graphs)
    failures |= {name: t.failure for name, t in timings.items() if t.failure is not None}
    return Timed({name: t for name, t in timings.items() if name not in failures}, failures)


def rows(
    key: Row,
    case: Case,
    variants: Iterable[Variant],
    found: Timed,
    ceiling: float,
    *,
    passes: Sequence[str] | None = None,
    against: Callable[[dict[str, Timing], str], str | None] | None = None,
) -> list[Row]:
    """The rows of a case: for each pass one of each variant. A variant without a timing has its
    failure as status.

    Args:
        key: first columns, which say what the case is.
        ceiling: highest rate of the machine in FLOP/s or bytes/s.
        passes: passes to make rows of; all of the case by default.
        against: returns, for the timings and a pass, the variant to compare with. With it rows have
            columns for the ratio of that variant's time to their own.
    """
    made = []
    for pass_ in case.passes if passes is None else passes:
        last = pass_ == case.passes[-1]
        other = None if against is None else against(found.timings, pass_)
        for variant in variants:
            name = variant.name
            time = found.timings.get(name)
            row = {
                **key,
                "variant": name,
                "pass": pass_,
                "status": found.failures.get(name, MEASURED),
                **_speed(case, pass_, time, ceiling),
                "counted_flops": found.flops.get(name) if last else None,
                "peak_bytes": found.peaks.get(name) if last else None,
                "predicted_bytes": variant.scratch if last else None,
            }
            if against is not None:
                row |= comparison(found.timings, other if time else None, time, pass_)
            made.append({k: rounded(v) for k, v in row.items()})
    return made


def _speed(case: Case, pass_: str, time: Timing | None, ceiling: float) -> Row:
    """The columns of times and rates, None where nothing was measured."""
    scale = SCALES[case.unit]
    p20, p50, p80 = time.quantiles(pass_) if time else (None, None, None)
    rate = case.work(pass_) / p50 if p50 else None
    return {
        "p20_ms": _ms(p20),
        "p50_ms": _ms(p50),
        "p80_ms": _ms(p80),
        "samples": len(time.samples) if time else None,
        "host_ms": _ms(time.host.get(pass_)) if time else None,
        "graph_ms": _ms(time.graph.get(pass_)) if time else None,
        "graph_failure": time.uncaptured if time else None,
        "rate": rate / scale if rate else None,
        "unit": case.unit,
        "ceiling": ceiling / scale,
        "fraction_of_ceiling": rate / ceiling if rate else None,
    }


def comparison(
    timings: dict[str, Timing], other: str | None, time: Timing | None, pass_: str
) -> Row:
    """The columns that compare a variant with another one, None without one of them."""
    names = ("ratio_p20", "ratio_p50", "ratio_p80")
    if other is None or time is None:
        return {"against": None, "against_ms": None, "pairs": None, **dict.fromkeys(names)}
    theirs = timings[other]
    return {
        "against": other,
        "against_ms": _ms(theirs.quantiles(pass_)[1]),
        "pairs": min(len(theirs.samples), len(time.samples)),
        **dict(zip(names, timing.ratio(theirs, time, pass_), strict=True)),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def rounded(value: Any) -> Any:
    """A number with four digits if it is no integer; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def highest_rate(unit: str, device: str, *dtypes: str) -> float:
    """The highest rate of this machine now: bytes/s of a copy, or FLOP/s of the fastest product in
    one of the dtypes."""
    if unit == "GB/s":
        return timing.copy_ceiling(device)
    return max(timing.product_ceiling(DTYPES[dtype], device) for dtype in dtypes)


def disagreement(case: Case, variant: Variant, whole: Case | None = None) -> str | None:
    """How the variant differs from the reference in float64 on this case, None if it agrees.

    With `whole`, the case is an excerpt of it. The variant then computes the whole case on repeated
    inputs of the excerpt, and the first repetition is compared: so it runs the very kernels that
    will be timed.
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
    """Wraps a call: repeats its inputs to the shapes of the whole case, and cuts its outputs to the
    part that belongs to the original inputs."""
    shapes = {name: x.shape for name, x in replace(whole, device="meta").inputs().items()}

    def part(**inputs: Tensor) -> Any:
        times = {
            name: [n // m for n, m in zip(shapes[name], x.shape, strict=True)]
            for name, x in inputs.items()
        }
        outputs = call(**{name: x.repeat(times[name]) for name, x in inputs.items()})
        first = times[next(iter(inputs))]  # outputs are cut as the first input was repeated

        def cut(output: Tensor) -> Tensor:
            for dim, count in enumerate(first[: output.dim()]):
                output = output.narrow(dim, 0, output.shape[dim] // count)
            return output

        return tuple(map(cut, outputs)) if isinstance(outputs, tuple) else cut(outputs)

    return part


def does_not_fit(case: Case, variant: Variant) -> str | None:
    """Why memory is too small for the variant, by its scratch and by its tensors, or None."""
    # A tenth stays free: the prediction leaves out what allocators and libraries keep.
    there = 0.9 * memory.available(case.device)
    for need in (variant.scratch, memory.footprint(case, variant)[1]):
        if need > there:
            return f"would need {size(need)}"
    return None


def free_cached(device: str) -> None:
    """Gives memory that former variants have freed back to the device."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def count_flops(case: Case, variant: Variant) -> int:
    """FLOPs of a call, the sum over its operators. It runs on tensors without memory, so that any
    length takes no time.

    Plain operators count by their shapes, fused ones by the tiles that they visit.
    """
    formulas = case.flop_formulas()
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        prepared(case, variant, case.inputs(), traced=True).run()
    return counter.get_total_flops()


def size(count: float) -> str:
    """Bytes as text, such as 34 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
