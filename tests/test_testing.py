"""`validate` passes what is as good as torch and refuses everything else, each for its reason."""

import doctest

import pytest
import torch

from tfkern.testing import validate
from tfkern.validation import compare

x = torch.linspace(-2, 2, 40).reshape(4, 10)


def exp(x):
    return x.exp()


def outcome(fn, name="output", inputs=None, reference=exp, **options):
    report = validate(fn, reference, inputs or {"x": x}, **options)
    (row,) = (c for c in report.comparisons if c.name == name)
    assert report.ok == all(c.ok for c in report.comparisons)
    return row


def test_docstring():
    results = doctest.testmod(compare)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_itself_passes(dtype):
    validate(exp, exp, {"x": x.to(dtype)}).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_few_roundings_too_many_fail(dtype):
    off = 1 + 200 * torch.finfo(dtype).eps
    row = outcome(lambda x: x.exp() * off, inputs={"x": x.to(dtype)})
    assert not row.ok and row.problem is None and row.error > row.limit


@pytest.mark.parametrize(
    ("fn", "name", "problem"),
    [
        (lambda x: x.exp().masked_fill(x > 1.9, torch.nan), "output", "NaN"),
        (lambda x: x.exp().masked_fill(x > 1.9, torch.inf), "output", "infinities differ"),
        (lambda x: x.exp()[:2], "output", "shape"),
        (lambda x: x.exp().double(), "output", "dtype"),
        (lambda x: x.exp() + 0 * x.sqrt(), "dx", "NaN"),
    ],
    ids=["nan", "inf", "shape", "dtype", "gradient"],
)
def test_problems_have_names(fn, name, problem):
    if problem == "shape":
        report = validate(fn, exp, {"x": x}, gradients=False)
        assert problem in report.comparisons[0].problem
    else:
        row = outcome(fn, name)
        assert not row.ok and problem in row.problem


def test_a_missing_gradient_fails():
    row = outcome(lambda x, y: x + y.detach(), "dy", {"x": x, "y": x}, lambda x, y: x + y)
    assert not row.ok and row.problem == "no gradient"


def test_a_wrong_gradient_fails_beside_a_right_output():
    row = outcome(lambda x: x.exp() + (2 * x - 2 * x.detach()), "dx")
    assert not row.ok


def test_infinities_that_agree_leave_the_maximum():
    row = outcome(lambda x: x.log(), reference=lambda x: x.log(), inputs={"x": x.abs().round()})
    assert row.ok and row.error < 1e-6


def test_floor_scale():
    def off(x):
        return x.exp() * (1 + 4e-7)

    assert not outcome(off).ok
    assert outcome(off, floor_scale={"output": 50}).ok


def test_inputs_without_gradients():
    assert outcome(lambda i: i + 1, inputs={"i": torch.arange(4)}, reference=lambda i: i + 1).ok


def test_the_reference_must_be_sound():
    with pytest.raises(ValueError, match="the reference gives NaN for output"):
        validate(exp, lambda x: x.sqrt(), {"x": x})
    with pytest.raises(ValueError, match="fn returns 1 tensors, reference 2"):
        validate(exp, lambda x: (x, x), {"x": x})
