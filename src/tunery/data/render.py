"""Messages to text, by a Jinja chat template, exactly as `tokenizer.apply_chat_template` renders it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.nodes
from transformers.utils import chat_template_utils

from tunery.errors import TemplateError
from tunery.types import Message, Refused

# What `strftime_now` says in templates that print today's date (Llama 3.2, gpt-oss, ...). A fixed day, so that a row
# gives the same tokens whenever it is encoded; it is the day Llama 3.1's own template falls back to.
TODAY = datetime.datetime(2024, 7, 26)


class RowRefused(TemplateError):
    """This conversation cannot be used; `refused` is the reason to count by and the detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.refused = Refused(reason, detail)


def to_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages in the form chat templates read (OpenAI's, with parsed arguments). Absent fields are absent keys.

    Calls without an id get "call00000", "call00001", ... in order of appearance, and results without one take the
    ids in the same order: some templates insist on ids of nine characters."""
    rows = []
    called = answered = 0
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                function = {"name": call.name, "arguments": call.arguments}
                calls.append({"id": call.id or f"call{called:05d}", "type": "function", "function": function})
                called += 1
            row["tool_calls"] = calls
        if message.role == "tool":
            row["tool_call_id"] = message.tool_call_id or f"call{answered:05d}"
            answered += 1
        if message.name is not None:
            row["name"] = message.name
        if message.reasoning is not None:
            # Two names for one thing: most templates read the first, gpt-oss the second.
            row["reasoning_content"] = row["thinking"] = message.reasoning
        rows.append(row)
    return rows


class Renderer:
    """One template, compiled once. `variables`: the special tokens by name (bos_token, eos_token, ...)."""

    def __init__(self, source: str, variables: dict[str, Any]):
        self.source = source
        self.variables = {**variables, "strftime_now": TODAY.strftime}

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return chat_template_utils._compile_jinja_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from error

    @cached_property
    def literals(self) -> str:
        """Every string the template itself can write, joined by NUL."""
        tree = self._compiled.environment.parse(self.source)
        found = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        found += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        return "\0".join(found)

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template marks what the model generates, with {% generation %}."""
        tree = self._compiled.environment.parse(self.source)
        return any(
            isinstance(node.call, jinja2.nodes.Call)
            and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)
            and node.call.node.name == "_generation_support"
            for node in tree.find_all(jinja2.nodes.CallBlock)
        )

    def render(self, messages: Sequence[dict[str, Any]], tools: Any, header: bool) -> str:
        """The text of a conversation; `header`: with the opening of an assistant turn at its end.

        Raises RowRefused where the template raises."""
        compiled = self._compiled
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": header}
        try:
            # What `compiled.render(**given)` does, without copying every global into each new context.
            context = compiled.new_context({**self._names, **given}, shared=True)
            text = "".join(compiled.root_render_func(context))
        except Exception as error:
            raise refusal(error) from error
        check_text(text)
        return text

    @cached_property
    def _names(self) -> dict[str, Any]:
        return {**self._compiled.globals, **self.variables}

    def render_marked(self, messages: Sequence[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, end) characters of what {% generation %} encloses."""
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": False}
        try:
            # activate_tracker is transformers' extension of the environment, not Jinja's.
            with self._compiled.environment.activate_tracker(pieces, spans):  # pyright: ignore[reportAttributeAccessIssue]
                for piece in self._compiled.generate(**variables, **self.variables):
                    pieces.append(piece)  # one by one: the tracker reads the list while the template runs
        except Exception as error:
            raise refusal(error) from error
        return "".join(pieces), spans

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "variables": self.variables}


def check_text(text: str) -> None:
    """Raises RowRefused for half a surrogate pair, which JSON files can hold and no tokenizer can encode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = text[max(0, error.start - 20) : error.start]
            raise RowRefused("broken characters", f"half a surrogate pair after {place!r}") from error


def refusal(error: Exception) -> RowRefused:
    """What a failed rendering means for the row."""
    if type(error) is jinja2.TemplateError:  # raise_exception(...) in the template
        return RowRefused("template refuses these roles", str(error))
    return RowRefused("template cannot render this", f"{type(error).__name__}: {error}")
