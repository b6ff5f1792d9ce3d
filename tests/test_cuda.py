"""The kernels of csrc/cuda: what nvcc makes of them, and the tests of their ops on the host."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import emulation
import pytest

_C = pytest.importorskip("tfkern._C", reason="no native build")

# What is tested of the operators themselves, of float64, threads and products of a CPU, is the CPU
# kernels' alone.
CHOSEN = "native and not (compile or opcheck or vmap or float64 or threads or products_of_native)"


# Sanitizers make it several times slower: a case of each kind always, all of them as slow tests.
SOME = (
    f"{CHOSEN} and (each_value or activations or long_rows or (bfloat16 and (matches or residual)))"
)


@pytest.mark.parametrize(
    "flavour, order, chosen",
    [
        ("plain", 1, CHOSEN),
        ("sanitized", 7, SOME),
        pytest.param("sanitized", 0, CHOSEN, marks=pytest.mark.slow),
    ],
    ids=["plain", "sanitized", "all sanitized"],
)
@pytest.mark.parametrize("op", emulation.OPS)
def test_op_tests_pass_on_the_host(op, flavour, order, chosen):
    tests = (emulation.ROOT / "tests").glob(f"test_{op}*.py")
    result = emulation.pytest("-k", chosen, *tests, flavour=flavour, order=order)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout


def resources(text: str) -> list[tuple[str, str, int, int, int]]:
    """Architecture, kernel, registers, bytes of stack and of static shared memory, from the report
    of `cuobjdump -res-usage`. A kernel has a stack only where registers spill."""
    rows, architecture = [], ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        if found := re.match(r" Function (\w+):", line):
            mangled = found[1]
        if found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            name, arguments = re.search(
                r"\d([a-z][a-z_]*_kernel)((?:I\w+?E(?=Ev))?)", mangled
            ).groups()
            file = re.search(r"_([a-z_]+)_cu_", mangled)
            kernel = f"{file[1]}_{name}" if file else name
            rows.append((architecture, kernel + arguments, *map(int, found.groups())))
    return rows


@pytest.fixture(scope="module")
def compiled():
    if not _C.has_cuda:
        pytest.skip("built without CUDA kernels")
    triton = pytest.importorskip("triton")
    path = shutil.which("cuobjdump") or triton.knobs.nvidia.cuobjdump.path
    (library,) = Path(_C.__file__).parent.glob("_operators*.so")
    command = [path, "-res-usage", library]
    return resources(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    kernels = Counter(architecture for architecture, *_ in compiled)
    assert {f"sm_{a.removeprefix('sm_')}" for a in _C.cuda_architectures} == set(kernels)
    assert len(set(kernels.values())) == 1
    assert {re.sub(r"_kernel.*", "_kernel", row[1]) for row in compiled} == set(_C.cuda_kernels)


# Bytes of stack that are known: float32 is in three parts, which fill the registers.
SPILLS = {
    "attention_forward_kernelIfLi128EE": 16,
    "attention_backward_dbias_kernelIfLi128EE": 16,
    "attention_backward_dbias_kernelIfLi256EE": 56,
    "attention_backward_dkv_kernelIfLi64EE": 24,
    "attention_backward_dkv_kernelIfLi128EE": 40,
    "attention_backward_dkv_kernelIfLi256EE": 136,
    "attention_backward_dq_kernelIfLi128EE": 24,
    "attention_backward_dq_kernelIfLi256EE": 56,
}


def test_no_kernel_spills(compiled):
    for architecture, kernel, registers, stack, shared in compiled:
        assert stack <= SPILLS.get(kernel, 0), f"{kernel} spills for {architecture}"
        reserved = () if architecture == "sm_80" else (1024,)  # by the system
        assert shared in (0, *reserved), f"{kernel} has shared memory that launch does not know of"
        assert 0 < registers <= 255


def test_a_spill_would_be_seen():
    text = "arch = sm_80\n Function _Z14forward_kernelILb0EEv:\n  REG:255 STACK:16 SHARED:4 LOCAL:0"
    assert resources(text)[0][2:] == (255, 16, 4)
