"""Scores of conversations by a reward model, from Python (`RewardModel`) or of a whole file (`score`).

What is scored is the conversation in the template's form up to the end of its last answer, as in training; several at
once in packed streams, which nothing is generated from."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from tunery.config import validate
from tunery.data.collate import collate
from tunery.data.examples import read_examples
from tunery.data.pack import best_fit_decreasing
from tunery.data.report import RefusedRow, SourceReport
from tunery.data.sources import Located, Source, locate
from tunery.errors import DataError
from tunery.files import json_line
from tunery.generate.answers import Files, same_name, weights_stamp
from tunery.kernels import KernelsConfig
from tunery.models.fuse import fuse
from tunery.models.load import hook_attention
from tunery.models.parts import unwrap
from tunery.models.target import Target, load_target
from tunery.pairs import encode_pairs
from tunery.policy import CausalPolicy
from tunery.types import Example, Message, Refused, Tokens


class RewardModel:
    """A reward model ready to score: a run, adapter or model folder, or a hub name, also one that another program saved
    (transformers' sequence classification with one label). `dtype`, `device` and `template` as in load_target;
    `batch_tokens` at once. `beside`: a language model in memory whose base weights it uses (load_target). Raises
    ModelError for a target that is none.

    >>> RewardModel("runs/reward").score([[Message("user", "2 + 2?"), Message("assistant", "4")]])
    [1.73]
    """

    def __init__(
        self,
        target: str | Path | Target,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        template: str | None = None,
        batch_tokens: int = 16384,
        beside: Any = None,
    ):
        loaded = load_target(
            target, dtype=dtype, device=device, template=template, talks=True, scores=True, beside=beside
        )
        self.target, self.template, self.tokenizer = loaded.target, loaded.template, loaded.tokenizer
        self.dtype: torch.dtype = loaded.model.dtype
        hook_attention(unwrap(loaded.model))
        fuse(loaded.model, KernelsConfig(), self.dtype)
        loaded.model.requires_grad_(False)  # what PEFT disables for a moment, trains when it is enabled again
        self.policy = CausalPolicy(loaded.model, dtype=self.dtype)
        self.batch_tokens = batch_tokens
        text = self.policy.causal.config.get_text_config()
        self.context: int | None = getattr(text, "max_position_embeddings", None)

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The reward of each conversation, which ends with the answer to judge. Raises DataError for one that cannot be
        scored."""
        rows = self.encode([Example(messages=list(conversation)) for conversation in conversations])
        for number, row in enumerate(rows):
            if isinstance(row, Refused):
                raise DataError(f"conversation {number + 1} cannot be scored: {_why(row)}")
        return self.score_ids([row[0].ids for row in rows if not isinstance(row, Refused)])

    def score_ids(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[float]:
        """The same of conversations that are tokens already, each up to and with the end of its last answer."""
        scores = [0.0] * len(sequences)
        for number, value in self.stream(sequences):
            scores[number] = value
        return scores

    def stream(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> Iterator[tuple[int, float]]:
        """(number, score) of each, in the order in which they are done."""
        made = [Tokens(np.asarray(ids, np.int32), np.zeros(len(ids), np.float32)) for ids in sequences]
        for members in best_fit_decreasing([len(tokens) for tokens in made], self.batch_tokens):
            batch = collate([made[i] for i in members]).to(self.policy.device)
            with torch.no_grad():
                values = self.policy.values(batch, batch.ends_S)
            yield from zip(members, values.tolist(), strict=True)

    def encode(self, examples: Sequence[Example]) -> list[list[Tokens] | Refused]:
        """encode_scored by the model's own template, and within its context."""
        rows = encode_scored(examples, self.template)
        return [row if isinstance(row, Refused) else self._within_context(row) for row in rows]

    def _within_context(self, row: list[Tokens]) -> list[Tokens] | Refused:
        longest = max(map(len, row))
        if self.context is not None and longest > self.context:
            return Refused("too long", f"{longest} tokens; the model's context is {self.context}")
        return row


def encode_scored(examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
    """What is to be scored of each example: [chosen, rejected] where it has a rejected answer, else [conversation], in
    which the last answer alone has weights; or why it cannot be."""
    rows: list[list[Tokens] | Refused] = [_unfit(e) or Refused("no answer") for e in examples]
    whole = [i for i, e in enumerate(examples) if _unfit(e) is None and not e.rejected]
    pairs = [i for i, e in enumerate(examples) if _unfit(e) is None and e.rejected]
    encoded = template.encode_many([examples[i] for i in whole], train="last")
    for i, row in zip(whole, encoded, strict=True):
        if _is_empty(examples[i].messages[-1]):
            rows[i] = [_empty(examples[i], template)]
        else:
            rows[i] = row if isinstance(row, Refused) else row[-1:]
    for i, row in zip(pairs, encode_pairs([examples[i] for i in pairs], template), strict=True):
        rows[i] = row
    return rows


def _empty(example: Example, template: Any) -> Tokens:
    """An answer of nothing but its end, which is nothing to train on but may well be scored."""
    prompt, end = template.prompt(example.messages[:-1], example.tools), _end(template)
    weights = np.repeat([0, 1], [len(prompt), len(end)]).astype(np.float32)
    return Tokens(np.array([*prompt, *end], np.int32), weights)


def _end(template: Any) -> list[int]:
    """The tokens with which a template ends an answer."""
    short = [Message("user", "?"), Message("assistant", "!")]
    (tokens,) = template.encode(short, train="last")
    answer = tokens.ids[len(template.prompt(short[:1])) :].tolist()
    return [*itertools.dropwhile(lambda token: token not in template.end_ids, answer)]


def _unfit(example: Example) -> Refused | None:
    if example.text is not None:
        return Refused("plain text", "there is no answer in it")
    if example.media:
        return Refused("media not supported", "the row has images, video or audio")
    if not example.messages or example.messages[-1].role != "assistant":
        return Refused("no answer", "the row does not end with an assistant turn")
    return None


def _is_empty(message: Message) -> bool:
    return not (message.content.strip() or message.tool_calls or message.reasoning)


def _why(refused: Refused) -> str:
    return f"{refused.reason}: {refused.detail}" if refused.detail else refused.reason


# ---------------------------------------------------------------- a whole file


@dataclass(frozen=True, slots=True)
class Scored:
    """A row to score: one conversation, or the two of a pair; `label` where the row has a thumb up or down."""

    sequences: list[Tokens]
    label: bool | None


def score(
    target: str | Path,
    data: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    samples: int | None = None,
    console: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    template: str | None = None,
    batch_tokens: int = 16384,
    dataset_dir: str | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Scores the rows of `data` with the reward model `target` and writes to `out`, in the data's order, rows
    {"prompt", "answer", "score"}, or of pairs {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}; the
    summary goes to `<out without extension>.scores.json`. Returns it: "scored" and "refused" rows; "mean", "min" and
    "max" of all scores; where there are pairs, "pairs", "accuracy" (the share in which the chosen answer has the higher
    score) and "margin" (the mean difference).

    Data, options, what an interrupted run leaves and what is raised are as in generate.predict."""
    files = Files.at(out)
    console = console or Console(stderr=True)
    values = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    values |= {"samples": samples} if samples is not None else {}
    located = locate(validate(Source, values), "data", dataset_dir)
    files.check_writable(located.files)
    if resume:
        files.check_unclaimed({"target": same_name(str(target)), "task": "score"})
    model = RewardModel(target, dtype=dtype, device=device, template=template, batch_tokens=batch_tokens)
    rows, refused = _read(located, model, console)
    settings = _settings(model, rows)
    if resume:
        files.check_unclaimed(settings)
        if (done := files.finished(settings)) is not None:
            say = f"{files.out}: already scored, by the same run; --no-resume scores anew"
            console.print(say, markup=False, highlight=False, soft_wrap=True)
            return done
    known = files.begin(settings, resume)
    scores = _scores(model, rows, files, {number: row["score"] for number, row in known.items()}, console)
    summary = {**_summary(rows, scores), "refused": len(refused)}
    reasons = dict(Counter(row.reason for row in refused))
    files.finish(_lines(rows, scores, model.tokenizer), {**summary, "reasons": reasons, "settings": settings})
    return summary


def _scores(
    model: RewardModel, rows: Sequence[Scored], files: Files, known: dict[int, float], console: Console
) -> list[float]:
    """The scores of all sequences, those of a row beside each other; what is done is kept in the partial file."""
    flat = [tokens.ids for row in rows for tokens in row.sequences]
    missing = [number for number in range(len(flat)) if number not in known]
    done = model.stream([flat[number] for number in missing])
    try:
        with files.partial.open("a", encoding="utf-8") as file:
            for place, value in track(done, "scoring", total=len(missing), console=console, transient=True):
                file.write(json_line({"index": missing[place], "score": value}))
                known[missing[place]] = value
    except KeyboardInterrupt:
        console.print(f"stopped: {len(known)} of {len(flat)} answers are scored; the same command goes on")
        raise
    except OSError as error:
        raise DataError(f"{files.partial}: cannot be written: {error.strerror or error}") from error
    return [known[number] for number in range(len(flat))]


def _read(located: Located, model: RewardModel, console: Console) -> tuple[list[Scored], list[RefusedRow]]:
    """The rows of a source that can be scored, and the others, which are shown."""
    found = list(read_examples(located, SourceReport("data", located.source.path)))
    fit = [example for _, _, example in found if not isinstance(example, Refused)]
    encoded = iter(model.encode(fit))
    rows: list[Scored] = []
    refused: list[RefusedRow] = []
    for file, number, example in found:
        row = example if isinstance(example, Refused) else next(encoded)
        if isinstance(row, Refused):
            refused.append(RefusedRow(file, number, row.reason, row.detail, 0))
        else:
            rows.append(Scored(row, getattr(example, "label", None)))
    if refused:
        lines = [f"{len(refused):,} of {len(found):,} rows of {located.source.path} cannot be scored:"]
        lines += [f"  {row}" for row in refused[:5]] + (["  ..."] if len(refused) > 5 else [])
        if not rows:
            raise DataError("\n".join(lines))
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return rows, refused


def _summary(rows: Sequence[Scored], scores: Sequence[float]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "scored": len(rows), "mean": float(np.mean(scores)), "min": min(scores), "max": max(scores),
    }  # fmt: skip
    numbers = iter(scores)
    pairs = [pair for row in rows if len(pair := [next(numbers) for _ in row.sequences]) == 2]
    if pairs:
        margins = [chosen - rejected for chosen, rejected in pairs]
        accuracy = float(np.mean([margin > 0 for margin in margins]))
        summary |= {"pairs": len(pairs), "accuracy": accuracy, "margin": float(np.mean(margins))}
    return summary


def _lines(rows: Sequence[Scored], scores: Sequence[float], tokenizer: Any) -> Iterator[dict[str, Any]]:
    numbers = iter(scores)
    for row in rows:
        texts = [_texts(tokens, tokenizer) for tokens in row.sequences]
        if len(texts) == 2:
            (prompt, chosen), (_, rejected) = texts
            yield {
                "prompt": prompt, "chosen": chosen, "rejected": rejected,
                "score_chosen": next(numbers), "score_rejected": next(numbers),
            }  # fmt: skip
            continue
        line = {"prompt": texts[0][0], "answer": texts[0][1], "score": next(numbers)}
        yield line if row.label is None else {**line, "label": row.label}


def _texts(tokens: Tokens, tokenizer: Any) -> tuple[str, str]:
    """What stands before the answer and the answer, special tokens included."""
    trained = np.flatnonzero(tokens.weights)
    start = int(trained[0]) if len(trained) else 0
    return tuple(
        tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (tokens.ids[:start], tokens.ids[start:])
    )


def _settings(model: RewardModel, rows: Sequence[Scored]) -> dict[str, Any]:
    """What the scores depend on; a partial file goes on only under the same."""
    asked = hashlib.sha256(json.dumps([t.ids.tolist() for row in rows for t in row.sequences]).encode())
    return {
        "target": same_name(model.target.name),
        "task": "score",
        "weights": weights_stamp(model.target),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": asked.hexdigest()[:16],
    }


__all__ = ["RewardModel", "score"]
