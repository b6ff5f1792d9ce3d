"""The steps that change or drop single documents, by the names that a recipe gives them."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import py3langid
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.formatters.base import BaseFormatter

from tfkern import files
from tfkern.data.prepare.markup import plain_text
from tfkern.data.prepare.options import checked
from tfkern.data.prepare.private import KINDS, mask
from tfkern.data.prepare.stage import named
from tfkern.data.prepare.words import TOKENIZERS


class PlainText(BaseFormatter):
    """Removes the markup of documents that have one."""

    name = "plain text"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            self.stat_update("total")
            if document.metadata.pop("markup", None) == "wiki":
                with self.track_time():
                    document.text = self.format(document.text)
            if document.text.strip():
                self.stat_update("forwarded")
                yield document
            else:
                self.stat_update("dropped", "dropped_empty")

    def format(self, text: str) -> str:
        return plain_text(text)


class Unicode(FTFYFormatter):
    """Repairs text that was decoded wrongly, and removes control characters (library ftfy)."""

    name = "unicode"


class Private(BaseFormatter):
    """Masks what points to a person."""

    name = "private"

    def __init__(self, kinds: list[str] | None = None) -> None:
        super().__init__()
        self.kinds = list(KINDS) if kinds is None else kinds
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")

    def format(self, text: str) -> str:
        return mask(text, self.kinds)


class Language(BaseFilter):
    """Drops documents in other languages (library py3langid)."""

    name = "language"

    def __init__(self, languages: list[str] | None = None) -> None:
        super().__init__()
        self.languages = ["en"] if languages is None else languages
        known = {name for name, _ in py3langid.rank("text")}
        for language in self.languages:
            if language not in known:
                raise ValueError(f"{language!r} is not one of {', '.join(sorted(known))}")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        found = py3langid.classify(doc.text)[0]
        return True if found in self.languages else (False, found)


class WordList(BaseFilter):
    """Drops documents in which more than a share of the words are in a list."""

    name = "word list"

    def __init__(self, file: str | Path, share: float = 0.0) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"share must lie in [0, 1), got {share}")
        text = Path(file).read_text("utf-8-sig")
        entries = {" ".join(line.split()).lower() for line in text.splitlines()} - {""}
        if not entries:
            raise ValueError(f"{file}: the list has no words")
        self.share = share
        # The longest comes first, so that it is found before one that begins it.
        choices = "|".join(
            re.escape(e).replace(r"\ ", r"\s+") for e in sorted(entries, key=lambda e: (-len(e), e))
        )
        self.pattern = re.compile(rf"(?<!\w)(?:{choices})(?!\w)")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        listed = sum(len(m.group().split()) for m in self.pattern.finditer(doc.text.lower()))
        return True if listed <= self.share * len(doc.text.split()) else (False, "listed")


class Length(BaseFilter):
    """Drops documents with fewer or more characters."""

    name = "length"

    def __init__(self, least: int = 1, most: int | None = None) -> None:
        super().__init__()
        limits = [least] if most is None else [least, most]
        if any(type(n) is not int for n in limits) or limits != sorted(limits):
            raise ValueError(f"least and most must be integers in this order, got {least}, {most}")
        self.least, self.most = least, most

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if len(doc.text) < self.least:
            return False, "short"
        return True if self.most is None or len(doc.text) <= self.most else (False, "long")


class Empty(Length):
    """Drops documents of which other steps left nothing."""

    name = "empty"


STEPS: dict[str, Callable[..., Any]] = {
    "unicode": Unicode,
    "private": Private,
    "language": Language,
    "length": Length,
    "word_list": WordList,
    "gopher_repetition": GopherRepetitionFilter,
    "gopher_quality": GopherQualityFilter,
    "c4": C4QualityFilter,
    "fineweb": FineWebQualityFilter,
}
# These are the steps that the papers apply to pages of the web, in their order.
GROUPS = {
    "web": (
        "unicode",
        "language",
        "gopher_repetition",
        "gopher_quality",
        "c4",
        "fineweb",
        "private",
    )
}
_FIXED = ("exclusion_writer", "language")  # parameters of datatrove's that a recipe has no use for


def steps(told: list[Any], words: str) -> list[Any]:
    """The steps of a recipe.

    Args:
        told: names, or objects of one name and its options, such as {"length": {"least": 100}}.
        words: the tokenizer that counts words.

    Raises:
        ValueError: an unknown name or option, or a value that a step refuses.
    """
    made: list[Any] = []
    for entry in told:
        if isinstance(entry, dict) and len(entry) == 1:
            name, options = next(iter(entry.items()))
            options = {} if options is None else options
        else:
            name, options = entry, {}
        if not isinstance(name, str):
            raise ValueError(f"clean: {files.shown(entry)} is neither a name nor {{name: options}}")
        if name not in {*GROUPS, *STEPS}:
            raise ValueError(f"clean: {name!r} is not one of {', '.join([*GROUPS, *STEPS])}")
        if name in GROUPS:
            if options:
                raise ValueError(f"clean: {name!r} takes no options, got {options!r}")
            made += steps(list(GROUPS[name]), words)
            continue
        made.append(_step(name, options, words))
    return made


def _step(name: str, options: Any, words: str) -> Any:
    kind = STEPS[name]
    options = checked(name, options, kind, _FIXED)
    if "language" in inspect.signature(kind).parameters:  # is how datatrove names the tokenizer
        options["language"] = TOKENIZERS[words]()
    try:
        step = kind(**options)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from None
    return named(step, name.replace("_", " "))
