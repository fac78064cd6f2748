"""A reward in a process of its own, so that code of the user's can neither hang, crash nor fill the memory of a run.

It guards against mistakes, not against malice: the process has limits of memory and time, and dies with the run; it
may read and write files and reach the network as the user may."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tunery.config import KindConfig
from tunery.errors import ConfigError, RewardError
from tunery.types import Answer

START = 120.0  # seconds a process may take to import what the reward needs, beyond which it is taken to hang
LAST = 1.0  # seconds that a process may live on once it answers no more
TIMEOUT, MEMORY = 30.0, 8.0  # seconds for a call and GB, of rewards whose Config does not say


class SandboxedReward:
    """Scores answers in a process of tunery.rollout.worker, which is started when it is needed, and again where it was
    lost. Where a call fails, the answers are tried one by one to learn which fail alone: they get the config's
    `on_error` where it has one, else RewardError names the row."""

    def __init__(self, config: KindConfig, name: str):
        self.config, self.name = config, name
        self.timeout: float = getattr(config, "timeout", TIMEOUT)
        self.on_error: float | None = getattr(config, "on_error", None)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, unless it runs. Raises ConfigError where the reward cannot be made there."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunery.rollout.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,  # Ctrl-C is the run's to handle
        )  # fmt: skip
        limits = {"memory": getattr(self.config, "memory", MEMORY), "seconds": self.timeout}
        made = {"config": self.config.model_dump(mode="json"), "parent": os.getpid(), **limits}
        reply, why = self._exchange(made, START)
        if reply is None:
            self.close()
            raise ConfigError(f"rewards: {self.name} cannot be used: {why}")

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """Raises RewardError."""
        found, why = self._call(answers)
        if found is not None:
            return found
        if len(answers) == 1:
            return [self._failed(answers[0], why)]
        alone = [self._alone(answer) for answer in answers]
        if all(fine for _, fine in alone) and self.on_error is None:
            raise RewardError(
                f"rewards: {self.name} failed on {len(answers)} answers together, of {answers[0].where} to "
                f"{answers[-1].where}, and on none of them alone: {why}"
            )
        return [value for value, _ in alone]

    def close(self) -> None:
        """End the process and whatever it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    # ------------------------------------------------------------ inside

    def _alone(self, answer: Answer) -> tuple[float | None, bool]:
        """The score of one answer, and whether it was the reward that gave it."""
        found, why = self._call([answer])
        return (found[0], True) if found is not None else (self._failed(answer, why), False)

    def _failed(self, answer: Answer, why: str) -> float:
        if self.on_error is not None:
            return self.on_error
        hint = "; set on_error to the score such answers get to go on" if hasattr(self.config, "on_error") else ""
        raise RewardError(f"rewards: {self.name} failed on an answer to {answer.where}: {why}{hint}")

    def _call(self, answers: Sequence[Answer]) -> tuple[list[float | None] | None, str]:
        """The scores, or None and why not."""
        self.start()
        reply, why = self._exchange({"answers": [asdict(answer) for answer in answers]}, self.timeout)
        return (None, why) if reply is None else (reply["scores"], "")

    def _exchange(self, message: dict[str, Any], seconds: float) -> tuple[dict[str, Any] | None, str]:
        """The process's answer to a message, or None and what went wrong; a process that is of no use any more is
        ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        data = json.dumps(message, default=str).encode()
        deadline = time.monotonic() + seconds
        try:
            _write(process.stdin.fileno(), len(data).to_bytes(8, "big") + data, deadline)
            size = int.from_bytes(_read(process.stdout.fileno(), 8, deadline), "big")
            reply = json.loads(_read(process.stdout.fileno(), size, deadline))
        except TimeoutError:
            self.close()
            return None, f"it took longer than {seconds:g} s (timeout)"
        except (OSError, EOFError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST)
            code = process.returncode
            self.close()
            if code is None:
                return None, "its process closed the pipe that answers come through"
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
            return None, f"its process {how}"
        return (None, reply["error"]) if "error" in reply else (reply, "")


def _read(fd: int, count: int, deadline: float) -> bytes:
    """Exactly so many bytes. Raises TimeoutError, or EOFError where the other side has gone."""
    data = b""
    while len(data) < count:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return data


def _write(fd: int, data: bytes, deadline: float) -> None:
    """All of it. Raises TimeoutError, or OSError where the other side has gone."""
    os.set_blocking(fd, False)
    rest = memoryview(data)
    while rest:
        if not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
            raise TimeoutError
        rest = rest[os.write(fd, rest[: 1 << 16]) :]
