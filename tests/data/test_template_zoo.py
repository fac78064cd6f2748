"""Many published templates: rendered as Python's jinja2 renders them, and trained or refused for a stated reason.

Oracles: the recorded renderings in templates/oracle.json, and `apply_chat_template` for the prompt. The special tokens
are those a template writes, in a small tokenizer made on the spot: only their names matter here."""

from __future__ import annotations

import json
import re

import pytest
from template_cases import TOOLS, dicts, small_tokenizer, spans

from assets_path import assets
from tunery.data.render import Renderer, to_dicts
from tunery.data.template import load_template
from tunery.errors import TemplateError
from tunery.types import Message, ToolCall

CONTROL = re.compile(
    r"<\|[^|<>\s']{2,40}\|>|<｜[^<>\s']{2,40}｜>|<\|?(?:turn|channel|tool_call|tool_response)\|?>|<(?:start|end)_of_turn>"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|THINK|ARGS|CALL_ID)\]|</?seed:[a-z_:]+>"
    r"|<sop>|\[gMASK\]|<sep>"
)
TALK = [
    Message("system", "Be brief please"),
    Message("user", "Hi there"),
    Message("assistant", "Hello to you"),
    Message("user", "More words"),
    Message("assistant", "Second reply"),
]
CALLS = [
    Message("user", "Weather in Paris?"),
    Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Paris"}, "abcdefgh1"),)),
    Message("tool", "It is sunny", tool_call_id="abcdefgh1", name="get_weather"),
    Message("assistant", "It is sunny there"),
]
# Refused, and with what word of the reason: TALK, then CALLS.
NO_TALK = {
    "Apriel-1.6-15b-Thinker-fixed": "does not lead",  # its prompt begins the reasoning with a sentence
    "CohereForAI-c4ai-command-r-plus-tool_use": "cannot render",  # only with tools
    "MiroThinker": "cannot render",  # not valid for transformers either
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "cannot render",  # only with tools
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "cannot render",  # only with tools
    "fireworks-ai-llama-3-firefunction-v2": "cannot render",  # wants a variable `functions`
    "google-gemma-2-2b-it": "System role not supported",
}
NO_CALLS = {
    "Apriel-1.6-15b-Thinker-fixed": "does not lead",
    "CohereForAI-c4ai-command-r-plus-tool_use": "does not lead",  # its prompt says more than a turn shows
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "end-of-turn",
    "Kimi-K2-Instruct": "append",  # changes a list, which transformers does not let templates do
    "Kimi-K2-Thinking": "append",
    "MiroThinker": "cannot render",
    "fireworks-ai-llama-3-firefunction-v2": "cannot render",
    "google-gemma-2-2b-it": "alternate",
    "llama-cpp-deepseek-r1": "cannot render",
    "meetkai-functionary-medium-v3.2": "cannot render",  # wants arguments as text
    # These show no calls, or not the list of tools.
    **dict.fromkeys(
        (
            "GigaChat3-10B-A1.8B", "HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "LFM2.5-Instruct",
            "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
            "deepseek-ai-DeepSeek-V3.1", "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world",
            "microsoft-Phi-3.5-mini-instruct",
        ),
        "no place for tool",
    ),
}  # fmt: skip


def _sources():
    folder = assets() / "templates" / "llama.cpp"
    found = sorted(folder.glob("*.jinja"))
    assert {*NO_TALK, *NO_CALLS} < {path.stem for path in found}, f"not all templates are in {folder}"
    return found


def _check(path, messages, tools, refused):
    source = path.read_text(encoding="utf-8")
    tok = small_tokenizer(tuple(sorted(set(CONTROL.findall(source)))), bos="<s>")
    made = load_template(str(path), tok)
    expected = refused.get(path.stem)
    if expected:
        with pytest.raises(TemplateError, match=expected):
            made.encode(messages, tools)
        return
    sequences = made.encode(messages, tools)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    assert sum(len(spans(tokens)) for tokens in sequences) == len(answers)
    for i in answers:
        prompt = made.prompt(messages[:i], tools)
        if "strftime_now" not in source:
            assert prompt == tok.apply_chat_template(
                dicts(messages[:i]), tools=tools, chat_template=source, add_generation_prompt=True, return_dict=False
            )
        (tokens,) = [t for t in sequences if t.ids[: len(prompt)].tolist() == prompt and t.weights[len(prompt)] > 0]
        run = next(run for run in spans(tokens) if run == tokens.ids[len(prompt) : len(prompt) + len(run)].tolist())
        assert run[-1] in made.end_ids
        assert not set(run[:-1]) & set(made.end_ids[:1])
        shown = messages[i].tool_calls[0].name if messages[i].tool_calls else messages[i].content
        assert shown in tok.decode(run)
        if messages[i].content:
            assert made.parse(run).content == messages[i].content


def test_published_templates_with_a_system_message_and_two_turns():
    for path in _sources():
        _check(path, TALK, None, NO_TALK)


def test_published_templates_with_tools():
    for path in _sources():
        _check(path, CALLS, TOOLS, NO_CALLS)


def test_renders_what_python_renders():
    oracle = json.loads((assets() / "templates" / "oracle.json").read_text(encoding="utf-8"))
    messages = to_dicts([Message(m["role"], m["content"]) for m in oracle["messages"]])
    assert len(oracle["cases"]) == 17
    for case in oracle["cases"]:
        renderer = Renderer(case["template_str"], {"bos_token": case["bos_token"], "eos_token": case["eos_token"]})
        assert renderer.render(messages, None, oracle["add_generation_prompt"]) == case["python_jinja2_output"]
