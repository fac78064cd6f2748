"""Oracles: the parts of a target are where they were put; a loaded adapter computes what plain PEFT computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny_model import byte_tokenizer, random_llama, save
from tunery.errors import ModelError
from tunery.models.load import resolve_name
from tunery.models.target import load_adapter, load_target, resolve_target

IDS = torch.tensor([[5, 60, 7, 200]])


def adapter(folder, base, seed=1, **options):
    """A LoRA adapter that changes the output, as PEFT saves it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tmp_path):
    """A finished LoRA run with one checkpoint, as the loop leaves it."""
    folder = adapter(tmp_path / "runs" / "mine", base)
    byte_tokenizer(template="trained: {{ messages[0].content }}<|im_end|>").save_pretrained(folder)
    shutil.copytree(folder, folder / "checkpoint-20")
    (folder / "tunery.yaml").write_text(
        f"# torch 2.0\nmodel: {{name: {base}, revision: null, trust_remote_code: false}}\n"
        "data: {template: chatml, system: Be kind.}\noutput: elsewhere\n"
    )
    return folder


def test_model_folder(base):
    found = resolve_target(base)
    assert (found.kind, found.adapter, found.base.name) == ("model", None, str(base))
    assert (found.tokenizer, found.template, found.system) == (str(base), "auto", None)


def test_built_in():
    found = resolve_target("builtin:tiny")
    assert (found.kind, found.base.name, found.adapter) == ("model", "builtin:tiny", None)
    with pytest.raises(ModelError, match=r"no such built-in model .*builtin:tiny"):
        resolve_target("builtin:tyni")


def test_run_and_checkpoint(run, base):
    for folder, kind in ((run, "run"), (run / "checkpoint-20", "checkpoint")):
        found = resolve_target(folder)
        assert (found.kind, found.adapter, found.base.name) == (kind, folder, str(base))
        assert (found.tokenizer, found.template, found.system) == (str(folder), "auto", "Be kind.")
    loaded = load_target(run)
    assert loaded.template.source.startswith("trained: ")  # the one saved with it, not the base's
    assert loaded.template.system == "Be kind."


def test_a_run_whose_tokenizer_has_no_template_uses_the_one_of_its_configuration(run):
    (run / "chat_template.jinja").unlink()
    assert resolve_target(run).template == "chatml"


def test_whole_model_run(base, tmp_path):
    shutil.copytree(base, tmp_path / "full")
    (tmp_path / "full" / "tunery.yaml").write_text("model: {name: 'builtin:tiny'}\nadapter: {kind: full}\n")
    found = resolve_target(tmp_path / "full")
    assert (found.kind, found.base.name, found.adapter) == ("run", str(tmp_path / "full"), None)


def test_foreign_adapter_takes_tokenizer_and_template_from_its_base(base, tmp_path):
    folder = adapter(tmp_path / "theirs", base)
    found = resolve_target(folder)
    assert (found.kind, found.base.name, found.tokenizer) == ("adapter", str(base), str(base))
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    loaded = load_target(folder)
    assert not loaded.model.training
    assert torch.equal(loaded.model(IDS).logits, expected(IDS).logits)
    assert not torch.equal(loaded.model(IDS).logits, random_llama()(IDS).logits)


def test_an_adapter_of_another_folder_than_the_configured_model(run, base, tmp_path):
    """`model.init_from` names weights to start from: the adapter is one of those, and its own file says so."""
    other = save(tmp_path / "other", seed=5)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    assert resolve_target(run).base.name == str(other)


def test_dtype(base):
    assert load_target(base, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_target(base, device="cpu").model.dtype == torch.float32


# ---------------------------------------------------------------- errors


def test_no_such_folder_names_the_nearest(run):
    with pytest.raises(ModelError, match=r"no such folder; did you mean .*runs/mine\?"):
        resolve_target(run.parent / "mien")
    with pytest.raises(ModelError, match="is a file"):
        resolve_target(run / "tunery.yaml")


def test_a_mistyped_relative_folder_is_not_taken_for_a_hub_name(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(ModelError, match=r"runs/min: no such folder; did you mean runs/mine\?"):
        resolve_target("runs/min")
    with pytest.raises(ModelError, match="no such folder"):
        resolve_target("runs/quite-another")


def test_unfinished_run_names_its_checkpoints(run):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    with pytest.raises(ModelError, match=r"has no finished model yet; use one of its checkpoints \(.*/checkpoint-20\)"):
        resolve_target(run)
    shutil.rmtree(run / "checkpoint-20")
    with pytest.raises(ModelError, match="no finished model yet and no checkpoint"):
        resolve_target(run)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"neither an adapter nor a model: .*it holds: notes\.txt"):
        resolve_target(tmp_path)


def test_base_that_is_gone(run, base):
    config = json.loads((run / "adapter_config.json").read_text())
    gone = f"{base}-moved"
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": gone}))
    with pytest.raises(ModelError, match=r"its base model cannot be found: .*base_model_name_or_path of .*mine"):
        resolve_target(run)
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    (run / "tunery.yaml").unlink()
    with pytest.raises(ModelError, match="names no base model"):
        resolve_target(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 48}, "size mismatch"),
        ({"num_hidden_layers": 1}, "tensors are not in the file, [1-9][0-9]* in the file have no place"),
    ],
)
def test_adapter_that_does_not_fit(base, tmp_path, options, message):
    folder = adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=f"adapter: this adapter does not fit the base model: .*{message}"):
        load_adapter(random_llama(**options), folder)


def test_adapter_with_saved_modules_fits(base, tmp_path):
    folder = adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True)
    saved = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(load_adapter(random_llama(), folder), save_embedding_layers=False)
    assert any("lm_head" in name for name in saved) and own.keys() == saved.keys()
    assert all(own[name].equal(saved[name]) for name in saved)


def test_built_in_name_stays_a_name():
    assert resolve_name("builtin:tiny") != "builtin:tiny"  # a packaged folder, whose path must not get into results
    assert resolve_target("builtin:tiny").tokenizer == "builtin:tiny"
