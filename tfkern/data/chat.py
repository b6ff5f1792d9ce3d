"""Conversations to tokens, of which only the assistant's are targets."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tfkern import files
from tfkern.data.sources import IGNORED, Item
from tfkern.data.template import Template

if TYPE_CHECKING:
    from tfkern.tokenize import Tokenizer

_FORMS = '"messages", "prompt" and "completion", or "chosen" and "rejected" (with "prompt" or not)'


class Chat:
    """Rows of conversations to items.

        chat = Chat(tokenize.load(folder), Template(read_template(folder)))
        item = chat.item({"messages": [{"role": "user", "content": "Hi"},
                                       {"role": "assistant", "content": "Hello"}]})

    A message has a "role", mostly a "content", and whatever else the template reads. Control tokens
    that a message spells become plain text; those that the template writes are control tokens.

    The assistant's part is what {% generation %} marks in the template. Without such marks it is
    what the template adds to the messages before, written with add_generation_prompt, when the
    message is there: all of it, such as the token that ends a turn. A template that writes earlier
    messages in another way when others follow needs the marks.

    Args:
        tokenizer: makes tokens of the text.
        template: writes messages as text.
        variables: what else the template reads, such as "enable_thinking".
    """

    def __init__(
        self, tokenizer: "Tokenizer", template: Template, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        special = {f"{role}_token": token for role, token in tokenizer.special.items()}
        self._variables = {"documents": None, **special, **(variables or {})}
        added = tokenizer.backend.get_added_tokens_decoder()
        self._control = {str(token): i for i, token in added.items() if token.special}
        self._shield = _Shield(self._control)

    def item(self, row: Mapping[str, Any]) -> Any:
        """A row as tokens and targets, or a preference row as "chosen" and "rejected" of these.

        A row has "messages"; or a "prompt" and a "completion"; or "chosen" and "rejected", with a
        "prompt", or with messages of which the first ones that are equal are the prompt. These are
        lists of messages, or texts, which the end token follows. A row may have "tools". No token
        of a prompt is a target.

        Returns:
            a dict with "tokens" and "targets", (n,) int64: the target of a token is the token that
            follows it, if it is the assistant's, and `IGNORED` if not.

        Raises:
            ValueError: the row has another form, no word of the assistant, or messages that the
                template refuses or does not write in one way.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be an object, got {files.shown(row)}")
        tools = row.get("tools")
        if "messages" in row:
            return self._messages([], _messages("messages", row["messages"]), tools)
        if "completion" in row and "prompt" in row:
            return self._pair("completion", row["prompt"], row["completion"], tools)
        if "chosen" not in row or "rejected" not in row:
            raise ValueError(f"a row must have {_FORMS}, got {files.shown(sorted(map(str, row)))}")
        prompt, ends = row.get("prompt"), {name: row[name] for name in ("chosen", "rejected")}
        if prompt is None:
            for name, messages in ends.items():
                ends[name] = _messages(name, messages)
            pairs = enumerate(zip(*ends.values(), strict=False))
            shortest = min(map(len, ends.values()))
            same = next((i for i, (a, b) in pairs if a != b), shortest)
            prompt = ends["chosen"][:same]
            ends = {name: messages[same:] for name, messages in ends.items()}
        return {name: self._pair(name, prompt, end, tools) for name, end in ends.items()}

    def prompt(self, row: Mapping[str, Any]) -> np.ndarray:
        """The "prompt" of a row as tokens (n,) int64, behind which an answer is to be written.

        It is a list of messages, behind which the template opens the assistant's turn, or a text.

        Raises:
            ValueError: the row has no prompt, or one that the template refuses.
        """
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise ValueError(f'a row must be an object with a "prompt", got {files.shown(row)}')
        prompt, tools = row["prompt"], _plain(row.get("tools"))
        if isinstance(prompt, str):
            pieces: list[str | int] = [*self._opening(), prompt]
        else:
            messages = _plain(_messages("prompt", prompt))
            words = [self.template.text, *_strings([messages, tools, self._variables])]
            guard = next(_unused("".join(words)))

            def shield(text: str) -> str:
                return self._shield(text, guard)

            text = self._render(_mapped(messages, shield), _mapped(tools, shield), True)
            pieces, _ = self._pieces(text, [], guard)
        return np.array(self.tokenizer.encode_pieces(pieces)[0], np.int64)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False, tools: Any = None
    ) -> str:
        """The text of messages, with what opens the assistant's answer behind it if `prompt`."""
        return self._render(_plain(_messages("messages", messages)), _plain(tools), prompt)

    def _render(
        self, messages: Any, tools: Any, prompt: bool, marks: tuple[str, str] = ("", "")
    ) -> str:
        given = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
        return self.template.render({**self._variables, **given}, marks)

    def _pair(self, name: str, prompt: Any, completion: Any, tools: Any) -> Item:
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._texts(prompt, completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError(f"prompt and {name} must both be texts, or both messages")
        return self._messages(_messages("prompt", prompt), _messages(name, completion), tools)

    def _texts(self, prompt: str, completion: str) -> Item:
        opening, eos = self._opening(), self.tokenizer.special_id("eos")
        pieces: list[str | int] = [*opening, prompt, completion, eos]
        return self._tokens(pieces, [False] * len(opening) + [False, True, True])

    def _opening(self) -> list[int]:
        """The token that texts begin with, if the model's tokenizer puts one there."""
        bos, around = self.tokenizer.special.get("bos"), self.tokenizer.encode("")
        opens = bos is not None and around[:1] == [self.tokenizer.id(bos)]
        return around[: int(opens)]

    def _messages(self, prompt: list[Any], messages: list[Any], tools: Any) -> Item:
        prompt, messages, tools = _plain(prompt), _plain(messages), _plain(tools)
        words = [self.template.text, *_strings([prompt, messages, tools, self._variables])]
        guard, *marks = itertools.islice(_unused("".join(words)), 3)

        def shield(text: str) -> str:
            return self._shield(text, guard)

        prompt, tools = _mapped(prompt, shield), _mapped(tools, shield)
        messages = prompt + _mapped(messages, shield)
        if self.template.generation:
            marked = self._render(messages, tools, False, (marks[0], marks[1]))
            text, spans = _cut_out(marked, *marks)
        else:
            text = self._render(messages, tools, False)
            spans = list(self._answers(text, messages, len(prompt), tools))
        if prompt:
            start = len(self._before(text, messages, len(prompt), tools))
            spans = [(max(a, start), b) for a, b in spans if b > start]
        if not spans:
            raise ValueError("the assistant says nothing in this row")
        return self._tokens(*self._pieces(text, spans, guard))

    def _answers(
        self, text: str, messages: list[Any], first: int, tools: Any
    ) -> Iterator[tuple[int, int]]:
        """Where the messages of the assistant stand, from the message `first` on."""
        for i in range(first, len(messages)):
            if messages[i].get("role") == "assistant":
                start = self._before(text, messages, i, tools)
                upto = text
                if i + 1 < len(messages):
                    upto = self._same(text, self._render(messages[: i + 1], tools, False), i)
                if len(upto) > len(start):
                    yield len(start), len(upto)

    def _before(self, text: str, messages: list[Any], count: int, tools: Any) -> str:
        """What the template writes before it writes message `count`."""
        prompt = any(m.get("role") == "assistant" for m in messages[count : count + 1])
        return self._same(text, self._render(messages[:count], tools, prompt), count)

    def _same(self, text: str, part: str, message: int) -> str:
        if not text.startswith(part):
            raise ValueError(
                f"the template does not write the messages up to message {message} (from 0) in one "
                "way alone and before others: mark the assistant's part by {% generation %}"
            )
        return part

    def _pieces(
        self, text: str, spans: list[tuple[int, int]], guard: str
    ) -> tuple[list[str | int], list[bool]]:
        """The text in pieces, control tokens as ids, and which pieces are the assistant's."""
        pieces: list[str | int] = []
        counted: list[bool] = []
        edges = [edge for span in spans for edge in span]
        for start, part, control in self._shield.split(text, guard):
            cuts = [start, *(e for e in edges if start < e < start + len(part)), start + len(part)]
            for a, b in itertools.pairwise(cuts if not control else (start, start + len(part))):
                pieces.append(self._control[part] if control else part[a - start : b - start])
                counted.append(any(low <= a < high for low, high in spans))
        return pieces, counted

    def _tokens(self, pieces: list[str | int], counted: list[bool]) -> Item:
        ids, made_of = self.tokenizer.encode_pieces(pieces)
        tokens = np.array(ids, np.int64)
        answer = np.array([any(counted[i] for i in each) for each in made_of], bool)
        targets = np.full(len(tokens), IGNORED)
        targets[:-1] = np.where(answer[1:], tokens[1:], IGNORED)
        return {"tokens": tokens, "targets": targets}


class _Shield:
    """Guards control tokens that messages spell, and tells them from those of the template.

    The guard is a character that occurs nowhere else. It is put around a control token, and beside
    a text that begins or ends like one or is a part of one, so that several texts make none
    together. Words are left alone: templates compare them, and some make control tokens of roles.
    """

    def __init__(self, control: Mapping[str, int]) -> None:
        self._names = names = sorted(filter(None, control), key=len, reverse=True)
        self._any = "|".join(map(re.escape, names)) or "(?!)"  # which matches nothing
        self._heads = tuple({name[i:] for name in names for i in range(1, len(name))})
        self._tails = tuple({name[:i] for name in names for i in range(1, len(name))})

    def __call__(self, text: str, guard: str) -> str:
        body = text.strip()
        if not body or body.isidentifier():  # such as a role, which templates compare
            return re.sub(self._any, rf"{guard}\g<0>{guard}", text)
        within = any(body in name for name in self._names)
        front = guard if within or body.startswith(self._heads) else ""
        behind = guard if body.endswith(self._tails) else ""
        middle = re.sub(self._any, rf"{guard}\g<0>{guard}", body)
        return text.replace(body, f"{front}{middle}{behind}", 1)

    def split(self, text: str, guard: str) -> Iterator[tuple[int, str, bool]]:
        """The parts of a text without guards: where each stands in the text, and whether it is a
        control token."""
        end = 0
        for found in re.finditer(f"{guard}({self._any}){guard}|{guard}|({self._any})", text):
            yield end, text[end : found.start()], False
            spelled, control = found.groups()
            if control:
                yield found.start(), control, True
            elif spelled:
                yield found.start() + len(guard), spelled, False
            end = found.end()
        yield end, text[end:], False


def _unused(text: str) -> Iterator[str]:
    """Characters that a text does not have. JSON writes the first one as it is, even in ASCII."""
    known = set(text)
    every = itertools.chain([0x7F], range(0xF0000, 0x10FFFE))  # too many to be made at once
    return (c for c in map(chr, every) if c not in known)


def _cut_out(text: str, before: str, after: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and where the stretches between marks are in it."""
    parts, spans, place, depth, start = [], [], 0, 0, 0
    for part in re.split(f"([{before}{after}])", text):
        if part == before:
            start, depth = (place if not depth else start), depth + 1
        elif part == after:
            depth -= 1
            if not depth and place > start:
                spans.append((start, place))
        else:
            parts.append(part)
            place += len(part)
    return "".join(parts), spans


def _messages(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of messages, got {files.shown(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'{name}[{i}] must have a "role", got {files.shown(message)}')
    # a name without a value is as if it were absent, and templates ask whether it is there
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _plain(value: Any) -> Any:
    """A copy of what JSON can hold; a template can do nothing else to such values than read them.

    Raises:
        ValueError: there is something else.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    raise ValueError(f"messages hold texts, numbers, lists and objects, not {files.shown(value)}")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with all its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(k, change): _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else value


def _strings(value: Any) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _mapped(value, note)
    return found
