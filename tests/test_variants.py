"""Every variant of the benchmarks under pytest-benchmark: right, and timed.

    pytest -m slow tests/test_variants.py --benchmark-only

One length and one pass each; `tfkern bench` does the sweeps.
"""

import pytest
import torch

from tfkern.benchmarks import OPS, measure
from tfkern.benchmarks.case import load, prepared

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow

_LENGTHS = {"attention": 512, "layer_norm": 2048, "mlp": 512, "block": 256, "model": 256}
_LENGTHS |= {"rotary": 2048, "cross_entropy": 256, "linear_cross_entropy": 256}


def _points():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS:
        case = load(op)(length=_LENGTHS[op], device=device)
        for variant in case.variants():
            yield pytest.param(case, variant, id=f"{op}-{variant.name.replace(' ', '-')}")


@pytest.mark.parametrize("case, variant", list(_points()))
def test_benchmark(benchmark, case, variant):
    if variant.unavailable is not None:
        pytest.skip(variant.unavailable)
    small = case.small()
    same = next(v for v in small.variants() if v.name == variant.name)
    try:
        problem = measure.disagreement(small, same)
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert problem is None, "a wrong result is not timed"
    step = prepared(case, variant, case.inputs())

    def run():
        output = step.forward()
        if step.backward is not None:
            step.backward(output)
        if case.device == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark(run)
