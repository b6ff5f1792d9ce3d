"""Words and sentences, as the filters count them, without a model of a language."""

import re

from datatrove.utils.word_tokenizers import WordTokenizer

_WORD = re.compile(r"\w+(?:['’.-]\w+)*|[^\w\s]+")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+[\"'”’)]*|\n|$)")


class Whitespace(WordTokenizer):
    """Words are what stands between blanks, as the papers count them (Rae et al. 2021).

    Tokenizers that part punctuation from words change the counts: of pages of documentation they
    drop nine in ten, for too few words with a letter.
    """

    def __init__(self) -> None:
        super().__init__("en")

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[a:b].strip() for a, b in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in _SENTENCE.finditer(text) if m.group().strip()]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:  # datatrove keeps the words of a text by its tokenizer
        return hash(type(self).__name__)


class Words(Whitespace):
    """Words are letters and digits, and each run of punctuation is one, too."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)


TOKENIZERS = {"whitespace": Whitespace, "words": Words}
