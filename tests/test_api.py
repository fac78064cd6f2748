"""Oracle: the same job by YAML."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import tunery
from tiny_model import byte_tokenizer, random_llama
from tiny_runs import tiny_job
from tunery.errors import ConfigError, TemplateError
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from tunery.models.target import load_target
from tunery.run_folder import write_config
from tunery.types import Message


def test_train_takes_files_mappings_and_jobs(tmp_path):
    job = tiny_job(tmp_path, train={"max_steps": 2})
    write_config(job, tmp_path)
    outputs = []
    for number, source in enumerate((str(tmp_path / "tunery.yaml"), job.model_dump(mode="json"), job)):
        result = tunery.train(source, f"output={tmp_path / str(number)}", "train.log_every=2")
        assert result.step == 2 and result.metrics["train_loss"] > 0
        outputs.append(load_file(result.output / "adapter_model.safetensors"))
    assert all(outputs[0].keys() == o.keys() and len(o) for o in outputs)
    assert all(outputs[0][k].equal(o[k]) for o in outputs[1:] for k in o)


def test_tuner_is_the_yaml_in_python(tmp_path):
    job = tiny_job(tmp_path, train={"max_steps": 2})
    tuner = tunery.Tuner(
        str(tmp_path / "model"), output=str(tmp_path / "tuner"), adapter={"kind": "lora", "rank": 4},
        data={"cache": False},
    )  # fmt: skip
    tuner.set(model__dtype="float64", optimizer__lr=1e-2, train__seed=5, train__batch_size=8)
    before = tuner.chat("1: alpha", max_new_tokens=4)
    tuner.load_jsonl(tmp_path / "train.jsonl", eval=tmp_path / "eval.jsonl").train(max_steps=2, epochs=2, log_every=1)
    mine = load_file(tmp_path / "tuner" / "adapter_model.safetensors")
    theirs = load_file(tunery.train(job).output / "adapter_model.safetensors")
    assert theirs and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    after = tuner.chat([tunery.types.Message("user", "1: alpha")], system="Repeat.", max_new_tokens=4)
    assert isinstance(before, str) and isinstance(after, str)
    report = tuner.export(tmp_path / "merged")
    assert report["kind"] == "merged"


def test_a_base_without_a_template_talks_with_the_one_named(tmp_path):
    random_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(template=None).save_pretrained(tmp_path / "model")
    tuner = tunery.Tuner(str(tmp_path / "model"))
    with pytest.raises(TemplateError, match=r"data\.template"):
        tuner.chat("hi")
    named = tunery.Tuner(str(tmp_path / "model"), data={"template": "chatml"})
    direct = load_target(tmp_path / "model", template="chatml")
    (expected,) = HFGenerator(direct.model, direct.tokenizer, direct.template).generate(
        [Request([Message("user", "hi")])], Sampling(max_new_tokens=3)
    )
    assert named.chat("hi", max_new_tokens=3) == expected.text


def test_rows_are_added_to_those_of_any_form():
    data = {"train": "a.jsonl"}
    tuner = tunery.Tuner(data=data).load_jsonl("b.jsonl", samples=3)
    assert [source.path for source in tuner.job.data.train] == ["a.jsonl", "b.jsonl"]
    assert data == {"train": "a.jsonl"}  # the caller's own stays as it was
    tuner = tunery.Tuner(data={"train": {"path": "a.jsonl", "samples": 5}}).load_jsonl("b.jsonl")
    assert [source.samples for source in tuner.job.data.train] == [5, None]


def test_mistakes_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="got 5"):
        tunery.train(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"optimizer\.lrr"):
        tunery.Tuner(optimizer={"lrr": 1}).job  # noqa: B018
    with pytest.raises(ConfigError, match=r"data\.train"):
        tunery.Tuner(output=str(tmp_path / "x")).train()
    with pytest.raises(ConfigError, match=r"temperature: must be .*got -1"):
        tunery.Tuner().chat("hi", temperature=-1.0)
    with pytest.raises(ConfigError, match="max_tokens: unknown key; did you mean 'max_new_tokens'"):
        tunery.Tuner().chat("hi", max_tokens=3)
    with pytest.raises(ConfigError, match=r"data: expected a mapping, got 'rows\.jsonl'"):
        tunery.Tuner(data="rows.jsonl").load_jsonl("more.jsonl")
    with pytest.raises(ConfigError, match="call train"):
        tunery.Tuner().export(tmp_path / "y")
