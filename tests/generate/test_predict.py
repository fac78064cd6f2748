"""Oracles: the generator asked row by row, the scores of evaluate.text, and the file of an undisturbed run."""

from __future__ import annotations

import json

import pytest

from tiny_model import save
from tunery.errors import DataError, TuneryError
from tunery.evaluate.text import score
from tunery.generate import answers
from tunery.generate import predict as module
from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from tunery.generate.predict import answer, message_text, predict
from tunery.models.target import load_target
from tunery.types import Example, Message, Refused, ToolCall

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0)
ROWS = [
    {"instruction": "Say one thing", "input": "", "output": "One."},
    {"instruction": "翻译", "input": "second", "output": "第二"},
    {"instruction": "A long question " * 4, "input": "", "output": ""},
    {"instruction": "", "input": "", "output": "nothing was asked"},
    {"instruction": "And then?", "history": [["First", "1"]], "output": "2"},
    {"instruction": "Too long for this model " * 20, "output": "x"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_in_order_with_scores(model, data, tmp_path, capfd):
    out = tmp_path / "sub" / "predictions.jsonl"
    scores = predict(model, data, out, SAMPLING)
    loaded = load_target(model)
    generator = HFGenerator(loaded.model, loaded.tokenizer, loaded.template)
    conversations = [
        [Message("user", "Say one thing")],
        [Message("user", "翻译\nsecond")],
        [Message("user", "A long question " * 4)],
        [Message("user", "First"), Message("assistant", "1"), Message("user", "And then?")],
    ]
    rows = lines(out)
    assert len(rows) == 4
    for i, (row, messages) in enumerate(zip(rows, conversations, strict=True)):
        (alone,) = generator.generate([Request(messages, number=i)], SAMPLING)
        assert list(row) == ["prompt", "predict", "label"]
        assert row["predict"] == alone.text
        assert row["prompt"] == loaded.tokenizer.decode(loaded.template.prompt(messages))
    assert [row["label"] for row in rows] == ["One.", "第二", "", "2"]
    expected = score([rows[i]["predict"] for i in (0, 1, 3)], ["One.", "第二", "2"])
    assert {name: scores[name] for name in expected} == expected
    assert (scores["answered"], scores["refused"]) == (4, 2)
    saved = json.loads((tmp_path / "sub" / "predictions.scores.json").read_text())
    assert saved["bleu"] == scores["bleu"] and saved["settings"]["temperature"] == 1.0
    assert saved["reasons"] == {"empty prompt": 1, "prompt too long": 1}
    errors = capfd.readouterr().err
    assert "2 of 6 rows" in errors and f"{data}:4: empty prompt" in errors and f"{data}:6: prompt too long" in errors
    assert not out.with_name("predictions.jsonl.partial").exists()


class Killed(BaseException):
    """Any sudden end: nothing in the code catches it."""


def interrupted(monkeypatch, after):
    """A generator that is killed after some answers, and counts what it is asked."""
    real, counts = HFGenerator.generate, []

    def generate(self, requests, sampling):
        requests = list(requests)
        counts.append(len(requests))
        for number, completion in enumerate(real(self, requests, sampling)):
            if number == after:
                raise Killed
            yield completion

    monkeypatch.setattr(module.HFGenerator, "generate", generate)
    return counts


@pytest.mark.parametrize("torn", [b"", b'{"index": 0, "pred', b'{"index": 3, "predict": "\xe7'])
def test_goes_on_where_it_stopped(model, data, tmp_path, monkeypatch, torn):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = predict(model, data, whole, SAMPLING)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupted(patch, after=2)
        predict(model, data, out, SAMPLING)
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("ab") as file:
        file.write(torn)
    counts = interrupted(monkeypatch, after=99)
    assert predict(model, data, out, SAMPLING) == expected
    assert counts == [2]
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    assert predict(model, data, out, SAMPLING) == expected  # finished: nothing is asked again
    assert counts == [2]
    predict(model, data, out, SAMPLING, resume=False)
    assert counts == [2, 4]


def test_other_settings_do_not_join_what_is_there(model, data, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupted(patch, after=1)
        predict(model, data, out, SAMPLING)
    other = SAMPLING.model_copy(update={"seed": 7})
    with pytest.raises(DataError, match=r"out\.jsonl\.partial: .*seed 42 -> 7.*remove it"):
        predict(model, data, out, other)
    predict(model, data, out, other, resume=False)
    first = out.read_text()
    with pytest.raises(
        DataError, match=r"out\.jsonl: holds another run's answers \(seed 7 -> 42\); choose .*--no-resume"
    ):
        predict(model, data, out, SAMPLING)
    assert out.read_text() == first
    rows = json.dumps(ROWS[:1])
    data.write_text(rows)
    with pytest.raises(DataError, match=r"out\.jsonl: holds another run's answers \(questions "):
        predict(model, data, out, other)
    predict(model, data, out, SAMPLING, resume=False)
    assert len(lines(out)) == 1


def test_the_same_run_again_says_so(model, data, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    expected = predict(model, data, out, SAMPLING)
    assert "already" not in capfd.readouterr().err
    assert predict(f"{model}/", data, out, SAMPLING) == expected
    assert f"{out}: already answered" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (".", r"^\.: is a folder; name a file to write, such as predictions\.jsonl"),
        ("folder", r"folder: is a folder; .* folder/predictions\.jsonl"),
        ("/proc/p.jsonl", r"^/proc/p\.jsonl: cannot be written: .*; choose another"),
        ("mine.txt/p.jsonl", r"p\.jsonl: cannot be written"),
        ("mine.txt", r"mine\.txt: holds something else than answers; choose another"),
        ("done.jsonl", r"done\.jsonl: holds another run's answers \(temperature 0\.5 -> 1\.0\)"),
        ("rows.json", r"rows\.json: holds the rows to answer"),
    ],
)
def test_where_to_write_is_checked_before_the_model_loads(data, tmp_path, monkeypatch, out, words):
    monkeypatch.setattr(module, "load_target", lambda *args, **options: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "done.jsonl").write_text("{}")
    settings = {"target": "m", **SAMPLING.model_dump(mode="json"), "temperature": 0.5}
    (tmp_path / "done.scores.json").write_text(json.dumps({"settings": settings}))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=words):
        predict("m", data, out, SAMPLING)
    with pytest.raises(TuneryError):
        predict("m", "no_such.jsonl", "new.jsonl", SAMPLING)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_stopped_between_its_last_two_files_goes_on(model, data, tmp_path, monkeypatch):
    """The answers are there, their scores are not yet, and `.partial` tells whose they are."""
    out = tmp_path / "out.jsonl"
    expected = predict(model, data, tmp_path / "whole.jsonl", SAMPLING)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(answers, "write_json", lambda *args: (_ for _ in ()).throw(Killed))
        predict(model, data, out, SAMPLING)
    assert out.exists()
    assert predict(model, data, out, SAMPLING) == expected


def test_a_full_disk_is_one_clear_error(model, data, tmp_path, monkeypatch):
    def full(value):
        if "index" in value:
            raise OSError(28, "No space left on device")
        return json.dumps(value) + "\n"

    monkeypatch.setattr(module, "json_line", full)
    with pytest.raises(
        DataError, match=r"out\.jsonl\.partial: cannot be written: No space left on device; 0 of 4 rows"
    ):
        predict(model, data, tmp_path / "out.jsonl", SAMPLING)


def test_damage_in_the_middle_is_an_error(model, data, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupted(patch, after=2)
        predict(model, data, out, SAMPLING)
    partial = tmp_path / "out.jsonl.partial"
    text = partial.read_text().splitlines()
    partial.write_text("\n".join([text[0], text[1][:9], text[2]]) + "\n")
    with pytest.raises(DataError, match=r"partial:2: is damaged"):
        predict(model, data, out, SAMPLING)


def test_no_row_can_be_answered(model, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("plain text\nmore of it\n")
    with pytest.raises(DataError, match=r"2 of 2 rows .* cannot be answered:\n.*rows\.txt:1: plain text"):
        predict(model, path, tmp_path / "out.jsonl", SAMPLING)


def test_answer_gives_a_row_for_each_example(model):
    loaded = load_target(model)
    generator = HFGenerator(loaded.model, loaded.tokenizer, loaded.template)
    question = [Message("user", "Hi")]
    examples = [
        Example([*question, Message("assistant", "Hello")]),
        Example(text="no question"),
        Example(question),
        Example([*question, Message("assistant", "Go away")], label=False),
    ]
    first, second, third, fourth = answer(generator, examples, SAMPLING)
    assert isinstance(first, dict) and first["label"] == "Hello" and first["predict"]
    assert second == Refused("plain text", "there is no question in it")
    assert isinstance(third, dict) and third["label"] is None
    assert isinstance(fourth, dict) and fourth["label"] is None  # a bad answer is no reference


def test_calls_are_text_in_one_form():
    call = ToolCall("f", {"b": 1, "a": "第"}, id="x")
    line = '{"arguments": {"a": "第", "b": 1}, "name": "f"}'
    assert message_text(Message("assistant", "", tool_calls=(call, call))) == f"{line}\n{line}"
    assert message_text(Message("assistant", "So:", tool_calls=(call,))) == f"So:\n{line}"
    assert message_text(Message("assistant", "yes", reasoning="because")) == "yes"
