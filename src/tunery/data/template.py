"""Chat templates: conversations to tokens for training and for inference, and generated tokens back to messages.

    template = load_template("auto", tokenizer, max_length=1024)
    template.encode_many(examples)      # training: sequences with a loss weight per token
    template.prompts(conversations)     # inference: the very same tokens, up to where the answer begins
    template.parse(generated_ids)       # the answer, its reasoning and its tool calls

The text comes from a Jinja template: the tokenizer's own, one of ours by name (the files in data/templates), or a file.
See drafts.py for the text and what of it is trained, codec.py for the tokens, encode.py for the loss weights, parse.py
for the way back."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tunery.data.characters import Writer, check_vocabulary
from tunery.data.codec import Codec
from tunery.data.drafts import Draft, Drafter
from tunery.data.encode import Encoder
from tunery.data.parse import parse_answer
from tunery.data.render import Renderer, RowRefused, check_text
from tunery.data.report import Noted
from tunery.data.truncate import shorten
from tunery.errors import ConfigError, DataError, TemplateError
from tunery.types import Example, Message, Refused, Tokens

ENCODER_VERSION = 2  # part of the fingerprint: raise it whenever the same row may give other tokens than before
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
    `system` is put before conversations that have no system message. Raises TemplateError, also for a tokenizer without
    a vocabulary."""
    if too_long not in TOO_LONG:
        raise ConfigError(f"too_long is {too_long!r}; it can be {', '.join(TOO_LONG)}")
    check_vocabulary(tokenizer)
    if name == "auto":
        source = _own_source(getattr(tokenizer, "chat_template", None))
    elif name in named_templates():
        source = _fitted((_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), name, tokenizer)
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


def _fitted(source: str, name: str, tokenizer: Any) -> str:
    """One of our templates for this tokenizer. Where its end-of-turn marker is no token, a turn ends with the end of
    sequence instead, so that there is always one token to stop at; and it begins with BOS only where the tokenizer
    begins its texts with it."""
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[0]
    if tokenizer.bos_token_id is None or first != tokenizer.bos_token_id:
        source = source.replace("{%- set bos = bos_token -%}", "{%- set bos = '' -%}")
    marker = re.search(r"\{%- set end = '(.*)' -%\}", source)
    if marker and tokenizer.backend_tokenizer.token_to_id(marker.group(1)) is None:
        source = source.replace(marker.group(), "{%- set end = eos_token -%}")
    if "set end = eos_token" in source and tokenizer.eos_token is None:
        raise TemplateError(
            f"template {name!r} ends answers with the end-of-sequence token, and this tokenizer has none; "
            "set eos_token in its tokenizer_config.json"
        )
    return source


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
    def _codec(self) -> Codec:
        return Codec(self.tokenizer, self._renderer.literals if self.source is not None else "")

    @cached_property
    def _renderer(self) -> Renderer:
        if self.source is None:
            raise TemplateError(
                "the tokenizer has no chat template. Choose one: set data.template to a .jinja file, or to one of "
                f"{', '.join(named_templates())} (the one the model was tuned with; for a base model, any)"
            )
        return Renderer(self.source, self.tokenizer.special_tokens_map)

    @cached_property
    def _drafter(self) -> Drafter:
        return Drafter(self._renderer, self._codec, self.name)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._codec, self._drafter.ends)

    @cached_property
    def unlimited(self) -> ChatTemplate:
        """The same without a limit on the length, for those who cut several conversations together (pairs.py)."""
        return ChatTemplate(self.name, self.source, self.tokenizer, system=self.system)

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens at which generation stops: the ends of a turn, and the tokenizer's end of sequence."""
        ends = self._drafter.ends if self.source is not None else []
        eos = self.tokenizer.eos_token_id
        return [*ends, eos] if eos is not None and eos not in ends else list(ends)

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
        """Without the parts built when needed: a compiled template cannot be pickled."""
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

        `train`: "answers" trains every assistant turn with its Message.weight (1 where None) and those of its spans,
        "last" the last one only, "all" every token of the conversation (an assistant turn's weights still count).
        Raises DataError for a row over max_length when too_long is "error"."""
        if train not in TRAIN:
            raise ConfigError(f"train is {train!r}; it can be {', '.join(TRAIN)}")
        drafts: list[Draft] = []
        rows: list[tuple[int, int] | Refused] = []
        for example in examples:
            try:
                if example.media:
                    raise RowRefused("media not supported", "the row has images, video or audio")
                made = self._drafter.drafts(self._with_system(example.messages), example.tools, train)
            except RowRefused as refused:
                rows.append(refused.refused)
                continue
            rows.append((len(drafts), len(drafts) + len(made)))
            drafts += made
        encoded = self._encoder.encode(drafts)
        result: list[list[Tokens] | Refused] = []
        for example, row in zip(examples, rows, strict=True):
            if isinstance(row, Refused):
                result.append(row)
                continue
            first, last = row
            try:
                result.append(self._within(example, train, drafts[first:last], encoded[first:last]))
            except RowRefused as refused:
                result.append(refused.refused)
        return result

    def _within(
        self, example: Example, train: str, drafts: list[Draft], encoded: list[list[Tokens] | RowRefused]
    ) -> list[Tokens]:
        """The sequences of one example's drafts, those over max_length treated as `too_long` says."""
        made: list[Tokens] = []
        for draft, sequences in zip(drafts, encoded, strict=True):
            if isinstance(sequences, RowRefused):
                raise sequences
            longest = max(map(len, sequences))
            if self.max_length is None or longest <= self.max_length:
                made += sequences
                continue
            detail = f"{longest} tokens > {self.max_length}"
            if self.too_long == "error":
                where = f"{example.meta.get('file', 'the data')}, row {example.meta.get('row', '?')}"
                raise DataError(f"{where}: {detail}. Raise data.max_length, or set data.too_long to drop or truncate")
            if self.too_long == "drop":
                raise RowRefused("too long", detail)
            made += self._truncated(example, train, draft, detail)
        return made

    def _truncated(self, example: Example, train: str, draft: Draft, detail: str) -> list[Tokens]:
        """The sequences of one draft, cut to max_length (see truncate.py)."""
        limit = self.max_length or 0
        turns = {turn.index: turn.weight for turn in draft.turns}
        messages = self._with_system(example.messages)[: draft.count]
        if train != "all":
            messages = [
                replace(message, weight=turns.get(i, 0.0)) if message.role == "assistant" else message
                for i, message in enumerate(messages)
            ]
            train = "answers"

        def sequences(shorter: list[Message]) -> list[Tokens]:
            made = []
            for part in self._encoder.encode(self._drafter.drafts(shorter, example.tools, train)):
                if isinstance(part, RowRefused):
                    raise part
                made += part
            return made

        def fits(shorter: list[Message]) -> bool:
            return max(map(len, sequences(shorter))) <= limit

        cut = shorten(messages, fits)
        if cut is None:
            raise RowRefused("too long", f"{detail}, and what must stay does not fit")
        made = sequences(cut)
        for tokens in made:
            tokens.extra["truncated"] = True
        return made

    def unwritable(self, examples: Sequence[Example]) -> list[Refused | list[Noted]]:
        """What of each example this tokenizer has no tokens for: Refused where that is most of what is trained, else
        remarks. Always empty for tokenizers that write bytes, and these are not asked row by row."""
        if self._writer.complete:
            return [[] for _ in examples]
        return self._writer.judge(
            [replace(e, messages=self._with_system(e.messages)) if e.messages else e for e in examples]
        )

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self.tokenizer)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is not None and not any(message.role == "system" for message in messages):
            return [Message("system", self.system), *messages]
        return list(messages)

    # ------------------------------------------------------------ inference

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The tokens to generate from: the conversation and the opening of the assistant's turn."""
        return self.prompts([(messages, tools)])[0]

    def prompts(
        self, conversations: Sequence[tuple[Sequence[Message], list[dict[str, Any]] | None]]
    ) -> list[list[int]]:
        """`prompt` of many conversations at once. Raises TemplateError when one is refused."""
        return self._codec.encode_mixed(
            [self._drafter.prompt(self._with_system(messages), tools) for messages, tools in conversations]
        )

    def parse(self, ids: Sequence[int]) -> Message:
        """What the model generated after a prompt: content, reasoning and tool calls. Everything from the first end
        token on is left out; what cannot be read as a tool call stays content."""
        ends = set(self.end_ids)
        kept = list(itertools.takewhile(lambda token: token not in ends, ids))
        text = self._codec.decode_answer(kept)
        if self.source is None:
            return Message("assistant", text)
        before, after = self._drafter.frame
        literals = self._renderer.literals
        return parse_answer(
            text.removeprefix(before).removesuffix(after),
            thinking=self._drafter.thinking,
            bare_json='"parameters": ' in literals and "<tool_call>" not in literals,
        )

    # ------------------------------------------------------------ plain text

    def encode_texts(self, examples: Sequence[Example], append_eos: bool = True) -> list[list[Tokens] | Refused]:
        """Raw text, every token trained. A document longer than max_length becomes consecutive sequences; each later
        one begins with the token before it, untrained, so that every token of the document is a target once. Special
        tokens written in the text are special tokens: that is how corpora mark the ends of documents."""
        results: list[list[Tokens] | Refused] = []
        for example in examples:
            try:
                check_text(example.text or "")
                results.append(Refused("empty text") if not example.text else [])
            except RowRefused as refused:
                results.append(refused.refused)
        usable = [i for i, result in enumerate(results) if not isinstance(result, Refused)]
        for i, ids in zip(usable, self._codec.encode_documents([examples[i].text or "" for i in usable]), strict=True):
            results[i] = self._document(ids, append_eos)
        return results

    def _document(self, ids_list: list[int], append_eos: bool) -> list[Tokens]:
        eos = self.tokenizer.eos_token_id
        if append_eos and eos is not None and ids_list[-1:] != [eos]:
            ids_list = [*ids_list, eos]
        ids = np.array(ids_list, dtype=np.int32)
        step = max((self.max_length or len(ids)) - 1, 1)
        pieces = []
        for start in range(0, max(len(ids) - 1, 1), step):
            weights = np.ones(len(ids[start : start + step + 1]), dtype=np.float32)
            weights[0] = 0.0 if start else 1.0
            pieces.append(Tokens(ids[start : start + step + 1], weights))
        return pieces
