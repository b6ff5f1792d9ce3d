"""Documents to shards of tokens, and tokenizers that are trained on them."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from tfkern import files, tokenize
from tfkern.data.prepare.storage import file_of, read
from tfkern.tokenize import Tokenizer
from tfkern.tokenize.trainers import LEAST

TRAINED = ("characters", *LEAST)
PARTS = ("train", "validation")
TOLD = "tokens.json"  # size of the vocabulary and end token, beside tokenizer and shards
_END = "<|endoftext|>"
_ENDS = {"bpe": _END, "unigram": "</s>"}  # of tokenizers that are trained with one
_MOST = 1 << 32  # tokens that a shard can tell apart
_SAMPLE = 1 << 27  # most characters that a tokenizer is trained on


def check(spec: str, end: str | None) -> None:
    """Checks what a recipe tells of its tokenizer, before any work.

    Raises:
        ValueError: an unknown kind, a file that is no tokenizer, or no token that ends a text.
    """
    kind, size = parsed(spec)
    if kind is None:
        end_id(tokenize.load(spec), end)
    elif kind != "characters":
        if size is None:
            raise ValueError(
                f"tokenizer: {spec!r} needs the size of a vocabulary, as in {kind}:8192; a folder "
                f"of this name is ./{kind}"
            )
        least = LEAST[kind] + _adds_end(kind, end)
        if not least <= size <= _MOST:
            raise ValueError(
                f"tokenizer: {spec!r} needs a vocabulary of {least} to {_MOST} tokens, got {size}"
            )


def parsed(spec: str) -> tuple[str | None, int | None]:
    """The kind and the size of a vocabulary that is to be trained, or (None, None) for a path."""
    if not isinstance(spec, str):
        raise ValueError(f"tokenizer must be a string, got {spec!r}")
    kind, colon, size = spec.partition(":")
    if kind not in TRAINED:
        return None, None
    if not colon:
        return kind, None
    if kind == "characters" or not (size.isascii() and size.isdigit()) or not int(size):
        raise ValueError(f"tokenizer: {spec!r} is not of the form kind:size, as in bpe:8192")
    return kind, int(size)


def _adds_end(kind: str, end: str | None) -> bool:
    """Whether the end token is none of those with which the kind is trained."""
    return kind not in _ENDS or end not in (None, _ENDS[kind])


def end_id(tokenizer: Tokenizer, end: str | None) -> int:
    """The id of the token that ends a document: one by its name, or the one with the role eos."""
    return tokenizer.special_id("eos") if end is None else tokenizer.id(end)


class Train(PipelineStep):
    """Trains a tokenizer on the documents of all ranks, or copies the one at a path."""

    type, name = "tokenizer", "train"

    def __init__(self, source: Path, files: int, spec: str, end: str | None, folder: Path) -> None:
        super().__init__()
        self.source, self.files, self.folder = str(source), files, str(folder)
        self.spec = spec if parsed(spec)[0] else os.path.abspath(spec)
        self.end = end

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        if next(self._documents(), None) is None:
            raise ValueError("no document is left to train on: all were dropped")
        with self.track_time("run"):
            kind, size = parsed(self.spec)
            if kind is None:
                tokenizer = tokenize.load(self.spec)
            elif kind == "characters":
                tokenizer = tokenize.characters(self._texts())
            else:
                assert size is not None
                room = size - _adds_end(kind, self.end)
                tokenizer = tokenize.train(kind, self._sample(), room)
            if self.end is not None or "eos" not in tokenizer.special:
                special = {**tokenizer.special, "eos": self.end or _END}
                tokenizer = Tokenizer(tokenizer.backend, special)
            tokenize.save(tokenizer, self.folder)
            end_token = tokenizer.special_id("eos")
            content = {"vocab_size": tokenizer.vocab_size, "end_token": end_token}
            files.write(Path(self.folder) / TOLD, json.dumps(content) + "\n")
        yield from ()

    def _documents(self) -> Iterator[Document]:
        for file in range(self.files):
            yield from read(file_of(self.source, file))

    def _texts(self) -> Iterator[str]:
        return (document.text for document in self._documents())

    def _sample(self) -> list[str]:
        """All texts, or if they are too many the first part of each, in equal shares."""
        size = sum(map(len, self._texts()))
        if size <= _SAMPLE:
            return list(self._texts())
        return [text[: max(len(text) * _SAMPLE // size, 1)] for text in self._texts()]


class Tokens(PipelineStep):
    """Writes the tokens of the documents, each with the end token behind it, as shards.

    A shard has the tokens (NAME.ds, little-endian, 2 bytes each if the vocabulary has at most 65536
    and else 4), the ends of its documents (NAME.ds.index, 8 bytes each) and a text that tells the
    size (NAME.ds.metadata): the form of datatrove.
    """

    type, name = "tokens", "tokens"

    def __init__(self, tokenizer: Path, folder: Path, validation: float) -> None:
        super().__init__()
        self.tokenizer, self.folder, self.validation = str(tokenizer), str(folder), validation

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokenizer = tokenize.load(self.tokenizer)
        end = tokenizer.special_id("eos")
        shards = {
            part: _Shard(Path(self.folder) / part / f"{rank:05d}.ds", tokenizer.vocab_size)
            for part in (PARTS if self.validation else PARTS[:1])
        }
        for document in data:
            part = PARTS[share(document.id) < self.validation]
            with self.track_time():
                try:
                    ids = tokenizer.encode(document.text, template=False)
                except ValueError as error:
                    raise ValueError(f"document {document.id}: {error}") from None
                shards[part].write([*ids, end])
            self.stat_update("total", part)
            self.stat_update("tokens", f"{part}_tokens", value=len(ids) + 1)
            self.update_doc_stats(document)
            yield document
        for shard in shards.values():
            shard.close()


def share(name: str) -> float:
    """A number in [0, 1) that depends on the id of a document only."""
    return xxhash.xxh64_intdigest(name, seed=1) / 2**64


def width(vocab_size: int) -> int:
    """Bytes of a token in a shard."""
    return 2 if vocab_size <= 1 << 16 else 4


class _Shard:
    """A file of tokens, which is there only once it is whole."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.new = path, path.with_name(path.name + ".new")
        self.dtype = np.dtype(f"<u{width(vocab_size)}")
        self.file = open(self.new, "wb")
        self.ends = [0]

    def write(self, ids: list[int]) -> None:
        self.file.write(np.array(ids, self.dtype).tobytes())
        self.ends.append(self.ends[-1] + len(ids))

    def close(self) -> None:
        self.file.close()
        ends = np.array(self.ends[1:], "<u8").tobytes()
        files.write(self.path.with_name(self.path.name + ".index"), ends)
        told = f"tfkern|{self.dtype.itemsize}\n{self.ends[-1]} tokens\n"
        files.write(self.path.with_name(self.path.name + ".metadata"), told)
        files.place(self.new, self.path)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
