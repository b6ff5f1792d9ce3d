"""Token shards on disk as one stream of tokens with the ends of documents.

A shard is three files. NAME.ds has the tokens, as little-endian uint16 or uint32. NAME.ds.index has
the end of each document, counted in tokens from the start of the shard, as little-endian uint64.
The first line of NAME.ds.metadata is `tokenizer|bytes per token`. This is datatrove's format.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfkern import files

_TOLD = "tokens.json"


class Shards:
    """All shards of a folder, in the order of their names, as one stream of tokens.

    The files are mapped into memory, so that only what is read takes any. A copy in another process
    opens them again.

    Attributes:
        folder: where the shards are.
        tokens: number of tokens in the stream.
        documents: number of documents.
        dtype: type of the tokens on disk.
        tokenizer: name of the tokenizer.
        vocab_size, end_token: as tokens.json tells them; None if there is no such file.

    Raises:
        ValueError: there are no shards, or files that are cut off or do not fit together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("*.ds"))
        if not paths:
            raise ValueError(f"{folder} has no shards (*.ds)")
        names, sizes = zip(*map(_kind, paths), strict=True)
        for what, values in (("tokenizers", names), ("sizes of tokens", sizes)):
            if len(set(values)) > 1:
                raise ValueError(f"{folder}: shards of several {what}: {sorted(set(values))}")
        self.tokenizer: str = names[0]
        self.dtype = np.dtype(f"<u{sizes[0]}")
        shards = [(_mapped(p, self.dtype), _mapped(_beside(p, "index"), "<u8")) for p in paths]
        for path, (tokens, ends) in zip(paths, shards, strict=True):
            _check(path, tokens, ends)
        self._shards = shards
        self._starts = np.cumsum([0, *(len(tokens) for tokens, _ in shards)])
        self._first = np.cumsum([0, *(len(ends) for _, ends in shards)])
        self.tokens, self.documents = int(self._starts[-1]), int(self._first[-1])
        self.vocab_size, self.end_token = _told(self.folder / _TOLD)
        self._check_ends(paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the stream, int64.

        Raises:
            IndexError: the stream has no such tokens.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.tokens}")
        out = np.empty(stop - start, np.int64)
        for shard, a, b in self._parts(start, stop):
            at = int(self._starts[shard]) - start
            out[at + a : at + b] = self._shards[shard][0][a:b]
        return out

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """The document (int64) of each of the tokens [start, stop), counted in the whole stream.

        Raises:
            IndexError: the stream has no such tokens.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.tokens}")
        out = np.empty(stop - start, np.int64)
        for shard, a, b in self._parts(start, stop):
            at, ends = int(self._starts[shard]) - start, self._shards[shard][1]
            # only the ends within the range are looked at, however many the shard has
            low, high = np.searchsorted(ends, np.array((a, b), np.uint64), "right")
            inside = np.searchsorted(ends[low:high], np.arange(a, b, dtype=np.uint64), "right")
            out[at + a : at + b] = self._first[shard] + low + inside
        return out

    def span(self, number: int) -> tuple[int, int]:
        """Start and end of a document in the stream.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        i, at = number - int(self._first[shard]), int(self._starts[shard])
        ends = self._shards[shard][1]
        return at + (int(ends[i - 1]) if i else 0), at + int(ends[i])

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, int64.

        Raises:
            IndexError: there is no such document.
        """
        return self.read(*self.span(number))

    def ends(self) -> np.ndarray:
        """The ends of all documents in the stream, int64: 8 bytes a document."""
        each = zip(self._starts, self._shards, strict=False)
        return np.concatenate([ends.astype(np.int64) + start for start, (_, ends) in each])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that have tokens of [start, stop), each with its own part of them."""
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        while start < stop:
            at, end = int(self._starts[shard]), min(stop, int(self._starts[shard + 1]))
            if end > start:
                yield shard, start - at, end - at
            start, shard = max(start, end), shard + 1

    def _check_ends(self, paths: list[Path]) -> None:
        for path, (tokens, _) in zip(paths, self._shards, strict=True):
            if self.end_token is not None and len(tokens) and tokens[-1] != self.end_token:
                raise ValueError(
                    f"{path} ends with the token {tokens[-1]}, and not with the end token "
                    f"{self.end_token} of {_TOLD}"
                )


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _kind(path: Path) -> tuple[str, int]:
    """Tokenizer and bytes per token of a shard."""
    told = _beside(path, "metadata")
    line = files.read(told).decode(errors="replace").partition("\n")[0]
    name, _, size = line.rpartition("|")
    if size.strip() not in ("2", "4"):
        raise ValueError(
            f"{told} must begin with tokenizer|2 or tokenizer|4, got {files.shown(line)}"
        )
    return name, int(size)


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    size, each = files.regular(path).stat().st_size, np.dtype(dtype).itemsize
    if size % each:
        raise ValueError(f"{path} is cut off: {size} bytes are no multiple of {each}")
    try:
        if not size:  # mmap needs a byte
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype, "r"))  # slices of a memmap itself are slow
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _check(path: Path, tokens: np.ndarray, ends: np.ndarray) -> None:
    last = int(ends[-1]) if len(ends) else 0
    if last != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens, but its index ends at {last}")
    if len(ends) and not (ends[0] > 0 and (ends[1:] > ends[:-1]).all()):
        raise ValueError(f"{path}: the ends in its index do not rise")


def _told(path: Path) -> tuple[int | None, int | None]:
    """Size of the vocabulary and end token, if there is a file that tells them."""
    if not path.exists():
        return None, None
    told = files.read_object(path)
    found = []
    for name, limit in (("vocab_size", 2**32 + 1), ("end_token", told.get("vocab_size"))):
        value = told.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < (limit or 2**32)):
            raise ValueError(f"{path}: {name} = {files.shown(value)} is no such number")
        found.append(value)
    return found[0], found[1]
