"""Our own templates. The oracle is each format as its makers publish it, written out by hand."""

from __future__ import annotations

import pytest
from template_cases import TOOLS, small_tokenizer, spans

from tunery.data.template import load_template, named_templates
from tunery.errors import TemplateError
from tunery.types import Message, ToolCall

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
    Message("assistant", "2"),
]
# The special tokens of each format besides <s> and </s>, and the text of CONVERSATION in it.
FORMATS = {
    "alpaca": (
        (),
        "<s>Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n1</s>\n\n"
        "### Instruction:\nTwo?\n\n### Response:\n2</s>\n\n",
    ),
    "chatml": (
        ("<|im_start|>", "<|im_end|>"),
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    ),
    "deepseek": ((), "<s>Be brief.\n\nUser: One?\n\nAssistant: 1</s>User: Two?\n\nAssistant: 2</s>"),
    "deepseek3": (
        ("<｜User｜>", "<｜Assistant｜>"),
        "<s>Be brief.<｜User｜>One?<｜Assistant｜>1</s><｜User｜>Two?<｜Assistant｜>2</s>",
    ),
    "gemma": (
        ("<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n<start_of_turn>model\n1<end_of_turn>\n"
        "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n",
    ),
    "llama2": ((), "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] 1 </s><s>[INST] Two? [/INST] 2 </s>"),
    "llama3": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>",
    ),
    "mistral": (("[INST]", "[/INST]"), "<s>[INST] Be brief.\n\nOne?[/INST] 1</s>[INST] Two?[/INST] 2</s>"),
    "phi3": (
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\n1<|end|>\n"
        "<|user|>\nTwo?<|end|>\n<|assistant|>\n2<|end|>\n",
    ),
    "plain": ((), "<s>Be brief.\nOne?\n1</s>\nTwo?\n2</s>\n"),
    "qwen": (
        ("<|im_start|>", "<|im_end|>"),
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    ),
    "vicuna": ((), "<s>Be brief. USER: One? ASSISTANT: 1</s>USER: Two? ASSISTANT: 2</s>"),
    "zephyr": (
        ("<|system|>", "<|user|>", "<|assistant|>"),
        "<s><|system|>\nBe brief.</s>\n<|user|>\nOne?</s>\n<|assistant|>\n1</s>\n"
        "<|user|>\nTwo?</s>\n<|assistant|>\n2</s>\n",
    ),
}
ENDS = {
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
}


def test_every_named_template_is_tested():
    assert named_templates() == sorted(FORMATS)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_format(name):
    special, text = FORMATS[name]
    tok = small_tokenizer(special, bos="<s>", add_bos=True)
    made = load_template(name, tok)
    (tokens,) = made.encode(CONVERSATION)
    assert tok.decode(tokens.ids) == text
    end = ENDS.get(name, "</s>")
    assert [tok.decode(run).strip(" ") for run in spans(tokens)] == [
        answer + (" " if name == "llama2" else "") + end for answer in "12"
    ]
    assert made.end_ids[0] == tok.convert_tokens_to_ids(end)
    for i in (2, 4):
        prompt = made.prompt(CONVERSATION[:i])
        assert tokens.ids[: len(prompt)].tolist() == prompt
        assert tokens.weights[len(prompt)] == 1


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_tokenizer_without_the_markers_ends_answers_with_eos(name):
    tok = small_tokenizer()  # has no BOS, and no special token but </s>
    made = load_template(name, tok)
    (tokens,) = made.encode(CONVERSATION)
    assert made.end_ids == [tok.eos_token_id]
    assert [run[-1] for run in spans(tokens)] == [tok.eos_token_id] * 2
    assert [tok.decode(run[:-1]).strip() for run in spans(tokens)] == ["1", "2"]
    assert "None" not in tok.decode(tokens.ids)
    assert made.parse(spans(tokens)[0]) == Message("assistant", "1")
    for i in (2, 4):
        prompt = made.prompt(CONVERSATION[:i])
        assert tokens.ids[: len(prompt)].tolist() == prompt
    with pytest.raises(TemplateError, match="set eos_token"):
        load_template(name, small_tokenizer(eos=None)).encode(CONVERSATION)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_a_template_cannot_show_is_refused(name):
    made = load_template(name, small_tokenizer(FORMATS[name][0], bos="<s>", add_bos=True))
    call = Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "上海"}, "call00000"),))
    messages = [Message("user", "Weather?"), call, Message("tool", "Sunny", tool_call_id="call00000"), CONVERSATION[-1]]
    if name in ("chatml", "qwen", "llama3", "mistral"):
        (tokens,) = made.encode(messages, TOOLS)
        first = made.parse(spans(tokens)[0])
        assert [(c.name, c.arguments) for c in first.tool_calls] == [("get_weather", {"city": "上海"})]
        assert first.content == ""
        return
    with pytest.raises(TemplateError, match=r"tool|take turns"):
        made.encode(messages, TOOLS)
    with pytest.raises(TemplateError, match=r"tool|take turns|user and assistant"):
        made.encode(messages)
    with pytest.raises(TemplateError, match="reasoning"):
        made.encode([Message("user", "Q"), Message("assistant", "A", reasoning="Because.")])


FREE = ["alpaca", "chatml", "deepseek", "deepseek3", "llama3", "phi3", "plain", "vicuna", "zephyr"]


@pytest.mark.parametrize("name", FREE)
def test_roles_need_not_alternate(name):
    tok = small_tokenizer()
    messages = [Message("assistant", "Hello!"), Message("user", "a"), Message("user", "b"), Message("assistant", "c")]
    made = load_template(name, tok)
    (tokens,) = made.encode(messages)
    assert [tok.decode(run[:-1]).strip() for run in spans(tokens)] == ["Hello!", "c"]


def test_default_systems():
    tok = small_tokenizer()
    asked = [Message("user", "Hi")]
    assert tok.decode(load_template("alpaca", tok).prompt(asked)).startswith("Below is an instruction that describes")
    assert tok.decode(load_template("vicuna", tok).prompt(asked)).startswith("A chat between a curious user and")
    assert "You are Qwen, created by Alibaba Cloud." in tok.decode(load_template("qwen", tok).prompt(asked))
    assert tok.decode(load_template("chatml", tok).prompt(asked)) == "<|im_start|>user\nHi</s>\n<|im_start|>assistant\n"


def test_unknown_name_and_missing_template():
    with pytest.raises(TemplateError, match=r"no template 'chatlm'.*chatml"):
        load_template("chatlm", small_tokenizer())
    made = load_template("auto", small_tokenizer())
    assert made.source is None
    assert made.end_ids == [small_tokenizer().eos_token_id]
    with pytest.raises(TemplateError, match=r"no chat template.*chatml"):
        made.prompt([Message("user", "Hi")])
    with pytest.raises(TemplateError, match="no chat template"):
        made.encode([Message("user", "Hi"), Message("assistant", "Hello")])
