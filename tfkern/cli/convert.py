"""`tfkern convert`."""

from pathlib import Path
from typing import Annotated

import typer

from tfkern.benchmarks.case import DTYPES
from tfkern.cli.options import check_dtype, number


def command(
    source: Annotated[
        Path, typer.Argument(help="Directory of the model, with config.json and safetensors.")
    ],
    target: Annotated[
        Path, typer.Argument(help="Directory to write. It is made if it is missing.")
    ],
    form: Annotated[
        str, typer.Option("--to", help="Names of the weights: huggingface, or tfkern for its own.")
    ] = "huggingface",
    dtype: Annotated[
        str, typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)}. The default keeps it.")
    ] = "",
    shard_bytes: Annotated[
        int,
        number("Size of the weights in bytes above which they go to several files.", int, 1, 2**62),
    ] = 5_000_000_000,
) -> None:
    """Rewrites the weights of a model under other names, in another dtype or in other shards.

    It knows GPT-1, GPT-2, BERT, BART, T5 and ViT, and reads and writes local directories only.
    """
    from tfkern import models

    kept = check_dtype(dtype) if dtype else None
    if form not in ("huggingface", "tfkern"):
        raise ValueError(f"form must be huggingface or tfkern, got {form!r}")
    there = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {target}: {there} is no directory")
    if target.resolve() == source.resolve():
        raise ValueError(f"source and target are the same directory, {source}")
    model = models.load(source, dtype=kept)
    models.save(model, target, form=form, shard_bytes=shard_bytes)
