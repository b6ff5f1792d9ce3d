"""`tfkern prepare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tfkern import files
from tfkern.cli.options import values
from tfkern.cli.output import console, with_progress

_PICTURE = "report.png"
_REASONS = 5  # shown of each step


def command(
    what: Annotated[
        str,
        typer.Argument(help="A recipe (.yaml), or the folder to write to with the default recipe."),
    ] = "",
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Values of the recipe, as name=value; values are YAML."),
    ] = None,
    input: Annotated[str, typer.Option(help="File or folder to read. Same as input=...")] = "",
    tokenizer: Annotated[
        str,
        typer.Option(help="characters, bpe:8192 or the path of a tokenizer. Same as tokenizer=..."),
    ] = "",
    executor: Annotated[str, typer.Option(help="Where ranks run: local, ray or slurm.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ranks at the same time; by the machine if not given.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Only prints what a run did, and takes nothing else: its folder."),
    ] = None,
) -> None:
    """Prepares text for training: reads, cleans, drops duplicates, makes shards of tokens.

    It prints the folder of the result, which is named by a hash of recipe, inputs and versions, and
    writes what each step dropped as a table and a picture. A run that was cut off goes on where it
    was. All values of a recipe: see tfkern.data.prepare.Recipe.
    """
    from tfkern.data.prepare import draw, prepare
    from tfkern.data.prepare.recipe import load, made

    if report is not None:
        if what or changes or input or tokenizer or executor != "local" or workers is not None:
            raise ValueError("--report shows a folder, and takes nothing beside it")
        _show(report)
        return
    if not what:
        raise ValueError("a recipe (.yaml) or a folder to write to is needed")
    is_recipe = Path(what).suffix in (".yaml", ".yml")
    told = {"input": input, "tokenizer": tokenizer, "output": "" if is_recipe else what}
    told = values(changes or [], {name: value for name, value in told.items() if value})
    recipe = load(what, **told) if is_recipe else made(told)
    folder = with_progress(
        None, lambda shown: prepare(recipe, executor=executor, workers=workers, progress=shown)
    )
    if executor == "slurm" and not (folder / "manifest.json").exists():
        print(f"queued; the result will be {folder}")
        return
    _show(folder)
    draw(folder, folder / _PICTURE)


def _show(folder: Path) -> None:
    from tfkern.data.prepare import steps

    table = Table("step", "documents", "dropped", "kept", "M characters/s", box=None)
    for row in steps(folder):
        reasons = sorted(((n, reason) for reason, n in row["dropped"].items()), reverse=True)
        dropped = ", ".join(f"{n:,} {reason}" for n, reason in reasons[:_REASONS])
        if others := sum(n for n, _ in reasons[_REASONS:]):
            dropped += f", {others:,} others"
        rate = row["characters"] / 1e6 / row["seconds"] if row["seconds"] > 1e-3 else None
        name = row["step"] if row["step"] != "input" else "read"
        counts = (f"{row['documents']:,}", dropped, f"{row['kept']:,}")
        table.add_row(name, *counts, "" if rate is None else f"{rate:.2f}")
    console().print(table)
    manifest = folder / "manifest.json"
    if manifest.exists():
        shards = files.read_object(manifest)["shards"]
        for part in ("train", "validation"):
            found = [v for k, v in shards.items() if k.startswith(part)]
            if found:
                documents = sum(shard["documents"] for shard in found)
                tokens = sum(shard["tokens"] for shard in found)
                print(f"{part}: {documents:,} documents, {tokens:,} tokens")
    else:
        print("the run is not finished")
    print(folder)
