"""From a conversation to the texts to train on: which answers, after which prompts, in how many sequences.

Everything here is about text. What a template leaves out or puts in another order is found here, by comparing what it
rendered with what the row says, and refused with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tunery.data.codec import CLOSE, OPEN, Codec
from tunery.data.render import Renderer, RowRefused, to_dicts
from tunery.errors import TemplateError
from tunery.types import Message

_THINK = re.compile(r"\s*<think>\s*")
_WORD = re.compile(r"[A-Za-z0-9]+")


@dataclass(slots=True)
class Turn:
    """One trained answer: its place among the messages, the text of its prompt, the text of the conversation up to
    and with it, and its loss weight. `untrained`: stretches of `upto` after the prompt (in characters) that the
    template says the model does not write."""

    index: int
    prompt: str
    upto: str
    weight: float
    untrained: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Draft:
    """One rendered text to be one sequence, of the first `count` messages. `shadow`: its control tokens are renamed;
    `base`: the loss weight of everything outside the turns."""

    text: str
    shadow: bool
    count: int
    turns: list[Turn] = field(default_factory=list)
    base: float = 0.0


class Drafter:
    """Conversations to drafts with one template."""

    def __init__(self, renderer: Renderer, codec: Codec, name: str):
        self.renderer = renderer
        self.codec = codec
        self.name = name

    # ------------------------------------------------------------ what the template does, learned by probing

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the template writes between a prompt and the answer, and between the answer and its end token."""
        prompt, text, place = self._probe
        found = self.codec.pattern.search(text, place)
        return text[len(prompt) : place - len(_PROBE)], text[place : found.start() if found else len(text)]

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an assistant's turn: the first one after an answer, and the last one after a tool call
        where the template has another token there. Raises TemplateError when an answer ends with no token."""
        _, text, place = self._probe
        found = self.codec.pattern.search(text, place)
        if found is None:
            raise TemplateError(
                f"template {self.name!r} ends an answer with {text[place:]!r}, in which there is no special token of "
                "this tokenizer, so a model trained with it would not learn to stop. Choose a named template, or end "
                "answers with eos_token in the .jinja file"
            )
        ends = [self.codec.ids[found.group()]]
        call = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
        user = {"role": "user", "content": "Hello"}
        try:
            called = self.renderer.render(
                [user, {"role": "assistant", "content": "", "tool_calls": [call]}], None, False
            )
        except RowRefused:
            return ends
        plain, after_call = self.codec.last_control(text, False), self.codec.last_control(called, False)
        if _PROBE in called and plain and after_call and after_call.group() != plain.group():
            ends.append(self.codec.ids[after_call.group()])
        return ends

    @cached_property
    def thinking(self) -> bool:
        """Whether the prompt itself opens the reasoning, as in DeepSeek R1's templates."""
        return self._probe[0].rstrip().endswith("<think>")

    @cached_property
    def _probe(self) -> tuple[str, str, int]:
        """A prompt, the conversation with its answer, and where the answer ends in it."""
        user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}
        refused = None
        for head in ([user], [{"role": "system", "content": "Hello"}, user]):
            try:
                prompt = self.renderer.render(head, None, True)
                text = self.renderer.render([*head, answer], None, False)
            except RowRefused as error:
                refused = error
                continue
            if _PROBE in text:
                return prompt, text, text.rfind(_PROBE) + len(_PROBE)
        raise TemplateError(f"template {self.name!r} cannot render a question and an answer: {refused}")

    # ------------------------------------------------------------ rendering

    def prompt(self, messages: Sequence[Message], tools: Any) -> tuple[str, bool]:
        """The text to generate from, and whether its control tokens are renamed."""
        rows, tools, shadow = self._dicts(messages, tools)
        return self._text(rows, tools, shadow, True), shadow

    def _text(self, rows: list[dict[str, Any]], tools: Any, shadow: bool, header: bool) -> str:
        text = self.renderer.render(rows, tools, header)
        return self.codec.rename(text) if shadow else text

    def _dicts(self, messages: Sequence[Message], tools: Any) -> tuple[list[dict[str, Any]], Any, bool]:
        """Messages and tools for the renderer, marked if they hold look-alikes, and whether they do."""
        rows = to_dicts(messages)
        hints = self.codec.hints
        simple = tools is None and all(len(row) == 2 for row in rows)
        strings = [row["content"] for row in rows] if simple else [json.dumps([rows, tools], ensure_ascii=False)]
        if any(hint in text for text in strings for hint in hints):
            marked_rows, marked_tools = self.codec.mark(rows), self.codec.mark(tools)
            if marked_rows != rows or marked_tools != tools:
                return marked_rows, marked_tools, True
        return rows, tools, False

    # ------------------------------------------------------------ drafts

    def drafts(self, messages: Sequence[Message], tools: Any, train: str) -> list[Draft]:
        """The sequences of one conversation, as text. Raises RowRefused."""
        trained = _trained(messages, train)
        rows, marked_tools, shadow = self._dicts(messages, tools)
        whole = Draft(
            self._text(rows, marked_tools, shadow, False), shadow, len(rows), base=1.0 if train == "all" else 0.0
        )
        own = []
        for i in trained:
            prompt = self._text(rows[:i], marked_tools, shadow, True)
            last = i == len(rows) - 1
            upto = whole.text if last else self._text(rows[: i + 1], marked_tools, shadow, False)
            self._check_answer(messages[i], i, upto)
            if not upto.startswith(prompt):
                upto, last = self._after_thinking(messages[i], i, prompt, upto, shadow), False
            weight = messages[i].weight
            turn = Turn(i, prompt, upto, 1.0 if weight is None else weight)
            if self.renderer.has_markers:
                turn.untrained = self._untrained(rows[: i + 1], marked_tools, shadow, turn)
            if last or whole.text.startswith(upto[: self._turn_end(turn, shadow)]):
                whole.turns.append(turn)
            elif train != "all" or i == len(rows) - 1:
                own.append(Draft(upto, shadow, i + 1, [turn], whole.base))
        self._check_shown(messages, tools, (own[-1] if own and not whole.turns else whole).text)
        if train == "all" and own:
            return own
        return own + [whole] if whole.turns or whole.base else own

    def _turn_end(self, turn: Turn, shadow: bool) -> int:
        """Where the turn's end token ends in `upto`."""
        for found in self.codec.controls(turn.upto, shadow, len(turn.prompt)):
            if self.codec.id_of(found.group(), shadow) in self.ends:
                return found.end()
        return len(turn.upto)

    def _after_thinking(self, message: Message, i: int, prompt: str, upto: str, shadow: bool) -> str:
        """The text for a template whose prompt opens the reasoning although a finished turn does not show it: the
        prompt, the row's reasoning (which may be empty), its closing, and then the answer as the template writes it.
        That is what the model has to produce there, and what no rendering of the template shows."""
        same = next(
            (k for k, (a, b) in enumerate(zip(prompt, upto, strict=False)) if a != b), min(len(prompt), len(upto))
        )
        if not _THINK.fullmatch(prompt[same:].replace(OPEN, "").replace(CLOSE, "")) or "</think>" in upto[same:]:
            raise RowRefused(
                "the prompt does not lead to the answer",
                f"message {i + 1}: after {upto[max(0, same - 20) : same]!r} the prompt goes on with "
                f"{prompt[same : same + 30]!r}, the conversation with {upto[same : same + 30]!r}",
            )
        reasoning = message.reasoning
        if reasoning is None and "</think>" in message.content:
            reasoning = message.content.partition("</think>")[0].replace("<think>", "", 1)
        thoughts = f"{(reasoning or '').strip()}\n</think>\n\n"
        if shadow:
            thoughts = self.codec.rename(self.codec.mark((reasoning or "").strip(), assistant=True) + "\n</think>\n\n")
        return prompt + thoughts + upto[same:].lstrip("\n")

    def _untrained(self, rows: list[dict[str, Any]], tools: Any, shadow: bool, turn: Turn) -> list[tuple[int, int]]:
        """The stretches of the turn, up to its end token, outside the template's {% generation %} blocks."""
        text, spans = self.renderer.render_marked(rows, tools)
        if shadow:
            spans = [(len(self.codec.rename(text[:a])), len(self.codec.rename(text[:b]))) for a, b in spans]
            text = self.codec.rename(text)
        if text != turn.upto:
            return []
        start, end = len(turn.prompt), self._turn_end(turn, shadow)
        control = self.codec.last_control(turn.upto[:end], shadow)
        end = max(start, control.start()) if control and control.end() == end else end  # the end token always counts
        gaps = []
        for a, b in sorted(spans):
            if a > start:
                gaps.append((start, min(a, end)))
            start = max(start, b)
            if start >= end:
                return gaps
        return [*gaps, (start, end)]

    # ------------------------------------------------------------ nothing is left out in silence

    def _check_answer(self, message: Message, i: int, upto: str) -> None:
        if message.reasoning and not self.thinking and not _shows(upto, message.reasoning):
            raise RowRefused("template has no place for reasoning", f"message {i + 1}")
        for call in message.tool_calls:
            if call.name not in upto:
                raise RowRefused("template has no place for tool calls", f"message {i + 1} calls {call.name}")

    def _check_shown(self, messages: Sequence[Message], tools: Any, text: str) -> None:
        for i, message in enumerate(messages):
            if message.content not in text and not _shows(text, message.content):
                raise RowRefused(f"template leaves out {message.role} messages", f"message {i + 1}")
        for tool in tools or []:
            name = tool.get("function", tool).get("name")
            if name and name not in text:
                raise RowRefused("template has no place for tools", f"tool {name}")


_PROBE = "Probe"


def _trained(messages: Sequence[Message], train: str) -> list[int]:
    """Places of the answers to train, checked. For "all": those whose weight is not that of the rest, and the last."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise RowRefused("no assistant turn")
    wanted = [i for i in (answers[-1:] if train == "last" else answers) if messages[i].weight != 0]
    for i in wanted:
        message = messages[i]
        if not (message.content.strip() or message.tool_calls):
            raise RowRefused("empty answer", f"message {i + 1}")
    if train == "all":
        return [i for i in answers if messages[i].weight is not None or i == len(messages) - 1]
    if not wanted:
        raise RowRefused("nothing to train", "every assistant turn to train has weight 0")
    return wanted


def _shows(text: str, content: str) -> bool:
    """Whether a rendered text holds this content, which a template may trim, escape or take apart: its longest word
    must be there. Content without a word of ASCII letters or digits cannot be judged so."""
    if content.strip() in text:
        return True
    if "</think>" in content:
        content = content.rpartition("</think>")[2]
    longest = max(_WORD.findall(content[:2000]), key=len, default="")
    return longest in text
