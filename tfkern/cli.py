"""The `tfkern` program: models, benchmarks, validation, what is on or off on this machine."""

import contextlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tfkern
import tfkern_program
from tfkern import files
from tfkern_program import failed, say

if TYPE_CHECKING:
    import torch


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status, as `tfkern_program.main`, in this process."""
    try:
        app = _app()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich", "matplotlib", "tokenizers"):
            raise
        return say(f"{package} is not installed: pip install tfkern[cli]", 2)
    import typer

    usage_error: Any = typer.BadParameter.__base__  # typer shows its errors in boxes
    try:
        return app(arguments, prog_name="tfkern", standalone_mode=False) or 0
    except usage_error as error:
        return say(error.format_message() or "no command was given", 2)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return say("interrupted", 130)
    except (ValueError, NotImplementedError) as error:
        return say(str(error), 2)
    except Exception as error:
        return failed(error)


def _app():
    """The commands. Built on demand, since what builds them comes with the extra `cli`."""
    import matplotlib  # noqa: F401  missed now, and not when the chart of a long run is due
    import typer

    from tfkern.benchmarks.case import DTYPES
    from tfkern.benchmarks.commands import SEEDS, check_device, number
    from tfkern.benchmarks.commands import app as bench
    from tfkern.commands import add_model_commands

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        help="Fused transformer kernels: measure them, check them, see which of them run here, and "
        "the models on top of them.",
    )
    app.add_typer(bench, name="bench")

    @app.command("doctor")
    def _doctor(
        kernels: Annotated[
            bool, typer.Option("--kernels", help="List each kernel and where it has run.")
        ] = False,
    ) -> None:
        """Show versions, the device, and which backend runs each op here, or why not."""
        doctor(kernels)

    @app.command("validate")
    def _validate(
        op: Annotated[
            str, typer.Argument(help=f"One of {', '.join(_OPS)}; all of them by default.")
        ] = "",
        backend: Annotated[
            str, typer.Option(help="Backend to check. The one that would serve by default.")
        ] = "",
        dtype: Annotated[
            str, typer.Option(help=f"Of the tensors: {', '.join(DTYPES)}.")
        ] = "float32",
        device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
        seed: Annotated[int, number("Draws the cases and their inputs.", *SEEDS)] = 0,
        count: Annotated[int, number("Cases per op.", int, 1, 100_000)] = 8,
        file: Annotated[
            Path | None, typer.Option("--json", help="Also write the results to this file.")
        ] = None,
    ) -> None:
        """Compare outputs and gradients of random cases with float64, next to PyTorch's own errors.

        Fails (exit status 1) where the error is more than twice that of PyTorch in the same dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if op and op not in _OPS:
            raise ValueError(f"unknown op {op!r}: expected one of {', '.join(_OPS)}")
        ops = (op,) if op else _OPS
        device = check_device(device)
        if file is not None:
            files.replaceable(file)
        if not validate(ops, DTYPES[dtype], device, backend or None, seed, count, file):
            raise typer.Exit(1)

    add_model_commands(app)
    return app


def validate(
    ops: Sequence[str],
    dtype: "torch.dtype",
    device: str,
    backend: str | None,
    seed: int,
    count: int,
    file: Path | None,
) -> bool:
    """Runs the random cases of `ops`, prints a table of the errors, and says whether all passed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tfkern.dispatch import check_backend
    from tfkern.validation import cases

    if backend is not None:
        check_backend(backend)
    table = Table("case", "tensor", box=None, header_style="bold", pad_edge=False)
    for column in ("ours", "torch", "ratio", "limit", ""):
        table.add_column(column, justify="right")
    results: list[dict] = []
    for op in ops:
        for case in cases(op, dtype, device, backend, seed, count):
            for i, result in enumerate(case.run(seed).as_dicts()):
                results.append({"op": op, "case": case.label} | result)
                errors = [f"{result[name]:.2g}" for name in ("error", "torch_error")]
                verdict = "ok" if result["ok"] else f"FAILED {result['problem'] or ''}".rstrip()
                table.add_row(
                    Text(f"{op} {case.label}" if i == 0 else ""),
                    result["name"],
                    *errors,
                    f"{result['ratio']:.2f}",
                    f"{result['limit']:.2g}",
                    Text(verdict, style="" if result["ok"] else "bold red"),
                )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    failed = sum(not result["ok"] for result in results)
    console.print(f"{len(results)} comparisons, {failed} failed")
    if file is not None:
        settings = {"dtype": str(dtype), "device": device, "backend": backend, "seed": seed}
        files.write(file, json.dumps(settings | {"results": results}, indent=1) + "\n")
    return failed == 0


def doctor(kernels: bool = False) -> None:
    """Prints the facts of this installation and machine, and every backend of every op."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts().items():
        facts.add_row(Text(name, style="bold"), Text(value))
    console.print(facts)
    table = Table("op", "backend", "state")
    for row in _backends():
        table.add_row(*map(Text, row))
    console.print(table)
    if kernels:
        listed = Table("kernel", "backend", "for", "GPUs in benchmarks/results")
        for kernel in _kernels():
            listed.add_row(*map(Text, kernel))
        console.print(listed)


_OPS = ("attention", "layer_norm", "mlp")


def _facts() -> dict[str, str]:
    import torch

    from tfkern.benchmarks import environment

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
    import torch

    from tfkern.benchmarks.case import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in _OPS:
        for name, reason in tfkern.backends(op).items():
            if reason is None:
                inputs = load(op)(length=8, device=device, backward=True).inputs()
                reason = tfkern.explain(op, **inputs, backend=name).reasons.get(name)
            rows.append((op, name, "on" if reason is None else f"off: {reason}"))
    return rows


def _kernels() -> list[tuple[str, str, str, str]]:
    """Kernels by name, their backend, what they are built for, and the GPUs that have run them."""
    import importlib
    import pkgutil

    import torch

    rows = []
    run = _gpus()
    with contextlib.suppress(ImportError):  # without triton
        kernels = importlib.import_module("tfkern.kernels")
        for found in pkgutil.walk_packages(kernels.__path__, "tfkern.kernels."):
            module, op = importlib.import_module(found.name), found.name.split(".")[2]
            gpus = ", ".join(sorted(run.get((op, "triton"), ()))) or "no GPU yet"
            for name, kernel in vars(module).items():
                function = getattr(kernel, "fn", None)
                if name.endswith("_kernel") and getattr(function, "__module__", "") == found.name:
                    rows.append((f"{op}{name}", "triton", "sm_80 and later, when called", gpus))
    with contextlib.suppress(ImportError):  # without native kernels
        from tfkern import _C

        for name in _C.cuda_kernels:
            # One that is no op's own sums gradients of these two.
            ops = [op for op in _OPS if name.startswith(op)] or ["layer_norm", "mlp"]
            gpus = ", ".join(sorted({g for op in ops for g in run.get((op, "native"), ())}))
            built_for = ", ".join(_C.cuda_architectures)
            built_for += " and PTX" if "sm_80" in _C.cuda_architectures else ""
            rows.append((name, "native", built_for, gpus or "no GPU yet"))
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("tfkern::"):
            rows.append((name.removeprefix("tfkern::"), "native", "CPU", ""))
    return rows


def _gpus() -> dict[tuple[str, str], set[str]]:
    """The GPUs that benchmarks/results has rows of, by op and backend."""
    import tfkern.benchmarks
    from tfkern.benchmarks import report

    gpus: dict[tuple[str, str], set[str]] = {}
    for path in Path(tfkern.benchmarks.__path__[0]).glob("results/**/*.csv"):
        for row in report.read(path):
            package, _, backend = row.get("variant", "").partition(" ")
            ran = row.get("driver") and row.get("status") == "measured"  # a driver: on a GPU
            if package == "tfkern" and ran:
                gpus.setdefault((row["op"], backend), set()).add(row["device"])
    return gpus


if __name__ == "__main__":
    sys.exit(tfkern_program.main())
