"""`tfkern doctor`."""

import contextlib
import importlib
import pkgutil
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import tfkern
import tfkern.benchmarks
from tfkern.benchmarks import environment, report
from tfkern.benchmarks.case import load
from tfkern.cli.output import console
from tfkern.ops import OPS


def command(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Lists each kernel and where it has run.")
    ] = False,
    bounds: Annotated[
        bool,
        typer.Option("--bounds", help="With --kernels: what each GPU kernel can reach at best."),
    ] = False,
) -> None:
    """Shows versions, the device, and which backends run each op here, or why they do not."""
    if bounds and not kernels:
        raise ValueError("--bounds needs --kernels")
    show(kernels, bounds)


def show(kernels: bool = False, bounds: bool = False) -> None:
    """Prints the facts of this installation and machine, and every backend of every op."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts().items():
        facts.add_row(Text(name, style="bold"), Text(value))
    screen = console()
    screen.print(facts)
    table = Table("op", "backend", "state")
    for row in _backends():
        table.add_row(*map(Text, row))
    screen.print(table)
    if kernels:
        listed = Table("kernel", "backend", "for", "GPUs in benchmarks/results")
        for kernel in _kernels():
            listed.add_row(*map(Text, kernel))
        screen.print(listed)
    if bounds:
        _show_bounds(screen)


def _show_bounds(screen: Console) -> None:
    """Prints the main columns of the file that tools/bounds.py makes."""
    path = Path(tfkern.benchmarks.__path__[0]) / "results" / "bounds.csv"
    if not path.is_file():
        screen.print("Bounds are not known here: wheels hold no results.")
        return
    title = (
        "Bounds by the busiest pipe, counted from machine code: no run is faster, most are slower"
    )
    table = Table(title=title, title_justify="left")
    for name in _BOUNDS:
        table.add_column(name)
    for row in report.read(path):
        table.add_row(*(Text(row[name]) for name in _BOUNDS))
    screen.print(table)


_BOUNDS = (
    *("gpu", "kernel", "backend", "case", "bound", "unit", "limit", "instructions"),
    *("registers", "blocks per SM", "spills"),
)


def _facts() -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from tfkern import _C

        native = f"built by {_C.compiler} for torch {_C.torch_version}"
        architectures = ", ".join(getattr(_C, "cuda_architectures", ()))
    except ImportError:
        native, architectures = "not built", ""
    facts = {
        "tfkern": " ".join(filter(None, (tfkern.__version__, environment.commit()))),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": environment.installed("triton") or "not installed",
        "native kernels": native,
        "CUDA architectures": architectures or "none: no CUDA kernels in this build",
        "device": environment.device_name(device),
        "instruction set": environment.instructions(),
        "CPU threads": str(torch.get_num_threads()),
    }
    return facts | ({"driver": environment.driver()} if device == "cuda" else {})


def _backends() -> list[tuple[str, str, str]]:
    """Every op and backend, and whether it serves an ordinary float32 call on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in OPS:
        for name, reason in tfkern.backends(op).items():
            if reason is None:
                inputs = load(op)(length=8, device=device, backward=True).inputs()
                reason = tfkern.explain(op, **inputs, backend=name).reasons.get(name)
            rows.append((op, name, "on" if reason is None else f"off: {reason}"))
    return rows


def _kernels() -> list[tuple[str, str, str, str]]:
    """Kernels by name, their backend, what they are built for, and the GPUs that have run them."""
    rows = []
    run = _gpus()
    with contextlib.suppress(ImportError):  # triton is not installed
        kernels = importlib.import_module("tfkern.kernels")
        for found in pkgutil.walk_packages(kernels.__path__, "tfkern.kernels."):
            module, op = importlib.import_module(found.name), found.name.split(".")[2]
            gpus = _told(run, [op], "triton")
            for name, kernel in vars(module).items():
                function = getattr(kernel, "fn", None)
                if name.endswith("_kernel") and getattr(function, "__module__", "") == found.name:
                    rows.append((f"{op}{name}", "triton", "sm_80 and later, when called", gpus))
    with contextlib.suppress(ImportError):  # built without native kernels
        from tfkern import _C

        for name in _C.cuda_kernels:
            # `sum_partials_kernel` belongs to no op: layer_norm and mlp both call it.
            ops = [op for op in OPS if name.startswith(op)] or ["layer_norm", "mlp"]
            gpus = _told(run, ops, "native")
            built_for = ", ".join(_C.cuda_architectures)
            built_for += " and PTX" if "sm_80" in _C.cuda_architectures else ""
            rows.append((name, "native", built_for, gpus))
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("tfkern::"):
            rows.append((name.removeprefix("tfkern::"), "native", "CPU", ""))
    return rows


def _told(run: dict[tuple[str, str], set[str]] | None, ops: list[str], backend: str) -> str:
    if run is None:
        return "not known here: wheels hold no results"
    return ", ".join(sorted({g for op in ops for g in run.get((op, backend), ())})) or "no GPU yet"


def _gpus() -> dict[tuple[str, str], set[str]] | None:
    """The GPUs on which a kernel was measured, from benchmarks/results, by op and backend.

    None if there is no such folder: it is part of the repository, but not of a wheel.
    """
    results = Path(tfkern.benchmarks.__path__[0]) / "results"
    if not results.is_dir():
        return None
    gpus: dict[tuple[str, str], set[str]] = {}
    for path in results.glob("**/*.csv"):
        for row in report.read(path):
            package, _, backend = row.get("variant", "").partition(" ")
            ran = row.get("driver") and row.get("status") == "measured"  # only GPUs have drivers
            if package == "tfkern" and ran:
                gpus.setdefault((row["op"], backend), set()).add(row["device"])
    return gpus
