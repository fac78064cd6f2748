"""Oracles: transformers' and PEFT's own classes on the same folder, one conversation at a time, and the file of an
undisturbed run."""

from __future__ import annotations

import json

import pytest
import torch

from test_cli import tunery
from tiny_model import byte_tokenizer, chat_template, random_llama, save
from tunery.adapters import lora
from tunery.config import build
from tunery.errors import DataError, ModelError
from tunery.generate import score as module
from tunery.generate.score import RewardModel, score
from tunery.models.load import ModelConfig
from tunery.models.score import load_with_head
from tunery.rewards.model import Config as RewardConfig
from tunery.types import Answer, Message

TALKS = [
    [Message("system", "Be brief."), Message("user", "One thing?"), Message("assistant", "One.")],
    [Message("user", "First"), Message("assistant", "1"), Message("user", "And then?"), Message("assistant", "二")],
    [Message("user", "Long " * 20), Message("assistant", "Yes, a longer answer than the others.")],
]
ROWS = [
    {"instruction": "Which?", "input": "", "chosen": "This one.", "rejected": "That."},
    {"instruction": "Which?", "input": "", "output": "Both of them."},
    {"instruction": "Too long " * 60, "input": "", "output": "x"},
    {"instruction": "And?", "input": "more", "chosen": "So.", "rejected": "Not at all so."},
]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A reward model as anyone saves it, with transformers alone."""
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("others")
    config = random_llama().config
    config.num_labels = 1
    torch.manual_seed(4)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """One of ours: an adapter with updates and a head that are not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    base = save(folder / "base")
    model = load_with_head("score", ModelConfig(name=str(base)), torch.float32, seed=1)
    ours = lora.Adapter(lora.Config(rank=2))
    wrapped = ours.apply(model)
    torch.manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    ours.save(wrapped, folder / "adapter", str(base))
    byte_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"


def alone(model, talks=TALKS) -> list[float]:
    ids = [chat_template().encode(talk)[0].ids.tolist() for talk in talks]
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in ids]


@pytest.mark.parametrize("batch_tokens", [16384, 100])
def test_a_model_that_transformers_saved(others, batch_tokens):
    from transformers import AutoModelForSequenceClassification

    theirs = alone(AutoModelForSequenceClassification.from_pretrained(others).eval())
    model = RewardModel(others, dtype="float32", batch_tokens=batch_tokens)
    assert model.policy.packs and model.score(TALKS) == pytest.approx(theirs, abs=1e-5)
    assert model.score(TALKS[:1]) == pytest.approx(theirs[:1], abs=1e-5)


def test_an_adapter_of_ours_in_peft(adapter):
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification

    mine = RewardModel(adapter, dtype="float32").score(TALKS)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1).eval()
    assert mine == pytest.approx(alone(auto), abs=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(adapter.parent / "base", num_labels=1)
    assert mine == pytest.approx(alone(PeftModel.from_pretrained(base, adapter).eval()), abs=1e-5)
    assert len({round(value, 3) for value in mine}) == 3


def test_what_scores_nothing_and_what_cannot_be_scored(others, adapter):
    from tunery.models.target import load_target

    with pytest.raises(ModelError, match="language model, which scores nothing"):
        RewardModel(adapter.parent / "base")
    for target in (others, adapter):
        with pytest.raises(ModelError, match="reward model, which scores answers and gives none"):
            load_target(target)
    model = RewardModel(others)
    with pytest.raises(DataError, match="conversation 2 cannot be scored: no answer"):
        model.score([TALKS[0], TALKS[1][:-1]])
    with pytest.raises(DataError, match="context is 256"):
        model.score([[Message("user", "x" * 300), Message("assistant", "y")]])


def test_an_empty_answer_is_scored_at_its_end(others):
    from transformers import AutoModelForSequenceClassification

    asked = Message("user", "One thing?")
    model = RewardModel(others, dtype="float32")
    ids = [*chat_template().prompt([asked]), *byte_tokenizer()("<|im_end|>\n")["input_ids"]]
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(others)(input_ids=torch.tensor([ids])).logits
    assert model.score([[asked, Message("assistant", "")]]) == pytest.approx([theirs.item()], abs=1e-5)


def test_the_reward_of_generated_answers(others):
    reward = build_reward(RewardConfig(target=str(others), dtype="float32"))
    answers = [Answer(talk[:-1], talk[-1].content, [], "stop") for talk in TALKS]
    assert reward.score(answers) == pytest.approx(RewardModel(others, dtype="float32").score(TALKS), abs=1e-6)


def build_reward(config):
    return build("rewards", config)


# ---------------------------------------------------------------- a whole file


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_in_order_with_a_summary(others, data, tmp_path, capfd):
    out = tmp_path / "sub" / "scores.jsonl"
    summary = score(others, data, out, dtype="float32")
    first, second, third = lines(out)
    talks = [
        [Message("user", "Which?"), Message("assistant", text)] for text in ("This one.", "That.", "Both of them.")
    ]
    talks += [[Message("user", "And?\nmore"), Message("assistant", text)] for text in ("So.", "Not at all so.")]
    expected = RewardModel(others, dtype="float32").score(talks)
    found = [first["score_chosen"], first["score_rejected"], second["score"]]
    found += [third["score_chosen"], third["score_rejected"]]
    assert found == pytest.approx(expected, abs=1e-5)
    assert first["prompt"] == "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert (first["chosen"], second["answer"]) == ("This one.<|im_end|>\n", "Both of them.<|im_end|>\n")
    margins = [expected[0] - expected[1], expected[3] - expected[4]]
    assert summary == pytest.approx({
        "scored": 3, "refused": 1, "pairs": 2, "accuracy": sum(m > 0 for m in margins) / 2, "margin": sum(margins) / 2,
        "mean": sum(expected) / 5, "min": min(expected), "max": max(expected),
    }, abs=1e-5)  # fmt: skip
    assert "1 of 4 rows" in capfd.readouterr().err
    saved = json.loads((tmp_path / "sub" / "scores.scores.json").read_text())
    assert saved["accuracy"] == summary["accuracy"] and saved["reasons"] == {"too long": 1}
    assert score(others, data, out, dtype="float32") == summary  # done already


def test_an_interrupted_run_goes_on(others, data, tmp_path, monkeypatch):
    whole = score(others, data, tmp_path / "whole.jsonl", dtype="float32", batch_tokens=40)
    real, out, asked = RewardModel.stream, tmp_path / "scores.jsonl", []

    def breaks(self, sequences):
        asked.append(len(sequences))
        for number, found in enumerate(real(self, sequences)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(module.RewardModel, "stream", breaks)
    with pytest.raises(KeyboardInterrupt):
        score(others, data, out, dtype="float32", batch_tokens=40)
    assert not out.exists() and len(lines(tmp_path / "scores.jsonl.partial")) == 3
    with pytest.raises(DataError, match="other settings"):
        score(others, data, out, dtype="float64")
    with pytest.raises(KeyboardInterrupt):
        score(others, data, out, dtype="float32", batch_tokens=40)
    assert asked == [5, 3]
    monkeypatch.setattr(module.RewardModel, "stream", real)
    assert score(others, data, out, dtype="float32", batch_tokens=40) == whole
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_the_command(others, data, tmp_path):
    out = tmp_path / "scores.jsonl"
    done = tunery("generate", others, data, "--out", out, "--score")
    assert done.returncode == 0 and json.loads(done.stdout)["pairs"] == 2 and len(lines(out)) == 3
    refused = tunery("generate", others, data, "--out", out, "--score", "--temperature", "1")
    assert refused.returncode != 0 and "--temperature: is for answers" in refused.stderr
