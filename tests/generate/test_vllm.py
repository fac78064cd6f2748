"""Oracle: HFGenerator, through a stand-in for vLLM 0.33.0 (stand_ins/vllm) with weights of its own. No real engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_model import byte_tokenizer, chat_template, random_llama, save
from tunery.errors import ConfigError, ModelError
from tunery.generate import vllm as ours
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from tunery.models.load import ModelConfig
from tunery.types import Message

PROMPTS = ["Hi", "What is 第二组?", "a" * 40, "One\ntwo\nthree", "?"]
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=16),
    "sampled": Sampling(max_new_tokens=16, temperature=0.7, seed=5),
    "truncated": Sampling(max_new_tokens=16, temperature=1.0, top_k=20, top_p=0.9, seed=2**32 - 1),
    "penalised": Sampling(max_new_tokens=16, temperature=1.0, repetition_penalty=1.3),
    "stops": Sampling(max_new_tokens=16, temperature=1.0, seed=3, stop=["e"]),
}


@pytest.fixture
def stand_in(monkeypatch):
    """The module `vllm`, in this test alone."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "stand_ins"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    import vllm

    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def requests(*texts):
    return [Request([Message("user", text)], number=3 * i + 1) for i, text in enumerate(texts)]


def adapted(**options):
    model = random_llama(seed=3)
    wrapped = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options}))
    change(wrapped, seed=1)
    return wrapped


def change(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)


def make(folder, model, sampling=SAMPLINGS["greedy"], **changes):
    """A generator whose engine knows the architecture of `model` from a folder with other weights."""
    save(folder, seed=99)
    options = {
        "source": ModelConfig(name=str(folder)), "dtype": torch.float32, "world": 1, "longest": 128, "memory": 0.3,
        "sleeps": False, "mode": ours.logprobs_mode(sampling), "seed": 0, **changes,
    }  # fmt: skip
    return ours.VLLMGenerator(model, byte_tokenizer(), chat_template(), **options)


def answers(generator, sampling, *texts):
    made = generator.generate(requests(*(texts or PROMPTS)), sampling)
    return sorted(made, key=lambda completion: completion.index)


def hf(model):
    return HFGenerator(model, byte_tokenizer(), chat_template(), logps=True)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_answers_are_those_of_the_model(stand_in, tmp_path, name):
    """Tokens, text, message and how it ended to the letter; log-probabilities at the temperature, before top-k and
    top-p."""
    sampling, model = SAMPLINGS[name], random_llama(seed=3)
    generator, reference = make(tmp_path, model, sampling), hf(model)
    generator.end_ids = reference.end_ids = {*reference.end_ids, *range(0, 264, 25)}
    generator.sync()
    found, expected = answers(generator, sampling), answers(reference, sampling)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logps == pytest.approx(theirs.logps, abs=1e-4) and len(mine.logps) == len(mine.ids)
        mine.logps = theirs.logps
        assert mine == theirs
    assert {completion.finish for completion in found} == {"stop", "length"}


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_greedy_answers_have_their_probabilities_in_any_engine(stand_in, tmp_path, mode):
    model = random_llama(seed=3)
    generator = make(tmp_path, model, mode=mode)
    generator.sync()
    expected = answers(hf(model), SAMPLINGS["greedy"])
    for mine, theirs in zip(answers(generator, SAMPLINGS["greedy"]), expected, strict=True):
        assert mine.ids == theirs.ids and mine.logps == pytest.approx(theirs.logps, abs=1e-4)


def test_no_probabilities_where_none_are_asked_for(stand_in, tmp_path):
    generator = make(tmp_path, random_llama(seed=3), mode=None)
    generator.sync()
    warm = Sampling(max_new_tokens=8, temperature=0.5, top_k=3)
    assert [completion.logps for completion in answers(generator, warm)] == [[]] * len(PROMPTS)


MODELS = {
    "whole": lambda: random_llama(seed=3),
    "lora": lambda: adapted(target_modules="all-linear"),
    "dora": lambda: adapted(use_dora=True),
    "some whole": lambda: adapted(modules_to_save=["norm", "lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_has_the_weights_it_was_given_last(stand_in, tmp_path, name):
    model, sampling = MODELS[name](), SAMPLINGS["greedy"]
    generator = make(tmp_path, model)
    generator.sync()
    first = [completion.ids for completion in answers(generator, sampling)]
    assert first == [completion.ids for completion in answers(hf(model), sampling)]
    change(model, seed=2)
    expected = [completion.ids for completion in answers(hf(model), sampling)]
    assert expected != first
    assert [completion.ids for completion in answers(generator, sampling)] == first
    generator.sync()
    assert [completion.ids for completion in answers(generator, sampling)] == expected


def test_weights_are_rounded_to_the_engines_dtype_and_the_model_is_left_alone(stand_in, tmp_path):
    model = adapted(target_modules="all-linear")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make(tmp_path, model, dtype=torch.bfloat16).sync()
    theirs = stand_in.LOADED[-1].worker.model.state_dict()
    merged = model.merge_and_unload(safe_merge=True).state_dict()
    assert {value.dtype for value in theirs.values()} == {torch.bfloat16}
    assert all(theirs[name].equal(value.bfloat16()) for name, value in merged.items())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items() if name in before)


def test_a_sleeping_engine_is_woken_for_the_weights_before_its_cache(stand_in, tmp_path):
    model, sampling = random_llama(seed=3), SAMPLINGS["greedy"]
    generator = make(tmp_path, model, sleeps=True)
    generator.sync()
    expected = [completion.ids for completion in answers(hf(model), sampling)]
    assert [completion.ids for completion in answers(generator, sampling)] == expected
    generator.sync()
    assert [completion.ids for completion in answers(generator, sampling)] == expected
    assert [completion.ids for completion in answers(generator, sampling)] == expected  # nobody has said that it slept
    woken = ["wake ['weights']", "reload_weights", "wake ['kv_cache']", "generate", "sleep"]
    assert stand_in.LOADED[-1].events == ["reload_weights", "generate", "sleep", *woken, *woken]


def test_the_callers_arithmetic_is_not_the_engines(stand_in, tmp_path):
    model = adapted()
    generator = make(tmp_path, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the stand-in insists that it is off
        generator.sync()
        found = answers(generator, SAMPLINGS["greedy"])
    assert [c.ids for c in found] == [c.ids for c in answers(hf(model), SAMPLINGS["greedy"])]


def test_every_answer_has_random_numbers_of_its_own():
    seeds = {ours.request_seed(seed, number) for seed in (0, 1, 2**32 - 1) for number in range(1000)}
    assert len(seeds) == 3000 and all(0 <= seed < 2**63 for seed in seeds)


def test_closing_ends_the_engine_once(stand_in, tmp_path):
    generator = make(tmp_path, random_llama(seed=3))
    generator.close()
    generator.close()
    assert stand_in.LOADED[-1].events == ["shutdown"]


# ---------------------------------------------------------------- what cannot be


def test_what_vllm_cannot_do_is_said_before_anything_is_loaded(stand_in):
    ours.check(Sampling(temperature=0.7), "auto")
    with pytest.raises(ConfigError, match=r"rollout.temperature: 0.005, but vLLM samples at 0.01 at least"):
        ours.check(Sampling(temperature=0.005), "auto")
    with pytest.raises(ConfigError, match=r"model.dtype: float64, but vLLM computes in bfloat16"):
        ours.check(Sampling(temperature=1.0), "float64")
    for left_out in ({"top_k": 5}, {"top_p": 0.9}, {"repetition_penalty": 1.1}):
        ours.check(Sampling(temperature=1.0, **left_out), "auto")
        with pytest.raises(ConfigError, match="set the temperature to 1, leave nothing out"):
            ours.check(Sampling(temperature=0.7, **left_out), "auto")


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vllm is not installed. Install it with: pip install 'tunery\[vllm\]'"):
        ours.check_installed()


def test_an_engine_for_another_device_is_refused(stand_in, monkeypatch):
    from vllm import platforms

    ours.check_device("cpu")
    with pytest.raises(ConfigError, match="trains on cuda, and the vllm that is installed is for cpu"):
        ours.check_device("cuda")
    monkeypatch.setattr(platforms.current_platform, "device_type", "")
    with pytest.raises(ConfigError, match="trains on cpu, and the vllm that is installed finds no device for it"):
        ours.check_device("cpu")


def test_what_goes_wrong_in_the_engine_is_said_for_a_person(stand_in, tmp_path, monkeypatch):
    model = random_llama(seed=3)
    with pytest.raises(ModelError, match=r"vLLM did not start: Free memory .* 95% .*rollout.vllm_memory"):
        make(tmp_path / "large", model, memory=0.95)
    generator = make(tmp_path / "other", random_llama(seed=3, num_hidden_layers=3))
    with pytest.raises(ModelError, match=r"weights of LlamaForCausalLM: There is no .* 'model.layers.2.*generator: hf"):
        generator.sync()
    generator = make(tmp_path / "sound", model)
    generator.sync()
    with pytest.raises(ModelError, match="gives raw_logprobs, which are not those of this sampling"):
        answers(generator, Sampling(temperature=0.7))
    with pytest.raises(ModelError, match=r"request 2: its prompt of \d+ tokens fills the model's context of 128"):
        answers(generator, SAMPLINGS["greedy"], "a" * 200)
    monkeypatch.setattr(stand_in.LOADED[-1], "reset_prefix_cache", lambda: False)
    with pytest.raises(ModelError, match="still answers earlier requests"):
        generator.sync()


def test_answers_that_are_no_numbers_or_were_broken_off(stand_in, tmp_path, monkeypatch):
    model = random_llama(seed=3)
    generator = make(tmp_path, model)
    generator.sync()
    engine = stand_in.LOADED[-1]
    monkeypatch.setattr(engine, "_logprobs", lambda prompt, ids, params: [float("nan")] * len(ids))
    with pytest.raises(ModelError, match="request 2: the model's output is not a number"):
        answers(generator, SAMPLINGS["greedy"], "Hi")
    made = engine._answer([1, 2, 3], stand_in.SamplingParams(seed=1, ignore_eos=True))
    made.finish_reason = "abort"
    monkeypatch.setattr(engine, "_answer", lambda prompt, params: made)
    with pytest.raises(ModelError, match=r"request 2: vLLM broke the answer off \(abort\)"):
        answers(generator, SAMPLINGS["greedy"], "Hi")


def test_embeddings_that_an_adapter_takes_apart_are_refused_before_the_engine_starts(stand_in, tmp_path):
    model = random_llama(seed=3, tie_word_embeddings=True)
    wrapped = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["embed_tokens"]))
    made = len(stand_in.LOADED)
    with pytest.raises(ModelError, match="one tensor in vLLM"):
        make(tmp_path, wrapped)
    assert len(stand_in.LOADED) == made
