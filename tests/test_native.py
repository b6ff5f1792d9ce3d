"""The C++ library: its instruction sets and its facts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_C = pytest.importorskip("tfkern._C", reason="no native build")

LEVELS = _C.cpu_levels[: _C.cpu_levels.index(_C.cpu_capability()) + 1]
OPS = ("attention", "layer_norm", "mlp")


def run(*arguments, level):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TFKERN_CPU_CAPABILITY": level},
        cwd="/",
    )


@pytest.mark.parametrize("level", _C.cpu_levels)
def test_the_level_can_be_lowered_but_not_raised(level):
    code = "from tfkern import _C; print(_C.cpu_capability())"
    expected = level if level in LEVELS else LEVELS[-1]
    assert run("-c", code, level=level).stdout.strip() == expected


@pytest.mark.parametrize("level", LEVELS[:-1])  # the best one runs in the tests of each op
@pytest.mark.parametrize("op", OPS)
def test_kernels_under_every_level(op, level):
    tests = Path(__file__).parent.glob(f"test_{op}*.py")
    chosen = "native and not compile and not opcheck and not vmap"
    result = run("-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *tests, level=level)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_build_facts():
    import torch

    assert _C.torch_version == torch.__version__
    assert _C.compiler.split()[0] in ("gcc", "clang")
