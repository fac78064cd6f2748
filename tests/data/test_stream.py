"""Streaming. Oracle: the rows of the files as a set, and the stream itself started from its beginning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from toy_template import ToyTemplate, text_of
from tunery.config import validate
from tunery.data.dataset import DataConfig, Prepared, prepare
from tunery.data.stream import StreamingExamples
from tunery.errors import DataError
from tunery.objectives import pretrain, sft

SFT = sft.Objective(sft.Config())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))


def lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def alpaca(*numbers: int) -> list[dict]:
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in numbers]


def go(template=None, objective=SFT, seed=1, **data) -> Prepared:
    return prepare(validate(DataConfig, {"streaming": True, **data}), template or ToyTemplate(), objective, seed=seed)


def stream(template=None, objective=SFT, seed=1, **data) -> StreamingExamples:
    made = go(template, objective, seed, **data).train
    assert isinstance(made, StreamingExamples)
    return made


def texts(items) -> list[str]:
    return [text_of(sequences[0]) for sequences, _ in items]


def expected(*numbers: int) -> list[str]:
    return [f"q{i}|a{i}|" for i in numbers]


def test_an_epoch_is_every_row_once_in_a_seeded_order(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(1000)))
    one = stream(train=path, shuffle_buffer=64)
    first, second = texts(one.examples(0)), texts(one.examples(1))
    assert sorted(first) == sorted(second) == sorted(expected(*range(1000)))
    assert first != second and first != expected(*range(1000))
    assert texts(stream(train=path, shuffle_buffer=64).examples(0)) == first
    assert texts(stream(train=path, shuffle_buffer=64, seed=2).examples(0)) != first
    assert texts(stream(train=path, shuffle_buffer=1).examples(0)) == expected(*range(1000))


def test_the_origin_is_the_file_and_the_row(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(20)))
    examples = list(stream(train=path, shuffle_buffer=8).examples(0))
    assert len(examples) == 20
    for sequences, (file, row) in examples:
        assert file == path and text_of(sequences[0]) == f"q{row - 1}|a{row - 1}|"


@pytest.mark.parametrize("cache", [True, False])
def test_a_restart_goes_on_where_it_stopped(tmp_path, cache):
    """With rows refused in parsing, in tokenising and for length on the way."""
    rows = [*alpaca(*range(900)), *["{"] * 9, *[{"instruction": "q" * 50, "output": "a"}] * 70]
    path = lines(tmp_path / "x.jsonl", [row for pair in zip(rows, reversed(rows), strict=True) for row in pair][:979])
    options = {"train": path, "shuffle_buffer": 100, "cache": cache}
    whole = [(text_of(s[0]), origin) for s, origin in stream(ToyTemplate(20), **options).examples(0)]
    assert 800 < len(whole) < 979
    for start in (0, 1, 255, 256, 600, len(whole) - 1, len(whole)):
        template = ToyTemplate(20)
        again = stream(template, **options)
        probed = template.rows_encoded
        rest = [(text_of(s[0]), origin) for s, origin in again.examples(0, start)]
        assert rest == whole[start:]
        if cache:  # what is skipped in whole chunks is not tokenised again
            assert template.rows_encoded - probed <= 979 - start + 256 + 79


def test_a_restart_counts_over_epochs(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(300)))
    for cache in (True, False):
        one = stream(train=path, shuffle_buffer=32, cache=cache)
        long = texts(itertools.islice(one.forever(), 1000))
        assert long[300:600] == texts(one.examples(1)) and long[900:] == texts(one.examples(3))[:100]
        for start in (0, 299, 300, 301, 750):
            fresh = stream(train=path, shuffle_buffer=32, cache=cache)
            assert texts(itertools.islice(fresh.forever(start), 1000 - start)) == long[start:]


def test_a_known_epoch_is_skipped_without_reading(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(600)))
    list(stream(train=path, shuffle_buffer=8).examples(0))
    template = ToyTemplate()
    again = stream(template, train=path, shuffle_buffer=8)
    probed = template.rows_encoded
    next(again.forever(600))
    assert template.rows_encoded - probed == 256  # one chunk of epoch 1


def test_changed_data_forgets_what_was_known(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(600)))
    list(stream(train=path).examples(0))
    lines(tmp_path / "x.jsonl", alpaca(*range(700)))
    assert len(list(stream(train=path).examples(0, 600))) == 100


def test_refused_rows_are_counted_as_they_are_read(tmp_path):
    path = lines(
        tmp_path / "x.jsonl", [*alpaca(*range(1500)), "{", *alpaca(0), {"instruction": "q" * 50, "output": "a"}]
    )
    one = stream(ToyTemplate(20), train=path)
    assert one.report.rows == 1000 and one.report.cache == "stream"  # looked at before training
    for _ in range(2):  # each epoch is counted by itself
        assert len(list(one.examples(0))) == 1501
        (source,) = one.report.sources
        assert (source.rows, source.used) == (1503, 1501)
        assert [(row.row, row.reason) for row in one.report.refused] == [(1501, "not JSON"), (1503, "too long")]
        assert source.tokens == sum(len(text) for text in expected(*range(1500), 0))


def test_bad_data_stops_at_once_or_on_the_way(tmp_path):
    with pytest.raises(DataError, match="300 of 1,000 rows cannot be used"):
        go(train=lines(tmp_path / "x.jsonl", ["{"] * 300 + alpaca(*range(9000))))
    late = stream(train=lines(tmp_path / "y.jsonl", alpaca(*range(1500)) + ["{"] * 5000), shuffle_buffer=64)
    seen = 0
    with pytest.raises(DataError, match="rows cannot be used"):
        for _ in late.examples(0):
            seen += 1
    assert 1000 < seen < 1500
    with pytest.raises(DataError, match="none of the tokens of its first 1 rows is trained"):
        row = [{"role": "assistant", "content": "a", "weight": 0}]
        go(train=lines(tmp_path / "z.jsonl", [{"messages": row}]))
    with pytest.raises(DataError, match="the row is too long"):
        go(ToyTemplate(4), train=lines(tmp_path / "w.jsonl", alpaca(1)), too_long="error")


def test_evaluation_rows_are_tokenised_before_and_left_out_of_the_stream(tmp_path):
    train = lines(tmp_path / "x.jsonl", alpaca(*range(50)))
    held = lines(tmp_path / "y.jsonl", alpaca(7, 8, 99))
    made = go(train=train, eval=held)
    assert made.eval is not None and len(made.eval) == 3 and len(made.eval_examples) == 3
    assert made.report.sources[1].key == "data.eval[0]" and made.report.eval is not None
    assert isinstance(made.train, StreamingExamples)
    assert sorted(texts(made.train.examples(0))) == sorted(expected(*(i for i in range(50) if i not in (7, 8))))
    assert made.train.report.sources[0].overlap == 2


def test_sources_are_mixed_by_weight_until_each_was_read_once(tmp_path):
    a = lines(tmp_path / "a.jsonl", alpaca(*range(400)))
    b = lines(tmp_path / "b.jsonl", alpaca(*range(1000, 1010)))
    mixed = stream(train=[{"path": a, "weight": 1.0}, {"path": b, "weight": 3.0}], mix="weighted", shuffle_buffer=16)
    files = [Path(file).name for _, (file, _) in mixed.examples(0)]
    assert files.count("a.jsonl") == 400
    assert 0.7 < files.count("b.jsonl") / len(files) < 0.8
    assert texts(mixed.examples(0, 500)) == texts(mixed.examples(0))[500:]


def test_files_are_read_in_a_seeded_order_unless_the_first_rows_are_asked_for(tmp_path):
    for i in range(8):
        lines(tmp_path / "many" / f"{i}.jsonl", alpaca(i))
    folder = str(tmp_path / "many")
    assert texts(stream(train=folder, shuffle_buffer=2).examples(0)) != expected(*range(8))
    first = stream(train={"path": folder, "samples": 3}, shuffle_buffer=2)
    assert sorted(texts(first.examples(0))) == sorted(texts(first.examples(5))) == expected(0, 1, 2)


def test_text_is_cut_into_examples(tmp_path):
    (tmp_path / "x.txt").write_text("abcdefg\nhi\n")
    one = stream(ToyTemplate(4), pretrain.Objective(pretrain.Config()), train=str(tmp_path / "x.txt"), shuffle_buffer=1)
    assert texts(one.examples(0)) == ["abcd", "efg|", "hi|"]
    assert texts(one.examples(0, 1)) == ["efg|", "hi|"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Oracle: the peak of traced allocations, for a file five times as long."""
    import tracemalloc

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                file.write(json.dumps({"instruction": f"q{i}", "output": "a" * 100}) + "\n")
        one = stream(train=str(path), shuffle_buffer=50)
        tracemalloc.start()
        for _ in one.examples(0):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(5000) < 1.5 * peak(1000)
