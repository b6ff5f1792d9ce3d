"""Fixed cases in pairs with PyTorch, on a CPU: `tfkern bench <op> --against torch`.

The result of a case is the ratio of PyTorch's time to the native kernels' time. It is taken from
pairs of samples that ran side by side, so that whatever slows down the machine cancels. The rows
of all ops stand in one file for each processor and instruction set of PyTorch; README's table comes
from these files. Running an op replaces its rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import (
    attention,
    block,
    cross_entropy,
    environment,
    layer_norm,
    linear_cross_entropy,
    measure,
    mlp,
    report,
    rotary,
    timing,
)
from .case import BACKWARD, BOTH, FORWARD, Case, Variant, compiled
from .measure import Results, Row

CHOICES = ("torch",)
THREADS = 2
# At least 15 pairs, or fewer for calls that take many seconds.
PROTOCOL = timing.Protocol(min_samples=15, max_samples=500, min_seconds=0.5, long_seconds=60)


@dataclass(frozen=True)
class Comparison:
    """A pass of a case, and the target ratios for float32 and, where torch has no AMX, bfloat16."""

    name: str
    case: Case
    pass_: str
    targets: tuple[float, float]
    compiled: bool = False  # whether torch's side is under torch.compile

    def target(self, dtype: str) -> float | None:
        """The ratio to reach for a dtype on this processor, None where none is set."""
        if dtype != "float32" and "amx" in environment.torch_instructions():
            return None
        return dict(zip(("float32", "bfloat16"), self.targets, strict=True)).get(dtype)

    def at(self, dtype: str) -> Case:
        return replace(self.case, dtype=dtype, backward=self.pass_ != FORWARD)

    def variants(self, case: Case) -> tuple[Variant, Variant]:
        """PyTorch's variant and tfkern's."""
        eager = Variant("torch", case.fused)
        theirs = compiled("torch.compile", case.fused) if self.compiled else eager
        return theirs, next(v for v in case.variants(["native"]) if v.name == "tfkern native")


_D64 = attention.OpCase(length=2048, heads=8, head_dim=64)
_D128 = attention.OpCase(length=2048, heads=4, head_dim=128)
_D64_CAUSAL, _D128_CAUSAL = replace(_D64, causal=True), replace(_D128, causal=True)
_NORM, _SMALL_NORM = (layer_norm.OpCase(length=n, hidden=m) for n, m in ((4096, 1024), (512, 768)))
_MLP = mlp.OpCase(length=2048, hidden=768)
_ROTARY = rotary.OpCase(length=2048)
_BLOCK = block.OpCase(length=1024)
_LOSS = cross_entropy.OpCase(length=2048, vocabulary=50257)
_HEAD = linear_cross_entropy.OpCase(length=2048, vocabulary=50257)

COMPARISONS = {
    "attention": (
        Comparison("T=2048 D=64 full", _D64, FORWARD, (1.3, 1.8)),
        Comparison("T=2048 D=128 full", _D128, FORWARD, (1.2, 1.7)),
        Comparison("T=2048 D=64 causal", _D64_CAUSAL, FORWARD, (1.5, 2.1)),
        Comparison("T=2048 D=128 causal", _D128_CAUSAL, FORWARD, (1.4, 2.0)),
        Comparison("T=2048 D=64 full", _D64, BACKWARD, (1.2, 1.9)),
        Comparison("T=2048 D=128 full", _D128, BACKWARD, (1.15, 1.8)),
        Comparison("T=2048 D=64 causal", _D64_CAUSAL, BACKWARD, (1.4, 2.3)),
        Comparison("T=2048 D=128 causal", _D128_CAUSAL, BACKWARD, (1.3, 2.2)),
        Comparison("B=8 T=128 D=64 full", replace(_D64, batch=8, length=128), FORWARD, (1.2, 1.5)),
        Comparison("B=8 T=512 D=64 full", replace(_D64, batch=8, length=512), FORWARD, (1.2, 1.5)),
        Comparison(
            "B=4 T=1 S=4096 D=64",
            attention.Decode(batch=4, heads=16, length=4096, head_dim=64),
            FORWARD,
            (1.5, 1.2),
        ),
    ),
    "layer_norm": (
        Comparison("4096 x 1024", _NORM, FORWARD, (1.1, 1.3)),
        Comparison("512 x 768", _SMALL_NORM, FORWARD, (1.1, 1.3)),
        Comparison("4096 x 1024", _NORM, BACKWARD, (1.3, 1.5)),
        Comparison("512 x 768", _SMALL_NORM, BACKWARD, (1.3, 1.5)),
        Comparison("4096 x 1024 residual", replace(_NORM, residual=True), BOTH, (1.6, 1.6)),
    ),
    "mlp": (
        Comparison("2048 x 768 x 3072", _MLP, FORWARD, (1.1, 1.6)),
        Comparison("2048 x 768 x 3072", _MLP, BACKWARD, (1.05, 1.5)),
    ),
    "rotary": (
        Comparison("T=2048 H=16 D=64", _ROTARY, FORWARD, (1.5, 1.5)),
        Comparison("T=2048 H=16 D=64", _ROTARY, BOTH, (1.5, 1.5)),
        Comparison(
            "B=8 T=128 H=12 Hk=4 D=128",
            replace(_ROTARY, batch=8, length=128, heads=12, key_heads=4, head_dim=128),
            BOTH,
            (1.5, 1.5),
        ),
    ),
    "cross_entropy": (
        Comparison("2048 x 50257", _LOSS, FORWARD, (3.0, 3.0)),
        Comparison("2048 x 50257", _LOSS, BACKWARD, (1.5, 1.5)),
    ),
    "linear_cross_entropy": (
        Comparison("2048 x 768 x 50257", _HEAD, BOTH, (1.0, 1.0)),
        Comparison(
            "4096 x 768 x 32000", replace(_HEAD, length=4096, vocabulary=32000), BOTH, (1.0, 1.0)
        ),
    ),
    "block": (
        Comparison("T=1024 dim=768", _BLOCK, BOTH, (1.2, 1.6)),
        Comparison("T=1024 dim=768", _BLOCK, BOTH, (1.05, 1.4), compiled=True),
    ),
}
_HALF = ("attention", "mlp")  # ops whose float16 has code of its own


def dtypes(op: str) -> tuple[str, ...]:
    return ("float32", "bfloat16", *(("float16",) if op in _HALF else ()))


def run(
    op: str,
    *,
    protocol: timing.Protocol = PROTOCOL,
    progress: Callable[[str], None] = lambda doing: None,
) -> Results:
    """Times the comparisons of an op, except those with a side that differs from float64."""
    facts, results = environment.facts("cpu"), Results()
    for dtype in dtypes(op):
        for comparison in COMPARISONS[op]:
            case = comparison.at(dtype)
            name = f"{comparison.name} {comparison.pass_} {dtype}"
            progress(name)
            wrong = _disagreements(comparison, case.small())
            results.wrong |= {f"{side}, {name},": how for side, how in wrong.items()}
            if not wrong:
                results.rows.append(_row(comparison, case, protocol) | facts)
    return results


def write(rows: list[Row], folder: Path) -> Path:
    """Puts the rows of an op into the file of this processor, in place of the op's former rows."""
    return report.replace_rows(folder / file_name(rows[0]), rows, "op", list(COMPARISONS))


def file_name(facts: Row) -> str:
    """The name of the file for a processor, from the facts of its rows."""
    return report.file_name("cpu", facts["device"], facts["torch_instructions"])


def _disagreements(comparison: Comparison, case: Case) -> dict[str, str]:
    """By variant, how it differs from float64 on a small case, for variants that do."""
    found = {}
    for variant in comparison.variants(case):
        if variant.unavailable is not None:
            raise NotImplementedError(f"{variant.name} cannot run: {variant.unavailable}")
        torch.manual_seed(0)  # both variants, and all runs, get the same inputs
        problem = measure.disagreement(case, variant)
        if problem is not None:
            found[variant.name] = problem
    return found


def _row(comparison: Comparison, case: Case, protocol: timing.Protocol) -> Row:
    """The row of tfkern's variant, which has the ratio to PyTorch's.

    Raises:
        RuntimeError: one of the two failed.
    """
    theirs, ours = comparison.variants(case)
    before = _ceiling(case)
    found = measure.timed(case, (theirs, ours), protocol)
    for side, why in found.failures.items():
        raise RuntimeError(f"{side}, {comparison.name}: {why}")
    ceiling = max(before, _ceiling(case))  # a busy machine lowers it
    key = {"op": case.op, "case": comparison.name, "dtype": case.dtype}
    (row,) = measure.rows(
        key,
        case,
        [ours],
        found,
        ceiling,
        passes=[comparison.pass_],
        against=lambda timings, pass_: theirs.name,
    )
    return row | {"target": comparison.target(case.dtype)}


def _ceiling(case: Case) -> float:
    """The highest rate of this machine now, in FLOP/s or bytes/s.

    The product may be in float32 for 16-bit dtypes, whose factors may be widened. PyTorch's float16
    product is no ceiling: on most processors it takes a hundred times longer.
    """
    dtypes = ("float32", "bfloat16") if case.dtype == "bfloat16" else ("float32",)
    return measure.highest_rate(case.unit, "cpu", *dtypes)
