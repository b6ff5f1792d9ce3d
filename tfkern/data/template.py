"""Chat templates: Jinja programs that write messages as one text, as transformers runs them."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tfkern import files

_TEMPLATE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


class Template:
    """A chat template.

    It runs in Jinja's sandbox, with the functions that transformers gives to templates.

    Args:
        text: the program.
        now: the time that templates are told; that of each call if None.

    Attributes:
        text: the program.
        generation: whether {% generation %} marks what the assistant says.

    Raises:
        ValueError: the text is no Jinja program.
    """

    def __init__(self, text: str, *, now: datetime | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
        self.text = text
        try:
            self._program = environment.from_string(text)
            parsed = environment.parse(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the template is no Jinja: {files.one_line(error)}") from None
        calls = parsed.find_all(nodes.ExtensionAttribute)
        self.generation = any(call.identifier == _Generation.identifier for call in calls)

    def render(self, variables: dict[str, Any], marks: tuple[str, str] = ("", "")) -> str:
        """The text that the template writes.

        Args:
            variables: what it reads: "messages", "add_generation_prompt" and others.
            marks: what is put in front of the assistant's part and behind it, if {% generation %}
                marks it.

        Raises:
            ValueError: the template fails, or refuses the messages.
        """
        try:
            return self._program.render({**variables, _MARKS: marks})
        except Exception as error:  # whatever its expressions do to values of another type
            what = files.one_line(error) or type(error).__name__
            raise ValueError(f"the template refuses the messages: {what}") from None


def read_template(folder: str | Path) -> str:
    """The chat template of a tokenizer: chat_template.jinja, or else tokenizer_config.json's.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    if (folder / _TEMPLATE).exists():
        try:
            return files.read(folder / _TEMPLATE).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{folder / _TEMPLATE} is not UTF-8") from None
    config = folder / _CONFIG
    found = files.read_object(config).get("chat_template") if config.exists() else None
    if isinstance(found, list):  # of several templates, each with its name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(f"{folder} has no chat template, in {_TEMPLATE} or in {_CONFIG}")
    return found


_MARKS = "tfkern_marks"


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: Any, caller: Any) -> str:
        before, after = context[_MARKS]
        return f"{before}{caller()}{after}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON that keeps <, > and &, which Jinja's own filter replaces."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
