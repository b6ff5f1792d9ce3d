"""Compiles Triton kernels for GPUs that need not be present, and says what they use.

    python tests/support/aot.py GROUP [ARCH ...]  e.g. python tests/support/aot.py selftest 80 90

records the launches that GROUP would make on each ARCH, compiles exactly these, and prints one line
of JSON per kernel. To add a group, decorate a function that makes tensors of realistic shapes on
"cuda" and calls launchers with them. The tensors are fake: they need neither GPU nor memory. (Where
torch has no CUDA, slices such as `x[1:]` fail on them; methods such as `x.narrow` work.)

Tests call `report` or `check`, which start another process: a process in which TRITON_INTERPRET is
set cannot compile.
"""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# Bytes of shared memory that a block may opt in to, by architecture (CUDA programming guide, table
# of technical specifications per compute capability).
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}

# Shared memory is least on sm_89, and only products of sm_90 can be serialised.
each_arch = pytest.mark.parametrize(
    "arch", [89, 90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
)

# Messages of ptxas when it makes asynchronous products of sm_90 wait for each other.
SERIALISED = re.compile(r"C751[0-5]\b.*")

INSTRUCTIONS = re.compile(r"\b(cp\.async(?=\.c[ag])|mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma)\b")

GROUPS: dict[str, Callable[[], None]] = {}


@dataclass(frozen=True)
class Resources:
    registers: int  # per thread
    stack_bytes: int  # per thread; Triton's kernels have a stack only where registers spill
    shared_bytes: int  # per block
    instructions: dict[str, int]  # asynchronous copies and matrix products, as counted in the PTX
    serialised: list[str]  # messages of ptxas


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, as a launch by Triton would compile it."""

    fn: JITFunction
    signature: dict[str, str]
    constexprs: dict  # values by path: (3,) is the fourth parameter
    attrs: dict  # attributes by path
    arch: int
    options: dict = field(repr=False)
    grid: tuple[int, ...] | None = None

    def kernel(self):
        """The kernel as Triton compiles it, with the log of ptxas in its metadata."""
        source = ASTSource(self.fn, self.signature, self.constexprs, self.attrs)
        target = GPUTarget("cuda", self.arch, 32)
        # The option makes a cache key of its own, so that cached kernels have the log of ptxas.
        options = self.options | {"ptx_options": "--verbose"}
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.add_stages_inspection_hook = _keep_log
            return triton.compile(source, target=target, options=options)

    def compile(self) -> Resources:
        kernel = self.kernel()
        registers, stack = _usage(kernel.asm["cubin"])
        instructions = Counter(INSTRUCTIONS.findall(kernel.asm["ptx"]))
        # Shared memory is from Triton's metadata: it is asked for at launch, and the cubin says 0.
        tensor_memory = getattr(kernel.metadata, "tmem_size", 0)
        if tensor_memory > 512:  # columns on sm_100; more compiles to an empty kernel
            raise RuntimeError(f"{tensor_memory} columns of tensor memory, there are 512")
        serialised = SERIALISED.findall(kernel.metadata.ptxas_log)
        return Resources(registers, stack, kernel.metadata.shared, dict(instructions), serialised)


def compile(
    fn: JITFunction,
    signature: dict[str, str],
    constexprs: dict,
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: tuple[str, ...] = (),
) -> Resources:
    """Compiles one kernel from a hand-written signature; `divisible` names multiples of 16."""
    path = {name: (i,) for i, name in enumerate(fn.arg_names)}
    return Launch(
        fn,
        signature={name: signature.get(name, "constexpr") for name in fn.arg_names},
        constexprs={path[name]: value for name, value in constexprs.items()},
        attrs={path[name]: [["tt.divisibility", 16]] for name in divisible},
        arch=arch,
        options={"num_warps": num_warps, "num_stages": num_stages},
    ).compile()


def _keep_log(backend, stages, *_) -> None:
    """Makes Triton keep the log of ptxas in the metadata of a kernel."""
    assemble = stages["cubin"]

    def cubin(ptx, metadata):
        log = io.StringIO()
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            assembled = assemble(ptx, metadata)
        metadata["ptxas_log"] = log.getvalue()
        return assembled

    stages["cubin"] = cubin


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


class _Pointer:
    """Stands for a tensor without memory: Triton asks a tensor argument for dtype and address."""

    def __init__(self, x: FakeTensor):
        self.dtype = x.dtype
        self.address = x.storage_offset() * x.itemsize  # torch aligns storages to more than 16

    def data_ptr(self) -> int:
        return self.address


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Lists the launches inside the block, with the specialisations of a GPU, without running them.

    Tensors made inside are fake, and torch.cuda describes a device of architecture `arch`.
    """
    launches = []
    backend = make_backend(GPUTarget("cuda", arch, 32))
    capability = divmod(arch, 10)
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=108,
        shared_memory_per_block_optin=SHARED_LIMIT[arch],
    )

    def record(fn, *args, grid, warmup, **kwargs):
        args, kwargs = tree_map_only(FakeTensor, _Pointer, (args, kwargs))
        bind = create_function_from_signature(fn.signature, fn.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constexprs, attrs = fn._pack_args(
            backend, kwargs, bound, specialization, options
        )
        grid = tuple(grid(bound) if callable(grid) else grid)
        launches.append(
            Launch(fn, signature, constexprs, attrs, arch, dict(options.__dict__), grid)
        )

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.itemsize),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: capability),
        mock.patch("torch.cuda.get_device_properties", lambda device=None: properties),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.device", contextlib.nullcontext),
        mock.patch("torch.cuda.device_of", contextlib.nullcontext),
        FakeTensorMode(),
    ):
        yield launches


def python(*arguments: str) -> str:
    """The output of python with `arguments`, in a process that can compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def report(group: str, *arches: int) -> list[dict]:
    """The rows of `group` for the named architectures or all, in the order of launches."""
    lines = python(__file__, group, *map(str, arches)).splitlines()
    return [json.loads(line) for line in lines]


def check(group: str, arch: int, spills: Mapping[Any, int] | None = None) -> None:
    """Fails if a kernel of `group` spills, asks for more shared memory than exists, or has
    serialised products. Of the four architectures, `each_arch` leaves two to the slow tests.

    `spills`: bytes of stack that a kernel may use, by its name, but not in bfloat16, or by its name
    and architecture.
    """
    for row in report(group, arch):
        keys = [(row["kernel"], arch), *([row["kernel"]] if "bf16" not in row["dtypes"] else [])]
        allowed = max((spills or {}).get(key, 0) for key in keys)
        label = {k: row[k] for k in ("kernel", "arch", "dtypes", "constexprs", "num_warps")}
        assert row["stack"] <= allowed, f"{row['stack']} bytes of spills: {label}"
        assert row["shared"] <= row["limit"], f"{row['shared']} > {row['limit']} bytes: {label}"
        assert not row["serialised"], f"{row['serialised']}: {label}"


def _row(launch: Launch) -> dict:
    start = time.perf_counter()
    used = launch.compile()
    names = launch.fn.arg_names
    return {
        "kernel": launch.fn.__name__,
        "arch": launch.arch,
        "dtypes": sorted({t.strip("*k") for t in launch.signature.values() if t[0] == "*"}),
        "constexprs": {names[path[0]]: str(v) for path, v in launch.constexprs.items()},
        "num_warps": launch.options["num_warps"],
        "num_stages": launch.options["num_stages"],
        "grid": launch.grid,
        "registers": used.registers,
        "stack": used.stack_bytes,
        "shared": used.shared_bytes,
        "limit": SHARED_LIMIT[launch.arch],
        "instructions": used.instructions,
        "serialised": used.serialised,
        "seconds": round(time.perf_counter() - start, 2),  # near 0 if Triton has it in its cache
    }


def _rows(group: str, arch: int) -> list[dict]:
    with record_launches(arch) as launches:
        GROUPS[group]()
    if not launches:
        raise RuntimeError(f"{group} launched no Triton kernel")
    return [_row(launch) for launch in launches]


def group(fn: Callable[[], None]) -> Callable[[], None]:
    GROUPS[fn.__name__] = fn
    return fn


@triton.jit
def _matmul(
    A, B, C, K, stride_a, stride_b, stride_c, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    k = tl.arange(0, BLOCK)
    c = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        a = tl.load(A + rows * stride_a + (start + k)[None, :])
        b = tl.load(B + (start + k)[:, None] * stride_b + columns)
        c = tl.dot(a, b, c)
    tl.store(C + rows * stride_c + columns, c)


def _launch_matmul(a, b, num_warps=4):
    c = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    strides = a.stride(0), b.stride(0), c.stride(0)
    _matmul[(1,)](a, b, c, a.shape[1], *strides, *c.shape, 32, num_warps=num_warps, num_stages=3)


@group
def selftest():
    """A plain product, one with rows at odd addresses, and one that is too large for one warp."""
    a = torch.empty(128, 128, dtype=torch.bfloat16, device="cuda")
    _launch_matmul(a, a)
    odd = torch.empty(128, 129, dtype=torch.bfloat16, device="cuda").narrow(1, 0, 128)
    _launch_matmul(odd, odd)
    _launch_matmul(a, a, num_warps=1)


@group
def attention():
    """Head sizes at the ends of the ranges of tiles, causal; one with lengths; options."""
    lengths = torch.empty(2, dtype=torch.int32, device="cuda")
    ends = {"query_lengths": lengths, "key_lengths": lengths, "right": 0}
    for D in (64, 128, 256):
        _launch_attention(D, right=0)
    _launch_attention(128, **ends)
    for D in (64, 128):
        _launch_attention(D, torch.float32, **ends)

    cu_seqlens = torch.empty(3, dtype=torch.int32, device="cuda")
    seed = torch.empty((), dtype=torch.int64, device="cuda")
    sink = torch.empty(8, device="cuda")
    bias = torch.empty(1, 8, 4096, 4096, dtype=torch.bfloat16, device="cuda")
    mask = torch.empty(2, 1, 4096, 4096, dtype=torch.bool, device="cuda")
    table = torch.empty(2, 256, dtype=torch.int32, device="cuda")
    packed = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "B": 1}
    for D in (64, 128):
        _launch_attention(D, right=0, left=1024, softcap=50.0, sink=sink)
        _launch_attention(D, right=0, alibi_slopes=torch.empty(2, 8, device="cuda"))
        _launch_attention(D, right=0, seed=seed, dropout_p=0.1)
        _launch_attention(D, bias=bias, mask=mask, bias_grad=True)
        _launch_attention(D, right=0, **packed)
    for dtype in (torch.bfloat16, torch.float32):
        _launch_attention(128, dtype, right=0, T=1, key_lengths=lengths)
        _launch_attention(128, dtype, right=0, T=1, key_lengths=lengths, page_table=table)


@group
def attention_of_others():
    """Cases that need hardly more registers than those of `attention`."""
    lengths = torch.empty(2, dtype=torch.int32, device="cuda")
    for D in (64, 256):
        _launch_attention(D, query_lengths=lengths, key_lengths=lengths, right=0)
    for dtype in (torch.bfloat16, torch.float32):
        _launch_attention(128, dtype)
    for D in (64, 128, 256):
        _launch_attention(D, right=0, shared=True)


def _launch_attention(
    D,
    dtype=torch.bfloat16,
    *,
    B=2,
    T=4096,
    page_table=None,
    bias_grad=False,
    shared=False,
    **options,
):
    from tfkern.kernels import attention as op
    from tfkern.reference.attention import Arguments

    q = torch.empty(B, 8, T, D, dtype=dtype, device="cuda")
    k = torch.empty(B, 2, 4096, D, dtype=dtype, device="cuda")
    if shared:  # by all heads, which no descriptor takes
        k = k.select(1, 0).unsqueeze(1).expand_as(k)
    if page_table is not None:
        k = torch.empty(512, 2, 16, D, dtype=dtype, device="cuda")
    args = Arguments(q, k, k, page_table=page_table, scale=0.1, **options)
    op._forward(*args)
    if T > 1:
        lse = torch.empty(2, B, 8, T, device="cuda")
        op._backward(q, None, q, lse, *args, bias_grad)


@group
def layer_norm():
    """A usual width, and the largest that fit into the registers of the backward and the forward,
    with all options and with none."""
    from tfkern.kernels import layer_norm as op

    seed = torch.empty((), dtype=torch.int64, device="cuda")
    bf16, fp32 = torch.bfloat16, torch.float32
    for N, dtype in (768, bf16), (8192, bf16), (32768, bf16), (8192, fp32), (16384, fp32):
        x = torch.empty(4096, N, dtype=dtype, device="cuda")
        w = torch.empty(N, dtype=dtype, device="cuda")
        stat = torch.empty(4096, device="cuda")
        op._forward(x, w, w, x, seed, 0.1, 1e-5, False, 1)
        op._backward(x, x, x, w, w, stat, stat, seed, 0.1, True, 1)
        op._forward(x, w, None, None, None, 0.0, 1e-5, True, 1)
        op._backward(x, None, x, w, None, None, stat, None, 0.0, False, 1)


@group
def cross_entropy():
    """Many classes and few, with all options and with none, whole and as columns in place."""
    from tfkern.kernels import cross_entropy as op

    targets = torch.empty(4096, dtype=torch.int64, device="cuda")
    stat = torch.empty(4096, device="cuda")
    for V, dtype in itertools.product((100, 32000), (torch.bfloat16, torch.float32)):
        logits, weight = (
            torch.empty(4096, V, dtype=dtype, device="cuda"),
            torch.empty(V, device="cuda"),
        )
        for w, smoothing, softcap, all_lse in ((None, 0.0, 0.0, False), (weight, 0.1, 30.0, True)):
            op._forward(logits, targets, w, -100, smoothing, softcap, all_lse)
            rows = targets, w, stat, stat, stat, stat if all_lse else None, -100, smoothing, softcap
            op._backward(logits, *rows, 0, V)
            op._backward_(logits, *rows, 0, V)


@group
def rotary():
    """Heads of usual sizes, turned whole and in part, in both layouts; views of a projection."""
    from tfkern.kernels import rotary as op

    sizes = (128, 128), (80, 32), (256, 256)
    for dtype, (D, R) in itertools.product((torch.bfloat16, torch.float32), sizes):
        qkv = torch.empty(2, 4096, 48, D, dtype=dtype, device="cuda").transpose(1, 2)
        q, k = qkv.narrow(1, 0, 32), qkv.narrow(1, 32, 8)
        cos = torch.empty(2, 4096, R, device="cuda")
        for interleaved in (False, True):
            op._forward(q, k, cos, cos, interleaved, False)
            op._forward(q, None, cos, cos, interleaved, True)
            op._forward_inplace(q, k, cos, cos, interleaved, False)


@group
def mlp():
    """Plain and gated MLPs, at usual sizes, with columns as rows and with rows at odd addresses."""
    from tfkern.kernels import mlp as op

    bf16, fp32 = torch.bfloat16, torch.float32
    for (K, F), dtype in ((768, 3072), bf16), ((65, 259), bf16), ((768, 3072), fp32):
        for gated in (False, True):
            w1, b1 = (torch.empty(s, dtype=dtype, device="cuda") for s in ((F, K), F))
            weights = w1, b1, *((w1, b1) if gated else (None, None))
            x = torch.empty(2048, K, dtype=dtype, device="cuda")
            h, _ = op._forward(x, *weights, "gelu")
            op._backward(h, h, h if gated else None, "gelu", True)
            if (K, dtype) == (768, bf16):  # columns have no descriptors; many terms are not fused
                op._forward(torch.empty(K, 2048, dtype=dtype, device="cuda").t(), *weights, "gelu")
                w1 = torch.empty(F, 4096, dtype=dtype, device="cuda")
                op._forward(w1, w1, None, w1 if gated else None, None, "gelu")


if __name__ == "__main__":
    name, *arches = sys.argv[1:]
    # A fresh fork for each architecture: launchers may cache facts of the device.
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        compiled = functools.partial(_rows, name)
        for rows in pool.imap(compiled, map(int, arches or SHARED_LIMIT), chunksize=1):
            for row in rows:
                print(json.dumps(row), flush=True)
