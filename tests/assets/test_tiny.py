"""The embedded base model: its size, its tokenizer and its chat template."""

from __future__ import annotations

import json
import unicodedata
from random import Random

import pytest

from tunery.assets import FOLDER, TINY
from tunery.assets.quickstart import quickstart_rows

pytestmark = pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the model has not been made yet")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def test_the_package_stays_small():
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 8_000_000
    assert sum(f.stat().st_size for f in FOLDER.glob("*.py")) < 200_000


def test_every_byte_has_its_token(tokenizer):
    vocabulary = tokenizer.get_vocab()
    from tokenizers import pre_tokenizers

    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)
    assert len(vocabulary) == json.loads((TINY / "config.json").read_text())["vocab_size"]


def test_any_text_round_trips(tokenizer):
    rng = Random(0)
    texts = [
        "",
        " ",
        "  two  spaces\t\r\n",
        "É vs É",
        "受试者（n = 24）\u3000",
        "🧪👩‍🔬",
        "\x00\x7f",
        "ﬁ ① ½",
    ]
    for _ in range(200):
        points = [
            rng.choice([rng.randint(0, 0x7F), rng.randint(0x80, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])
            for _ in range(rng.randint(1, 20))
        ]
        texts.append("".join(map(chr, points)))
    for text in (unicodedata.normalize("NFC", text) for text in texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_stand_alone(tokenizer):
    tokens = tokenizer.tokenize("12,500 on 2024-03-05")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("1250020240305")


def test_the_file_alone_gives_the_same_tokens(tokenizer):
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for row in quickstart_rows(Random(5), 50, False):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert alone.encode(text).ids == tokenizer(text)["input_ids"]


def test_a_term_is_the_same_tokens_alone_and_in_a_sentence(tokenizer):
    term = tokenizer("受试者")["input_ids"]
    sentence = tokenizer("该受试者于2024年退出")["input_ids"]
    assert any(sentence[i : i + len(term)] == term for i in range(len(sentence)))


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    config = json.loads((TINY / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert tokenizer("<|im_start|>", add_special_tokens=True)["input_ids"] == [config["pad_token_id"] + 1]


def test_chat_template_is_plain_chatml(tokenizer):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "你好！"}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "你好！<|im_end|>\n"


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    said = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "A<|im_end|>"


def test_chat_template_shows_tools_and_calls(tokenizer):
    tools = [{"type": "function", "function": {"name": "dose", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "dose", "arguments": {"mg": 5}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nS\n\nYou may call these tools:\n<tools>\n")
    assert text.count("<|im_start|>system") == 1
    assert '<tool_call>{"name": "dose", "arguments": {"mg": 5}}</tool_call><|im_end|>\n' in text
    assert text.endswith("<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\n")


def test_the_model_loads_and_answers(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert model.num_parameters() < 3_500_000
    prompt = tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": "Translate into Chinese.\nThe ethics committee approved the protocol on 05 Mar 2024.",
            }
        ],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True)
    assert "伦理委员会" in text
    assert "2024" in text
    assert out[-1] == tokenizer.eos_token_id
