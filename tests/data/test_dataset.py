"""prepare(). Oracle: the rows written to the files, counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from assets_path import assets
from toy_template import ToyTemplate, text_of
from tunery.config import validate
from tunery.data.dataset import DataConfig, Prepared, mix, prepare
from tunery.data.report import DataReport
from tunery.data.store import TokenStore
from tunery.errors import ConfigError, DataError
from tunery.objectives import pretrain, sft

SFT = sft.Objective(sft.Config())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)


def lines(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def alpaca(*numbers: int) -> list[dict]:
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in numbers]


def go(template=None, objective=SFT, seed=1, **data) -> Prepared:
    return prepare(validate(DataConfig, data), template or ToyTemplate(), objective, seed=seed)


def texts(store) -> list[str]:
    assert isinstance(store, TokenStore)
    return [text_of(sequences[0]) for sequences in store]


def test_rows_become_examples_in_order_with_their_origin(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(0, 1, 2))
    data = go(train=path)
    assert texts(data.train) == ["q0|a0|", "q1|a1|", "q2|a2|"]
    assert data.train.origin(2) == (path, 3)
    assert data.eval is None and data.eval_examples == []


def test_the_report_counts_every_row(tmp_path):
    rows = [*alpaca(*range(30)), "{broken", {"instruction": "q", "output": 3}, *alpaca(0, 0)]
    rows += [{"instruction": "q" * 50, "output": "long"}]
    path = lines(tmp_path / "x.jsonl", rows)
    report = go(ToyTemplate(40), train=path, max_bad=0.1).report
    (source,) = report.sources
    assert (report.rows, source.rows, source.used, source.duplicates) == (35, 35, 32, 2)
    assert source.refused == {"not JSON": 1, "wrong type": 1, "too long": 1} and source.bad == 2
    assert [(row.file, row.row, row.reason) for row in report.refused] == [
        (path, 31, "not JSON"),
        (path, 32, "wrong type"),
        (path, 35, "too long"),
    ]
    # q0|a0| is 6 tokens, q10|a10| 8; the answer and its end are trained.
    assert source.tokens == report.train.tokens == 12 * 6 + 20 * 8
    assert source.labelled == report.train.labelled == 12 * 3 + 20 * 4
    assert report.train.lengths == {"min": 6, "p25": 6, "p50": 8, "p75": 8, "p90": 8, "p99": 8, "max": 8}
    assert report.to_dict()["refused"] == {"not JSON": 1, "wrong type": 1, "too long": 1}
    report.write_refused(tmp_path / "out" / "refused.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert written[2] == {
        "file": path,
        "row": 35,
        "reason": "too long",
        "detail": "56 tokens > 40",
        "source": "data.train[0]",
    }


def test_the_printed_report_shows_counts_reasons_and_places(tmp_path):
    from io import StringIO

    from rich.console import Console

    path = lines(tmp_path / "x.jsonl", [*alpaca(*range(30)), "{broken", {"instruction": "q", "output": "a", "id": 1}])
    console = Console(file=StringIO(), width=300)
    go(train=path, eval=0.1).report.print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{path}:31: Expecting property name" in text and "refused: not JSON: 1" in text
    assert "train: 28 examples" in text and "eval: 3 examples" in text and "32 rows tokenised and cached" in text


# ---------------------------------------------------------------- too many bad rows, nothing to learn


def test_too_many_bad_rows_stop_with_counts_and_places(tmp_path):
    path = lines(tmp_path / "x.jsonl", [*alpaca(*range(8)), "{", {"instruction": "a"}])
    with pytest.raises(DataError) as caught:
        go(train=path)
    said = str(caught.value)
    assert "2 of 10 rows cannot be used (20.0%; data.max_bad is 5.0%)" in said
    assert "not JSON: 1" in said and f"{path}:10: missing column ('output' is not in this row)" in said
    assert go(train=path, max_bad=0.2).report.sources[0].used == 8


def test_rows_refused_in_tokenising_count_too(tmp_path):
    rows = [*alpaca(*range(9)), {"messages": 1}]
    turns = [{"messages": [{"role": "user", "content": "q"}]}] * 3
    path = lines(tmp_path / "x.jsonl", rows[:9])
    other = lines(tmp_path / "y.jsonl", [*turns, {"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(DataError, match="3 of 13 rows cannot be used"):
        go(train=[path, other])


def test_rows_dropped_for_length_are_a_choice_and_do_not_stop(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"instruction": "q" * 50, "output": "a"}] * 9 + alpaca(1))
    data = go(ToyTemplate(20), train=path)
    assert texts(data.train) == ["q1|a1|"] and data.report.sources[0].refused == {"too long": 9}
    with pytest.raises(DataError, match=r"x\.jsonl:1: the row is too long .53 tokens > 20.; raise data.max_length"):
        go(ToyTemplate(20), train=path, too_long="error")


def test_a_source_without_a_usable_row_stops_even_beside_a_large_one(tmp_path):
    good = lines(tmp_path / "x.jsonl", alpaca(*range(100)))
    bad = lines(tmp_path / "y.jsonl", [{"instruction": " ", "output": "a"}])
    with pytest.raises(DataError, match=r"data\.train\[1\]: none of the 1 rows of .*y\.jsonl can be used"):
        go(train=[good, bad])
    long = lines(tmp_path / "z.jsonl", [{"instruction": "q" * 50, "output": "a"}])
    with pytest.raises(DataError, match="too long: 1"):
        go(ToyTemplate(20), train=long)


def test_zero_trained_tokens_stop(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    path = lines(tmp_path / "x.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=r"data\.train: none of the 4 tokens is trained"):
        go(train=path)


def test_configuration_that_cannot_work_is_refused_before_reading(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train: no data given"):
        go()
    for fraction in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigError, match="eval: expected a fraction between 0 and 1"):
            go(train="x.jsonl", eval=fraction)
    for number in (0, 1, 2, True):
        with pytest.raises(ConfigError, match="eval: expected a fraction between 0 and 1"):
            go(train="x.jsonl", eval=number)
    for value in (5, 0.5, [5], ["x.jsonl", None]):
        with pytest.raises(ConfigError, match=r"train: expected a path, a mapping \{path: \.\.\.\}, or a list"):
            go(train=value)
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.weight is 2\.0, but data\.mix is concat"):
        go(train=[{"path": "x.jsonl", "weight": 2.0}])
    with pytest.raises(ConfigError, match="of a stream cannot be held out"):
        go(train="x.jsonl", eval=0.1, streaming=True)


# ---------------------------------------------------------------- eval


def test_a_fraction_is_held_out_by_seed_and_never_overlaps(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(100)))
    one, again, other = go(train=path, eval=0.1), go(train=path, eval=0.1), go(train=path, eval=0.1, seed=2)
    assert one.eval is not None and other.eval is not None and again.eval is not None
    assert len(one.eval) == 10 and len(one.train) == 90
    assert not set(texts(one.train)) & set(texts(one.eval))
    assert texts(one.eval) == texts(again.eval) != texts(other.eval)
    assert [f"{e.messages[0].content}|{e.messages[1].content}|" for e in one.eval_examples] == texts(one.eval)
    assert (one.report.sources[0].used, one.report.sources[0].held_out) == (90, 10)


def test_train_rows_that_eval_has_too_are_removed_and_counted(tmp_path):
    train = lines(tmp_path / "x.jsonl", alpaca(1, 2, 3, 2))
    held = lines(tmp_path / "y.jsonl", alpaca(2, 9))
    data = go(train=train, eval=held)
    assert texts(data.train) == ["q1|a1|", "q3|a3|"] and texts(data.eval) == ["q2|a2|", "q9|a9|"]
    assert data.report.sources[0].overlap == 2 and data.report.sources[0].used == 2
    with pytest.raises(DataError, match=r"no row is left; all 1 usable rows are in the evaluation data too$"):
        go(train=lines(tmp_path / "z.jsonl", alpaca(2)), eval=held)


def test_copies_of_a_held_out_row_leave_train_too(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(10)) * 2)
    data = go(train=path, eval=0.1)
    assert data.eval is not None and not set(texts(data.train)) & set(texts(data.eval))
    source = data.report.sources[0]
    assert (source.held_out, source.used, source.overlap) == (2, 18, 0)


def test_many_copies_do_not_cost_training_its_other_rows(tmp_path):
    """Oracle: what is left is all rows but one group of equal ones."""
    path = lines(tmp_path / "x.jsonl", alpaca(*range(40), *[100] * 30, *[101] * 30))
    data = go(train=path, eval=0.1)
    assert data.eval is not None and len(data.eval) == 10 and len(data.train) == 90
    assert Counter(texts(data.train))["q100|a100|"] == Counter(texts(data.train))["q101|a101|"] == 30
    data = go(train=lines(tmp_path / "y.jsonl", alpaca(*[1] * 30, *[2] * 20)), eval=0.1)
    assert texts(data.eval) == ["q2|a2|"] * 20 and texts(data.train) == ["q1|a1|"] * 30
    with pytest.raises(DataError, match=r"cannot hold out 0\.5 of 4 usable rows that say the same"):
        go(train=lines(tmp_path / "z.jsonl", alpaca(1, 1, 1, 1)), eval=0.5)


def test_too_few_rows_to_hold_some_out(tmp_path):
    with pytest.raises(DataError, match=r"cannot hold out 0.5 of 1 usable rows"):
        go(train=lines(tmp_path / "x.jsonl", alpaca(1)), eval=0.5)


def test_eval_rows_refused_are_not_among_the_examples_to_generate_from(tmp_path):
    rows = [alpaca(5)[0], {"instruction": "q" * 50, "output": "a"}, alpaca(6)[0]]
    data = go(ToyTemplate(20), train=lines(tmp_path / "x.jsonl", alpaca(1)), eval=lines(tmp_path / "y.jsonl", rows))
    assert [e.messages[0].content for e in data.eval_examples] == ["q5", "q6"]
    assert data.report.sources[1].refused == {"too long": 1}


# ---------------------------------------------------------------- mixing, text


def test_concat_takes_every_row_of_every_source(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", alpaca(1, 2)), lines(tmp_path / "b.jsonl", alpaca(3))
    data = go(train=[a, {"path": b, "samples": 1}])
    assert texts(data.train) == ["q1|a1|", "q2|a2|", "q3|a3|"]
    assert [source.tokens for source in data.report.sources] == [12, 6]


def test_weighted_keeps_the_epoch_and_shares_it_by_weight(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", alpaca(*range(90))), lines(tmp_path / "b.jsonl", alpaca(*range(100, 110)))
    data = go(train=[{"path": a, "weight": 1.0}, {"path": b, "weight": 3.0}], mix="weighted")
    counts = Counter(Path(data.train.origin(i)[0]).name for i in range(len(data.train)))
    assert counts == {"a.jsonl": 25, "b.jsonl": 75} and data.report.train.examples == 100
    rows = Counter(data.train.origin(i) for i in range(len(data.train)))
    assert {n for (file, _), n in rows.items() if file == b} == {7, 8}
    assert {n for (file, _), n in rows.items() if file == a} == {1}


def test_mix_is_exact_seeded_and_skips_empty_sources():
    sources = np.repeat([0, 1, 2], [7, 0, 4])
    one, again, other = mix([1, 5, 2], sources, 0), mix([1, 5, 2], sources, 0), mix([1, 5, 2], sources, 1)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert len(one) == 11 and np.bincount(sources[one], minlength=3).tolist() == [4, 0, 7]


def test_plain_text_for_pretraining(tmp_path):
    (tmp_path / "x.txt").write_text("abc\n\ndefgh\n")
    data = go(ToyTemplate(4), pretrain.Objective(pretrain.Config()), train=str(tmp_path / "x.txt"))
    assert texts(data.train) == ["abc|", "defg", "h|"] and data.report.sources[0].used == 2
    assert [data.train.origin(i)[1] for i in range(3)] == [1, 3, 3]


# ---------------------------------------------------------------- the cache


def built(data: Prepared) -> str:
    return data.report.cache


def test_the_cache_gives_the_same_again_without_tokenising(tmp_path):
    path = lines(tmp_path / "x.jsonl", [*alpaca(*range(40)), "{"])
    template = ToyTemplate()
    one = go(template, train=path, eval=0.1)
    encoded = template.rows_encoded
    two = go(template, train=path, eval=0.1)
    assert (built(one), built(two)) == ("built", "hit") and template.rows_encoded == encoded
    assert texts(one.train) == texts(two.train) and texts(one.eval) == texts(two.eval)
    assert one.eval_examples == two.eval_examples
    assert [two.train.origin(i) for i in range(36)] == [one.train.origin(i) for i in range(36)]
    a, b = one.report.to_dict(), two.report.to_dict()
    assert {**a, "cache": 0, "seconds": 0} == {**b, "cache": 0, "seconds": 0}
    assert two.report.refused == one.report.refused


def test_whatever_decides_the_tokens_makes_another_entry(tmp_path):
    path = tmp_path / "x.jsonl"
    lines(path, alpaca(*range(40)))
    base = {"train": str(path), "eval": 0.1}
    assert built(go(**base)) == "built"
    assert built(go(**base, max_bad=0.5)) == "hit"  # decides nothing
    assert built(go(**base, seed=2)) == "built"
    assert built(go(ToyTemplate(999), **base)) == "built"
    assert built(go(None, sft.Objective(sft.Config(train_on="last")), **base)) == "built"
    assert built(go(**{**base, "eval": 0.2})) == "built"
    assert built(go(**{**base, "train": {"path": str(path), "samples": 20}})) == "built"
    assert built(prepare(validate(DataConfig, base), ToyTemplate(), SFT, seed=1, cache_key="x")) == "built"
    lines(path, alpaca(*range(39), 99))  # the same size
    assert built(go(**base)) == "built"
    assert built(go(**base)) == "hit"
    assert built(go(**base, cache=False)) == "off"
    assert built(go(train=str(path), seed=1)) == "built"
    assert built(go(train=str(path), seed=2)) == "hit"  # without a fraction the seed decides nothing


def test_a_damaged_entry_is_built_again(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(40)))
    one = go(train=path, eval=0.1)
    for name in ("train/ids.npy", "train/store.json", "eval.jsonl", "report.json", "eval/rows.npy"):
        (file,) = (tmp_path / "cache" / "data").glob(f"*/{name}")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        two = go(train=path, eval=0.1)
        assert built(two) == "built", name
        assert texts(two.train) == texts(one.train) and texts(two.eval) == texts(one.eval)
        assert built(go(train=path, eval=0.1)) == "hit"


def test_bad_data_leaves_no_entry_and_no_litter(tmp_path):
    path = lines(tmp_path / "x.jsonl", ["{"] * 5 + alpaca(1))
    for _ in range(2):
        with pytest.raises(DataError, match="5 of 6 rows"):
            go(train=path)
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_a_report_survives_saving(tmp_path):
    report = go(train=lines(tmp_path / "x.jsonl", alpaca(*range(20)) + ["{"]), eval=0.1).report
    report.save(tmp_path / "report.json")
    assert DataReport.load(tmp_path / "report.json") == report


def test_real_rows_are_what_the_template_makes_of_each_alone(tmp_path):
    """Oracle: template.encode, row by row, with a real tokenizer and its own template."""
    from transformers import AutoTokenizer

    from tunery.data.examples import read_examples
    from tunery.data.report import SourceReport
    from tunery.data.template import load_template
    from tunery.types import Example, Refused

    root = assets()
    template = load_template("auto", AutoTokenizer.from_pretrained(root / "tokenizers" / "qwen2.5"), max_length=1024)
    info = root / "datasets" / "llamafactory"
    data = go(template, train=["identity", "glaive_toolcall_zh_demo"], dataset_dir=str(info))
    assert data.report.rows == 391 and len(data.train) + sum(data.report.reasons().values()) == 391
    assert len(data.train) > 300
    read = {
        (file, row): example
        for source in data.located
        for file, row, example in read_examples(source, SourceReport(source.key, source.name))
    }
    for number in range(0, len(data.train), 10):
        example = read[data.train.origin(number)]
        assert isinstance(example, Example)
        (expected,) = template.encode_many([Example(example.messages, tools=example.tools)])
        assert not isinstance(expected, Refused)
        for left, right in zip(data.train.sequences(number), expected, strict=True):
            assert np.array_equal(left.ids, right.ids) and np.array_equal(left.weights, right.weights)


# ---------------------------------------------------------------- what is said of rows that are used, and of an epoch


def test_rejected_answers_are_counted_and_said_also_from_the_cache(tmp_path):
    rows = [*alpaca(*range(5)), *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4))]
    train = [lines(tmp_path / "x.jsonl", rows[:5]), lines(tmp_path / "y.jsonl", rows[5:])]
    for cache in ("built", "hit"):
        data = go(train=train)
        assert data.report.cache == cache and texts(data.train)[-1] == "p3|a|"
        (warning,) = data.report.all_warnings()
        assert warning.startswith("rows with a rejected answer, which objective sft does not use: 4 (first: ")
    streamed = go(train=train, streaming=True).report.all_warnings()
    assert streamed == [warning]


def test_thumbs_down_are_not_trained_as_good_answers(tmp_path):
    rows = [{**row, "kto_tag": i % 2 == 0} for i, row in enumerate(alpaca(*range(4)))]
    data = go(train=lines(tmp_path / "x.jsonl", rows), max_bad=1.0)
    assert texts(data.train) == ["q0|a0|", "q2|a2|"] and data.report.reasons() == {"thumbs down": 2}


def test_the_report_shows_the_rows_of_a_weighted_epoch(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", alpaca(*range(30))), lines(tmp_path / "b.jsonl", alpaca(*range(100, 110)))
    for _ in range(2):
        data = go(train=[{"path": a, "weight": 1.0}, {"path": b, "weight": 3.0}], mix="weighted")
        assert [source.used for source in data.report.sources] == [30, 10]
        rows, tokens = zip(*(source.epoch for source in data.report.sources if source.epoch), strict=True)
        assert rows == (10, 30) and sum(tokens) == data.report.train.tokens
        assert tokens[1] == 30 * len("q100|a100|")
    assert go(train=a).report.sources[0].epoch is None


def test_the_headline_and_the_reasons_agree(tmp_path):
    path = lines(tmp_path / "x.jsonl", [*alpaca(*range(6)), "{", {"instruction": "q" * 60, "output": "long"}])
    with pytest.raises(DataError) as caught:
        go(ToyTemplate(50), train=path)
    assert str(caught.value).startswith("1 of 8 rows") and "too long" not in str(caught.value)
