"""Oracles: a fresh adapter equals the base; what is saved loads in PEFT and gives the same logits; resume is bitwise;
PiSSA's plain LoRA on the original base equals the trained model; LoRA+ groups by hand."""

from __future__ import annotations

import pytest
import torch
from peft import PeftConfig, PeftModel

from tiny_models import tiny_model
from tunery.adapters import lora
from tunery.errors import ConfigError
from tunery.setup import parameter_groups

IDS = torch.arange(9)[None]
KINDS = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3.0},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa exact, rslora": {"init": "pissa", "pissa_iter": -1, "rslora": True},
    "module saved": {"modules_to_save": ["lm_head"], "targets": ["q_proj", "v_proj"]},
}


def applied(options: dict, family: str = "llama", **more):
    adapter = lora.Adapter(lora.Config(rank=4, **options))
    model = tiny_model(family, torch.float32, hook=False, tie_word_embeddings=False)
    return adapter, adapter.apply(model, **more).eval()


def shake(model) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_equals_base_and_saved_loads_in_peft(kind, tmp_path):
    base = tiny_model("llama", torch.float32, hook=False, tie_word_embeddings=False).eval()
    adapter, model = applied(KINDS[kind])
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=1e-5, atol=1e-5)
    shake(model)
    trained = model(IDS).logits
    assert (trained - base(IDS).logits).abs().max() > 0.01
    adapter.save(model, tmp_path, "some/base")
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "some/base"
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(IDS).logits, trained, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(kind, tmp_path):
    adapter, model = applied(KINDS[kind])
    shake(model)
    adapter.save(model, tmp_path, "base")
    _, resumed = applied(KINDS[kind], resume=tmp_path)
    assert all(a.equal(b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    adapter.load(resumed, tmp_path)
    assert all(a.equal(b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_pissa_takes_the_principal_part_out_of_the_base():
    """With the exact SVD, what is left in the base has exactly the singular values after the first r."""
    base = tiny_model("llama", torch.float32, hook=False)
    _, model = applied({"init": "pissa", "pissa_iter": -1})
    name = "model.layers.0.mlp.up_proj"
    whole = torch.linalg.svdvals(base.get_submodule(name).weight.double())
    left = torch.linalg.svdvals(model.get_base_model().get_submodule(name).base_layer.weight.double())
    torch.testing.assert_close(left[: len(whole) - 4], whole[4:], rtol=1e-4, atol=1e-6)


def test_pissa_ends_as_one_lora_of_twice_the_rank_without_its_working_file(tmp_path):
    adapter, model = applied({"init": "pissa"})
    adapter.finish(model, tmp_path, "base", torch.float32)
    assert PeftConfig.from_pretrained(str(tmp_path)).r == 8
    assert not (tmp_path / lora.PISSA_FILE).exists()
    assert adapter.changes_base


def test_gpt2s_transposed_weights(tmp_path):
    adapter = lora.Adapter(lora.Config(rank=4, init="pissa"))
    base = tiny_model("gpt2", torch.float32, hook=False).eval()
    model = adapter.apply(tiny_model("gpt2", torch.float32, hook=False)).eval()
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=1e-5, atol=1e-5)
    shake(model)
    adapter.save(model, tmp_path, "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_start_from_an_adapter_takes_its_shape_and_weights(tmp_path):
    adapter, model = applied({})
    shake(model)
    adapter.save(model, tmp_path, "base")
    other = lora.Adapter(lora.Config())
    started = other.apply(tiny_model("llama", torch.float32, hook=False, tie_word_embeddings=False), start=tmp_path)
    torch.testing.assert_close(started.eval()(IDS).logits, model(IDS).logits)
    with pytest.raises(ConfigError, match=r"adapter\.rank: 16, but .* has 4"):
        lora.Adapter(lora.Config(rank=16)).apply(tiny_model("llama", torch.float32, hook=False), start=tmp_path)


def test_lora_plus_and_decay_make_groups():
    adapter, model = applied({"loraplus_ratio": 16.0})
    groups = parameter_groups(model, adapter, lr=1e-4, weight_decay=0.1, beside={})
    assert sorted(g["lr"] for g in groups) == pytest.approx([1e-4, 16e-4])
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        assert all(("lora_B" in names[id(p)]) == (group["lr"] > 1e-3) for p in group["params"])


def test_adapter_weights_are_float32_over_a_bfloat16_base():
    model = lora.Adapter(lora.Config()).apply(tiny_model("llama", torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["q_proj", "v_prj"]}, r"adapter\.targets: .*'v_prj'"),
        ({"modules_to_save": ["embed_tokenz"]}, r"adapter\.modules_to_save: .*'embed_tokenz'"),
        ({"targets": "["}, r"adapter\.targets"),
        ({"init": "pissa", "rank": 33}, r"adapter\.rank: 33"),
        ({"init": "pissa", "targets": ["q_proj", "embed_tokens"]}, "pissa is for linear layers"),
        ({"init": "pissa", "targets": ["q_proj", "lm_head"]}, "tied to"),
    ],
)
def test_what_peft_would_pass_over_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        lora.Adapter(lora.Config(**options)).apply(tiny_model("llama", torch.float32, tie_word_embeddings=True))


def test_an_adapter_started_from_keeps_its_shape_and_takes_our_dropout(tmp_path):
    adapter, model = applied({"targets": ["q_proj", "v_proj"]})
    adapter.save(model, tmp_path, "base")
    for options in ({"targets": ["q_proj"]}, {"dora": True}, {"init": "pissa"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ConfigError, match="drop the key"):
            lora.Adapter(lora.Config(**options)).apply(tiny_model("llama", torch.float32), start=tmp_path)
    started = lora.Adapter(lora.Config(dropout=0.25)).apply(tiny_model("llama", torch.float32), start=tmp_path)
    rates = {m.p for n, m in started.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


def test_dropout_reaches_peft():
    _, model = applied({"dropout": 0.125})
    assert {m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in n} == {0.125}


def test_targets_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*no_such"):
        lora.Adapter(lora.Config(targets=["no_such"])).apply(tiny_model())
