"""Oracles: scores worked out by hand, and sacrebleu and rouge-score called directly."""

from __future__ import annotations

import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from tunery.errors import DataError
from tunery.evaluate.text import bleu_tokenizer, rouge_tokens, score

ENGLISH = [
    ("the cat sat on the mat", "the cat sat on a mat"),
    ("Patients received 5 mg daily.", "The patients received 5 mg twice daily."),
    ("nothing in common", "entirely different words"),
    ("Same line, same end.", "Same line, same end."),
]
CHINESE = [("患者每日服药一次", "患者每天服药一次"), ("第二组", "第二组"), ("剂量为5 mg（口服）", "剂量为5 mg，口服")]


def columns(pairs):
    return [prediction for prediction, _ in pairs], [reference for _, reference in pairs]


def test_english_equals_the_libraries():
    predictions, references = columns(ENGLISH)
    found = score(predictions, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(predictions, [references]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(predictions, [references]).score
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(reference, prediction) for prediction, reference in ENGLISH]
    for ours, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        assert found[ours] == pytest.approx(100 * sum(row[theirs].fmeasure for row in rows) / 4)
    assert (found["rows"], found["empty"], found["exact"], found["bleu_tokenizer"]) == (4, 0, 25.0, "13a")


def test_by_hand():
    """6 words each, 5 shared; of 5 pairs 3; of 4 triples 2; of 3 fours 1. Longest common subsequence: 5."""
    found = score(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found["bleu"] == pytest.approx(100 * math.exp(sum(map(math.log, (5 / 6, 3 / 5, 2 / 4, 1 / 3))) / 4))
    assert found["rouge-1"] == pytest.approx(100 * 5 / 6)
    assert found["rouge-2"] == pytest.approx(100 * 3 / 5)
    assert found["rouge-l"] == pytest.approx(100 * 5 / 6)


def test_chinese_by_hand():
    """8 characters each, 7 shared, the fourth differs: pairs 5 of 7, triples 3 of 6, fours 1 of 5."""
    found = score(["患者每日服药一次"], ["患者每天服药一次"])
    assert found["bleu"] == pytest.approx(100 * math.exp(sum(map(math.log, (7 / 8, 5 / 7, 3 / 6, 1 / 5))) / 4))
    assert found["rouge-1"] == found["rouge-l"] == pytest.approx(100 * 7 / 8)
    assert found["rouge-2"] == pytest.approx(100 * 5 / 7)
    assert found["bleu_tokenizer"] == "zh"


def test_chinese_and_mixed_equal_sacrebleu():
    for pairs in (CHINESE, CHINESE + ENGLISH):
        predictions, references = columns(pairs)
        found = score(predictions, references)
        assert found["bleu"] == sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score
        assert found["chrf"] == sacrebleu.corpus_chrf(predictions, [references]).score


def test_the_chinese_segmentation_is_the_usual_one_on_english():
    """What lets one tokenizer serve both directions."""
    chinese, usual = TokenizerZh(), Tokenizer13a()
    for prediction, reference in ENGLISH:
        for text in (prediction, reference, "p<0.05 (n=12), 3.5 mg/kg; 95% CI: 1.2-3.4"):
            assert chinese(text) == usual(text)


def test_bleu_tokenizer():
    assert bleu_tokenizer(["only English", "naïve café"]) == "13a"
    assert bleu_tokenizer(["English", "one 第 in it"]) == "zh"
    assert bleu_tokenizer(["これはペンです", "漢字だけ", "カタカナ"]) == "char"
    assert bleu_tokenizer(["สวัสดี", "ครับ"]) == "char"
    assert bleu_tokenizer(["중국어 단어"]) == "13a"  # Korean has spaces


def test_rouge_tokens():
    assert rouge_tokens("剂量5 mg（口服）") == ["剂", "量", "5", "mg", "口", "服"]
    assert rouge_tokens("Naïve café_test, «да» 𠀀") == ["naïve", "café", "test", "да", "𠀀"]
    assert rouge_tokens("カタ") == ["カ", "タ"]


def test_empty_predictions_and_white_space():
    found = score(["", " \n", "yes \n"], ["no", "还", "yes"])
    assert (found["empty"], found["exact"]) == (2, pytest.approx(100 / 3))
    assert found["rouge-1"] == pytest.approx(100 / 3)
    nothing = score(["", ""], ["a b", "第二组"])
    assert all(nothing[name] == 0.0 for name in ("exact", "bleu", "chrf", "rouge-1", "rouge-2", "rouge-l"))


def test_what_cannot_be_scored():
    with pytest.raises(DataError, match="2 predictions for 1 references"):
        score(["a", "b"], ["a"])
    with pytest.raises(DataError, match="no rows"):
        score([], [])
