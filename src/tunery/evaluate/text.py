"""Generated text against references: exact match, BLEU, chrF and ROUGE, with Chinese segmented rightly.

BLEU and chrF are corpus scores by sacrebleu (Papineni et al. 2002; Popović 2015), ROUGE is the mean over rows of
rouge-score's F measure (Lin 2004). All are on a scale of 0 to 100.

Segmentation. BLEU: "13a" (the WMT default), or "zh" as soon as one reference holds a Chinese character: it makes each
Chinese character a token and otherwise cuts like 13a, so one tokenizer serves a set that mixes both directions of
translation. Where most references are in another script written without spaces (kana, Thai, Lao, Khmer, Burmese), every
character is a token. chrF needs none. ROUGE: rouge-score's own tokenizer drops everything outside a-z and 0-9; ours
takes words of any script, and single characters of the scripts written without spaces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunery.errors import DataError

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
UNSPACED = "\u3040-\u30ff\uff66-\uff9f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_HAN = re.compile(f"[{HAN}]")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(f"[{HAN}{UNSPACED}]|[^\\W_{HAN}{UNSPACED}]+")


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Scores of `predictions` against `references`, row by row, one reference each:

    {"rows", "empty" (predictions without text), "exact" (% of rows equal but for white space at the ends), "bleu",
    "chrf", "rouge-1", "rouge-2", "rouge-l", "bleu_tokenizer" (the segmentation used)}.

    Raises DataError when there is nothing to score or the numbers of rows differ."""
    import sacrebleu  # here, as rouge-score below: half a second that a run without answers need not wait

    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} references: one each is needed")
    if not predictions:
        raise DataError("no rows to score")
    tokenizer = bleu_tokenizer(references)
    equal = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
    return {
        "rows": len(predictions),
        "empty": sum(not p.strip() for p in predictions),
        "exact": 100.0 * equal / len(predictions),
        # force: sacrebleu warns about text that looks tokenised already, which scores of single words do
        "bleu": sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer, force=True).score,
        "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
        **_rouge(predictions, references),
        "bleu_tokenizer": tokenizer,
    }


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's name of the segmentation that fits: "char", "zh" or "13a" (see the top of this file)."""
    unspaced = sum(bool(_UNSPACED.search(text)) for text in references)
    if 2 * unspaced > len(references):
        return "char"
    return "zh" if any(_HAN.search(text) for text in references) else "13a"


def rouge_tokens(text: str) -> list[str]:
    """Lower-case words of any script; each character of a script without spaces by itself."""
    return _WORD.findall(text.lower())


class _RougeTokenizer:
    """What rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_tokens(text)


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}
    scorer = RougeScorer(list(names), tokenizer=_RougeTokenizer())
    rows = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    return {ours: 100.0 * sum(row[theirs].fmeasure for row in rows) / len(rows) for theirs, ours in names.items()}
