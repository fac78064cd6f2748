"""What the run changed, shown on held-out rows: answers by real generation before and after, scored, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tunery.evaluate.text import score
from tunery.files import write_text
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from tunery.types import Example

if TYPE_CHECKING:
    from tunery.report import NullReport, Report
    from tunery.setup import Run

SHOWN = 4


class Showcase:
    """Answers `eval.generate` held-out rows with the model as it starts and as it ends, on the first rank."""

    def __init__(self, run: Run, report: Report | NullReport):
        self.run, self.report = run, report
        examples = run.data.eval_examples if run.engine.is_main else []
        answerable = [e for e in examples if e.messages and e.messages[-1].role == "assistant"]
        self.examples: list[Example] = answerable[: run.job.eval.generate]
        self.saved = run.output / "answers_before.json"
        self.first: list[str] = []

    def before(self) -> None:
        """Answer with the base (with `model.init_from`: with that). A resumed run reads what it answered then."""
        if not self.examples:
            return
        if self.run.start > 0 and self.saved.is_file():
            self.first = json.loads(self.saved.read_text(encoding="utf-8"))
            return
        self.report.note(f"answering {len(self.examples)} held-out rows before training")
        self.first = self._answers()
        write_text(self.saved, json.dumps(self.first, ensure_ascii=False))

    def after(self) -> None:
        """Answer again, and report both. Writes generated_predictions.jsonl in the run folder."""
        if not self.examples or len(self.first) != len(self.examples):
            return
        self.report.note(f"answering {len(self.examples)} held-out rows after training")
        answers = self._answers()
        labels = [e.messages[-1].content for e in self.examples]
        prompts = [e.messages[-2].content if len(e.messages) > 1 else "" for e in self.examples]
        rows = [
            {"prompt": prompt, "label": label, "before": before, "after": after}
            for prompt, label, before, after in zip(prompts, labels, self.first, answers, strict=True)
        ]
        lines = [{"prompt": r["prompt"], "predict": r["after"], "label": r["label"]} for r in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.run.output / "generated_predictions.jsonl", text)
        before, after = (_numbers(score(texts, labels)) for texts in (self.first, answers))
        self.report.before_after(before, after, _spread(rows))

    def _answers(self) -> list[str]:
        run = self.run
        generator = HFGenerator(run.model, run.tokenizer, run.template)
        requests = [Request(messages=e.messages[:-1], tools=e.tools) for e in self.examples]
        sampling = Sampling(max_new_tokens=run.job.eval.max_new_tokens)
        with run.policy.autocast():  # frozen and trained parameters may differ in dtype
            done = {c.index: c.text for c in generator.generate(requests, sampling)}
        return [done[i] for i in range(len(requests))]


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that can be compared; what they were computed with is in the scores file of `tunery generate`."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few rows from all over, so that data sorted by kind still shows its kinds."""
    return rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
