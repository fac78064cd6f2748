"""Oracles: plain transformers and plain PEFT load what was written and compute what base and adapter compute."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tiny_model import TEMPLATE, byte_tokenizer, random_llama, save
from tunery.data.template import load_template
from tunery.errors import ModelError
from tunery.export import merge as module
from tunery.export.merge import export
from tunery.models.load import resolve_name

IDS = torch.tensor([[5, 60, 7, 200, 31, 9]])


def adapter_on(folder, base, **options):
    """A run folder: a LoRA adapter that changes the output, and the tokenizer with the template trained with."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options})
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    byte_tokenizer(TEMPLATE + "{# trained #}").save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(base, folder):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base")


@pytest.fixture
def run(tmp_path, base):
    return adapter_on(tmp_path / "run", base)


def test_merged_folder_loads_in_transformers(run, base, tmp_path):
    out = tmp_path / "new" / "merged"
    report = export(run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(model) - trained(base, run)).abs().max() < 1e-4
    assert (logits(model) - logits(random_llama())).abs().max() > 0.1
    assert report["kind"] == "merged" and report["dtype"] == "float32" and report["out"] == str(out)
    assert report["written"]["error"] < 1e-5 < 0.05 < report["effect"]["error"]
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE + "{# trained #}"
    ends = model.generation_config.eos_token_id
    assert set(ends) == {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    modes = {path.stat().st_mode & 0o666 for path in [out, *out.iterdir()]}
    assert modes == {tmp_path.joinpath("new").stat().st_mode & 0o666}  # as readable as anything else made here


def test_a_template_named_for_the_export_is_the_one_saved(run, tmp_path):
    for adapter_only, out in ((False, tmp_path / "merged"), (True, tmp_path / "adapter")):
        export(run, out, adapter_only=adapter_only, template="chatml")
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == load_template("chatml", tokenizer).source != TEMPLATE


def test_adapter_alone_loads_in_peft(run, base, tmp_path):
    out = tmp_path / "adapter"
    report = export(run, out, adapter_only=True)
    assert torch.equal(trained(base, out), trained(base, run))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE + "{# trained #}"
    assert report["kind"] == "adapter" and report["written"]["error"] == 0.0
    weights = load_file(out / "adapter_model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_adapter_of_the_built_in_base_keeps_its_name(tmp_path):
    run = adapter_on(tmp_path / "run", resolved := resolve_name("builtin:tiny"))
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "builtin:tiny"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run / name).unlink()
    export(run, tmp_path / "adapter", adapter_only=True)
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "builtin:tiny" and resolved not in text


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),  # saved, but never changed
        ({"target_modules": "all-linear", "use_dora": True}, True),
        ({"target_modules": "all-linear", "use_rslora": True}, True),
    ],
)
def test_tied_embeddings_stay_right(tmp_path, options, tied):
    """Merging into one of two that share a tensor must not change the other."""
    base = save(tmp_path / "base", tie_word_embeddings=True)
    run = adapter_on(tmp_path / "run", base, **options)
    expected = trained(base, run)
    export(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(model) - expected).abs().max() < 1e-4
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounds_once(run, base, tmp_path, name):
    """Merged in float32, then rounded: each weight is the nearest to what was trained."""
    dtype = getattr(torch, name)
    report = export(run, tmp_path / "out", dtype=name)
    written = load_file(tmp_path / "out" / "model.safetensors")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).merge_and_unload()
    for key, tensor in merged.state_dict().items():
        assert torch.equal(written[key], tensor.to(dtype)), key
    assert report["dtype"] == name and json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert 1e-4 < report["written"]["error"] < 0.05


def test_the_default_precision_is_the_bases(tmp_path):
    base = tmp_path / "base"
    random_llama().to(torch.bfloat16).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    report = export(adapter_on(tmp_path / "run", base), tmp_path / "out")
    assert report["dtype"] == "bfloat16"
    assert report["merge"]["error"] < 1e-5  # before rounding


def test_a_whole_model_is_rewritten(base, tmp_path):
    report = export(base, tmp_path / "out", max_shard_size="20KB")
    assert report["kind"] == "model" and "effect" not in report
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(random_llama()))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    with pytest.raises(ModelError, match="there is no adapter to export"):
        export(base, tmp_path / "other", adapter_only=True)


# ---------------------------------------------------------------- nothing wrong is left behind


def nothing_left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_wrong_merge_is_refused(run, tmp_path, monkeypatch):
    merge = module._merge

    def wrong(model):
        merged = merge(model)
        merged.model.layers[0].mlp.up_proj.weight.data[0] += 0.5
        return merged

    monkeypatch.setattr(module, "_merge", wrong)
    with pytest.raises(ModelError, match=r"the merged model does not compute what was trained: .*Nothing was written"):
        export(run, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_wrong_file_is_refused(run, tmp_path, monkeypatch, adapter_only):
    """A disk or a library that wrote something else than it was given."""
    name = "adapter_model.safetensors" if adapter_only else "model.safetensors"
    real = module.load_adapter if adapter_only else AutoModelForCausalLM.from_pretrained

    def damaged(*args, **options):
        for path in tmp_path.glob(f".out.*/{name}"):
            content = bytearray(path.read_bytes())
            content[-400:] = bytes(400)
            path.write_bytes(content)
        return real(*args, **options)

    if adapter_only:
        monkeypatch.setattr(module, "load_adapter", damaged)
    else:
        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", damaged)
    with pytest.raises(ModelError, match=r"the written (model|adapter) does not compute what was trained"):
        export(run, tmp_path / "out", adapter_only=adapter_only)
    assert nothing_left(tmp_path)


def test_rounding_that_loses_the_training_is_refused(base, tmp_path):
    run = adapter_on(tmp_path / "run", base, lora_alpha=0.002)
    with pytest.raises(ModelError, match=r"more than half of what the adapter does .*float32, or the adapter"):
        export(run, tmp_path / "out", dtype="bfloat16")
    assert nothing_left(tmp_path)
    assert export(run, tmp_path / "out")["written"]["error"] < 1e-5


def test_an_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(self, folder, **options):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"out: cannot be written: .*No space left"):
        export(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_too_small_a_disk_is_found_before_writing(run, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(ModelError, match=r"out: needs 0\.03 GiB, its disk has 0\.00 GiB free"):
        export(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_what_is_there_is_not_overwritten(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="is not an empty folder"):
        export(run, out)
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").unlink()
    export(run, out)  # an empty one will do
    assert (out / "model.safetensors").is_file()


def test_quantised_base(run, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(ModelError, match="is quantised"):
        export(run, tmp_path / "out")


def test_unknown_precision(run, tmp_path):
    with pytest.raises(ModelError, match="dtype 'int8': not one of float32, bfloat16"):
        export(run, tmp_path / "out", dtype="int8")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_shard_size": "lots"}, r"max_shard_size 'lots': expected a size with its unit .* such as 5GB"),
        ({"max_shard_size": "0GB"}, "max_shard_size '0GB'"),
        ({"max_shard_size": "5"}, "max_shard_size '5'"),
        ({"out": "/proc/merged"}, r"/proc/merged: cannot be written: .*choose another place"),
        ({"out": "file.txt/merged"}, r"merged: cannot be written"),
    ],
)
def test_what_is_asked_is_checked_before_the_model_loads(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(module, "resolve_target", lambda target: pytest.fail("the target was looked up"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ModelError, match=words):
        export("m", **{"out": "out", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("20kb", 20_000), ("0.5 MB", 500_000), ("1TB", 10**12)])
def test_shard_sizes_are_those_of_transformers(text, size):
    assert module._shard_size(text) == size


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_reward_model(dtype, base, tmp_path):
    """Merged and as an adapter: the values that transformers and PEFT give before, one conversation at a time."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_CLS")
    tuned = get_peft_model(model, config)
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "run")
    byte_tokenizer().save_pretrained(tmp_path / "run")
    report = export(tmp_path / "run", tmp_path / "merged", dtype=dtype)
    assert (
        report["scores"] and report["kind"] == "merged" and report["written"]["error"] < report["written"]["tolerance"]
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.num_labels == 1 and merged.config.pad_token_id == 257
    near = 1e-5 if dtype is None else 0.1 * float(expected.abs().max()) + 0.02
    assert (logits(merged) - expected).abs().max() < near
    export(tmp_path / "run", tmp_path / "alone", adapter_only=True)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    assert (logits(PeftModel.from_pretrained(fresh, tmp_path / "alone")) - expected).abs().max() < 1e-6
    again = export(tmp_path / "merged", tmp_path / "again")
    assert again["kind"] == "model" and again["scores"]
