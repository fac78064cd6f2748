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
    """Answers `eval.generate` held-out rows with the model as it starts and as it ends, each rank its share."""

    def __init__(self, run: Run, report: Report | NullReport):
        self.run, self.report = run, report
        answerable = [e for e in run.data.eval_examples if e.messages and e.messages[-1].role == "assistant"]
        self.examples: list[Example] = answerable[: run.job.eval.generate]
        self.saved = run.output / "answers_before.json"
        self.first: list[str] = []

    def before(self) -> None:
        """Answer with the base (with `model.init_from`: with that). A resumed run reads what it answered then."""
        if not self.examples:
            return
        engine = self.run.engine
        saved = self.saved.read_text(encoding="utf-8") if self.run.start > 0 and self.saved.is_file() else None
        saved = engine.gather(saved)[0]  # what the first rank sees decides for all
        if saved is not None:
            self.first = json.loads(saved)
            return
        self.report.note(f"answering {len(self.examples)} held-out rows before training")
        self.first = self._answers()
        if engine.is_main:
            write_text(self.saved, json.dumps(self.first, ensure_ascii=False))

    def after(self) -> None:
        """Answer again, and report both. Writes generated_predictions.jsonl in the run folder."""
        if not self.examples or len(self.first) != len(self.examples):
            return
        self.report.note(f"answering {len(self.examples)} held-out rows after training")
        answers = self._answers()
        if not self.run.engine.is_main:
            return
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
        mine = range(run.engine.rank, len(self.examples), run.engine.world)
        requests = [Request(messages=self.examples[i].messages[:-1], tools=self.examples[i].tools) for i in mine]
        sampling = Sampling(max_new_tokens=run.job.eval.max_new_tokens)
        with run.policy.autocast():  # frozen and trained parameters may differ in dtype
            done = {mine[c.index]: c.text for c in generator.generate(requests, sampling)}
        everyone = {i: text for answers in run.engine.gather(done) for i, text in answers.items()}
        return [everyone[i] for i in range(len(self.examples))]


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that can be compared; what they were computed with is in the scores file of `tunery generate`."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few rows from all over, so that data sorted by kind still shows its kinds."""
    return rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
