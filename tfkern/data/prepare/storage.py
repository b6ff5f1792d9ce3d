"""Documents between two stages: one compressed file of JSON lines for each rank."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from tfkern import files


def file_of(folder: str | Path, rank: int) -> Path:
    """The documents of a rank."""
    return Path(folder) / f"{rank:05d}.jsonl.zst"


class Writer:
    """Documents to a new file, which takes its place only once it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._new = path, path.with_name(path.name + ".new")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._new, "wb")
        # Many files are open at a time, and other levels take megabytes for each.
        self._stream = zstandard.ZstdCompressor(level=1).stream_writer(self._file)

    def write(self, document: Document) -> None:
        row = {"text": document.text, "id": document.id, "metadata": document.metadata}
        self._stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        files.place(self._new, self.path)


class Write(PipelineStep):
    """Writes the documents of a rank."""

    type, name = "writer", "write"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        writer = Writer(file_of(self.folder, rank))
        for document in data:
            writer.write(document)
            self.update_doc_stats(document)
            yield document
        writer.close()


class Read(PipelineStep):
    """The documents of a rank."""

    type, name = "reader", "read"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from read(file_of(self.folder, rank))


def read(path: Path) -> Iterator[Document]:
    """The documents of a file that `Writer` wrote."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.BufferedReader(stream):  # type: ignore[arg-type]
            yield Document(**orjson.loads(line))
