"""Talk to a target in the terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tunery.errors import TuneryError
from tunery.generate.base import Request, Sampling
from tunery.types import Message

HELP = """\
/system TEXT  answer under this system message from now on (without TEXT: none)
/reset        forget the conversation
/help         this list
/quit         leave (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C while an answer runs stops the answer."""


class Chat:
    """A conversation: its system message, its turns so far, and who answers (`stream` of a generator)."""

    def __init__(self, generator: Any, sampling: Sampling, system: str | None = None):
        self.generator = generator
        self.sampling = sampling
        self.system = system
        self.turns: list[Message] = []

    def messages(self) -> list[Message]:
        return ([Message("system", self.system)] if self.system else []) + self.turns

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. The question and as much of the answer as was taken join the conversation, also when
        the caller stops in the middle; a question that could not be asked at all does not."""
        question = Message("user", text)
        pieces = self.generator.stream(Request([*self.messages(), question]), self.sampling)
        answer, completion = "", None
        try:
            while completion is None:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    completion = end.value
                    break
                answer += piece
                yield piece
        finally:
            pieces.close()
            if completion is not None or answer:
                parsed = completion.message if completion is not None else None
                self.turns += [question, parsed or Message("assistant", answer)]

    def command(self, line: str) -> str | None:
        """Carries out a line that begins with a slash; what to say about it, or None to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return None
        if name == "/reset":
            self.turns.clear()
            return "The conversation starts anew."
        if name == "/system":
            self.system = rest.strip() or None
            return f"System message: {self.system}" if self.system else "No system message."
        return HELP if name == "/help" else f"{name}: unknown command.\n{HELP}"


def chat(
    target: str | Path,
    prompt: str | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    template: str | None = None,
) -> None:
    """With `prompt`: prints the answer to it, and nothing else, to standard output. Without: a conversation, one turn a
    line, until /quit or the end of the input; input that is not a terminal is answered line by line without prompts.
    Raises ModelError when `target` cannot be loaded, TemplateError when it has no chat template."""
    from tunery.generate.hf import HFGenerator
    from tunery.models.target import load_target

    loaded = load_target(target, dtype=dtype, device=device, template=template, talks=True)
    generator = HFGenerator(loaded.model, loaded.tokenizer, loaded.template)
    talk = Chat(generator, sampling or Sampling(), system)
    if prompt is not None:
        _answer(talk, prompt, sys.stdout)
        return
    converse(talk, sys.stdin, sys.stdout, str(target))


def converse(talk: Chat, source: TextIO, out: TextIO, name: str) -> None:
    """The conversation over two files. What is not an answer goes to standard error unless `source` is a terminal, so
    that `echo hi | tunery chat TARGET > answer.txt` holds the answer."""
    terminal = source.isatty()
    notes = out if terminal else sys.stderr
    if terminal:
        _line_editing()
        print(f"{name}: /help lists the commands, Ctrl-D leaves.", file=notes)
    while True:
        try:
            line = _read(source, terminal)
        except KeyboardInterrupt:
            line = None
        if line is None:
            if terminal:
                print(file=notes)
            return
        line = line.strip()
        if not line:
            continue
        if line.startswith("/"):
            said = talk.command(line)
            if said is None:
                return
            print(said, file=notes, flush=True)
            continue
        try:
            _answer(talk, line, out)
        except KeyboardInterrupt:
            print(" [stopped]", file=notes, flush=True)
        except TuneryError as error:
            if not terminal:
                raise
            hint = " (/reset forgets the conversation)" if talk.turns else ""
            print(f"error: {error}{hint}", file=notes, flush=True)


def _answer(talk: Chat, question: str, out: TextIO) -> None:
    pieces = talk.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", file=out, flush=True)
    finally:
        # Closing puts what was said so far into the conversation, also after Ctrl-C.
        pieces.close()  # type: ignore[attr-defined]
    print(file=out, flush=True)


def _read(source: TextIO, terminal: bool) -> str | None:
    """The next line, or None at the end of the input."""
    if terminal:
        try:
            return input("> ")
        except EOFError:
            return None
    return source.readline() or None


def _line_editing() -> None:
    """Arrow keys and history at the prompt, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
