"""Chat templates: conversations to tokens for training and for inference, and generated tokens back to messages.

    template = load_template("auto", tokenizer, max_length=1024)
    template.encode_many(examples)      # training: sequences with a loss weight per token
    template.prompts(conversations)     # inference: the very same tokens, up to where the answer begins
    template.parse(generated_ids)       # the answer, its reasoning and its tool calls

The text comes from a Jinja template: the tokenizer's own, one of ours by name (the files in data/templates), or a file.
See render.py for the text, codec.py for the tokens, encode.py for the loss weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tunery.data.codec import Codec
from tunery.data.encode import Draft, Encoder, Turn
from tunery.data.render import Renderer, RowRefused, to_dicts
from tunery.errors import ConfigError, TemplateError
from tunery.types import Example, Message, Refused, Tokens

ENCODER_VERSION = 1  # part of the fingerprint: raise it whenever the same row may give other tokens than before
TOO_LONG = ("drop", "truncate", "error")
TRAIN = ("answers", "last", "all")
_FOLDER = Path(__file__).parent / "templates"


def named_templates() -> list[str]:
    """Names of our own templates, for tokenizers that have none."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def load_template(
    name: str, tokenizer: Any, *, max_length: int | None = None, too_long: str = "drop", system: str | None = None
) -> ChatTemplate:
    """The template `name`: "auto" (the tokenizer's own), a named one, or the path of a .jinja file.

    A tokenizer without a template gives, for "auto", a ChatTemplate that can encode plain text only (`source` is
    None) and raises TemplateError when a conversation comes. `max_length` is in tokens; None is no limit.
    `system` is put before conversations that have no system message."""
    if too_long not in TOO_LONG:
        raise ConfigError(f"too_long is {too_long!r}; it can be {', '.join(TOO_LONG)}")
    if name == "auto":
        source = _own_source(getattr(tokenizer, "chat_template", None))
    elif name in named_templates():
        source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    elif Path(name).is_file():
        source = Path(name).read_text(encoding="utf-8")
    else:
        raise TemplateError(
            f"no template {name!r}: it is neither a file nor one of auto, {', '.join(named_templates())}"
        )
    return ChatTemplate(name, source, tokenizer, max_length=max_length, too_long=too_long, system=system)


def _own_source(own: Any) -> str | None:
    """A tokenizer's template as one text. With several named ones, transformers takes `tool_use` when there are tools
    and `default` otherwise; the same choice is written in Jinja here, so that one text can be saved with the model."""
    if isinstance(own, list):
        own = {item["name"]: item["template"] for item in own}
    if not isinstance(own, dict):
        return own
    if "default" not in own:
        raise TemplateError(
            f"the tokenizer has several chat templates and no default one: {', '.join(sorted(own))}. "
            "Write the one you want to a .jinja file and give its path as the template"
        )
    if "tool_use" not in own:
        return own["default"]
    # Line breaks after `%}` are eaten by trim_blocks, and `+` keeps what stands before the tag.
    tools, default = (own[name].removesuffix("\n") for name in ("tool_use", "default"))
    return f"{{% if tools is not none %}}\n{tools}{{%+ else %}}\n{default}{{%+ endif %}}"


class ChatTemplate:
    """One template with one tokenizer. `source`: the Jinja text, to be saved with the model."""

    def __init__(
        self,
        name: str,
        source: str | None,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        too_long: str = "drop",
        system: str | None = None,
    ):
        self.name = name
        self.source = source
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.too_long = too_long
        self.system = system

    # ------------------------------------------------------------ parts, built when first needed

    @cached_property
    def _renderer(self) -> Renderer:
        if self.source is None:
            raise TemplateError(
                "the tokenizer has no chat template. Choose one: set data.template to a .jinja file or to one of "
                f"{', '.join(named_templates())} (what the model was tuned with; chatml for a base model)"
            )
        return Renderer(self.source, self.tokenizer.special_tokens_map)

    @cached_property
    def _codec(self) -> Codec:
        return Codec(self.tokenizer, self._renderer.literals if self.source else "")

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._codec, self._turn_ends)

    @cached_property
    def _turn_ends(self) -> list[int]:
        """Tokens that end an assistant's turn, learned by rendering an answer and a tool call and looking at what
        follows them."""
        ends = []
        probe = "Probe"
        user = Message("user", "Hello")
        for head in ([user], [Message("system", "Hello"), user]):
            try:
                text = self._renderer.render(to_dicts([*head, Message("assistant", probe)]), None, False)
            except RowRefused:
                continue
            after = text[text.rfind(probe) + len(probe) :]
            found = self._codec.pattern.search(after)
            if found is None:
                raise TemplateError(
                    f"template {self.name!r} ends an answer with {after!r}, in which there is no special token of this "
                    "tokenizer, so a model trained with it would not learn to stop. Choose a named template "
                    f"({', '.join(named_templates())}) or add eos_token to the template"
                )
            ends.append(self._codec.ids[found.group()])
            break
        eos = self.tokenizer.eos_token_id
        return ends or ([eos] if eos is not None else [])

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens at which generation stops: the ends of a turn, and the tokenizer's end of sequence."""
        ends = list(self._turn_ends) if self.source is not None else []
        eos = self.tokenizer.eos_token_id
        return ends + [eos] if eos is not None and eos not in ends else ends

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens: template, tokenizer, options and the encoder's version."""
        parts = [
            ENCODER_VERSION,
            self.source,
            self.tokenizer.backend_tokenizer.to_str(),
            dict(self.tokenizer.special_tokens_map),
            [self.max_length, self.too_long, self.system],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Without the parts built when needed: compiled templates cannot be pickled."""
        names = ("name", "source", "tokenizer", "max_length", "too_long", "system")
        return {name: getattr(self, name) for name in names}

    # ------------------------------------------------------------ training

    def encode(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, train: str = "answers"
    ) -> list[Tokens]:
        """The training sequences of one conversation. Raises TemplateError when it is refused."""
        (made,) = self.encode_many([Example(messages=list(messages), tools=tools)], train)
        if isinstance(made, Refused):
            raise RowRefused(made.reason, made.detail)
        return made

    def encode_many(self, examples: Sequence[Example], train: str = "answers") -> list[list[Tokens] | Refused]:
        """Each example's training sequences, or why it cannot be used.

        `train`: "answers" trains every assistant turn with its Message.weight (1 where None), "last" the last one
        only, "all" every token of the conversation (an assistant turn's Message.weight still counts)."""
        if train not in TRAIN:
            raise ConfigError(f"train is {train!r}; it can be {', '.join(TRAIN)}")
        drafts: list[Draft] = []
        rows: list[tuple[int, int] | Refused] = []
        for example in examples:
            try:
                made = self._drafts(example, train)
            except RowRefused as refused:
                rows.append(refused.refused)
                continue
            rows.append((len(drafts), len(drafts) + len(made)))
            drafts += made
        encoded = self._encoder.encode(drafts)
        result: list[list[Tokens] | Refused] = []
        for row in rows:
            result.append(row if isinstance(row, Refused) else _join(encoded[row[0] : row[1]]))
        return result

    def _drafts(self, example: Example, train: str) -> list[Draft]:
        """The texts of one example, with the turns to train in each."""
        messages = self._with_system(example.messages)
        if example.media:
            raise RowRefused("media not supported", "the row has images, video or audio")
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise RowRefused("no assistant turn")
        trained = answers[-1:] if train == "last" else answers
        for i in trained:
            if messages[i].weight != 0 and _is_empty(messages[i]):
                raise RowRefused("empty answer", f"message {i + 1}")
        if train == "all":
            trained = [i for i in answers if messages[i].weight is not None or i == len(messages) - 1]
        else:
            trained = [i for i in trained if messages[i].weight != 0]
        if not trained and train != "all":
            raise RowRefused("nothing to train", "every assistant turn has weight 0")
        rows, tools, shadow = self._dicts(messages, example.tools)

        def text(count: int, header: bool) -> str:
            rendered = self._renderer.render(rows[:count], tools, header)
            return self._codec.rename(rendered) if shadow else rendered

        whole = Draft(text(len(rows), False), shadow, base=1.0 if train == "all" else 0.0)
        own = []
        for i in trained:
            last = i == len(rows) - 1
            prompt = text(i, True)
            upto = whole.text if last else text(i + 1, False)
            if not upto.startswith(prompt):
                raise RowRefused("the prompt does not lead to the answer", f"message {i + 1}: {_differ(prompt, upto)}")
            weight = messages[i].weight
            turn = Turn(prompt, upto, 1.0 if weight is None else weight, last)
            if last or whole.text.startswith(self._through_end(turn, shadow)):
                whole.turns.append(turn)
            elif train != "all":
                own.append(Draft(upto, shadow, [turn]))
        return own + [whole] if whole.turns or whole.base else own

    def _through_end(self, turn: Turn, shadow: bool) -> str:
        """The conversation up to and with the turn's end token."""
        for found in self._codec.controls(turn.upto, shadow, len(turn.prompt)):
            if self._codec.id_of(found.group(), shadow) in self._encoder.ends:
                return turn.upto[: found.end()]
        return turn.upto

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is not None and not any(message.role == "system" for message in messages):
            return [Message("system", self.system), *messages]
        return list(messages)

    def _dicts(self, messages: Sequence[Message], tools: Any) -> tuple[list[dict[str, Any]], Any, bool]:
        """Messages and tools for the renderer, marked if they hold look-alikes, and whether they do."""
        rows = to_dicts(messages)
        codec = self._codec
        if any(codec.looks_alike(message.content) for message in messages) or any(
            codec.looks_alike(json.dumps([tools, row], ensure_ascii=False)) for row in rows if len(row) > 2 or tools
        ):
            marked = codec.mark(rows), codec.mark(tools)
            if marked != (rows, tools):
                return *marked, True
        return rows, tools, False

    # ------------------------------------------------------------ inference

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The tokens to generate from: the conversation and the opening of the assistant's turn."""
        return self.prompts([(messages, tools)])[0]

    def prompts(
        self, conversations: Sequence[tuple[Sequence[Message], list[dict[str, Any]] | None]]
    ) -> list[list[int]]:
        """`prompt` of many conversations at once. Raises TemplateError when one is refused."""
        texts: list[str] = []
        shadows: list[bool] = []
        for messages, tools in conversations:
            rows, tools, shadow = self._dicts(self._with_system(messages), tools)
            text = self._renderer.render(rows, tools, True)
            texts.append(self._codec.rename(text) if shadow else text)
            shadows.append(shadow)
        result: list[list[int]] = [[]] * len(texts)
        for shadow in (False, True):
            places = [i for i, is_shadow in enumerate(shadows) if is_shadow is shadow]
            if places:
                encode = self._codec.encode_shadow if shadow else self._codec.encode
                for i, ids in zip(places, encode([texts[i] for i in places]), strict=True):
                    result[i] = ids
        return result

    def parse(self, ids: Sequence[int]) -> Message:
        """What the model generated."""
        ids = list(ids)
        for i, token in enumerate(ids):
            if token in self.end_ids:
                ids = ids[:i]
                break
        return Message("assistant", self.tokenizer.decode(ids, skip_special_tokens=True))

    # ------------------------------------------------------------ plain text

    def encode_texts(self, examples: Sequence[Example], append_eos: bool = True) -> list[list[Tokens] | Refused]:
        """Raw text, every token trained. A document longer than max_length becomes consecutive sequences; each later
        one begins with the token before it, untrained, so that every token of the document is a target once."""
        texts = [example.text or "" for example in examples]
        encoded = self._codec.encode_documents(texts)
        return [
            self._document(ids, append_eos) if text else Refused("empty text")
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _document(self, ids_list: list[int], append_eos: bool) -> list[Tokens]:
        eos = self.tokenizer.eos_token_id
        if append_eos and eos is not None and (not ids_list or ids_list[-1] != eos):
            ids_list = [*ids_list, eos]
        ids = np.array(ids_list, dtype=np.int32)
        limit = self.max_length or len(ids)
        pieces = []
        start = 0
        while True:
            piece = ids[start : start + limit]
            weights = np.ones(len(piece), dtype=np.float32)
            weights[0] = 0.0 if start else 1.0
            pieces.append(Tokens(piece, weights))
            start += limit - 1
            if start >= len(ids) - 1:
                return pieces


def _join(parts: Sequence[list[Tokens] | RowRefused]) -> list[Tokens] | Refused:
    """The sequences of one row's drafts; refused when one of them is."""
    joined: list[Tokens] = []
    for part in parts:
        if isinstance(part, RowRefused):
            return part.refused
        joined += part
    return joined


def _is_empty(message: Message) -> bool:
    return not (message.content.strip() or message.tool_calls or message.reasoning)


def _differ(prompt: str, text: str) -> str:
    """Where a prompt leaves the text it should begin, for a person."""
    same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    return f"after {text[max(0, same - 20) : same]!r} it has {prompt[same : same + 30]!r}, the conversation {text[same : same + 30]!r}"
