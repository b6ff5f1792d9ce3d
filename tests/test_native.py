"""The C++ library: its instruction sets and its facts."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulation
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tfkern
from tfkern.ops import OPS

_C = pytest.importorskip("tfkern._C", reason="no native build")

OTHERS = [level for level in _C.cpu_levels if level != _C.cpu_capability()]


def run(*arguments, level):
    """Runs a process with this instruction set; "" stands for the processor's best."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TFKERN_CPU_CAPABILITY": level},
        cwd="/",
    )


def test_any_level_of_the_processor_can_be_chosen():
    code = "from tfkern import _C; print(_C.cpu_capability())"
    best = run("-c", code, level="").stdout.strip()
    assert best in _C.cpu_levels
    for level in ("default", "avx2", "avx512", "avx512_bf16", "amx", "none"):
        expected = level if level in _C.cpu_levels else best
        assert run("-c", code, level=level).stdout.strip() == expected


@pytest.mark.parametrize("level", OTHERS)  # the one in use runs in the tests of each op
@pytest.mark.parametrize("op", [*OPS, "linear", "int8"])
def test_kernels_under_every_level(op, level):
    tests = Path(__file__).parent.glob(f"test_{op}*.py")
    chosen = "native and not compile and not opcheck and not vmap"
    result = run("-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *tests, level=level)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(
    "avx512_bf16" not in _C.cpu_levels, reason="needs AVX-512 and pairs of bfloat16"
)
def test_attention_with_tiles_on_every_processor():
    """AMX is emulated, so that its kernels are tested where there is none."""
    result = emulation.pytest_on_cpu(
        "-k", "native and bfloat16 and not compile and not opcheck and not vmap",
        *Path(__file__).parent.glob("test_attention*.py"),
        flavour="amx", TFKERN_CPU_CAPABILITY="amx",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_build_facts():
    assert _C.torch_version == torch.__version__
    assert _C.compiler.split()[0] in ("gcc", "clang")
    assert isinstance(_C.has_cuda, bool) and _C.has_cuda == bool(_C.cuda_architectures)


@pytest.mark.parametrize(
    "built, capability, dtypes, told",
    [
        (True, (9, 0), "float32 float32", None),
        (True, (8, 0), "bfloat16 float32", None),
        (True, (9, 0), "float64 float64", "takes float32, bfloat16 and float16 on CUDA, got"),
        (True, (9, 0), "float32 float64", "takes float32, bfloat16 and float16 on CUDA, got"),
        (True, (7, 5), "float32 float32", r"compute capability 8.0, got \(7, 5\)"),
        (False, (9, 0), "float32 float32", "no CUDA compiler was found"),
    ],
)
def test_what_is_said_of_cuda(monkeypatch, built, capability, dtypes, told):
    from tfkern import native
    from tfkern.native import layer_norm

    monkeypatch.setattr(native._C, "has_cuda", built)
    monkeypatch.setattr(native, "_capability", lambda device: capability)
    x_type, weight_type = (getattr(torch, name) for name in dtypes.split())
    with FakeTensorMode():  # tensors on a device that need not exist
        x = torch.empty(2, 8, device="cuda", dtype=x_type)
        weight = torch.empty(8, device="cuda", dtype=weight_type)
        args = (x, weight, None, None, None, 0.0, 1e-5, False, 1)
        reason = layer_norm.why_not(*args, needs_grad=True)
    assert reason is None if told is None else re.search(told, reason)


@pytest.mark.parametrize(
    "dtype, size, needs_grad, shared, told",
    [
        ("bfloat16", 256, True, 99, None),
        ("float32", 64, True, 99, None),
        ("float32", 128, False, 99, None),
        ("float32", 128, True, 99, "needs 123904 bytes of shared memory for float32"),
        ("float32", 256, False, 99, "needs 147456 bytes of shared memory for float32"),
        ("float32", 256, True, 163, None),
        ("float16", 257, False, 227, "head sizes up to 256 on CUDA, got 257"),
        ("float64", 64, False, 227, "takes float32, bfloat16 and float16 on CUDA"),
    ],
)
def test_what_is_said_of_attention_on_cuda(monkeypatch, dtype, size, needs_grad, shared, told):
    from tfkern import native
    from tfkern.native import attention

    monkeypatch.setattr(native._C, "has_cuda", True)
    monkeypatch.setattr(native, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_shared_memory", lambda device: shared << 10)
    with FakeTensorMode():
        q = torch.empty(1, 1, 8, size, device="cuda", dtype=getattr(torch, dtype))
        args = (q, q, q, *[None] * 12, 1.0, 0.0, 0.0)
        reason = attention.why_not(*args, needs_grad=needs_grad)
    assert reason is None if told is None else told in reason


@pytest.mark.parametrize("sink", [None, torch.zeros(2)], ids=["", "sink"])
@pytest.mark.parametrize("T", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_next_to_the_largest_number(dtype, T, sink):
    """Their mean is finite, though the sum of two is not."""
    q = torch.randn(1, 2, T, 16, dtype=dtype)
    k = torch.zeros(1, 1, 3000, 16, dtype=dtype)
    v = torch.full((1, 1, 3000, 8), 3e38, dtype=dtype)
    o = tfkern.attention(q, k, v, sink=sink, backend="native")
    share = 1 if sink is None else 3000 / 3001
    expected = v[:, :, :1].double().expand(o.shape) * share
    rtol = 4 * torch.finfo(dtype).eps + 1e-5  # of the sum of 3000 terms
    torch.testing.assert_close(o.double(), expected, rtol=rtol, atol=0)


def test_calls_from_several_threads():
    """Sizes whose scratch memory is kept from one call to the next."""

    def gradients(seed):
        generator = torch.Generator().manual_seed(seed)
        S = 1024 + 64 * (seed % 3)
        q, k, v, do = (torch.randn(1, 1, S, 128, generator=generator) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(tfkern.attention(*inputs, causal=True), inputs, do)

    alone = [gradients(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, range(12)))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
