"""`tfkern bench`: one command per op."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tfkern import files
from tfkern.dispatch import check_backend

from . import against, environment, report, suite, sweep
from .case import DTYPES, load

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Time an op over context lengths, next to PyTorch's own ways to compute it. "
    "Every variant is compared with float64 first, and a wrong one is not timed (exit status 1). "
    "Reports quantiles of the time, the rate as a fraction of what the machine can do, counted "
    "FLOPs, peak memory, and how each of them grows. Writes <op>.csv, <op>.json and <op>.png. "
    "With --against torch: fixed cases on a CPU, and the ratio of PyTorch's time to ours. "
    "The command suite has fixed cases on a GPU.",
)

_OUT = Path("bench-results")
_FIXED_OUT = Path("benchmarks/results")
_LONGEST = 2**24  # tokens: counting the tiles of more takes seconds


def number(told: str, kind: type[int] | type[float], low: float, high: float, *names: str) -> Any:
    """An option that takes numbers of this range, and says so to others."""

    def parse(text: Any) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # NaN is in no range
                return value
        expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
        raise typer.BadParameter(f"got {files.shown(str(text))}, expected {expected}")

    return typer.Option(*names, help=told, parser=parse)


SEEDS = (int, -(2**62), 2**62)  # there is room to count up from them
SECONDS = (float, 0, 10**9)

Lengths = Annotated[
    str,
    typer.Option(
        help="Context lengths, such as 256,512. Powers of two by default, on a CPU up to "
        "8192 (block, model: 2048).",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option(help=f"Of the tensors: {', '.join(DTYPES)}.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda or cuda:N. CUDA if there is a GPU.", show_default=False)
]
Backends = Annotated[
    str,
    typer.Option(
        help="Backends of tfkern to time, such as native,reference. All that run here by default; "
        "PyTorch's variants are always timed.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for the results.", file_okay=False)]
Threads = Annotated[
    int,
    number("CPU threads; 0 leaves PyTorch's choice.", int, 0, os.cpu_count() or 1),
]
Limit = Annotated[
    float,
    number("Skip what is predicted to take longer than this a call.", *SECONDS, "--max-seconds"),
]
Backward = Annotated[
    bool,
    typer.Option(
        "--backward", help="Also run the backward; times of the two halves and of both together."
    ),
]
Batch = Annotated[int, number("Sequences in a batch.", int, 1, 2**20)]
Heads = Annotated[int, number("Attention heads.", int, 1, 2**16)]
Hidden = Annotated[int, number("Features of a token.", int, 1, 2**20)]

Against = Annotated[
    str,
    typer.Option(
        help="Time fixed cases in pairs with PyTorch (torch) instead of a sweep, on a CPU with "
        f"{against.THREADS} threads, and write them to cpu-<processor>.csv in {_FIXED_OUT}. Of "
        "the other options only --threads and --out apply.",
        show_default=False,
    ),
]


@app.command("attention")
def attention(
    context: typer.Context,
    lengths: Lengths = "",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    heads: Heads = 8,
    head_dim: Annotated[int, number("Size of a head.", int, 1, 256)] = 64,
    causal: Annotated[bool, typer.Option(help="Hide the keys behind each query.")] = False,
    window: Annotated[
        int | None,
        number("Keys on either side that a query sees, all by default.", int, 0, _LONGEST),
    ] = None,
    backward: Backward = False,
    backends: Backends = "",
    device: Device = "",
    threads: Threads = 0,
    max_seconds: Limit = 20.0,
    out: Out = _OUT,
    against: Against = "",
) -> None:
    """Softmax attention: plain quadratic, SDPA with each of its backends, and tfkern."""
    if against:
        return _against(context)
    sizes: dict[str, Any] = {"batch": batch, "heads": heads, "head_dim": head_dim}
    sizes |= {"causal": causal, "window": window, "backward": backward}
    _bench("attention", sizes, lengths, dtype, backends, device, threads, max_seconds, out)


@app.command("layer_norm")
def layer_norm(
    context: typer.Context,
    lengths: Lengths = "",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    hidden: Hidden = 1024,
    residual: Annotated[bool, typer.Option("--residual", help="Add a residual in front.")] = False,
    backward: Backward = False,
    backends: Backends = "",
    device: Device = "",
    threads: Threads = 0,
    max_seconds: Limit = 20.0,
    out: Out = _OUT,
    against: Against = "",
) -> None:
    """Layer norm: F.layer_norm, torch.compile of it, and tfkern, in GB/s."""
    if against:
        return _against(context)
    sizes = {"batch": batch, "hidden": hidden, "residual": residual, "backward": backward}
    _bench("layer_norm", sizes, lengths, dtype, backends, device, threads, max_seconds, out)


@app.command("mlp")
def mlp(
    context: typer.Context,
    lengths: Lengths = "",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    hidden: Hidden = 512,
    expansion: Annotated[int, number("Inner features over hidden.", int, 1, 1024)] = 4,
    activation: Annotated[str, typer.Option(help="gelu, gelu_tanh, relu or silu.")] = "gelu_tanh",
    backward: Backward = False,
    backends: Backends = "",
    device: Device = "",
    threads: Threads = 0,
    max_seconds: Limit = 20.0,
    out: Out = _OUT,
    against: Against = "",
) -> None:
    """The MLP: plain PyTorch, torch.compile of it, and tfkern."""
    if against:
        return _against(context)
    sizes = {"batch": batch, "hidden": hidden, "expansion": expansion, "activation": activation}
    sizes["backward"] = backward
    _bench("mlp", sizes, lengths, dtype, backends, device, threads, max_seconds, out)


@app.command("block")
def block(
    context: typer.Context,
    lengths: Lengths = "",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    hidden: Hidden = 768,
    heads: Heads = 12,
    backends: Backends = "",
    device: Device = "",
    threads: Threads = 0,
    max_seconds: Limit = 20.0,
    out: Out = _OUT,
    against: Against = "",
) -> None:
    """A training step of one decoder block: plain PyTorch, SDPA, torch.compile and tfkern."""
    if against:
        return _against(context)
    sizes = {"batch": batch, "hidden": hidden, "heads": heads}
    _bench("block", sizes, lengths, dtype, backends, device, threads, max_seconds, out)


@app.command("model")
def model(
    lengths: Lengths = "",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    layers: Annotated[int, number("Blocks.", int, 1, 128)] = 2,
    hidden: Hidden = 256,
    heads: Heads = 4,
    backends: Backends = "",
    device: Device = "",
    threads: Threads = 0,
    max_seconds: Limit = 20.0,
    out: Out = _OUT,
) -> None:
    """A training step of a decoder, without the optimizer: as `block`, of several layers."""
    sizes = {"batch": batch, "layers": layers, "hidden": hidden, "heads": heads}
    _bench("model", sizes, lengths, dtype, backends, device, threads, max_seconds, out)


@app.command("suite")
def fixed(
    ops: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of {', '.join(suite.OPS)}; all by default.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    budget: Annotated[
        float, number("Seconds after which no further case is begun.", *SECONDS)
    ] = suite.BUDGET,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Leave out cases that the file has from this device and commit."
        ),
    ] = False,
    out: Out = _FIXED_OUT,
) -> None:
    """Fixed cases on a GPU, next to everything that PyTorch has, into <gpu>.csv and plots."""
    for op in ops or ():
        if op not in suite.OPS:
            raise ValueError(f"unknown op {op!r}: expected one of {', '.join(suite.OPS)}")
    if not device.startswith("cuda"):
        raise ValueError(
            f"the suite's cases are for a GPU, got device {device!r}; those for a CPU run by "
            "tfkern bench <op> --against torch"
        )
    device = check_device(device)
    path = out / report.file_name(environment.device_name(device))
    _prepare(out, path.name)
    cases = [p for p in suite.points(device) if p.case.op in (ops or suite.OPS)]
    results = _with_progress(
        1 + len(cases),
        lambda progress: suite.run(cases, path, budget=budget, resume=resume, progress=progress),
    )
    console = _console()
    for table in suite.tables(results.rows):
        console.print(table)
    for line in suite.failures(results.rows):
        console.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
    for written in (path, *suite.charts(path, suite.points(device))):
        console.print(f"wrote {written}", soft_wrap=True, highlight=False)
    for name in results.skipped:
        print(f"tfkern: no time was left for {name}", file=sys.stderr)
    _exit(results.wrong)


def _bench(
    op: str,
    sizes: dict[str, Any],
    lengths: str,
    dtype: str,
    backends: str,
    device: str,
    threads: int,
    max_seconds: float,
    out: Path,
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    device = check_device(device)
    named = [check_backend(name.strip()) for name in backends.split(",")] if backends else None
    if threads:
        torch.set_num_threads(threads)
    kind = load(op)
    swept = _lengths(lengths) if lengths else kind.lengths[device.partition(":")[0]]
    case = kind(length=max(swept), dtype=dtype, device=device, **sizes)
    sweep.check_memory(case, named)
    _prepare(out, *(f"{op}{suffix}" for suffix in report.SUFFIXES))
    variants = len(case.variants(named))
    # The ceiling, comparisons, and at each length the warm-ups, the timing and the memory.
    total = 1 + variants + len(swept) * (2 * variants + 1)
    results = _with_progress(
        total,
        lambda progress: sweep.run(
            case,
            swept,
            named,
            max_seconds=max_seconds,
            progress=progress,
            keep=lambda results: report.write_rows(results, out),
        ),
    )
    console = _console()
    if results.rows:
        report.show(results, console)
        for path in report.write(results, out):
            console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    _exit(results.wrong)


def _against(context: typer.Context) -> None:
    """The fixed cases of the command that the context belongs to."""
    op, options = context.info_name or "", context.params
    if options["against"] not in against.CHOICES:
        choices = ", ".join(against.CHOICES)
        raise ValueError(f"unknown baseline {options['against']!r}: expected one of {choices}")
    source = context.get_parameter_source
    given = {name for name in options if getattr(source(name), "name", "") == "COMMANDLINE"}
    for name in sorted(given - {"against", "threads", "out"}):
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option} does not apply to --against, whose cases are fixed, on a CPU")
    torch.set_num_threads(options["threads"] or against.THREADS)
    out = options["out"] if "out" in given else _FIXED_OUT
    _prepare(out, against.file_name(environment.facts("cpu")))
    total = len(against.dtypes(op)) * len(against.COMPARISONS[op])
    results = _with_progress(total, lambda progress: against.run(op, progress=progress))
    if results.rows:
        console = _console()
        console.print(against.table(results.rows))
        path = against.write(results.rows, out)
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    _exit(results.wrong)


def _prepare(folder: Path, *names: str) -> None:
    """Makes the folder for these files, or fails now, not after minutes.

    Raises:
        ValueError: they cannot be written, or what is there is no CSV to add rows to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    for name in names:
        path = files.replaceable(folder / name)
        if path.suffix == ".csv" and path.exists():
            report.read(path)


def _console() -> Console:
    # 80 columns, which rich takes for a pipe, are too few
    return Console(width=None if sys.stdout.isatty() else 120)


def _exit(wrong: dict[str, str]) -> None:
    """With status 1 if something was not timed because it is wrong."""
    for name, problem in wrong.items():
        print(f"tfkern: {name} is wrong and was not timed: {problem}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def _with_progress(total: int, run: Callable[[Callable[[str], None]], Any]) -> Any:
    """What `run(progress)` returns, while a bar counts the calls of progress."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        return run(lambda doing: bar.update(task, advance=1, description=doing))


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            "lengths are integers with commas between them, such as 256,512; got "
            f"{files.shown(text)}"
        ) from None
    for length in lengths:
        if not 1 <= length <= _LONGEST:
            raise ValueError(f"lengths must be positive and at most {_LONGEST}, got {length}")
    return lengths


def check_device(name: str) -> str:
    """The device to use: what was asked for, if it is there, or the best one for ""."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or name.endswith(":") or (index and not index.isdecimal()):
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and (len(index) > 3 or int(index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise ValueError(f"device {name} is not available: PyTorch sees {count} GPUs")
    return "cpu" if kind == "cpu" else name
