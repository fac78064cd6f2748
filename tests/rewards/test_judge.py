"""Oracle: a server of ours that answers as an OpenAI-compatible one would, or fails to."""

from __future__ import annotations

import pytest

from json_server import BROKEN, HTML, JsonServer
from tunery.errors import ConfigError, RewardError
from tunery.rewards import _http, judge
from tunery.types import Answer, Message


class Server(JsonServer):
    """Replies in order: text of the judge's, or what JsonServer replies otherwise."""

    def __init__(self, *replies):
        super().__init__(*(
            {"choices": [{"message": {"role": "assistant", "content": reply}}]} if isinstance(reply, str) else reply
            for reply in replies
        ))  # fmt: skip


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    servers = []

    def start(*replies) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server: Server, *answers: Answer, **options):
    config = judge.Config(url=server.url("/v1/"), model="wise", **{"parallel": 1, **options})
    return judge.Reward(config).score(answers or [answer()])


def answer(text: str = "Paris.") -> Answer:
    return Answer(
        [Message("system", "Be brief."), Message("user", "Capital?")], text, [1], "stop", "Paris", {}, "r.jsonl:3"
    )


def test_the_last_score_counts_and_what_is_asked_is_all_there(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve("First I thought Score: 2, but\nScore: 7.5", "**Score:** 99", "score 0")
    assert ask(server, answer(), answer("Rome."), answer("?"), key_env="MY_KEY") == [0.75, 1.0, 0.0]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "wise" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    for part in ("system: Be brief.", "user: Capital?", "<answer>\nParis.", "<reference>\nParis", "from 0 to 10"):
        assert part in text


def test_a_busy_server_is_asked_again(serve):
    server = serve(429, 503, HTML, BROKEN, "Score: 5")
    assert ask(server) == [0.5] and len(server.requests) == 5


def test_what_never_comes_names_the_row_or_gets_a_score(serve):
    for reply, attempts, why in (
        (401, 1, "HTTP 401"),
        (500, 3, "HTTP 500"),
        ("Very good!", 1, "has no 'Score: <number>'"),
    ):
        server = serve(reply)
        with pytest.raises(RewardError, match=f"judge wise at .* gave no score for r.jsonl:3: .*{why}"):
            ask(server, retries=2)
        assert len(server.requests) == attempts
        assert ask(serve(reply), retries=0, on_error=0.25) == [0.25]


def test_a_server_that_does_not_answer_is_given_up(serve):
    with pytest.raises(RewardError, match="timed out"):
        ask(serve(30.0), timeout=0.2, retries=1)
    nobody = serve("Score: 1")
    nobody.close()
    with pytest.raises(RewardError, match="refused"):
        ask(nobody, retries=0)


def test_several_at_a_time_come_back_in_order(serve):
    server = serve("Score: 3")
    assert ask(server, *[answer(str(i)) for i in range(20)], parallel=5, low=1, high=5) == [0.5] * 20


@pytest.mark.parametrize(
    "options", [{"low": 5, "high": 5}, {"prompt": "{nothing}"}, {"prompt": "{"}, {"url": "host:1"}]
)
def test_a_wrong_configuration_is_refused(options):
    with pytest.raises(ConfigError, match="rewards: judge"):
        judge.Reward(judge.Config(**{"url": "http://localhost", "model": "m", "low": 0.0, **options}))
