"""What every generator offers: requests in, completions out, under one `Sampling`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from tunery.config import Config
from tunery.types import Completion, Message


class Sampling(Config):
    """How the next token is chosen. The default, temperature 0, is greedy and needs no seed."""

    max_new_tokens: int = Field(default=256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(default=0.0, ge=0, description="0: the likeliest token; 1: the model's own odds")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample among the likeliest that hold this probability")
    top_k: int = Field(default=0, ge=0, description="sample among this many likeliest tokens; 0: all")
    repetition_penalty: float = Field(default=1.0, gt=0, description="above 1 makes tokens already seen less likely")
    stop: list[str] = Field(default=[], description="texts that end the answer; not part of it")
    seed: int = Field(default=42, ge=0, description="of the sampling; the same seed gives the same answers")


@dataclass(frozen=True, slots=True)
class Request:
    """What to answer: a conversation (with the tools offered), or the prompt's token `ids` themselves. `number` goes
    into the Completion's `index` and, with the seed, decides its random numbers; by default the place in the list."""

    messages: Sequence[Message] = ()
    tools: list[dict[str, Any]] | None = None
    ids: Sequence[int] | None = None
    number: int | None = None


class Generator(Protocol):
    """Answers requests."""

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """One Completion for each request, in the order they finish; `Completion.index` tells which.
        A request's answer depends on the request, its number and the sampling, not on its neighbours in a batch."""
        ...

    def sync(self) -> None:
        """Answer by the model's weights as they are now. To be called before `generate` wherever they may have changed.
        Raises ModelError where a generator with weights of its own does not take them."""
        ...

    def close(self) -> None:
        """Give back what the generator holds besides the model. It answers nothing afterwards."""
        ...
