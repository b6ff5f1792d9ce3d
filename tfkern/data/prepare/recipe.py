"""What to prepare, and how: a recipe, and the key that names its result."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tfkern import files, tokenize
from tfkern.data.prepare import clean, sources, tokens
from tfkern.data.prepare.words import TOKENIZERS

_LEAST, _MOST, _SIZE = 8, 256, 1 << 26  # files, and about how many bytes each has
# Packages whose next version may give another result.
_PACKAGES = (
    "tfkern",
    "datatrove",
    "ftfy",
    "mwparserfromhell",
    "py3langid",
    "regex",
    "sentencepiece",
    "tokenizers",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to prepare, and how.

    Attributes:
        input: a file or a folder, or several. Compressed files (gz, bz2, xz, zst) are read, too.
        output: the folder for results; each goes into a folder that its key names.
        format: "text", "json" (JSON lines with a string "text") or "wiki" (a dump of MediaWiki); by
            the ending of each file if None.
        split: what a document of a text is: the whole "file", a "line" or a "paragraph", up to an
            empty line. Lines and paragraphs of more than 2^18 characters are cut.
        clean: steps in their order, by name or as {name: options}: "unicode", "private",
            "language", "length", "word_list", "gopher_repetition", "gopher_quality", "c4",
            "fineweb", or "web" for all but two of them. See `tfkern.data.prepare.clean`.
        words: how steps count words: "whitespace" or "words", which parts punctuation from them.
        exact_duplicates: whether one of several documents with the same words is left.
        near_duplicates: the Jaccard similarity of sequences of five words from which on one of
            several documents is left, in (0, 1]; None leaves all.
        decontaminate: files whose sequences of 13 words no document may have.
        tokenizer: "characters", or one to train, such as "bpe:8192" (or wordpiece, unigram, words),
            or the path of a tokenizer that `tfkern.tokenize.load` reads. A folder that has one of
            these names is ./characters.
        end_token: the token behind each document; the one with the role eos if None.
        validation: the share of documents that is kept apart, chosen by a hash of their ids.
        files: into how many files the documents are divided, which bounds the number of workers
            and never depends on it; by the size of the input if None.
        slurm: options of datatrove's SlurmPipelineExecutor; "time" and "partition" are needed.

    Raises:
        ValueError: a value of another type or out of range.
    """

    input: str | Sequence[str]
    output: str
    format: str | None = None
    split: str = "paragraph"
    clean: Sequence[Any] = ()
    words: str = "whitespace"
    exact_duplicates: bool = False
    near_duplicates: float | None = None
    decontaminate: str | Sequence[str] = ()
    tokenizer: str = "bpe:8192"
    end_token: str | None = None
    validation: float = 0.05
    files: int | None = None
    slurm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("input", "decontaminate"):
            told = getattr(self, name)
            paths = [told] if isinstance(told, str | Path) else told
            if not isinstance(paths, list | tuple):
                raise ValueError(
                    f"{name} must be a path or a list of paths, got {told!r}; it may need quotes"
                )
            for path in paths:
                self._text(name, path)
            object.__setattr__(self, name, tuple(str(path) for path in paths))
        if isinstance(self.clean, str | dict):
            object.__setattr__(self, "clean", [self.clean])
        if not self.input:
            raise ValueError("input must be a path or a list of paths, got none")
        if isinstance(self.tokenizer, Path):  # not "characters", but a folder of this name
            object.__setattr__(self, "tokenizer", os.path.join(os.curdir, self.tokenizer))
        for name in ("output", "tokenizer", "split", "words"):
            self._text(name, getattr(self, name))
            object.__setattr__(self, name, str(getattr(self, name)))
        self._among("format", (None, *sources.FORMATS))
        self._among("split", sources.SPLITS)
        self._among("words", tuple(TOKENIZERS))
        if not isinstance(self.exact_duplicates, bool):
            raise ValueError(
                f"exact_duplicates must be true or false, got {self.exact_duplicates!r}"
            )
        self._within("validation", 0, 0.5)
        if self.near_duplicates is not None:
            self._within("near_duplicates", 0.1, 1)
        if self.files is not None:
            self._within("files", 1, _MOST)
            if not isinstance(self.files, int):
                raise ValueError(f"files must be an integer, got {self.files!r}")
        if not isinstance(self.end_token, str | None):
            raise ValueError(f"end_token must be a string, got {self.end_token!r}")
        if not isinstance(self.clean, list | tuple):
            raise ValueError(f"clean must be a list of steps, got {self.clean!r}")
        if not isinstance(self.slurm, dict | None):
            raise ValueError(f"slurm must be a mapping of options, got {self.slurm!r}")

    def _text(self, name: str, value: Any) -> None:
        if not isinstance(value, str | Path):
            raise ValueError(f"{name} must be a string, got {value!r}; it may need quotes")
        if not str(value):
            raise ValueError(f"{name} must not be empty")

    def _among(self, name: str, known: tuple[Any, ...]) -> None:
        if getattr(self, name) not in known:
            names = ", ".join(str(k) for k in known if k is not None)
            raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")

    def _within(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in [{least}, {most}], got {value}")


def load(path: str | Path, **changes: Any) -> Recipe:
    """The recipe of a YAML file, with some values in place of its own.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has names that no recipe has.
    """
    return made(files.read_recipe(Path(path)) | changes)


def made(told: dict[str, Any]) -> Recipe:
    """The recipe with these values.

    Raises:
        ValueError: a name that no recipe has, or one that every recipe needs is missing.
    """
    files.check_recipe(told, [field.name for field in fields(Recipe)], ("input", "output"))
    return Recipe(**told)


@dataclass(frozen=True)
class Plan:
    """A recipe with all that follows from it and from the files that it names.

    Attributes:
        recipe: the recipe.
        inputs: the files, each with the name that begins the ids of its documents and its format.
        files: into how many files the documents are divided.
        size: bytes of the input.
        told: what the key is made of.
    """

    recipe: Recipe
    inputs: list[tuple[str, str, str]]
    files: int
    size: int
    told: dict[str, Any]

    @property
    def key(self) -> str:
        """A name for the result, the same for the same recipe, inputs and versions."""
        told = json.dumps(self.told, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output) / self.key


def plan(recipe: Recipe) -> Plan:
    """Checks a recipe and the files that it names.

    Raises:
        ValueError: files that are missing or in no known format, steps with other options, or a
            tokenizer that cannot be used.
        OSError: a file cannot be read.
    """
    inputs, size, told = [], 0, []
    for root in map(Path, recipe.input):
        for path in sources.found(root):
            form = recipe.format or sources.format_of(path)
            if form is None:
                raise ValueError(
                    f"{path}: no format is known for this ending: set format to one of "
                    f"{', '.join(sources.FORMATS)}"
                )
            name = path.name if path == root else path.relative_to(root).as_posix()
            size += path.stat().st_size
            inputs.append((str(path), name, form))
            told.append((name, form, tokens.digest(path)))
    names = [name for _, name, _ in inputs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"input: two files have the name {twice}, and ids would repeat")
    for name in names:
        if name != name.encode(errors="replace").decode():
            raise ValueError(
                f"input: a file has the name {name!r}, which cannot be written in UTF-8"
            )
    clean.steps(list(recipe.clean), recipe.words)
    tokens.check(recipe.tokenizer, recipe.end_token)
    divided = recipe.files or min(_MOST, max(_LEAST, -(-size // _SIZE)))
    values = asdict(recipe)
    for name in ("input", "output", "slurm", "files"):
        del values[name]
    values |= {
        "files": divided,
        "inputs": told,
        "tokenizer": _tokenizer(recipe.tokenizer),
        "decontaminate": [tokens.digest(Path(path)) for path in recipe.decontaminate],
        "clean": _with_contents(list(recipe.clean)),
        "versions": versions(),
    }
    return Plan(recipe, inputs, divided, size, values)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    python = ".".join(map(str, sys.version_info[:2]))  # has the tables of Unicode
    return {"python": python, **{name: version(name) for name in _PACKAGES}}


def _tokenizer(spec: str) -> str:
    kind, _ = tokens.parsed(spec)
    if kind is not None:
        return spec
    tokenizer = tokenize.load(spec)
    content = tokenizer.backend.to_str() + json.dumps(tokenizer.special, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _with_contents(told: list[Any]) -> list[Any]:
    """Steps, with the contents of files in place of their names."""
    changed = []
    for entry in told:
        if isinstance(entry, dict):
            options = dict(next(iter(entry.values())) or {})
            if "file" in options:
                options["file"] = tokens.digest(Path(options["file"]))
            entry = {next(iter(entry)): options}
        changed.append(entry)
    return changed
