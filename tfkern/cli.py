"""The `tfkern` program: benchmarks, validation, and what is on or off on this machine."""

import platform
import sys
from typing import Annotated

import tfkern


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status: 0, 1 for a failed check, 2 for a wrong call.

    Errors of the caller are one line on stderr.
    """
    try:
        app = _app()
    except ImportError as error:
        if error.name not in ("typer", "rich", "matplotlib"):
            raise
        return _error(f"{error.name} is not installed: pip install tfkern[cli]")
    import typer

    usage_error = typer.BadParameter.__base__  # typer shows its errors in boxes
    try:
        return app(arguments, prog_name="tfkern", standalone_mode=False) or 0
    except usage_error as error:
        return _error(error.format_message())
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _error("interrupted", 130)
    except (ValueError, NotImplementedError, OSError) as error:
        return _error(str(error))


def _error(message: str, status: int = 2) -> int:
    print(f"tfkern: {' '.join(message.split())}", file=sys.stderr)
    return status


def _app():
    """The commands. Built on demand, since what builds them comes with the extra `cli`."""
    import matplotlib  # noqa: F401  missed now, and not when the chart of a long run is due
    import typer

    from tfkern.benchmarks.commands import app as bench

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        help="Fused transformer kernels: measure them, check them, see which of them run here.",
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

    return app


def doctor(kernels: bool = False) -> None:
    """Prints the facts of this installation and machine, and every backend of every op."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts().items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    table = Table("op", "backend", "state")
    for row in _backends():
        table.add_row(*row)
    console.print(table)
    if kernels:
        listed = Table("kernel", "backend", "has run on")
        for row in _kernels():
            listed.add_row(*row)
        console.print(listed)


_OPS = ("attention", "layer_norm", "mlp")

# Where the kernels of a backend have run. To be changed by whoever runs them somewhere new.
_HAS_RUN = {
    "native": "CPUs",
    "triton": "no GPU yet: the interpreter, and compiled ahead of time",
}


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


def _kernels() -> list[tuple[str, str, str]]:
    """Kernels by name, the backend that they belong to, and where they have run."""
    import importlib

    import torch

    rows = []
    for op in _OPS:
        try:
            module = importlib.import_module(f"tfkern.kernels.{op}")
        except ImportError:
            continue
        names = [name for name in vars(module) if name.endswith("_kernel")]
        rows += [(f"{op}{name}", "triton", _HAS_RUN["triton"]) for name in names]
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("tfkern::"):
            rows.append((name.removeprefix("tfkern::"), "native", _HAS_RUN["native"]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
