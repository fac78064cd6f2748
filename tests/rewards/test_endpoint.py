"""Oracles: a server of ours that speaks as vLLM, SGLang and LLaMA-Factory do, and a reward model behind it."""

from __future__ import annotations

import json

import pytest
import torch

from json_server import HTML, JsonServer
from tiny_model import byte_tokenizer, chat_template, random_llama
from tunery.config import build
from tunery.errors import ConfigError, RewardError
from tunery.generate.score import RewardModel
from tunery.models.load import ModelConfig
from tunery.rewards import Host, _http
from tunery.rewards.endpoint import Config, Reward
from tunery.rollout.scoring import Rewards
from tunery.types import Answer, Message, Sample, Tokens, ToolCall

ASKED = [Message("system", "Be brief."), Message("user", "Capital?")]
PATHS = {"vllm": "/classify", "sglang": "/classify", "llamafactory": "/v1/score/evaluation"}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    servers = []

    def start(*replies) -> JsonServer:
        servers.append(JsonServer(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def answer(text: str = "Paris.", end: str = "<|im_end|>") -> Answer:
    ids = byte_tokenizer()(text + end)["input_ids"]
    return Answer(ASKED, text, ids, "stop", None, {}, "r.jsonl:3")


def reward(server: JsonServer, protocol: str = "vllm", **options) -> Reward:
    made = Reward(Config(url=server.url(PATHS[protocol]), protocol=protocol, **{"parallel": 1, **options}))  # type: ignore
    template = chat_template()
    assert made.load(Host(None, ModelConfig(), None, byte_tokenizer(), template)) == []
    return made


def reply(protocol: str, score) -> object:
    if protocol == "vllm":
        return {"object": "list", "data": [{"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}]}
    return [{"embedding": [score], "meta_info": {}}] if protocol == "sglang" else {"scores": [score]}


# ---------------------------------------------------------------- what is said to whom


def test_vllm_gets_messages_and_no_activation(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve(reply("vllm", -3.25), reply("vllm", 2))
    found = reward(server, key_env="MY_KEY", model="rm").score([answer(), answer("Rome.")])
    assert found == [-3.25, 2.0]
    path, headers, body = server.requests[0]
    assert path == "/classify" and headers["Authorization"] == "Bearer secret"
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"},
            {"role": "assistant", "content": "Paris."}]  # fmt: skip
    assert body == {"model": "rm", "messages": said, "add_generation_prompt": False, "use_activation": False}


def test_the_last_token_counts_where_a_server_gives_one_for_each(serve):
    per_token = {"data": [{"index": 0, "object": "pooling", "data": [[0.5], [7.0], [-1.5]]}]}
    whole = {"data": [{"index": 0, "object": "pooling", "data": [0.25]}]}
    server = serve(per_token, whole)
    assert reward(server).score([answer(), answer()]) == [-1.5, 0.25]
    assert "model" not in server.requests[0][2]


def test_calls_go_out_as_openai_writes_them(serve):
    server = serve(reply("vllm", 1.0))
    call = Message("assistant", "", tool_calls=(ToolCall("look", {"at": "四"}),))
    asked = Answer([ASKED[1], call, Message("tool", "4")], "It is 4.", [1], "stop")
    reward(server).score([asked])
    sent = server.requests[0][2]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "四"}'}
    assert sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"]


@pytest.mark.parametrize("protocol", ["sglang", "llamafactory"])
def test_others_get_the_text_that_was_generated(serve, protocol):
    server = serve(reply(protocol, 0.5))
    assert reward(server, protocol).score([answer(), answer("Par", end="")]) == [0.5, 0.5]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n"
    texts = [body["text" if protocol == "sglang" else "messages"] for _, _, body in server.requests]
    assert texts == [[prompt + "Paris.<|im_end|>"], [prompt + "Par"]]
    assert server.requests[0][2].get("model") == (None if protocol == "sglang" else "model")


def test_another_template_is_that_of_the_reward_model(serve, tmp_path):
    theirs = byte_tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
                            "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    theirs.save_pretrained(tmp_path)
    server = serve(reply("llamafactory", 1.0))
    made = reward(server, "llamafactory", tokenizer=str(tmp_path))
    made.score([answer(), answer("Par", end=""), answer("")])
    begin = "[system]Be brief.</s>[user]Capital?</s>[assistant]"
    assert [body["messages"] for _, _, body in server.requests] == [
        [begin + "Paris.</s>"], [begin + "Par</s>"], [begin + "</s>"],
    ]  # fmt: skip


def test_a_text_begins_once_where_the_server_puts_the_beginning_before_it(serve, tmp_path):
    from tokenizers.processors import TemplateProcessing

    theirs = byte_tokenizer("<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    theirs.add_special_tokens({"bos_token": "<s>"})
    number = theirs.convert_tokens_to_ids("<s>")
    theirs.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])  # type: ignore
    theirs.save_pretrained(tmp_path)
    for protocol, key, begin in (("sglang", "text", ""), ("llamafactory", "messages", "<s>")):
        server = serve(reply(protocol, 1.0))
        reward(server, protocol, tokenizer=str(tmp_path)).score([answer()])
        assert server.requests[0][2][key] == [begin + "Be brief.</s>Capital?</s>Paris.</s>"]


@pytest.mark.parametrize("protocol", ["vllm", "llamafactory"])
def test_scores_are_those_of_the_model_behind_it(serve, tmp_path, protocol):
    """The served model renders messages itself, or tokenises the text as it is."""
    from transformers import LlamaForSequenceClassification

    config = random_llama().config
    config.num_labels = 1
    torch.manual_seed(4)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = RewardModel(tmp_path, dtype="float32")

    def scored(body):
        if protocol == "vllm":
            return reply("vllm", model.score([[Message(m["role"], m["content"]) for m in body["messages"]]])[0])
        return reply("llamafactory", model.score_ids([byte_tokenizer()(body["messages"][0])["input_ids"]])[0])

    answers = [answer("Paris.", "<|im_end|>\n"), answer("No idea at all.", "<|im_end|>\n")]
    expected = model.score([[*a.prompt, Message("assistant", a.text)] for a in answers])
    assert reward(serve(scored), protocol).score(answers) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- what goes wrong


def test_a_busy_server_is_asked_again_and_several_come_back_in_order(serve):
    server = serve(429, HTML, 503, reply("vllm", 5.0))
    assert reward(server).score([answer()]) == [5.0] and len(server.requests) == 4
    many = serve(lambda body: reply("llamafactory", float(len(body["messages"][0]))))
    found = reward(many, "llamafactory", parallel=5).score([answer("x" * n) for n in range(12)])
    assert [one - found[0] for one in found] == [*range(12)]  # type: ignore[operator]


WRONG = {
    "status": (404, 1, "HTTP 404"),
    "always busy": (500, 3, "HTTP 500"),
    "another protocol": ({"scores": [1.0]}, 1, 'no score of vllm: {"scores": '),
    "text": ("good", 1, 'no score of vllm: "good"'),
    "classes": ({"data": [{"probs": [0.2, 0.8]}]}, 1, r"a reward is one number, and it gave \[0.2, 0.8\]"),
    "nothing": ({"data": [{"probs": [None]}]}, 1, "a reward is one number"),
    "yes": ({"data": [{"probs": [True]}]}, 1, "a reward is one number"),
    "no numbers": ({"data": [{"probs": []}]}, 1, "a reward is one number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_score_names_the_row_or_gets_one(serve, name):
    said, attempts, why = WRONG[name]
    server = serve(said)
    with pytest.raises(RewardError, match=f"the reward model at http.*/classify gave no score for r.jsonl:3: .*{why}"):
        reward(server, retries=2).score([answer()])
    assert len(server.requests) == attempts
    assert reward(serve(said), retries=0, on_error=0.25).score([answer()]) == [0.25]


def test_a_score_that_is_not_finite_stops_and_names_the_row(serve):
    """Whatever on_error says: it is for servers that fail."""
    for wrong in (float("nan"), float("inf")):
        url = serve(reply("vllm", wrong)).url("/classify")
        rewards = Rewards([Config(url=url, on_error=0.0)])
        sample = Sample(0, Tokens(torch.tensor([1]).numpy(), torch.tensor([1.0]).numpy()), answer())
        with pytest.raises(RewardError, match=r"endpoint gave (nan|inf) for an answer to r.jsonl:3"):
            rewards.score([sample])


def test_a_server_that_does_not_answer_is_given_up(serve):
    with pytest.raises(RewardError, match="timed out"):
        reward(serve(30.0), timeout=0.2, retries=1).score([answer()])
    nobody = serve(reply("vllm", 1.0))
    nobody.close()
    with pytest.raises(RewardError, match="refused"):
        reward(nobody, retries=0).score([answer()])


def test_a_wrong_configuration_is_refused(tmp_path):
    byte_tokenizer(None).save_pretrained(tmp_path)
    for options, why in (
        ({"url": "localhost:8000/classify"}, "expected an address that begins with http"),
        ({"tokenizer": "x"}, "endpoint.tokenizer is for servers that take text"),
        ({"tokenizer": str(tmp_path), "protocol": "sglang"}, "has no chat template"),
    ):
        with pytest.raises(ConfigError, match=why):
            build("rewards", Config(**{"url": "http://localhost", **options}))


# ---------------------------------------------------------------- a whole run


def test_a_run_learns_from_it(serve, tmp_path):
    from tiny_runs import tiny_job
    from tunery.loop import run_job

    rows = [{"messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = serve(lambda body: reply("llamafactory", len(body["messages"][0]) / 100))
    run_job(tiny_job(
        tmp_path, data={"train": str(tmp_path / "prompts.jsonl"), "eval": None},
        objective={"kind": "ppo", "score_norm": True}, rollout={"group": 1, "max_new_tokens": 6},
        rewards=[{"kind": "endpoint", "url": server.url("/v1/score/evaluation"), "protocol": "llamafactory"}],
        train={"batch_size": 3, "max_steps": 2},
    ))  # fmt: skip
    kept = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    assert len(server.requests) == 6 == len(kept)
    texts = {body["messages"][0] for _, _, body in server.requests}
    for line in kept:
        (text,) = [t for t in texts if line["prompt"][0]["content"] in t and len(t) / 100 == line["reward"]][:1]
        assert line["rewards"] == {"endpoint": len(text) / 100}
