"""Rewards that are asked for over HTTP: JSON there and back, further attempts with growing pauses, several at once."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import Field

from tunery.errors import ConfigError, RewardError
from tunery.rewards import RewardConfig
from tunery.types import Answer

T = TypeVar("T")
# Statuses that say "later": too many requests, and a server's own trouble.
_LATER = {408, 425, 429, 500, 502, 503, 504, 529}


class ServerConfig(RewardConfig):
    """What every reward that a server gives has besides its own options."""

    key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is needed")
    timeout: float = Field(60.0, gt=0, description="seconds for one request")
    retries: int = Field(4, ge=0, description="further attempts, with growing pauses")
    parallel: int = Field(8, ge=1, description="requests at a time")
    on_error: float | None = Field(None, description="score where none can be had or understood; null: stop")


def check_url(kind: str, url: str) -> None:
    """Raises ConfigError for what is no address."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"rewards: {kind}.url is {url!r}, expected an address that begins with http:// or https://")


def scores(
    config: ServerConfig, who: str, one: Callable[[Answer], float], answers: Sequence[Answer]
) -> list[float | None]:
    """`one` score for each answer, several at a time, in order. Raises RewardError, naming the row, where it does and
    there is no config.on_error; `who` was asked."""

    def guarded(answer: Answer) -> float:
        try:
            return one(answer)
        except RewardError as error:
            if config.on_error is not None:
                return config.on_error
            raise RewardError(
                f"rewards: {who} gave no score for {answer.where}: {error}; set {config.kind}.on_error to a score to "
                "go on without it"
            ) from None

    with ThreadPoolExecutor(config.parallel) as pool:
        return list(pool.map(guarded, answers))


def ask(config: ServerConfig, url: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
    """What `read` makes of the JSON that comes back, after as many attempts as it takes: a server that is busy, does
    not answer, or answers with something that `read` fails on (but with RewardError) is asked again. Raises
    RewardError."""
    why = ""
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(min(30.0, 0.5 * 2**attempt))
        try:
            return read(_post(config, url, body))
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
            if error.code not in _LATER:
                break
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
    raise RewardError(why)


def _post(config: ServerConfig, url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(config.key_env)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=config.timeout) as response:
        return json.load(response)
