"""Oracles: what a scripted model was asked and said; for a real one, the generator's own answer."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from tiny_model import save
from tunery.chat import Chat, chat, converse
from tunery.errors import ModelError
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from tunery.models.target import load_target
from tunery.types import Completion, Message


class Scripted:
    """Says the last question back in pieces, and remembers the conversations it was given. A piece that is an
    exception is raised."""

    def __init__(self, pieces=None, message=None):
        self.pieces, self.message = pieces, message
        self.asked: list[list[Message]] = []
        self.closed = 0

    def stream(self, request, sampling):
        self.asked.append(list(request.messages))
        pieces = self.pieces or ["You said ", request.messages[-1].content]
        try:
            for piece in pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1
        text = "".join(pieces)
        return Completion(0, [], text, "stop", self.message or Message("assistant", text))


class Terminal(io.StringIO):
    """Typed lines; an exception among them is a key such as Ctrl-C."""

    def __init__(self, *lines):
        super().__init__()
        self.lines = list(lines)

    def isatty(self):
        return True

    def typed(self, prompt):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def run(monkeypatch, generator, *lines, system=None):
    """A conversation at a terminal; what was on the screen, and the chat."""
    terminal, out = Terminal(*lines), io.StringIO()
    monkeypatch.setattr("builtins.input", terminal.typed)
    talk = Chat(generator, Sampling(), system)
    converse(talk, terminal, out, "runs/mine")
    return out.getvalue(), talk


def said(text):
    return [Message("user", text), Message("assistant", f"You said {text}")]


def test_history_system_and_reset(monkeypatch):
    model = Scripted()
    screen, _ = run(monkeypatch, model, "one", "two", "/system Be kind", "", "three", "/reset", "/system", "four")
    kind = Message("system", "Be kind")
    assert model.asked == [
        [Message("user", "one")],
        [*said("one"), Message("user", "two")],
        [kind, *said("one"), *said("two"), Message("user", "three")],
        [Message("user", "four")],
    ]
    assert "You said one\nYou said two\nSystem message: Be kind\nYou said three\n" in screen
    assert "The conversation starts anew.\nNo system message.\nYou said four\n" in screen


def test_system_from_the_start(monkeypatch):
    model = Scripted()
    run(monkeypatch, model, "one", system="Be brief")
    assert model.asked == [[Message("system", "Be brief"), Message("user", "one")]]


def test_help_and_unknown_commands(monkeypatch):
    model = Scripted()
    screen, _ = run(monkeypatch, model, "/help", "/hlep", "/quit", "never read")
    assert screen.count("/system TEXT") == 2 and "/hlep: unknown command" in screen
    assert model.asked == []


def test_the_parsed_answer_joins_the_history():
    """Reasoning is no part of what a template shows of earlier turns, so it must not be kept as content."""
    parsed = Message("assistant", "4", reasoning="2 + 2")
    talk = Chat(Scripted(["<think>2 + 2</think>", "4"], parsed), Sampling())
    assert "".join(talk.ask("2 + 2?")) == "<think>2 + 2</think>4"
    assert talk.turns == [Message("user", "2 + 2?"), parsed]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch):
    model = Scripted(["Some", " words", KeyboardInterrupt()])
    screen, talk = run(monkeypatch, model, "one")
    assert "Some words [stopped]\n" in screen
    assert talk.turns == [Message("user", "one"), Message("assistant", "Some words")]
    assert model.closed == 1


def test_ctrl_c_before_the_first_word_forgets_the_question(monkeypatch):
    _, talk = run(monkeypatch, Scripted([KeyboardInterrupt()]), "one")
    assert talk.turns == []


@pytest.mark.parametrize("key", [KeyboardInterrupt(), EOFError()])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(monkeypatch, key):
    screen, talk = run(monkeypatch, Scripted(), "one", key, "never read")
    assert talk.turns == said("one")
    assert screen.endswith("\n")


def test_a_question_that_cannot_be_asked_is_not_kept(monkeypatch):
    model = Scripted([ModelError("its prompt of 300 tokens fills the model's context of 256")])
    screen, talk = run(monkeypatch, model, "one", "/reset")
    assert "fills the model's context of 256" in screen
    assert "starts anew" in screen  # the conversation went on
    assert talk.turns == []


def test_a_pipe_holds_the_answers_alone(capsys):
    out = io.StringIO()
    converse(Chat(Scripted(), Sampling()), io.StringIO("one\n\n/reset\ntwo"), out, "runs/mine")
    assert out.getvalue() == "You said one\nYou said two\n"
    assert "starts anew" in capsys.readouterr().err


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), seed=3)


SAMPLING = Sampling(max_new_tokens=16)


def expected(model, *messages):
    loaded = load_target(model)
    generator = HFGenerator(loaded.model, loaded.tokenizer, loaded.template)
    (completion,) = generator.generate([Request(messages)], SAMPLING)
    return completion.text


def test_one_shot_prints_the_answer_alone(model, capsys):
    chat(model, "Hi", "Be brief", SAMPLING)
    found = capsys.readouterr()
    assert found.out == expected(model, Message("system", "Be brief"), Message("user", "Hi")) + "\n"
    assert found.err == ""


def test_conversation_through_a_pipe(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nWhy?\n"))
    chat(model, sampling=SAMPLING)
    first = expected(model, Message("user", "Hi"))
    second = expected(model, Message("user", "Hi"), Message("assistant", first), Message("user", "Why?"))
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_at_a_real_terminal():
    """In a process of its own behind a pseudo-terminal: prompts, commands, and Ctrl-D."""
    code = "import sys; from tunery.chat import *; converse(Chat(None, Sampling()), sys.stdin, sys.stdout, 'mine')"
    main, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=other, stdout=other, stderr=subprocess.STDOUT)
    os.close(other)
    screen = b""
    try:
        for typed in (b"/system Be kind\r", b"/reset\r", b"\x04"):
            screen += read_until(main, b"> ")  # keys typed before the prompt stands are another program's
            os.write(main, typed)
        screen += read_until(main, None)
        assert process.wait(30) == 0, screen
    finally:
        process.kill()
        process.wait()
        os.close(main)
    text = screen.decode()
    assert "/help lists the commands" in text
    assert "System message: Be kind" in text and "starts anew" in text


def read_until(terminal, end):
    """What appears on the screen up to `end` (None: until the program closes it); fails after half a minute."""
    screen, deadline = b"", time.monotonic() + 30
    while end is None or not screen.endswith(end):
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, screen
        try:
            chunk = os.read(terminal, 1024)
        except OSError:  # closed, as Linux says it
            break
        if not chunk:
            break
        screen += chunk
    return screen
