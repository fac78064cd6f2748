"""The process of a sandboxed reward (sandbox.py): messages in and out are a length of eight bytes and JSON.

    {"config": {"kind", ...}, "memory": GB or null, "seconds", "parent"} -> {} or {"error"}
    {"answers": [...]} -> {"scores": [...]} or {"error"}          as often as asked

What the reward prints goes to standard error."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

from tunery.config import build, load_kind
from tunery.errors import TuneryError
from tunery.types import Answer, Message, ToolCall


def main() -> None:
    """Serve one reward until the other side has gone."""
    into, out = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    first = _receive(into)
    if first is None:
        return
    _limit(first["memory"], first["parent"])
    reward: Any = None
    try:
        config = load_kind("rewards", first["config"]["kind"]).Config.model_validate(first["config"])
        reward = build("rewards", config)
    except BaseException as error:  # a file of the user's may raise anything, SystemExit too
        _send(out, {"error": _explain(error)})
        return
    _send(out, {})
    while (message := _receive(into)) is not None:
        _limit_time(first["seconds"])
        try:
            found = reward.score([_answer(values) for values in message["answers"]])
            # Those of arrays are no JSON. Text stays what it is, for the other side to refuse.
            scores = [score if score is None or isinstance(score, str) else float(score) for score in found]
            reply: dict[str, Any] = {"scores": scores}
        except BaseException as error:
            reply = {"error": _explain(error)}
        _send(out, reply)


def _limit(memory: float | None, parent: int) -> None:
    with suppress(OSError, AttributeError):  # Linux: a run that is killed outright takes this process with it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        with suppress(OSError, ValueError):  # macOS has no such limit
            size = int(memory * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _limit_time(seconds: float) -> None:
    """Processor time for this call: all cores for as long as the run waits, and then some."""
    spent = time.process_time() + (seconds + 5) * (os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _explain(error: BaseException) -> str:
    """What went wrong, and the line of the user's file where it did."""
    if isinstance(error, TuneryError):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "tunery" not in f.filename.split(os.sep)[-3:]]
    frames = [f for f in frames if "importlib" not in f.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _answer(values: dict[str, Any]) -> Answer:
    prompt = [
        Message(**{**m, "tool_calls": tuple(ToolCall(**call) for call in m["tool_calls"])}) for m in values["prompt"]
    ]
    return Answer(**{**values, "prompt": prompt})


def _receive(fd: int) -> dict[str, Any] | None:
    head = _exactly(fd, 8)
    body = _exactly(fd, int.from_bytes(head, "big")) if head is not None else None
    return None if body is None else json.loads(body)


def _exactly(fd: int, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            return None
        data += piece
    return data


def _send(fd: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
    sys.stderr.flush()
