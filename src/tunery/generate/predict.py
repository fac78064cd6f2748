"""Answers to a whole file, written as rows {"prompt", "predict", "label"}, with their scores beside them.

What is asked of a row is its conversation up to its last assistant turn, and that turn is the label; a row that ends
with a question, or whose answer is empty, is answered without being scored."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tunery.config import validate
from tunery.data.examples import read_examples
from tunery.data.render import RowRefused
from tunery.data.report import RefusedRow, SourceReport
from tunery.data.sources import Located, Source, locate
from tunery.errors import DataError
from tunery.evaluate.text import score
from tunery.files import json_line
from tunery.generate.answers import Files, same_name, weights_stamp
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from tunery.models.target import Loaded, load_target
from tunery.types import Completion, Example, Message, Refused


@dataclass(frozen=True, slots=True)
class Question:
    """One row to answer: `ids` the prompt's tokens, `label` the answer in the data (None where there is none)."""

    ids: list[int]
    label: str | None


def predict(
    target: str | Path,
    data: str | Path | Mapping[str, Any],
    out: str | Path,
    sampling: Sampling | None = None,
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
    """Answers the rows of `data` (a path, hub name, dataset_info.json name, or a source as in the `data:` section) with
    `target`; writes them to `out` in the data's order, and `<out without extension>.scores.json`. Returns the scores:
    those of evaluate.text.score over the rows that have a label, "answered", "refused" (rows that cannot be used) and
    "cut" (answers that ended at max_new_tokens). `samples`: only the first n rows. Progress, and rows that cannot be
    used, are shown on `console` (rich; None: standard error).

    Until all rows are answered they gather in `<out>.partial`. With `resume` an interrupted run of the same target,
    data and sampling goes on from there, and a finished one is not done again; without, what is at `out` is replaced.
    Raises DataError where `out` cannot be written, `out` or `<out>.partial` holds something else than this run's
    answers, or no row can be used; ModelError for the target. What can be found wrong before the model loads is."""
    files = Files.at(out)
    sampling = sampling or Sampling()
    console = console or Console(stderr=True)
    values = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    values |= {"samples": samples} if samples is not None else {}
    located = locate(validate(Source, values), "data", dataset_dir)
    files.check_writable(located.files)
    if resume:
        files.check_unclaimed({"target": same_name(str(target)), **sampling.model_dump(mode="json")})
    loaded = load_target(target, dtype=dtype, device=device, template=template, talks=True)
    generator = HFGenerator(loaded.model, loaded.tokenizer, loaded.template, batch_tokens=batch_tokens)
    questions, refused, rows = _read(located, generator, console)
    settings = _settings(loaded, questions, sampling)
    if resume:
        files.check_unclaimed(settings)
        if (done := files.finished(settings)) is not None:
            say = f"{files.out}: already answered, by the same run; --no-resume answers anew"
            console.print(say, markup=False, highlight=False, soft_wrap=True)
            return done
    answers = files.begin(settings, resume)
    missing = [i for i in range(len(questions)) if i not in answers]
    requests = [Request(ids=questions[i].ids, number=i) for i in missing]
    try:
        with files.partial.open("a", encoding="utf-8") as file:
            for completion in _shown(generator.generate(requests, sampling), len(questions), len(answers), console):
                answer = {"predict": answer_text(completion), "finish": completion.finish}
                file.write(json_line({"index": completion.index, **answer}))
                file.flush()
                answers[completion.index] = answer
    except KeyboardInterrupt:
        console.print(f"stopped: {len(answers)} of {len(questions)} rows are answered; the same command goes on")
        raise
    except OSError as error:
        raise DataError(
            f"{files.partial}: cannot be written: {error.strerror or error}; {len(answers)} of {len(questions)} rows "
            "are answered, and the same command goes on from there"
        ) from error
    ordered = [answers[i] for i in range(len(questions))]
    result = _scores(questions, ordered, rows)
    reasons = dict(Counter(r.reason for r in refused))
    files.finish(_rows(questions, ordered, loaded.tokenizer), {**result, "reasons": reasons, "settings": settings})
    return result


def _scores(questions: Sequence[Question], answers: Sequence[dict[str, Any]], rows: int) -> dict[str, Any]:
    labelled = [(a["predict"], q.label) for q, a in zip(questions, answers, strict=True) if q.label is not None]
    return {
        **(score(*zip(*labelled, strict=True)) if labelled else {}),  # type: ignore[arg-type]
        "answered": len(questions),
        "refused": rows - len(questions),
        "cut": sum(answer["finish"] == "length" for answer in answers),
    }


def answer(
    generator: HFGenerator, examples: Sequence[Example], sampling: Sampling
) -> list[dict[str, str | None] | Refused]:
    """The row {"prompt", "predict", "label"} of each example (label None where it has none), or why it has none."""
    asked = [question(example, generator) for example in examples]
    requests = [Request(ids=q.ids, number=i) for i, q in enumerate(asked) if isinstance(q, Question)]
    found = {completion.index: completion for completion in generator.generate(requests, sampling)}
    return [
        q
        if isinstance(q, Refused)
        else {"prompt": _text(generator.tokenizer, q.ids), "predict": answer_text(found[i]), "label": q.label}
        for i, q in enumerate(asked)
    ]


# ---------------------------------------------------------------- from a row to a question


def question(example: Example, generator: HFGenerator) -> Question | Refused:
    """What to ask of an example, or why nothing can be asked."""
    if example.text is not None:
        return Refused("plain text", "there is no question in it")
    if example.media:
        return Refused("media not supported", "the row has images, video or audio")
    messages = list(example.messages)
    label = None
    if messages and messages[-1].role == "assistant":
        last = message_text(messages.pop())
        label = None if example.label is False else last  # a thumb down: an answer not to be compared with
    if not messages:
        return Refused("no question", "nothing comes before the answer")
    try:
        (ids,) = generator.prompts([Request(messages, example.tools)])
    except RowRefused as refused:
        return refused.refused
    if generator.context is not None and len(ids) >= generator.context:
        return Refused("prompt too long", f"{len(ids)} tokens; the model's context is {generator.context}")
    return Question(ids, label or None)


def message_text(message: Message) -> str:
    """An answer as text: its content, then its tool calls as a line of JSON each. Reasoning is not part of it."""
    calls = [
        json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False, sort_keys=True)
        for call in message.tool_calls
    ]
    return "\n".join([*([message.content] if message.content or not calls else []), *calls])


def answer_text(completion: Completion) -> str:
    """What was generated, in the same form as the label."""
    return completion.text if completion.message is None else message_text(completion.message)


def _read(located: Located, generator: HFGenerator, console: Console) -> tuple[list[Question], list[RefusedRow], int]:
    """The questions of a source, the rows that give none (which are shown), and the number of rows."""
    report = SourceReport("data", located.source.path)
    questions: list[Question] = []
    refused: list[RefusedRow] = []
    rows = 0
    for file, row, example in read_examples(located, report):
        rows += 1
        asked = example if isinstance(example, Refused) else question(example, generator)
        if isinstance(asked, Refused):
            refused.append(RefusedRow(file, row, asked.reason, asked.detail, 0))
        else:
            questions.append(asked)
    if refused:
        lines = [f"{len(refused):,} of {rows:,} rows of {located.source.path} cannot be answered:"]
        lines += [f"  {row}" for row in refused[:5]] + (["  ..."] if len(refused) > 5 else [])
        if not questions:
            raise DataError("\n".join(lines))
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return questions, refused, rows


def _rows(questions: Sequence[Question], answers: Sequence[dict[str, Any]], tokenizer: Any) -> Iterator[dict[str, str]]:
    for asked, given in zip(questions, answers, strict=True):
        yield {"prompt": _text(tokenizer, asked.ids), "predict": given["predict"], "label": asked.label or ""}


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A prompt as text, special tokens included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- what the answers depend on


def _settings(loaded: Loaded, questions: Sequence[Question], sampling: Sampling) -> dict[str, Any]:
    """What the answers depend on; a partial file goes on only under the same."""
    asked = hashlib.sha256(json.dumps([[q.ids, q.label] for q in questions]).encode()).hexdigest()[:16]
    return {
        "target": same_name(loaded.target.name),
        "weights": weights_stamp(loaded.target),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "questions": asked,
        **sampling.model_dump(mode="json"),
    }


def _shown(completions: Iterator[Completion], total: int, done: int, console: Console) -> Iterator[Completion]:
    """The same completions, with a progress bar: rows, tokens per second, time left."""
    bar = Progress(
        TextColumn("answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    tokens = 0
    with bar:
        task = bar.add_task("", total=total, completed=done, speed="")
        for completion in completions:
            tokens += len(completion.ids)
            seconds = bar.tasks[0].elapsed or 0.0
            bar.update(task, advance=1, speed=f"{tokens / seconds:,.0f} tokens/s" if seconds else "")
            yield completion


__all__ = ["Question", "answer", "answer_text", "message_text", "predict", "question"]
