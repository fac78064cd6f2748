"""Errors meant for a person: one clear message that says what, where, and what to do. The command line prints them
without a traceback; anything else that escapes is a bug in Tunery."""

from __future__ import annotations


class TuneryError(Exception):
    """Base of every error a user can cause. `exit_code` is what the command line exits with."""

    exit_code = 1


class ConfigError(TuneryError):
    """The configuration is wrong: names the file, the key and the nearest known one."""

    exit_code = 2


class DataError(TuneryError):
    """The data is wrong: names the file, the row and the reason."""


class TemplateError(TuneryError):
    """The chat template cannot render this, or cannot be trained exactly."""


class ModelError(TuneryError):
    """The model, tokenizer or adapter folder cannot be used as asked."""


class NonFiniteError(TuneryError):
    """A loss or gradient was not finite; nothing was updated."""


class RewardError(TuneryError):
    """A reward failed on an answer, or gave it no usable number: names the reward and the row."""


class OutOfMemoryError(TuneryError):
    """Memory ran out, and what could be done about it without changing the result has been done."""


class MissingExtraError(TuneryError):
    """An optional library is not installed; names the extra that brings it."""

    def __init__(self, library: str, extra: str):
        super().__init__(f"{library} is not installed. Install it with: pip install 'tunery[{extra}]'")
