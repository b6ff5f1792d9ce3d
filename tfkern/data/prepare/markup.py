"""The text of wikitext, as a reader of the page sees it."""

import re
from typing import Any

import mwparserfromhell
from mwparserfromhell import nodes

_HIDDEN = frozenset(
    ("ref", "table", "gallery", "math", "timeline", "references", "source", "syntaxhighlight")
)
_ASIDE = re.compile(r"(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)", re.IGNORECASE)
_LEFT = re.compile(r"'{2,5}|\[\[|\]\]|\{\{|\}\}|\{\||\|\}|<ref[^>]*>?|</ref>|<!--|-->")


def plain_text(wikitext: str) -> str:
    """The words of wikitext: those of links, headings and formatting, without templates, tables,
    references, formulas, comments, and links to pictures, categories and other languages."""
    parts: list[str] = []
    _walk(mwparserfromhell.parse(wikitext, skip_style_tags=True), parts)
    text = _LEFT.sub("", "".join(parts))
    lines = [line.strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _walk(code: Any, parts: list[str]) -> None:
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            parts.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            space, colon, _ = str(node.title).partition(":")
            if colon and _ASIDE.fullmatch(space.strip()):
                continue
            _walk(node.title if node.text is None else node.text, parts)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                _walk(node.title, parts)
            elif not node.brackets:
                parts.append(str(node.url))
        elif isinstance(node, nodes.Tag):
            if str(node.tag).lower() not in _HIDDEN and node.contents is not None:
                _walk(node.contents, parts)
        elif isinstance(node, nodes.Heading):
            parts.append("\n")
            _walk(node.title, parts)
            parts.append("\n")
        elif isinstance(node, nodes.HTMLEntity):
            try:
                character = node.normalize()
            except ValueError:  # no character has this number
                continue
            parts.append("" if "\ud800" <= character <= "\udfff" else character)
