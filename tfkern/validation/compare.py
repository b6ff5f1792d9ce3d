"""Compares a kernel with a float64 reference, for tests, `tfkern validate` and users.

The yardstick is PyTorch itself. The reference runs once in float64, which is taken for the truth,
and once in the dtype of the inputs, whose error says what that dtype can give. A kernel passes if

    max|ours - truth| <= 2 max|torch - truth| + floor

for every output and every gradient. The floor is the rounding noise of the dtype around the truth
g, 2 max|((g + 0.3) - 0.3) - g|, or the bound of this if g has few values. For float64 inputs,
where truth and yardstick coincide, the limit is 64 eps max(1, max|truth|). A NaN fails, and
infinities must be the same. The tests of FlashAttention-3 have the same rule (Shah et al.
2024).

Example: a softmax that forgets to subtract the maximum passes on small inputs and fails on large
ones.

    >>> import torch
    >>> from tfkern.testing import validate
    >>> _ = torch.manual_seed(0)
    >>> def careless(x):
    ...     e = x.exp()
    ...     return e / e.sum(-1, keepdim=True)
    >>> def softmax(x):
    ...     return x.softmax(-1)
    >>> validate(careless, softmax, {"x": torch.randn(4, 64)}).ok
    True
    >>> validate(careless, softmax, {"x": 100 * torch.randn(4, 64)}).ok
    False
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One output or gradient: the largest error of ours and of torch's, and the limit for ours."""

    name: str
    error: float
    torch_error: float
    limit: float
    problem: str | None = None  # a fault other than the size of the error, as a phrase

    @property
    def ok(self) -> bool:
        return self.problem is None and self.error <= self.limit

    @property
    def ratio(self) -> float:
        """Our error over torch's; inf if only torch's is 0."""
        if self.torch_error == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.torch_error


@dataclass(frozen=True)
class Report:
    """The comparisons of one call of `validate`."""

    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons)

    def check(self) -> None:
        """Raises AssertionError with the table unless every comparison passed."""
        if not self.ok:
            raise AssertionError(f"outside the error limits:\n{self}")

    def as_dicts(self) -> list[dict]:
        return [asdict(c) | {"ratio": c.ratio, "ok": c.ok} for c in self.comparisons]

    def __str__(self) -> str:
        lines = [f"{'':14}{'ours':>10}{'torch':>10}{'limit':>10}"]
        for c in self.comparisons:
            verdict = "ok" if c.ok else f"FAILED {c.problem or ''}".rstrip()
            lines.append(
                f"{c.name:14}{c.error:10.2e}{c.torch_error:10.2e}{c.limit:10.2e}  {verdict}"
            )
        return "\n".join(lines)


def validate(
    fn: Callable,
    reference: Callable,
    inputs: Mapping[str, Tensor | None],
    *,
    gradients: bool = True,
    grad_outputs: tuple[Tensor, ...] | None = None,
    floor_scale: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Report:
    """Compares `fn(**inputs)` and its gradients with `reference(**inputs)`, by the rule above.

    Args:
        fn: the function under test. Returns a tensor or a tuple of tensors.
        reference: the same function in plain PyTorch, differentiable. It must compute in the dtype
            of its inputs.
        inputs: arguments by name. Floating tensors are cast to float64 for the truth, and get a
            gradient; other values are passed on as they are.
        gradients: whether to compare the gradients as well.
        grad_outputs: the incoming gradient of every output; drawn from a normal distribution if
            None.
        floor_scale: factor of the floor by the name of an input, for its gradient, or of an output
            ("output", or "output 0" and so on). Sums of many terms need one, such as sqrt(rows)
            for the weight of a norm.
        seed: seed for drawing the incoming gradients.

    Returns:
        A `Report`; its `check()` raises AssertionError on failure.

    Raises:
        ValueError: the two functions differ in the number of outputs, or the reference gives NaN.
    """
    outputs, grads = _run(fn, inputs, None, gradients, grad_outputs, seed)
    torch_outputs, torch_grads = _run(reference, inputs, None, gradients, grad_outputs, seed)
    true_outputs, true_grads = _run(reference, inputs, torch.float64, gradients, grad_outputs, seed)
    if len(outputs) != len(true_outputs):
        raise ValueError(f"fn returns {len(outputs)} tensors, reference {len(true_outputs)}")
    names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    rows = list(zip(names, names, outputs, torch_outputs, true_outputs, strict=True))
    rows += [(f"d{n}", n, grads[n], torch_grads[n], true_grads[n]) for n in true_grads]
    scale = floor_scale or {}
    return Report(
        tuple(
            _compare(label, ours, torchs, truth, scale.get(key, 1.0))
            for label, key, ours, torchs, truth in rows
        )
    )


def _run(fn, inputs, dtype, gradients, grad_outputs, seed):
    """Runs fn on the inputs, cast to `dtype` if given. Returns outputs, and gradients by name."""
    arguments = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            floating = value.is_floating_point()
            value = value.detach()
            value = value.to(dtype) if floating and dtype is not None else value
            value = value.requires_grad_(gradients and floating)
        arguments[name] = value
    outputs = fn(**arguments)
    outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    if not gradients:
        return outputs, {}
    wanted = {n: a for n, a in arguments.items() if isinstance(a, Tensor) and a.requires_grad}
    if not wanted:
        return outputs, {}
    if grad_outputs is None:
        generator = torch.Generator().manual_seed(2**20 + seed)  # differs from seeds of inputs
        # Rounded to the dtype of the call, so that all three runs get the same numbers.
        narrow = next((inputs[n].dtype for n in wanted), torch.float32)
        grad_outputs = tuple(
            torch.randn(o.shape, generator=generator, device="cpu").to(o.device, narrow)
            for o in outputs
        )
    grad_outputs = [g.to(o.dtype) for g, o in zip(grad_outputs, outputs, strict=True)]
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
    )
    return tuple(o.detach() for o in outputs), dict(zip(wanted, grads, strict=True))


_FEW = 64


def _compare(name, ours, torchs, truth, floor_scale) -> Comparison:
    def failed(problem):
        return Comparison(name, math.inf, math.nan, math.nan, problem)

    if truth is None or ours is None:
        if ours is truth:
            return Comparison(name, 0.0, 0.0, 0.0)
        return failed("no gradient" if ours is None else "a gradient where torch has none")
    if ours.shape != torchs.shape:
        return failed(f"shape {tuple(ours.shape)}, torch has {tuple(torchs.shape)}")
    if ours.dtype != torchs.dtype:
        return failed(f"dtype {ours.dtype}, torch has {torchs.dtype}")
    if truth.isnan().any():
        raise ValueError(f"the reference gives NaN for {name}")
    infinite = truth.isinf()
    finite = ~infinite
    problem = None
    if ours.isnan().any():
        problem = f"{int(ours.isnan().sum())} NaN"
    elif (ours[infinite].double() != truth[infinite]).any() or ours[finite].isinf().any():
        problem = "infinities differ"
    truth = truth[finite]
    error = _largest((ours[finite].double() - truth).abs())
    if ours.dtype == torch.float64:
        torch_error, magnitude = 0.0, max(1.0, _largest(truth.abs()))
        limit = 64 * torch.finfo(torch.float64).eps * magnitude * floor_scale
    else:
        torch_error = _largest(
            (torchs[finite].double() - truth).abs().nan_to_num(nan=0.0, posinf=0.0)
        )
        g = truth.to(ours.dtype)
        floor = 2 * _largest((((g + 0.3) - 0.3) - g).double().abs())
        # A few values may all be exact by luck, so they get the bound of the same noise.
        if g.is_floating_point() and g.unique().numel() < _FEW:
            floor = torch.finfo(ours.dtype).eps * (_largest(g.double().abs()) + 0.3)
        limit = 2 * torch_error + floor * floor_scale
    return Comparison(name, error, torch_error, limit, problem)


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0
