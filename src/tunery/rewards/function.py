"""A Python function of yours: `rewards: my_rewards.py:accuracy`, called as TRL calls its reward functions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from tunery.errors import ConfigError, RewardError
from tunery.rewards import RewardConfig, last_question
from tunery.types import Answer


class Config(RewardConfig):
    kind: str = "function"
    path: str = Field(description="file.py:function, or package.module:function")
    messages: bool = Field(
        False, description="prompts and completions as lists of {role, content}, TRL's conversational form, not as text"
    )
    timeout: float = Field(30.0, gt=0, description="seconds one call may take before its process is killed")
    memory: float | None = Field(8.0, gt=0, description="GB of addresses its process may use; null: no limit")
    on_error: float | None = Field(
        None, description="score of an answer on which it fails, hangs or crashes; null: stop the run and name the row"
    )


def name_of(config: Config) -> str:
    return config.path.rpartition(":")[2]


class Reward:
    """The function is called with keywords and returns a list with a number, or None, for each completion:

        def accuracy(completions, ground_truth, **kwargs):
            return [float(truth in text) for text, truth in zip(completions, ground_truth)]

    It gets those of these that it names, or all where it takes **kwargs, each a list: `completions`, `prompts` (the
    text of the last turn before), `completion_ids`, `finishes` ("stop" or "length"), `ground_truth`, and every column
    of the row by its name (None in rows that lack it). It is imported and called in a process of its own."""

    sandboxed = True

    def __init__(self, config: Config):
        self.config = config
        self.call = load_function(config.path)
        parameters = inspect.signature(self.call).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.required = {p.name for p in parameters if p.name in self.takes and p.default is p.empty}

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        given = self._keywords(answers)
        missing = sorted(self.required - given.keys())
        if missing:
            raise RewardError(f"it needs {missing[0]!r}, and the rows have {', '.join(sorted(given))}")
        found = self.call(**{name: value for name, value in given.items() if self.takes_all or name in self.takes})
        if not isinstance(found, list | tuple) and hasattr(found, "tolist"):
            found = found.tolist()  # an array, or a tensor
        if not isinstance(found, list | tuple) or len(found) != len(answers):
            what = f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
            raise RewardError(f"it returned {what}, expected a list with one number for each of {len(answers)} answers")
        return [_number(value) for value in found]

    def _keywords(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        columns = dict.fromkeys(name for answer in answers for name in answer.columns)
        given = {str(name): [answer.columns.get(name) for answer in answers] for name in columns}
        given["ground_truth"] = [answer.ground_truth for answer in answers]
        if self.config.messages:
            given["prompts"] = [[_turn(message) for message in answer.prompt] for answer in answers]
            given["completions"] = [[{"role": "assistant", "content": answer.text}] for answer in answers]
        else:
            given["prompts"] = [last_question(answer) for answer in answers]
            given["completions"] = [answer.text for answer in answers]
        given["completion_ids"] = [list(answer.ids) for answer in answers]
        given["finishes"] = [answer.finish for answer in answers]
        return given


def _turn(message: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(message).items() if value not in (None, (), [])}


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RewardError(f"it returned {value!r}, which is no number") from None


def split_path(path: str) -> tuple[str, str]:
    """(file or module, function) of "file.py:function". Raises ConfigError."""
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"rewards: {path!r} is not of the form file.py:function or package.module:function")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"rewards: {path}: there is no file {Path(place).absolute()}")
    return place, name


def load_function(path: str) -> Callable[..., Any]:
    """The function. Raises ConfigError; what the file itself raises comes through."""
    place, name = split_path(path)
    if place.endswith(".py"):
        file = Path(place).absolute()
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.parent))  # for what stands beside it
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(f"rewards: {place} has no function {name!r} (there: {', '.join(there) or 'none'})")
    return found
