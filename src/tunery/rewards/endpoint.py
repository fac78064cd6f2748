"""A reward model that somebody serves over HTTP: by vLLM, by SGLang, or by LLaMA-Factory and what speaks as it does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from tunery.errors import ConfigError, RewardError
from tunery.rewards import Host
from tunery.rewards._http import ServerConfig, ask, check_url, scores
from tunery.types import Answer, Example, Message, Refused


class Config(ServerConfig):
    kind: str = "endpoint"
    url: str = Field(description="what is asked, in full, such as http://localhost:8000/classify")
    key_env: str = Field("REWARD_API_KEY", description="environment variable that holds the key, if one is needed")
    protocol: Literal["vllm", "sglang", "llamafactory"] = Field("vllm", description="what the server understands")
    model: str | None = Field(None, description="the reward model's name there; null: the one that is served")
    tokenizer: str | None = Field(
        None,
        description="sglang, llamafactory: whose template makes the text of a conversation, the reward model's folder "
        "or hub name; null: the policy's, as it was generated",
    )


class Reward:
    """The one number that the server gives for a conversation with the answer, as it is: no activation, no scale.

    | protocol | what is sent | what is read |
    | --- | --- | --- |
    | vllm | `messages`, rendered by the server; `use_activation: false` | `data[0].probs` of /classify, or `data[0].data` of /pooling, of which the last token's counts |
    | sglang | `text: [text]` to /classify | `[0].embedding` |
    | llamafactory | `messages: [text]` to /v1/score/evaluation | `scores` |

    Text is the conversation in a template's form with all its special tokens. Of the policy's that is its prompt and
    the answer's tokens as they were generated, which is what LLaMA-Factory sends; an answer that was cut off has no end
    there, and has one in the form of another `tokenizer` and in `messages`. SGLang puts a beginning-of-sequence token
    before a text by itself, so one is left out where it would be the second.

    Raises ConfigError for options that cannot be, RewardError naming the row where the server fails for good."""  # noqa: E501

    def __init__(self, config: Config):
        self.config = config
        check_url("endpoint", config.url)
        if config.tokenizer is not None and config.protocol == "vllm":
            raise ConfigError("rewards: endpoint.tokenizer is for servers that take text; vllm renders messages itself")
        self.tokenizer: Any = None
        self.template: Any = None
        if config.tokenizer is not None:
            self.tokenizer, self.template = _template_of(config.tokenizer)

    def load(self, host: Host) -> list[str]:
        """Take the policy's template where the reward model's is not given."""
        if self.template is None:
            self.tokenizer, self.template = host.tokenizer, host.template
        return []

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        # Tokenizers are not asked by several threads at once.
        bodies = {id(answer): self._body_or_why(answer) for answer in answers}

        def one(answer: Answer) -> float:
            body = bodies[id(answer)]
            if isinstance(body, RewardError):
                raise body
            return _single(ask(self.config, self.config.url, body, self._values))

        return scores(self.config, f"the reward model at {self.config.url}", one, answers)

    def _body_or_why(self, answer: Answer) -> dict[str, Any] | RewardError:
        try:
            return self._body(answer)
        except RewardError as error:
            return error

    def _body(self, answer: Answer) -> dict[str, Any]:
        config = self.config
        named = {} if config.model is None else {"model": config.model}
        if config.protocol == "vllm":
            return {**named, "messages": _messages(answer), "add_generation_prompt": False, "use_activation": False}
        text = self._text(answer)
        if config.protocol == "sglang":
            return {**named, "text": [_begun_once(text, self.tokenizer)]}
        return {"model": "model", **named, "messages": [text]}

    def _text(self, answer: Answer) -> str:
        assert self.template is not None, "load comes first"
        if self.config.tokenizer is None:
            ids = [*self.template.prompt(answer.prompt), *answer.ids]
        else:
            from tunery.generate.score import encode_scored

            (row,) = encode_scored([Example(messages=_conversation(answer))], self.template)
            if isinstance(row, Refused):
                raise RewardError(f"the answer cannot be written in its vocabulary: {row.reason}")
            ids = row[0].ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _values(self, reply: Any) -> Any:
        """Where the score is in what came back. Raises RewardError where it is not."""
        try:
            if self.config.protocol == "vllm":
                first = reply["data"][0]
                return first["probs"] if "probs" in first else first["data"]
            if self.config.protocol == "sglang":
                return (reply[0] if isinstance(reply, list) else reply)["embedding"]
            return reply["scores"]
        except (KeyError, IndexError, TypeError):
            raise RewardError(f"what came back is no score of {self.config.protocol}: {_short(reply)}") from None


def _single(values: Any) -> float:
    """The number; of several tokens' that of the last. Raises RewardError for anything else."""
    found = values[-1] if isinstance(values, list) and values and isinstance(values[-1], list) else values
    if not isinstance(found, list) or len(found) != 1 or type(found[0]) not in (int, float):
        raise RewardError(f"a reward is one number, and it gave {_short(values)}")
    return float(found[0])


def _short(value: Any) -> str:
    return json.dumps(value)[:200]


def _conversation(answer: Answer) -> list[Message]:
    return [*answer.prompt, Message("assistant", answer.text)]


def _messages(answer: Answer) -> list[dict[str, Any]]:
    """As OpenAI's API has them: arguments of calls are text."""
    from tunery.data.render import to_dicts

    messages = to_dicts(_conversation(answer))
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return messages


def _template_of(name: str) -> tuple[Any, Any]:
    """A reward model's tokenizer and its chat template. Raises ModelError, and ConfigError where it has none."""
    from tunery.data.template import load_template
    from tunery.models.load import ModelConfig, load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name=name))
    template = load_template("auto", tokenizer)
    if template.source is None:
        raise ConfigError(f"rewards: endpoint.tokenizer: {name} has no chat template, so no text can be made with it")
    return tokenizer, template


def _begun_once(text: str, tokenizer: Any) -> str:
    """Without the token of the beginning that a server's tokenizer puts before it."""
    first = tokenizer.bos_token
    if first is None or not text.startswith(first):
        return text
    return text.removeprefix(first) if tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2 else text
