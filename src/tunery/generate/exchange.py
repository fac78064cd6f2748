"""What goes into a generator and what comes out, alike for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunery.errors import ModelError
from tunery.generate.base import Request, Sampling
from tunery.types import Completion, Message


def prompts_of(requests: Sequence[Request], template: Any) -> list[list[int]]:
    """The token ids each request is answered from. Raises ModelError where there is nothing to go on from."""
    asked = [request for request in requests if request.ids is None]
    if asked and template is None:
        raise ModelError("messages need a chat template; this generator was made without one")
    rendered = iter(template.prompts([(r.messages, r.tools) for r in asked]) if asked else [])
    prompts = [next(rendered) if r.ids is None else [int(token) for token in r.ids] for r in requests]
    for i, ids in enumerate(prompts):
        if not ids:
            raise ModelError(f"request {i + 1}: its prompt is empty, there is nothing to go on from")
    return prompts


def numbers_of(requests: Sequence[Request]) -> list[int]:
    """The number of each: its own, or its place."""
    return [i if request.number is None else request.number for i, request in enumerate(requests)]


def ends_of(template: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the template's, or without one the tokenizer's."""
    ends: list[Any] = list(template.end_ids) if template is not None else [tokenizer.eos_token_id]
    return {token for token in ends if token is not None}


def context_of(causal: Any) -> int | None:
    """The longest text a transformers model was made for, in tokens; None where its configuration does not say."""
    return getattr(causal.config.get_text_config(decoder=True), "max_position_embeddings", None)


def limit_of(number: int, prompt: Sequence[int], context: int | None, sampling: Sampling) -> int:
    """How many tokens an answer may have. Raises ModelError, naming the request, where the prompt leaves no room."""
    room = sampling.max_new_tokens if context is None else context - len(prompt)
    if room < 1:
        raise ModelError(
            f"request {number + 1}: its prompt of {len(prompt)} tokens fills the model's context of {context}"
        )
    return min(sampling.max_new_tokens, room)


def completion_of(
    number: int, ids: list[int], text: str, finish: str, logps: list[float], template: Any, end_ids: set[int]
) -> Completion:
    """With the message that the template reads in `ids`, unless a stop text ended them, which is no part of it."""
    message = None
    if template is not None:
        cut = finish == "stop" and ids[-1] not in end_ids
        message = Message("assistant", text) if cut else template.parse(ids)
    return Completion(number, ids, text, finish, message, logps)
