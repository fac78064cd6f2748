"""What objectives that generate have in common: prompts as rows, and values of a completion's tokens.

Such an objective says `generates = True`, its `rows` are prompts, and rollout/rollouts.py gives its `loss` batches of
completions. It has `judge(groups)`, which turns the rewards of a rollout's samples into what the loss needs, in
Tokens.extra, and returns metrics; and may have `measure(policy, batch)`: values of each position [T], computed once
for each rollout, without a gradient, which are in Tokens.extra by their names when `judge` is called.

A value of a completion's token stands where the token is predicted from, one place before it, as in a Batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunery.errors import TemplateError
from tunery.types import Example, Message, Refused, Tokens

ROLES_ASKING = ("user", "tool")


def question(example: Example) -> list[Message]:
    """The conversation up to the last turn that asks for an answer."""
    last = max((i for i, message in enumerate(example.messages) if message.role in ROLES_ASKING), default=-1)
    return example.messages[: last + 1]


def prompt_rows(examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
    """Each example's prompt as one sequence without weights, or why it has none."""
    why = [_unfit(example) for example in examples]
    fit = [(question(e), e.tools) for e, refused in zip(examples, why, strict=True) if refused is None]
    made = iter(_prompts(fit, template))
    return [refused or next(made) for refused in why]


def _unfit(example: Example) -> Refused | None:
    if example.text is not None:
        return Refused("wrong objective", "the row is plain text; it asks for no answer")
    if example.media:
        return Refused("media not supported", "the row has images, video or audio")
    return None if question(example) else Refused("no user turn", "there is nothing to answer")


def _prompts(conversations: Sequence[Any], template: Any) -> list[list[Tokens] | Refused]:
    if not conversations:
        return []
    try:
        prompts: list[list[int] | Refused] = list(template.prompts(conversations))
    except TemplateError:
        prompts = [_alone(messages, tools, template) for messages, tools in conversations]
    longest = template.max_length
    rows: list[list[Tokens] | Refused] = []
    for ids in prompts:
        if not isinstance(ids, Refused) and longest is not None and len(ids) > longest:
            ids = Refused("too long", f"{len(ids)} tokens > {longest}")
        rows.append(
            ids
            if isinstance(ids, Refused)
            else [Tokens(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.float32))]
        )
    return rows


def _alone(messages: Sequence[Message], tools: Any, template: Any) -> list[int] | Refused:
    try:
        return template.prompt(messages, tools)
    except TemplateError as error:
        return getattr(error, "refused", Refused("template refuses the prompt", str(error)))


def places(tokens: Tokens) -> np.ndarray:
    """The positions from which the trained tokens of a sequence are predicted, int64 [n]."""
    return np.flatnonzero(tokens.weights[1:])


def put(tokens: Tokens, name: str, values_n: Any) -> None:
    """Keep a value of each trained token (or one for all) in `extra`, float64 [T]."""
    array = np.zeros(len(tokens), dtype=np.float64)
    array[places(tokens)] = values_n
    tokens.extra[name] = array
