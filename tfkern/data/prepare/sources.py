"""Documents from files that others wrote: plain text, JSON lines, dumps of MediaWiki.

Each reader yields documents, and in place of one that is left out the reason.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import orjson
import zstandard
from datatrove.data import Document

FORMATS = ("text", "json", "wiki")
SPLITS = ("file", "line", "paragraph")
LONGEST = 1 << 18  # characters of a line; longer ones are cut, so that memory is bounded
_PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ENDINGS = {
    ".txt": "text", ".md": "text", ".text": "text", "": "text",
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".xml": "wiki",
}  # fmt: skip


def format_of(path: Path) -> str | None:
    """What the ending of a file tells, that of a compression left out."""
    name = path.with_suffix("") if path.suffix in (*_PACKED, ".zst") else path
    ending = re.sub(r"-.*", "", name.suffix.lower())  # a part of a dump ends with .xml-p10p3000
    return _ENDINGS.get(ending)


def opened(path: Path) -> IO[bytes]:
    """The file's content, decompressed."""
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path))
    return _PACKED.get(path.suffix, open)(path, "rb")  # type: ignore[return-value, operator]


class _Zstandard(io.RawIOBase):
    """The content of a file of one or several frames. The reader of the package zstandard takes a
    file that is cut off for a whole one."""

    def __init__(self, path: Path) -> None:
        self._file, self._frame = open(path, "rb"), zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._rest, self._begun = b"", b"", False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            packed = self._packed or self._file.read(1 << 16)
            self._packed = b""
            if not packed:
                if self._begun:
                    raise EOFError("the last frame is cut off")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._rest = self._frame.decompress(packed)
            self._begun = not self._frame.eof
            if self._frame.eof:
                self._packed = self._frame.unused_data
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def documents(path: Path, name: str, form: str, split: str) -> Iterator[Document | str]:
    """The documents of a file, with ids that begin with the name, or why one is left out.

    Raises:
        ValueError: the file is not in the format, or not in UTF-8.
        OSError: it cannot be read.
    """
    try:
        with opened(path) as file:
            if form == "json":
                yield from _json_lines(file, name)
            elif form == "wiki":
                yield from _pages(file, name)
            else:
                yield from _texts(file, name, split)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: no dump of MediaWiki: {error}") from None
    except (EOFError, zstandard.ZstdError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of gzip, bz2
            raise
        raise ValueError(f"{path}: cannot be decompressed: {error}") from None


def _texts(file: IO[bytes], name: str, split: str) -> Iterator[Document | str]:
    if split == "file":
        parts = iter([file.read().decode("utf-8-sig")])
    else:
        parts = _lines(file) if split == "line" else _paragraphs(_lines(file))
    for i, part in enumerate(parts):
        text = part.strip("\r\n") if split != "file" else part
        yield Document(text=text, id=f"{name}/{i}") if text.strip() else "empty"


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Lines with their ends. Those that are too long are cut behind a blank, or anywhere."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    rest = ""
    while True:
        line = rest + text.readline(LONGEST - len(rest))
        if not line:
            return
        rest = ""
        if len(line) == LONGEST and not line.endswith("\n"):
            cut = line.rfind(" ", LONGEST // 2) + 1
            line, rest = (line[:cut], line[cut:]) if cut else (line, "")
        yield line.replace("\r\n", "\n")


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Lines up to an empty one, joined."""
    found: list[str] = []
    size = 0
    for line in lines:
        if line.strip() and size + len(line) <= LONGEST:
            found.append(line)
            size += len(line)
            continue
        if found:
            yield "".join(found)
        found = [line] if line.strip() else []
        size = len(line)
    if found:
        yield "".join(found)


def _json_lines(file: IO[bytes], name: str) -> Iterator[Document | str]:
    """A line that is no object with a text costs that line only."""
    for i, line in enumerate(file):
        line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            yield "not_json"
            continue
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            yield "no_text"
        elif not text.strip():
            yield "empty"
        else:
            own = row.get("id")
            own = own if isinstance(own, str | int) and str(own) else i
            yield Document(text=text, id=f"{name}/{own}")


def _pages(file: IO[bytes], name: str) -> Iterator[Document | str]:
    """Articles with their markup; redirects and pages of other namespaces are left out."""
    page: dict[str, Any] = {}
    parents: list[ElementTree.Element] = []
    for event, element in ElementTree.iterparse(file, ("start", "end")):
        if event == "start":
            parents.append(element)
            continue
        parents.pop()
        tag = element.tag.rpartition("}")[2]
        if tag in ("title", "ns", "text"):
            page[tag] = element.text or ""
        elif tag == "id":
            page.setdefault("id", element.text)
        elif tag == "redirect":
            page["redirect"] = True
        elif tag == "page":
            text = page.get("text", "")
            if page.get("redirect") or re.match(r"(?i)\s*#redirect", text):
                yield "redirect"
            elif page.get("ns", "0") != "0":
                yield "namespace"
            elif not text.strip():
                yield "empty"
            else:
                metadata = {"title": page.get("title", ""), "markup": "wiki"}
                yield Document(text=text, id=f"{name}/{page.get('id')}", metadata=metadata)
            page = {}
            if parents:
                parents[-1].remove(element)  # else the tree would grow with the file


def found(path: Path) -> list[Path]:
    """The files of a folder and of the folders in it, by name, or the file itself.

    Raises:
        ValueError: there is nothing to read.
    """
    if not os.path.exists(path):  # False for names that are too long, too
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    paths = []
    for folder, inner, names in os.walk(path, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        above = Path(folder).relative_to(path).parents
        if os.path.realpath(folder) in {os.path.realpath(path / parent) for parent in above}:
            raise ValueError(f"{folder}: the link leads to a folder in which it is")
        paths += [Path(folder) / name for name in names if not name.startswith(".")]
    if not paths:
        raise ValueError(f"{path}: the folder has no files")
    return sorted(paths)
