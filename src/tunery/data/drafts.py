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

from tunery.data.codec import Codec
from tunery.data.render import Renderer, RowRefused, to_dicts
from tunery.data.shadow import CLOSE, OPEN, renamed
from tunery.data.spans import Weighted, bounded, found_again
from tunery.errors import TemplateError
from tunery.types import Message

# A prompt that ends by opening the model's reasoning, perhaps closing it at once, and how an opening is closed.
_CLOSE = {"<think>": "\n</think>\n\n", "<|START_THINKING|>": "<|END_THINKING|>", "<|channel>thought": "<channel|>"}
_THINKING = re.compile(
    r"(?P<open><think>|<\|START_THINKING\|>|<\|channel>thought)\s*"
    r"(?P<closed>(?:</think>|<\|END_THINKING\|>|<channel\|>)\s*)?\Z"
)
_PROBE = "Probe"
_USER = {"role": "user", "content": "Hello"}
_WORD = re.compile(r"[A-Za-z0-9]+")


@dataclass(slots=True)
class Turn:
    """One trained answer: its place among the messages, the text of its prompt, the text of the conversation up to
    and with it, and its loss weight. `untrained`: stretches of `upto` after the prompt (in characters) that the
    template says the model does not write. `spans`: those whose tokens' weights are multiplied."""

    index: int
    prompt: str
    upto: str
    weight: float
    untrained: list[tuple[int, int]] = field(default_factory=list)
    spans: list[Weighted] = field(default_factory=list)


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
        before = text[len(prompt) : place - len(_PROBE)] if text.startswith(prompt) else ""
        return before, text[place : found.start() if found else len(text)]

    @cached_property
    def stop(self) -> str:
        """What has to be added after an answer: nothing where the template ends it with a token, else eos. (Some
        templates end an answer only by the beginning of the next turn, or with a line break.)"""
        _, text, place = self._probe
        if self.codec.pattern.search(text, place):
            return ""
        if self.codec.eos is None:
            raise TemplateError(
                f"template {self.name!r} ends an answer with {text[place:]!r}, in which there is no special token of "
                "this tokenizer, and the tokenizer has no eos_token: a model trained so would not learn to stop. "
                "Set eos_token in its tokenizer_config.json"
            )
        return self.codec.eos

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an assistant's turn: the first one after an answer (the second, where the text ends with two
        side by side), and the one at the end of a tool call where the template has another token there."""
        _, text, place = self._probe
        after = list(self.codec.controls(text, False, place))
        end = after[0].group() if after else self.stop
        if len(after) == 2 and after[0].end() == after[1].start() and after[1].end() == len(text.rstrip()):
            end = after[1].group()
        ends = [self.codec.ids[end]]
        call = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            called = self.renderer.render([_USER, answer], None, False).rstrip()
        except RowRefused:
            return ends
        plain, last = self.codec.last_control(text, False), self.codec.last_control(called, False)
        if _PROBE in called and plain and last and last.end() == len(called) and last.group() != plain.group():
            ends.append(self.codec.ids[last.group()])
        return ends

    @cached_property
    def thinking(self) -> bool:
        """Whether the prompt itself opens the reasoning, as in DeepSeek R1's templates."""
        found = _THINKING.search(self._probe[0])
        return found is not None and not found.group("closed")

    @cached_property
    def _probe(self) -> tuple[str, str, int]:
        """A prompt, the conversation with its answer, and where the answer ends in it."""
        answer = {"role": "assistant", "content": _PROBE}
        system = {"role": "system", "content": "Hello"}
        refused = None
        for head, tools in (([_USER], None), ([system, _USER], None), ([_USER], [])):
            try:
                prompt = self.renderer.render(head, tools, True)
                text = self.renderer.render([*head, answer], tools, False)
            except RowRefused as error:
                refused = error
                continue
            if _PROBE in text:
                return prompt, text, text.rfind(_PROBE) + len(_PROBE)
        why = refused or "the answer is not in what it renders"
        raise TemplateError(f"template {self.name!r} cannot render a question and an answer: {why}")

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
        stop = renamed(self.stop) if shadow and self.stop else self.stop
        for i in trained:
            last = i == len(rows) - 1
            upto = whole.text if last else self._text(rows[: i + 1], marked_tools, shadow, False)
            prompt = self._prompt_of(rows, i, marked_tools, shadow, upto)
            natural = upto.startswith(prompt) and not stop
            if not upto.startswith(prompt):
                upto = self._as_inferred(messages, i, rows, marked_tools, prompt, upto, shadow)
            weight = messages[i].weight
            turn = Turn(i, prompt, upto + stop, 1.0 if weight is None else weight)
            self._check_answer(messages[i], turn.upto[len(prompt) : self._turn_end(turn, shadow)], f"message {i + 1}")
            if self.renderer.has_markers:
                turn.untrained = self._untrained(rows[: i + 1], marked_tools, shadow, turn)
            if messages[i].spans:
                turn.spans = self._spans(messages[: i + 1], rows, marked_tools, shadow, turn, stop)
            if natural and (last or whole.text.startswith(upto[: self._turn_end(turn, shadow)])):
                whole.turns.append(turn)
            elif train != "all" or last:
                own.append(Draft(turn.upto, shadow, i + 1, [turn], whole.base))
            else:
                raise RowRefused("weights do not apply", f"the template rewrites message {i + 1} in later turns")
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

    def _as_inferred(
        self,
        messages: Sequence[Message],
        i: int,
        rows: list[dict[str, Any]],
        tools: Any,
        prompt: str,
        upto: str,
        shadow: bool,
    ) -> str:
        """The text of a prompt and its answer, for a template that writes the prompt in another way once the answer is
        there. What is trained must follow the prompt that inference sends, so the answer is put after that one:

        - the prompt opens the reasoning (DeepSeek R1, QwQ), which a finished turn does not show: the row's reasoning
          (or none), its closing, and the answer as the template writes it;
        - otherwise the answer as the template writes it after a simple question, if the text here ends with the same
          (Mistral writes the system message before the last question only while that has no answer)."""
        thinking = _THINKING.search(prompt.replace(OPEN, "").replace(CLOSE, "")) if shadow else _THINKING.search(prompt)
        if thinking is not None:
            base = self._before(prompt, thinking.group(), shadow)
            if upto.startswith(base):
                return prompt + self._thoughts(messages[i], thinking, upto[len(base) :], shadow)
        answer = self._answer_of(rows[i], tools, shadow, upto)
        if answer:
            return prompt + answer
        same = next((k for k, (a, b) in enumerate(zip(prompt, upto, strict=False)) if a != b), 0)
        raise RowRefused(
            "the prompt does not lead to the answer",
            f"message {i + 1}: after {upto[max(0, same - 20) : same]!r} the prompt goes on with "
            f"{prompt[same : same + 30]!r}, the conversation with {upto[same : same + 30]!r}",
        )

    def _prompt_of(self, rows: list[dict[str, Any]], i: int, tools: Any, shadow: bool, upto: str) -> str:
        """The prompt of message i. A template may be unable to render no message at all; then a conversation that
        begins with an answer has as prompt what the template writes before it."""
        try:
            return self._text(rows[:i], tools, shadow, True)
        except RowRefused:
            answer = self._answer_of(rows[i], tools, shadow, upto) if i == 0 else ""
            if not answer:
                raise
            return upto.removesuffix(answer)

    def _answer_of(self, row: dict[str, Any], tools: Any, shadow: bool, upto: str) -> str:
        """The answer as the template writes it after a simple question, if `upto` ends with the same; else nothing."""
        for with_tools in (None, tools):
            try:
                ask = self._text([_USER], with_tools, shadow, True)
                answered = self._text([_USER, row], with_tools, shadow, False)
            except RowRefused:
                continue
            if answered.startswith(ask) and upto.endswith(answered[len(ask) :]):
                return answered[len(ask) :]
        return ""

    def _before(self, prompt: str, ending: str, shadow: bool) -> str:
        """The prompt without its ending."""
        return prompt.removesuffix(self.codec.rename(ending) if shadow else ending)

    def _thoughts(self, message: Message, thinking: re.Match[str], rest: str, shadow: bool) -> str:
        """What follows a prompt that has opened the reasoning; `rest` is the turn as the template writes it."""
        close = thinking.group("closed") or _CLOSE[thinking.group("open")]
        tag = close.strip()
        opened, closed = (self.codec.rename(t) if shadow else t for t in (thinking.group("open"), tag))
        shown = re.match(rf"(?:{re.escape(opened)})?(\s*{re.escape(closed)}\s*)", rest)
        rest = rest[shown.end() :] if shown else rest
        if thinking.group("closed"):
            return rest
        if rest.startswith(opened) and closed in rest:  # the template shows reasoning that stands in the content
            return rest.removeprefix(opened).lstrip("\n")
        reasoning = message.reasoning
        if reasoning is None and tag in message.content:
            reasoning = message.content.partition(tag)[0].replace(thinking.group("open"), "", 1)
        thoughts = (reasoning or "").strip()
        if shadow:
            thoughts, close = self.codec.rename(self.codec.mark(thoughts, assistant=True)), self.codec.rename(close)
        return thoughts + (shown.group(1) if shown else close) + rest.lstrip("\n")

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

    def _spans(
        self, messages: Sequence[Message], rows: list[dict[str, Any]], tools: Any, shadow: bool, turn: Turn, stop: str
    ) -> list[Weighted]:
        """Where the spans of the last of these messages are in the turn's `upto`: the turn is written again, with their
        boundaries in the text."""
        i = turn.index
        spoken = [*messages[:i], bounded(messages[i])]
        last = to_dicts(spoken)[i]
        marked = [*rows[:i], self.codec.mark(last) if shadow else last]
        upto = self._text(marked, tools, shadow, False)
        if not upto.startswith(turn.prompt):
            upto = self._as_inferred(spoken, i, marked, tools, turn.prompt, upto, shadow)
        found = found_again(messages[i], upto + stop, turn.upto)
        if found is None:
            raise RowRefused(
                "weights do not apply", f"the template does not write the weighted parts of message {i + 1} as they are"
            )
        return found

    # ------------------------------------------------------------ nothing is left out in silence

    def _check_answer(self, message: Message, answer: str, where: str) -> None:
        """The answer as rendered must show the message's content, reasoning and calls."""
        if message.reasoning and not _shows(answer, message.reasoning):
            raise RowRefused("template has no place for reasoning", where)
        if not _shows(answer, message.content):
            raise RowRefused("template leaves out assistant messages", where)
        for call in message.tool_calls:
            if call.name not in answer:
                raise RowRefused("template has no place for tool calls", f"{where} calls {call.name}")

    def _check_shown(self, messages: Sequence[Message], tools: Any, text: str) -> None:
        for i, message in enumerate(messages):
            if message.role != "assistant" and not _shows(text, message.content):
                raise RowRefused(f"template leaves out {message.role} messages", f"message {i + 1}")
        for tool in tools or []:
            name = tool.get("function", tool).get("name")
            if name and name not in text:
                raise RowRefused("template has no place for tools", f"tool {name}")


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
        weighed = [i for i in answers if messages[i].weight is not None or messages[i].spans]
        return [i for i in answers if i in weighed or i == len(messages) - 1]
    if not wanted:
        raise RowRefused("nothing to train", "every assistant turn to train has weight 0")
    return wanted


def _shows(text: str, content: str) -> bool:
    """Whether a rendered text holds this content, which a template may trim, escape or take apart: its longest word
    must be there. Content without a word of ASCII letters or digits cannot be judged so."""
    if content in text or content.strip() in text:
        return True
    if "</think>" in content:
        content = content.rpartition("</think>")[2]
    longest = max(_WORD.findall(content[:2000]), key=len, default="")
    return longest in text
