"""The interpreter computes what a GPU would. Every test here fails without `interpreter.patch`."""

import pytest
import torch
import triton
import triton.language as tl

import tfkern.kernels  # noqa: F401  which installs the repairs

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"
)


@triton.jit
def _dot(A, B, C, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(A + i * N + j), tl.load(B + i * N + j))
    tl.store(C + i * N + j, c)


@triton.jit
def _copy(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i))


@triton.jit
def _arithmetic(X, Y, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(Z + i, tl.where(x > y, -x * 1.5, x + y))


@triton.jit
def _maximum(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.maximum(tl.load(X + i), 0.0))


@triton.jit
def _count(Steps, Y):
    count = 0
    for _ in tl.range(0, tl.load(Steps), 2):
        count += 1
    tl.store(Y, count)


def _copied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _copy[(1,)](x, y, x.numel())
    return y


def _assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())  # which NaN it is, torch leaves open
    numbers = ~expected.isnan()
    integer = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert torch.equal(actual[numbers].view(integer), expected[numbers].view(integer))


def test_bfloat16_dot_multiplies_values():
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).bfloat16()
    c = torch.empty(32, 32)
    _dot[(1,)](a, b, c, 32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_rounds_to_nearest_even_bfloat16(low):
    """Every upper half there is: both zeros, subnormals, inf, NaN; 0x8000 is the tie."""
    bits = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + low
    x = bits.view(torch.float32)
    _assert_same_bits(_copied(x, torch.bfloat16), x.bfloat16())


def test_random_float32_rounds_to_nearest_even_bfloat16():
    torch.manual_seed(0)
    x = torch.randn(2**14) * 10 ** torch.linspace(-44, 38, 2**14)
    _assert_same_bits(_copied(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_other_numbers_become_bfloat16(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2**10) * 1000).to(dtype)
    _assert_same_bits(_copied(x, torch.bfloat16), x.float().bfloat16())


def test_bfloat16_widens_exactly():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    _assert_same_bits(_copied(x, torch.float32), x.float())


def test_bfloat16_arithmetic():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2**10).bfloat16()
    z = torch.empty_like(x)
    _arithmetic[(1,)](x, y, z, x.numel())
    _assert_same_bits(z, torch.where(x > y, -x * 1.5, x + y))


def test_maximum_ignores_nan():
    x = torch.tensor([float("nan"), -1.0, 2.0, float("-inf")])
    y = torch.empty_like(x)
    _maximum[(1,)](x, y, x.numel())
    assert y.tolist() == [0, 0, 2, 0]


@pytest.mark.filterwarnings("error::DeprecationWarning")  # numpy 2.4 made this one an error
def test_loop_bound_may_be_a_tensor():
    count = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](torch.tensor([7]), count)
    assert count.item() == 4
