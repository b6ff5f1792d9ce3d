"""Runs a recipe, stage by stage."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from tfkern import files
from tfkern.data.prepare import clean, duplicates, report, sources, tokens
from tfkern.data.prepare.execute import EXECUTORS, JOBS, Progress, check_queue, started
from tfkern.data.prepare.recipe import Plan, Recipe, plan
from tfkern.data.prepare.stage import Stage
from tfkern.data.prepare.storage import Read, Write, Writer, file_of
from tfkern.data.shards import Shards

MANIFEST = "manifest.json"
_LOCK = "lock"
_OURS = {"work", "logs", "tokenizer", MANIFEST, "report.png", _LOCK, JOBS, *tokens.PARTS}
_SHARD = re.compile(r"\d{5}\.ds(\.index|\.metadata|\.new)?|tokens\.json")
_BLOCK = (1 << 16, 1 << 26)  # bytes of text that go to one file before the next has its turn


def prepare(
    recipe: Recipe,
    *,
    executor: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes shards of tokens from texts, and returns their folder.

    The folder has `train` and `validation` with the shards, `tokenizer`, and manifest.json with the
    counts of every step, versions and hashes. It is named by a hash of the recipe, the contents of
    its inputs and the versions of the packages: a run with another recipe has another folder, one
    that was ended by whatever goes on where it was, and one that is done returns at once. The bytes
    of the shards depend on none of the arguments below.

    Args:
        executor: "local": processes of this machine, and an error within seconds if one is killed;
            "ray": tasks of a Ray cluster that shares the folders, each tried again when its
            process or machine dies; "slurm": jobs, of which each stage waits for the one before,
            while this call returns as soon as they are queued.
        workers: how many ranks run at the same time; by the machine and the size of the input if
            None, for Slurm all.
        progress: is called with the name of a stage, how many of its ranks are done, and of how
            many.

    Raises:
        ValueError: the recipe or its inputs are wrong, or there are no documents.
        OSError: files cannot be read or written.
        RuntimeError: a worker was killed, by the system for want of memory for example.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be positive, got {workers}")
    planned = plan(recipe)
    folder = planned.folder
    if (folder / MANIFEST).exists():
        return folder
    run = started(executor, planned, workers)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _check_foreign(folder)
        check_queue(folder)
        for stage in stages(planned):
            run(stage, progress or (lambda *_: None))
    return folder


def _check_foreign(folder: Path) -> None:
    """Raises ValueError if there are files that would be taken for ours, or lost."""
    names = {p.name for p in folder.iterdir()} - _OURS
    for part in tokens.PARTS:
        if (folder / part).is_dir():
            shards = (p.name for p in (folder / part).iterdir())
            names |= {f"{part}/{name}" for name in shards if not _SHARD.fullmatch(name)}
    # A run that was killed may have left folders for new files.
    names = {name for name in names if not Path(name).name.startswith(files.PREFIX)}
    if names:
        raise ValueError(f"{folder}: holds {min(names)}, which is not of this recipe")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuses a second run in a folder while one is at work in it, where files can be locked."""
    (folder / _LOCK).touch()
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(folder / _LOCK, wait=False))
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work in this folder") from None
        yield


def stages(planned: Plan) -> list[Stage]:
    """The stages of a recipe, each of which reads what the one before it wrote."""
    recipe, n = planned.recipe, planned.files
    folder = planned.folder.absolute()  # ranks on other machines start in other folders
    work = folder / "work"
    found = [Stage("read", [Ingest(planned, work / "read")], 1)]
    now = work / "read"
    steps = clean.steps(list(recipe.clean), recipe.words)
    if any(form == "wiki" for *_, form in planned.inputs):
        steps.insert(0, clean.PlainText())
    if recipe.decontaminate:
        index = work / "index"
        found.append(Stage("index", [Index(recipe, index)], 1))
        steps.append(duplicates.contaminated(index, recipe.words))
    if steps:
        found.append(Stage("clean", [Read(now), *steps, clean.Empty(), Write(work / "clean")], n))
        now = work / "clean"
    if recipe.exact_duplicates or recipe.near_duplicates is not None:
        found += duplicates.exact(now, work / "exact", work / "unequal", n)
        now = work / "unequal"
    if recipe.near_duplicates is not None:
        found += duplicates.near(
            now, work / "near", work / "unlike", n, recipe.near_duplicates, recipe.words
        )
        now = work / "unlike"
    tokenizer = folder / "tokenizer"
    training = tokens.Train(now, n, recipe.tokenizer, recipe.end_token, tokenizer)
    writing = tokens.Tokens(tokenizer, folder, recipe.validation)
    found += [
        Stage("tokenizer", [training], 1),
        Stage("tokens", [Read(now), writing], n),
        Stage("manifest", [Finish(planned, folder)], 1),
    ]
    return [replace(stage, number=i) for i, stage in enumerate(found)]


class Ingest(PipelineStep):
    """Divides the documents of all inputs into files, which the ranks of later stages read.

    Documents that follow one another stay together: a file takes a block of them at a time.
    """

    type, name = "reader", "input"

    def __init__(self, planned: Plan, folder: Path) -> None:
        super().__init__()
        self.inputs = [(os.path.abspath(path), *names) for path, *names in planned.inputs]
        self.split, self.files = planned.recipe.split, planned.files
        self.block = min(max(planned.size // planned.files, _BLOCK[0]), _BLOCK[1])
        self.folder = str(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        writers = [Writer(file_of(self.folder, i)) for i in range(self.files)]
        size = 0
        with self.track_time("run"):
            for path, name, form in self.inputs:
                for found in sources.documents(Path(path), name, form, self.split):
                    self.stat_update("total")
                    if isinstance(found, str):
                        self.stat_update("dropped", f"dropped_{found}")
                        continue
                    writers[size // self.block % self.files].write(found)
                    size += len(found.text.encode("utf-8", "replace"))
                    self.stat_update("forwarded")
                    self.update_doc_stats(found)
            for writer in writers:
                writer.close()
        if not size:
            raise ValueError(f"input: no documents in {', '.join(p for p, *_ in self.inputs)}")
        yield from ()


class Index(PipelineStep):
    """Collects the sequences of words that no document may have."""

    type, name = "index", "sequences"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__()
        self.paths = [os.path.abspath(path) for path in recipe.decontaminate]
        self.words, self.folder = recipe.words, str(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        texts = (
            document.text
            for path in map(Path, self.paths)
            for document in sources.documents(
                path, path.name, sources.format_of(path) or "text", "line"
            )
            if isinstance(document, Document)
        )
        self.stat_update("sequences", value=duplicates.index(texts, Path(self.folder), self.words))
        yield from ()


class Finish(PipelineStep):
    """Writes the manifest, and removes what was there on the way."""

    type, name = "writer", "manifest"

    def __init__(self, planned: Plan, folder: Path) -> None:
        super().__init__()
        self.folder, self.told, self.files = str(folder), planned.told, planned.files
        self.parts = tokens.PARTS if planned.recipe.validation else tokens.PARTS[:1]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        folder = Path(self.folder)
        told = files.read_object(folder / "tokenizer" / tokens.TOLD)
        size, shards = tokens.width(told["vocab_size"]), {}
        for part in self.parts:
            for i in range(self.files):
                path = folder / part / f"{i:05d}.ds"
                shards[f"{part}/{path.name}"] = {
                    "tokens": path.stat().st_size // size,
                    "documents": path.with_name(path.name + ".index").stat().st_size // 8,
                    "sha256": tokens.digest(path),
                }
            files.write(folder / part / tokens.TOLD, json.dumps(told) + "\n")
            Shards(folder / part)  # refuses files of which the disk has lost a part
        manifest = {
            **self.told,
            "tokens": told,
            "steps": report.steps(folder),
            "shards": shards,
        }
        shutil.rmtree(folder / "work", ignore_errors=True)
        files.write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        yield from ()
