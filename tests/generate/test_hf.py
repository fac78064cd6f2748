"""Oracles: transformers' own generate, one request at a time; the golden text that stories260K was published with; and
for sampling, probabilities worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from assets_path import assets
from tiny_model import byte_tokenizer, chat_template, random_llama
from tunery.errors import ModelError
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator, choose, generating
from tunery.models import attention
from tunery.types import Message

PROMPTS = ["Hi", "What is 第二组?", "a" * 40, "One\ntwo\nthree", "?", "Tell me, please: is it so"]
GREEDY = Sampling(max_new_tokens=24)


def asked(*texts):
    return [Request([Message("user", text)]) for text in texts]


def in_order(generator, requests, sampling):
    return sorted(generator.generate(requests, sampling), key=lambda completion: completion.index)


def library_ids(model, prompt, ends, new):
    """transformers' greedy generation of one prompt, without padding."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def generator():
    return HFGenerator(random_llama(seed=3), byte_tokenizer(), chat_template())


def test_greedy_equals_the_library(generator):
    completions = in_order(generator, asked(*PROMPTS), GREEDY)
    for completion, prompt in zip(completions, generator.prompts(asked(*PROMPTS)), strict=True):
        assert completion.ids == library_ids(generator.model, prompt, sorted(generator.end_ids), 24)


def test_answers_do_not_depend_on_the_batch(generator):
    """Also where rows end at different times and leave the batch: a fifth of the vocabulary ends a turn here."""
    many = HFGenerator(generator.model, generator.tokenizer, generator.template)
    many.end_ids = set(range(0, 264, 5))
    for sampling in (GREEDY, Sampling(max_new_tokens=24, temperature=1.3, top_p=0.95, top_k=50, seed=7)):
        together = in_order(many, asked(*PROMPTS), sampling)
        assert len({len(completion.ids) for completion in together}) > 2
        assert {completion.finish for completion in together} >= {"stop"}
        for i, text in enumerate(PROMPTS):
            (alone,) = many.generate([Request([Message("user", text)], number=i)], sampling)
            assert alone.ids == together[i].ids
        small = HFGenerator(generator.model, generator.tokenizer, generator.template, batch_tokens=120)
        small.end_ids = many.end_ids
        assert [c.ids for c in in_order(small, asked(*PROMPTS), sampling)] == [c.ids for c in together]


def test_batches_stay_within_the_token_budget(generator):
    small = HFGenerator(generator.model, generator.tokenizer, generator.template, batch_tokens=150)
    rows = [small._row(i, [1] * n, GREEDY) for i, n in enumerate((3, 60, 10, 30, 11, 140, 12))]
    batches = small._batches(rows)
    assert sorted(row.index for batch in batches for row in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(len(row.prompt) for row in batch) + 24) <= 150
    assert len(batches) < 7


def test_sampling_repeats_under_its_seed_and_changes_with_it(generator):
    def sample(seed):
        return [
            c.ids
            for c in in_order(generator, asked("Hi", "Hi"), Sampling(max_new_tokens=24, temperature=1.0, seed=seed))
        ]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]  # the same question twice: two draws


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=24, temperature=1.3, top_k=50, seed=7)])
def test_a_prompt_asked_several_times_is_answered_as_alone(generator, sampling):
    """It runs once for all of them."""
    texts = [text for text in PROMPTS[:3] for _ in range(3)]
    together = in_order(generator, asked(*texts), sampling)
    for i, text in enumerate(texts):
        (alone,) = generator.generate([Request([Message("user", text)], number=i)], sampling)
        assert alone.ids == together[i].ids


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_those_of_the_model(generator, temperature):
    """By one forward over prompt and answer; at the sampling's temperature, before top-k and top-p."""
    telling = HFGenerator(generator.model, generator.tokenizer, generator.template, logps=True)
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_k=20, top_p=0.9)
    requests = asked(*PROMPTS, PROMPTS[0])
    for completion, prompt in zip(in_order(telling, requests, sampling), telling.prompts(requests), strict=True):
        with torch.no_grad():
            logits = telling.model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logps == pytest.approx(expected.tolist(), abs=1e-4)
    assert in_order(generator, asked("Hi"), sampling)[0].logps == []


def test_golden_text_of_stories260k():
    folder = assets() / "models" / "stories260K"
    golden = re.search(r"-t 0\.0\n(.*?)\n```", (folder / "stories260K.md").read_text(), re.DOTALL)
    assert golden is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = HFGenerator(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    (completion,) = generator.generate([Request(ids=tokenizer("Once upon a time").input_ids)], Sampling())
    assert completion.finish == "length"
    assert len(completion.ids) == 256
    assert ("Once upon a time" + completion.text).startswith(golden.group(1))


def test_batched_real_model_equals_one_by_one():
    folder = assets() / "models" / "TinyStories-656K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = HFGenerator(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    texts = ["Once upon a time", "Lily", "The big red dog went to the park", "One day, a", "Tim and his mom"]
    requests = [Request(ids=tokenizer(text).input_ids) for text in texts]
    together = in_order(generator, requests, Sampling(max_new_tokens=100))
    for i, request in enumerate(requests):
        (alone,) = generator.generate([request], Sampling(max_new_tokens=100))
        assert alone.ids == together[i].ids


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "qwen3_next", "mamba"])
def test_other_families_equal_the_library(family):
    """Learned positions; soft-capped scores with windows in every other layer; a window shorter than the text; layers
    with a state instead of keys and values between such with them; and a family without such a cache at all."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 264, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 256, "pad_token_id": 0}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12, **sizes}  # fmt: skip
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=32, n_layer=2, n_head=4, **sizes))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(attn_logit_softcapping=2.0, query_pre_attn_scalar=8, **llama))
        model.set_attn_implementation("eager")  # the one that caps
    elif family == "qwen3_next":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        more = {"shared_expert_intermediate_size": 16, "linear_value_head_dim": 8, "num_hidden_layers": 4}
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**{**llama, **experts, **linear, **more}))
    elif family == "mamba":
        model = MambaForCausalLM(MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, **sizes))
    else:
        model = MistralForCausalLM(MistralConfig(**llama))
    model.eval()
    generator = HFGenerator(model, byte_tokenizer(), chat_template())
    assert generator.cached is (family != "mamba")
    texts = [*PROMPTS, PROMPTS[2]]  # one twice: it runs once
    expected = [library_ids(model, p, sorted(generator.end_ids), 24) for p in generator.prompts(asked(*texts))]
    if family == "gemma2" and model._supports_sdpa:  # it leaves the cap out
        model.set_attn_implementation("sdpa")
    assert [completion.ids for completion in in_order(generator, asked(*texts), GREEDY)] == expected


def test_without_a_cache_the_answers_are_the_same(generator):
    slow = HFGenerator(generator.model, generator.tokenizer, generator.template)
    slow.cached = False
    fast = [c.ids for c in in_order(generator, asked("Hi", "Why?"), GREEDY)]
    assert [c.ids for c in in_order(slow, asked("Hi", "Why?"), GREEDY)] == fast


def test_stream_gives_the_text_of_generate(generator):
    sampling = Sampling(max_new_tokens=60, temperature=1.0)
    (completion,) = generator.generate(asked("Hi"), sampling)
    stream = generator.stream(asked("Hi")[0], sampling)
    pieces = []
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        assert end.value.ids == completion.ids
    assert "".join(pieces) == completion.text


def test_a_stop_text_ends_the_answer_and_is_never_shown(generator):
    endless = HFGenerator(generator.model, generator.tokenizer, generator.template)
    endless.end_ids = set()
    (whole,) = endless.generate(asked("Hi"), Sampling(max_new_tokens=60))
    text = whole.text
    assert len(text) > 20
    stop = text[10:14]
    at = text.index(stop)
    sampling = Sampling(max_new_tokens=60, stop=["never there", stop])
    (cut,) = endless.generate(asked("Hi"), sampling)
    assert (cut.text, cut.finish) == (text[:at], "stop")
    assert cut.message is not None and cut.message.content == text[:at]
    assert "".join(endless.stream(asked("Hi")[0], sampling)) == text[:at]


def test_an_answer_ends_with_the_context(generator):
    ids = [1] * 250  # of 256
    (completion,) = generator.generate([Request(ids=ids)], GREEDY)
    assert (len(completion.ids), completion.finish) == (6, "length")
    with pytest.raises(ModelError, match="request 1: its prompt of 256 tokens fills the model's context of 256"):
        list(generator.generate([Request(ids=[1] * 256)], GREEDY))
    with pytest.raises(ModelError, match="request 2: its prompt is empty"):
        list(generator.generate([Request(ids=[1]), Request(ids=[])], GREEDY))


def test_the_model_is_left_as_it_was(generator):
    """Half-trained: some modules in training mode, attention by the packed hook, which takes no padded batch."""
    model = random_llama(seed=3)
    expected = [c.ids for c in in_order(generator, asked(*PROMPTS), GREEDY)]
    model.set_attn_implementation(attention.register())
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    trained = HFGenerator(model, generator.tokenizer, generator.template)
    assert [c.ids for c in in_order(trained, asked(*PROMPTS), GREEDY)] == expected
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "tunery"
    with pytest.raises(RuntimeError, match="stop"), generating(model):
        assert not model.training and model.config._attn_implementation == "sdpa"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "tunery" and model.training


def test_output_that_is_not_a_number_is_an_error(generator):
    model = random_llama(seed=3)
    model.lm_head.weight.data[5] = float("nan")
    broken = HFGenerator(model, generator.tokenizer, generator.template)
    with pytest.raises(ModelError, match="not a number"):
        list(broken.generate(asked("Hi"), GREEDY))


def test_memory_that_does_not_suffice_halves_the_batch(generator, monkeypatch):
    limited = HFGenerator(generator.model, generator.tokenizer, generator.template)
    steps = limited._steps

    def small_device(rows, sampling):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return steps(rows, sampling)

    monkeypatch.setattr(limited, "_steps", small_device)
    expected = [c.ids for c in in_order(generator, asked(*PROMPTS), GREEDY)]
    assert [c.ids for c in in_order(limited, asked(*PROMPTS), GREEDY)] == expected


# ---------------------------------------------------------------- choosing a token

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[None]


def drawn(sampling, seen=None, logits=LOGITS):
    """How often each token comes up over a fine grid of uniform numbers: its probability."""
    grid = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    rows = logits.expand(len(grid), -1)
    tokens = choose(rows, sampling, None if seen is None else seen.expand(len(grid), -1), grid)
    return (torch.bincount(tokens, minlength=4) / len(grid)).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 + 0.3 reach 0.65
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),  # never none at all
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_probabilities(options, expected):
    assert drawn(Sampling(**{"temperature": 1.0, **options})) == pytest.approx(expected, abs=2e-4)


def test_repetition_penalty():
    """Divides a positive logit and multiplies a negative one: 2 -> 1 and -1 -> -2 under a penalty of 2."""
    logits = torch.tensor([[2.0, -1.0, 0.5, -0.5]])
    seen = torch.tensor([[True, True, False, False]])
    expected = torch.tensor([1.0, -2.0, 0.5, -0.5]).softmax(-1).tolist()
    found = drawn(Sampling(temperature=1.0, repetition_penalty=2.0), seen, logits)
    assert found == pytest.approx(expected, abs=2e-4)


def test_the_last_of_the_allowed_tokens_bounds_the_draw():
    """A uniform number next to 1 must not fall behind the tokens that top-p has left out."""
    edge = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose(LOGITS, Sampling(temperature=1.0, top_p=0.65), None, edge).tolist() == [3]


def test_penalty_counts_the_prompt(generator):
    sampling = Sampling(max_new_tokens=20, repetition_penalty=1e6)
    (completion,) = generator.generate(asked("Hi"), sampling)
    (prompt,) = generator.prompts(asked("Hi"))
    assert len(set(completion.ids)) == len(completion.ids)
    assert not set(completion.ids) & set(prompt)
