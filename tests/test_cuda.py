"""The kernels of csrc/cuda: what nvcc makes of them, and the tests of their ops on the host."""

import emulation
import pytest

pytest.importorskip("tfkern._C", reason="no native build")

# What is tested of the operators themselves, and of float64 and threads, is the CPU kernels' alone.
CHOSEN = "native and not (compile or opcheck or vmap or float64 or threads)"


@pytest.mark.parametrize(
    "flavour, order",
    [("plain", 1), ("sanitized", 7)],
    ids=["plain", "sanitized"],
)
@pytest.mark.parametrize("op", emulation.OPS)
def test_op_tests_pass_on_the_host(op, flavour, order):
    tests = (emulation.ROOT / "tests").glob(f"test_{op}*.py")
    result = emulation.pytest("-k", CHOSEN, *tests, flavour=flavour, order=order)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout
