"""Facts about one variant of one case: whether it is right, what it needs, its columns."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tfkern.testing import validate

from . import memory, timing
from .case import Case, Variant, prepared

MEASURED = "measured"


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
            for dim, count in enumerate(first):
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


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def count_flops(case: Case, variant: Variant) -> int:
    """FLOPs of a call, the sum over its operators. It runs on tensors without memory, so that any
    length takes no time.

    Plain operators count by their shapes, fused ones by the tiles that they visit.
    """
    formulas = case.flop_formulas()
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step = prepared(case, variant, case.inputs(), traced=True)
        output = step.forward()
        if step.backward is not None:
            step.backward(output)
    return counter.get_total_flops()


def size(count: float) -> str:
    """Bytes as text, such as 34 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
