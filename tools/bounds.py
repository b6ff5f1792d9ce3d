"""What each GPU kernel can reach at best, counted from its machine code.

    python tools/bounds.py             # makes benchmarks/results/bounds.csv anew
    python tools/bounds.py --check     # compares the same rows with the file
    python tools/bounds.py --check 90  # those of an architecture, in a few cases of Triton

Triton's kernels are compiled for the cases below, those of CUDA C++ are taken from the built
library. This needs no GPU, but cuobjdump and nvdisasm, of the CUDA toolkit or of Triton. A bound is
no speed: it says what the busiest pipe allows if it never waits, in executed FLOPs of the tensor
cores, or as the share of the memory's bandwidth. `tfkern doctor --kernels --bounds` shows the file.
"""

import csv
import functools
import io
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import sass  # noqa: E402

PATH = ROOT / "benchmarks" / "results" / "bounds.csv"
MISSING = 3  # the status where a tool is missing


@dataclass(frozen=True)
class GPU:
    """A GPU of each architecture; clocks are those that last under load of tensor cores."""

    name: str
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # TB/s that a large copy reaches
    shared: int  # KiB of an SM


# Multiprocessors, clocks and sizes are those of NVIDIA's architecture white papers (A100 2020, H100
# 2022, Blackwell 2024). Of their bandwidths, 2.0, 3.35 and 8.0 TB/s, copies reach the part here.
GPUS = {
    80: GPU("A100 SXM", 108, 1.41, 2.0, 164),
    90: GPU("H100 SXM", 132, 1.755, 3.0, 228),
    100: GPU("B200", 148, 1.85, 7.7, 228),
}

# Threads and bytes of dynamic shared memory of a block, which only a launch tells: those of the
# main case in bfloat16. A kernel that is not here has no occupancy in the table.
_TILES = {64: 64, 96: 64, 128: 64, 256: 32}  # head size -> keys of a tile of the forward


def _backward(D: int) -> int:
    """Bytes of a block: 64 rows of its own, and the steps of 32 or 16 rows that pass by, two
    matrices of each; 16 bytes of statistics are for the queries among them."""
    own, steps = 256 * D, 256 * D if D <= 128 else 64 * D
    return own + steps + 1024


LAUNCHES: dict[str, Callable[[int], tuple[int, int]]] = {  # of the first template number
    "attention_forward": lambda D: (128, 2 * D * (64 + 4 * _TILES[D])),
    "attention_backward_dq": lambda D: (128, _backward(D)),
    "attention_backward_dkv": lambda D: (128, _backward(D)),
    "attention_combine": lambda _: (128, 0),
    "attention_backward_statistics": lambda _: (128, 0),
    # Rows of 16384 in forward, of 8192 or with 4 pieces a thread of 16384 in backward.
    "layer_norm_forward": lambda _: (512, 256),
    "layer_norm_backward": lambda K: (512, 256 + (131072 if K == 4 else 0)),
    "layer_norm_row_sums": lambda _: (512, 256),
    "mlp_forward": lambda _: (128, 0),
    "mlp_backward": lambda _: (128, 0),
    "rotary_forward": lambda _: (128, 0),
    "sum_partials": lambda _: (512, 2048),
}


def _attention(D: int, **options) -> Callable[[], None]:
    def launch():
        import aot

        aot._launch_attention(D, **options)

    return launch


def _decode() -> None:
    import aot
    import torch

    lengths = torch.empty(2, dtype=torch.int32, device="cuda")
    aot._launch_attention(128, right=0, T=1, key_lengths=lengths)


def _layer_norm(N: int) -> Callable[[], None]:
    def launch():
        import torch

        from tfkern.kernels import layer_norm as op

        x = torch.empty(4096, N, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(N, dtype=torch.bfloat16, device="cuda")
        stat = torch.empty(4096, device="cuda")
        op._forward(x, w, w, None, None, 0.0, 1e-5, False, 1)
        op._backward(x, None, x, w, w, stat, stat, None, 0.0, False, 1)

    return launch


def _mlp() -> None:
    import torch

    from tfkern.kernels import mlp as op

    x = torch.empty(16384, 1024, dtype=torch.bfloat16, device="cuda")
    w1 = torch.empty(16384, 1024, dtype=torch.bfloat16, device="cuda")
    b1 = torch.empty(16384, dtype=torch.bfloat16, device="cuda")
    h, _ = op._forward(x, w1, b1, None, None, "gelu")
    op._backward(h, h, None, "gelu", True)


def _rotary() -> None:
    import torch

    from tfkern.kernels import rotary as op

    q = torch.empty(4, 16, 4096, 128, dtype=torch.bfloat16, device="cuda")
    cos = torch.empty(4, 4096, 128, device="cuda")
    op._forward(q, q, cos, cos, False, False)


def _cross_entropy() -> None:
    import torch

    from tfkern.kernels import cross_entropy as op

    logits = torch.empty(8192, 32000, dtype=torch.bfloat16, device="cuda")
    targets = torch.empty(8192, dtype=torch.int64, device="cuda")
    stat = torch.empty(8192, device="cuda")
    op._forward(logits, targets, None, -100, 0.0, 0.0, False)
    op._backward(logits, targets, None, stat, stat, stat, None, -100, 0.0, 0.0, 0, 32000)


CASES: dict[str, Callable[[], None]] = {
    **{f"D={D} {kind}": _attention(D, **o) for D in (64, 128, 256)
       for kind, o in (("full", {}), ("causal", {"right": 0}))},
    "decode D=128": _decode,
    **{f"N={N}": _layer_norm(N) for N in (1024, 4096, 8192, 16384)},
    "16384x1024x16384 gelu": _mlp,
    "D=128 halves": _rotary,
    "V=32000": _cross_entropy,
}  # fmt: skip
QUICK = ("D=128 full", "N=1024")


def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm."""
    if path := shutil.which(name):
        return path
    try:
        import triton
    except ImportError:
        return None
    return getattr(triton.knobs.nvidia, name).path


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _kernels(cubin: Path, arch: int, warps: int | None = None) -> Iterator[tuple]:
    """Name, registers and counts of each kernel but those for float32 and float16: the latter's
    codes are those of bfloat16 with other conversions."""
    usage = _run(tool("cuobjdump"), "-res-usage", cubin)
    registers = dict(re.findall(r" Function (\S+):\s+REG:(\d+)", usage))
    wanted = [name for name in registers if not re.search(r"_kernelI(f|NS_4Half)", name)]
    symbols = _symbols(cubin.read_bytes())
    chosen = ",".join(str(symbols[name]) for name in wanted)
    for kernel in sass.kernels(_run(tool("nvdisasm"), "-c", "-fun", chosen, cubin)):
        yield kernel.name, int(registers[kernel.name]), sass.hot(kernel, arch, warps)


def _symbols(elf: bytes) -> dict[str, int]:
    """The index of each symbol of an ELF file of 64 bits, by which nvdisasm takes kernels."""
    (first,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, first + n * size) for n in range(count)]
    table = next(section for section in sections if section[1] == 2)  # SHT_SYMTAB
    names = sections[table[6]][4]  # the offset of the section that the table links to
    found = {}
    for n in range(table[5] // 24):
        (offset,) = struct.unpack_from("<I", elf, table[4] + 24 * n)
        found[elf[names + offset : elf.index(b"\0", names + offset)].decode()] = n
    return found


def _row(arch, backend, name, case, registers, launch, hot, compiler) -> dict[str, str]:
    gpu, issue = GPUS[arch], sum(hot.pipes.values())
    per_clock = 1e3 * gpu.bandwidth / gpu.multiprocessors / gpu.clock  # bytes that an SM gets
    slowest = max(hot.clocks.values())
    memory = 4 * hot.bytes / per_clock
    multiplies = hot.flop > 0
    if multiplies:
        rate = 4 * hot.flop / slowest * gpu.multiprocessors * gpu.clock / 1e3
        bound, unit, limit = f"{rate:.0f}", "TFLOP/s", hot.pipe
    else:
        share = memory / max(slowest, memory) if hot.bytes else 0
        bound, unit = f"{100 * share:.0f}", "% of bandwidth"
        limit = "memory" if memory >= slowest else hot.pipe
    row = {
        "arch": f"sm_{arch}",
        "gpu": gpu.name,
        "backend": backend,
        "kernel": name,
        "case": case,
        "bound": bound,
        "unit": unit,
        "limit": limit,
        "clocks": f"{max(slowest, 0 if multiplies else memory):.0f}",
        "instructions": str(issue),
        "part": "loop" if hot.loop else "kernel",
    }
    row |= {p: str(hot.pipes[p]) for p in ("tensor", "fma", "alu", "mufu", "lsu", "shuffle")}
    row |= {
        "bytes": str(hot.bytes),
        "barriers": str(hot.barriers),
        "waits": str(hot.waits),
        "spills": str(hot.spills),
        "spills elsewhere": str(hot.spills_elsewhere),
        "registers": str(registers),
    }
    if launch:
        threads, shared = launch
        blocks = _occupancy(gpu, registers, threads, shared)
        in_flight = blocks * threads * hot.in_flight
        row |= {"warps": str(threads // 32), "shared KiB": f"{shared / 1024:.0f}"}
        row |= {"blocks per SM": str(blocks), "KiB in flight per SM": f"{in_flight / 1024:.0f}"}
    else:
        row |= dict.fromkeys(("warps", "shared KiB", "blocks per SM", "KiB in flight per SM"), "")
    return row | {"compiler": compiler}


def _occupancy(gpu: GPU, registers: int, threads: int, shared: int) -> int:
    """Blocks that an SM runs at the same time. It has 65536 registers, which warps take 256 at a
    time, 64 warps and room for 32 blocks; the system takes 1 KiB of shared memory for a block."""
    warps = threads // 32
    of_warp = -(-32 * registers // 256) * 256
    return min(65536 // of_warp // warps, 64 // warps, 32, gpu.shared * 1024 // (shared + 1024))


def triton_rows(task: tuple[int, str]) -> list[dict[str, str]]:
    """The kernels that a case launches on an architecture."""
    import aot
    import triton

    arch, case = task
    with aot.record_launches(arch) as launches:
        CASES[case]()
    rows = []
    for launch in launches:
        compiled = launch.kernel()
        warps = launch.options["num_warps"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            ((_, registers, hot),) = _kernels(Path(file.name), arch, warps)
        op = launch.fn.fn.__module__.split(".")[2]
        name = (op + launch.fn.__name__).removesuffix("_kernel")
        size = 32 * warps, compiled.metadata.shared
        version = f"triton {triton.__version__}"
        rows.append(_row(arch, "triton", name, case, registers, size, hot, version))
    return rows


def native_rows(library: Path, arch: int) -> list[dict[str, str]]:
    """The CUDA kernels of the operator library."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", f"sm_{arch}", library],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        for cubin in sorted(Path(folder).glob(f"*.sm_{arch}*.cubin")):
            version = re.search(rb"release [\d.]+, V([\d.]+)", cubin.read_bytes())
            compiler = f"nvcc {version[1].decode()}" if version else "nvcc"
            for mangled, registers, hot in _kernels(cubin, arch):
                name, case = _name(mangled)
                size = re.search(r"\d+", case)
                launch = LAUNCHES.get(name)
                launch = launch and launch(int(size[0]) if size else 0)
                rows.append(_row(arch, "native", name, case, registers, launch, hot, compiler))
    return rows


# How rows are held, by the second template argument, in forward and backward.
_LAYER_NORM = ("in registers", "long"), ("in registers", "in shared memory", "long")


def _name(mangled: str) -> tuple[str, str]:
    """The kernel, with its op in front, and the numbers among its template arguments."""
    name, arguments = re.search(r"\d([a-z][a-z_]*)_kernel(I\w+?E(?=Ev))?", mangled).groups()
    file = re.search(r"_([a-z_]+)_cu_", mangled)
    values = re.findall(r"(?:L[ib]|PartsE)(\d+)E", arguments or "")
    op = file[1].split("_backward")[0] if file else ""
    labels = {"attention": ["D={}"], "layer_norm": ["K={}", _LAYER_NORM[name == "backward"]]}
    case = [
        label[int(value)] if isinstance(label, tuple) else label.format(value)
        for label, value in zip(labels.get(op, ["{}"] * len(values)), values, strict=False)
    ]
    case = " ".join(case + ["any type"] * (arguments or "").startswith("Iv"))
    return f"{file[1]}_{name}" if file else name, case


def rows(arches: list[int], cases: list[str]) -> list[dict[str, str]]:
    """The table, or the part of it for some architectures and cases of Triton."""
    try:  # what is imported before the fork, no process imports again
        import aot  # noqa: F401
    except ImportError:
        cases = []
    from tfkern import _C

    found = []
    tasks = [(arch, case) for arch in arches for case in cases]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        compiled = pool.map_async(triton_rows, tasks, chunksize=1)
        libraries = list((ROOT / "tfkern").glob("_operators*.so"))
        if libraries and _C.has_cuda:
            read = functools.partial(native_rows, libraries[0])
            found = [row for part in pool.map(read, arches, chunksize=1) for row in part]
        found += [row for part in compiled.get() for row in part]
    return sorted(found, key=lambda r: (r["arch"].zfill(7), r["kernel"], r["backend"]))


def table(found: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, found[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def changes(found: list[dict[str, str]]) -> list[str]:
    """A line for each row that the file lacks or has otherwise, if the same compiler made both."""

    def key(row):
        return tuple(row[c] for c in ("arch", "backend", "kernel", "case"))

    with PATH.open(newline="") as file:
        known: dict[tuple, list] = {}
        for row in csv.DictReader(file):
            known.setdefault(key(row), []).append(row)
    lines = []
    for row in found:
        before = known.get(key(row), [])
        if before and before[0]["compiler"] != row["compiler"]:
            continue
        if row not in before:
            told = "; ".join(
                ", ".join(f"{c} {old[c]} -> {row[c]}" for c in row if old[c] != row[c])
                for old in before
            )
            lines.append(f"{' '.join(key(row))}: {told or 'not in the file'}")
    return lines


def environment() -> dict[str, str]:
    """The environment of a process that can compile: Triton's interpreter cannot."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def main(arguments: list[str]) -> int:
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            print(f"{name} is missing: it is part of the CUDA toolkit and of Triton")
            return MISSING
    chosen = [int(a) for a in arguments if a.isdigit()]
    found = rows(chosen or list(GPUS), list(QUICK if chosen else CASES))
    if "--check" not in arguments:
        PATH.write_text(table(found))
        print(f"wrote {len(found)} rows to {PATH}")
        return 0
    lines = changes(found)
    for line in lines:
        print(line)
    if lines:
        print("If that is meant, `python tools/bounds.py` writes the table anew.")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
