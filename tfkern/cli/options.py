"""Options that several commands have, and what their values stand for."""

import contextlib
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from tfkern import files
from tfkern.benchmarks.case import DTYPES
from tfkern.ops import OPS

if TYPE_CHECKING:
    from tfkern.models import Transformer
    from tfkern.tokenize import Tokenizer


def number(told: str, kind: type[int] | type[float], low: float, high: float, *names: str) -> Any:
    """An option that takes numbers from low to high, and names the range in its error."""

    def parse(text: Any) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # NaN is in no range
                return value
        expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
        raise typer.BadParameter(f"got {files.shown(str(text))}, expected {expected}")

    return typer.Option(*names, help=told, parser=parse)


SEEDS = (int, -(2**62), 2**62)  # leaves room to count up
SECONDS = (float, 0, 10**9)

Device = Annotated[str, typer.Option(help="Device that computes, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help=f"Dtype of the tensors: {', '.join(DTYPES)}.")]
Model = Annotated[
    Path,
    typer.Argument(help="Directory of a model, with config.json, safetensors and a tokenizer."),
]
Out = Annotated[
    Path, typer.Option(help="Folder into which the results are written.", file_okay=False)
]
OUT_OF_FIXED = Path("benchmarks/results")  # results of fixed cases, under version control


def values(changes: list[str], told: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values of a recipe that options told, and those that changes add, as name=value in YAML.

    Raises:
        ValueError: a change of another form, or a value that is told twice.
    """
    found = dict(told or {})
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise ValueError(f"expected name=value, got {files.shown(change)}")
        if name in found:
            raise ValueError(f"{name} is told twice: {files.shown(found[name])} and {value!r}")
        found[name] = files.parse_yaml(value, name)
    return found


def check_dtype(name: str) -> torch.dtype:
    """The dtype with this name."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_op(name: str) -> str:
    """Returns `name` if an op with kernels has this name."""
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}: expected one of {', '.join(OPS)}")
    return name


def check_device(name: str) -> str:
    """The device to use: the named one if it exists, or for "" the best one."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or name.endswith(":") or (index and not index.isdecimal()):
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and (len(index) > 3 or int(index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise ValueError(f"device {name} is not available: PyTorch sees {count} GPUs")
    return "cpu" if kind == "cpu" else name


def load(directory: Path, device: str) -> tuple["Transformer", "Tokenizer"]:
    from tfkern import models, tokenize

    device = check_device(device)
    model = models.load(directory, device=device)
    tokenizer = tokenize.load(directory)
    if tokenizer.vocab_size > (model.config.vocab_size or 0):
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}"
        )
    return model, tokenizer


def models_of_transformers(asked: Collection[str] | None, known: Collection[str]) -> list[str]:
    """The models that a benchmark is asked for, all if none is.

    Raises:
        ValueError: one is not known.
        NotImplementedError: transformers, which has the models, is not installed.
    """
    for name in asked or ():
        if name not in known:
            expected = ", ".join(known)
            raise ValueError(f"unknown model {files.shown(name)}: expected one of {expected}")
    if importlib.util.find_spec("transformers") is None:
        raise NotImplementedError("transformers is not installed: pip install transformers")
    return list(asked or known)
