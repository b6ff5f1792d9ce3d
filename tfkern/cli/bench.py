"""`tfkern bench`: one command per op, that sweeps over context lengths."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tfkern import files
from tfkern.benchmarks import against as fixed
from tfkern.benchmarks import environment, report, sweep
from tfkern.benchmarks.case import load
from tfkern.cli.options import (
    OUT_OF_FIXED,
    SECONDS,
    Dtype,
    Out,
    check_device,
    check_dtype,
    number,
)
from tfkern.cli.output import console, exit_if_wrong, prepare, with_progress
from tfkern.dispatch import check_backend

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Times an op over context lengths, next to PyTorch's own ways to compute it. "
    "Every variant is compared with float64 first, and a wrong one is not timed (exit status 1). "
    "The results are quantiles of the time, the rate as a fraction of what the machine can do, "
    "counted FLOPs, peak memory, and how each of them grows. They are printed and written to "
    "<op>.csv, <op>.json and <op>.png. With --against torch the cases are fixed and run on a CPU, "
    "and the result is PyTorch's time divided by ours. The command suite times fixed cases on a "
    "GPU.",
)

_LONGEST = 2**24  # tokens: for more, counting tiles takes seconds

Lengths = Annotated[
    str,
    typer.Option(
        help="Context lengths in tokens, such as 256,512. The default is powers of two, on a CPU "
        "up to 8192, for block and model up to 2048.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device that computes: cpu, cuda or cuda:N. The default is cuda if there is a GPU.",
        show_default=False,
    ),
]
Backends = Annotated[
    str,
    typer.Option(
        help="Backends of tfkern to time, such as native,reference. The default is all backends "
        "that run here. PyTorch's variants are always timed.",
        show_default=False,
    ),
]
Threads = Annotated[
    int,
    number("Number of CPU threads. With 0, PyTorch chooses it.", int, 0, os.cpu_count() or 1),
]
Limit = Annotated[
    float,
    number(
        "Longest time of a call in seconds. A variant that is predicted to take longer is skipped.",
        *SECONDS,
        "--max-seconds",
    ),
]
Against = Annotated[
    str,
    typer.Option(
        help="Baseline to compare fixed cases with, instead of a sweep: torch. Each case is timed "
        f"in pairs with PyTorch, on a CPU with {fixed.THREADS} threads, and written to "
        f"cpu-<processor>.csv in {OUT_OF_FIXED}. --threads and --out are the only other options "
        "that apply.",
        show_default=False,
    ),
]

Backward = Annotated[
    bool,
    typer.Option(
        "--backward",
        help="Also times the backward, and gives times of the two halves and of both together.",
    ),
]
Batch = Annotated[int, number("Number of sequences in a batch.", int, 1, 2**20)]
Heads = Annotated[int, number("Number of attention heads.", int, 1, 2**16)]
Hidden = Annotated[int, number("Number of features of a token.", int, 1, 2**20)]


def _command(sizes: Callable[..., None]) -> Callable[..., None]:
    """Makes a command from a function named after an op, with the op's sizes as parameters.

    The options of the command are these sizes between those of `_sweep`. Its help is the docstring.
    """

    def command(**options: Any) -> None:
        _sweep(**options)

    shared = inspect.signature(_sweep).parameters.values()
    first = [p for p in shared if p.kind is p.POSITIONAL_OR_KEYWORD]
    last = [p for p in shared if p.kind is p.KEYWORD_ONLY]
    if sizes.__name__ not in fixed.COMPARISONS:
        last = [p for p in last if p.name != "against"]
    parameters = [*first, *inspect.signature(sizes).parameters.values(), *last]
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return app.command(sizes.__name__, help=sizes.__doc__)(command)


def _sweep(
    context: typer.Context,
    lengths: Lengths = "",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    *,
    backends: Backends = "",
    device: Device = "",
    threads: Threads = 0,
    max_seconds: Limit = 20.0,
    out: Out = Path("bench-results"),
    against: Against = "",
    **sizes: Any,
) -> None:
    """Sweeps over lengths. The op has the name of the command in the context."""
    op = context.info_name or ""
    if against:
        return _against(op, context)
    check_dtype(dtype)
    device = check_device(device)
    named = [check_backend(name.strip()) for name in backends.split(",")] if backends else None
    if threads:
        torch.set_num_threads(threads)
    kind = load(op)
    swept = _lengths(lengths) if lengths else kind.lengths[device.partition(":")[0]]
    case = kind(length=max(swept), dtype=dtype, device=device, batch=batch, **sizes)
    sweep.check_memory(case, named)
    prepare(out, *(f"{op}{suffix}" for suffix in report.SUFFIXES))
    variants = len(case.variants(named))
    # Steps of the bar: the ceiling, each comparison; per length the warm-ups, timing and memory.
    total = 1 + variants + len(swept) * (2 * variants + 1)
    results = with_progress(
        total,
        lambda progress: sweep.run(
            case,
            swept,
            named,
            max_seconds=max_seconds,
            progress=progress,
            keep=lambda results: report.write_rows(results.rows, out),
        ),
    )
    if results.rows:
        report.show_sweep(results, console())
        for path in report.write(results, out):
            console().print(f"wrote {path}", soft_wrap=True, highlight=False)
    exit_if_wrong(results.wrong)


def _against(op: str, context: typer.Context) -> None:
    """Times the fixed cases of an op."""
    options = context.params
    if options["against"] not in fixed.CHOICES:
        choices = ", ".join(fixed.CHOICES)
        raise ValueError(f"unknown baseline {options['against']!r}: expected one of {choices}")
    source = context.get_parameter_source
    given = {name for name in options if getattr(source(name), "name", "") == "COMMANDLINE"}
    for name in sorted(given - {"against", "threads", "out"}):
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option} does not apply to --against, whose cases are fixed, on a CPU")
    torch.set_num_threads(options["threads"] or fixed.THREADS)
    out = options["out"] if "out" in given else OUT_OF_FIXED
    prepare(out, fixed.file_name(environment.facts("cpu")))
    total = len(fixed.dtypes(op)) * len(fixed.COMPARISONS[op])
    results = with_progress(total, lambda progress: fixed.run(op, progress=progress))
    if results.rows:
        console().print(report.pairs_table(results.rows))
        path = fixed.write(results.rows, out)
        console().print(f"wrote {path}", soft_wrap=True, highlight=False)
    exit_if_wrong(results.wrong)


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


@_command
def attention(
    heads: Heads = 8,
    head_dim: Annotated[int, number("Number of features of a head.", int, 1, 256)] = 64,
    causal: Annotated[bool, typer.Option(help="Hides the keys after each query.")] = False,
    window: Annotated[
        int | None,
        number(
            "Number of keys on either side that a query sees. The default is all.", int, 0, _LONGEST
        ),
    ] = None,
    backward: Backward = False,
) -> None:
    """Times softmax attention: plain PyTorch, SDPA with each of its backends, and tfkern."""


@_command
def layer_norm(
    hidden: Hidden = 1024,
    residual: Annotated[
        bool, typer.Option("--residual", help="Adds a residual before the norm.")
    ] = False,
    backward: Backward = False,
) -> None:
    """Times layer norm: F.layer_norm, torch.compile of it, and tfkern. Rates are in GB/s."""


@_command
def mlp(
    hidden: Hidden = 512,
    expansion: Annotated[
        int, number("Number of inner features, as a multiple of hidden.", int, 1, 1024)
    ] = 4,
    activation: Annotated[
        str, typer.Option(help="Activation: gelu, gelu_tanh, quick_gelu, relu or silu.")
    ] = "gelu_tanh",
    backward: Backward = False,
) -> None:
    """Times an MLP: plain PyTorch, torch.compile of it, and tfkern."""


Vocabulary = Annotated[int, number("Number of classes.", int, 1, 2**24)]


@_command
def cross_entropy(vocabulary: Vocabulary = 32000, backward: Backward = False) -> None:
    """Times the cross entropy of logits: F.cross_entropy, torch.compile of it, and tfkern. Rates
    are in GB/s."""


@_command
def linear_cross_entropy(
    hidden: Hidden = 768, vocabulary: Vocabulary = 32000, backward: Backward = False
) -> None:
    """Times a linear layer with cross entropy: plain PyTorch, torch.compile of it, PyTorch's loss
    in chunks, and tfkern."""


@_command
def rotary(
    heads: Heads = 16,
    key_heads: Annotated[int, number("Heads of the keys.", int, 1, 2**16)] = 16,
    head_dim: Annotated[int, number("Size of a head, even.", int, 2, 2048)] = 64,
    interleaved: Annotated[
        bool, typer.Option("--interleaved", help="Pairs are neighbours, not halves apart.")
    ] = False,
    backward: Backward = False,
) -> None:
    """Rotary positions: as transformers writes them, torch.compile of it, and tfkern, in GB/s."""


@_command
def block(hidden: Hidden = 768, heads: Heads = 12) -> None:
    """Times a training step of a decoder block: plain PyTorch, SDPA, torch.compile and tfkern."""


@_command
def model(
    layers: Annotated[int, number("Number of blocks.", int, 1, 128)] = 2,
    hidden: Hidden = 256,
    heads: Heads = 4,
) -> None:
    """Times a training step of a decoder with several blocks, without the optimizer."""
