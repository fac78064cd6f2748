"""The comparison's own arithmetic and book-keeping, not timings. Oracle: figures worked by hand, and Tunery's own
configuration check."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench.contestants import Contestant, ablation, chosen, contestants
from bench.jobs import JOBS, Prepared, prepare, save_tokenizer, step_sums, tiny
from bench.rivals.recorder import StepClock, packs_per_step, real_tokens
from bench.rivals.tunery import values
from bench.summary import largest_difference, page, ratio, speed, summarise, table, wrong_tokens

from assets_path import assets
from bench import sft
from tunery.errors import ConfigError
from tunery.job import load_job

IN_ORDER = Contestant("rival", "trainer", "plain", "fp32")
PACKED = Contestant("packed", "trl", "packing", "fp32", in_order=False)


def steps(*tokens: int, seconds: float = 1.0, loss: float = 3.0) -> list[dict[str, float]]:
    return [{"loss": loss - i / 10, "seconds": seconds, "tokens": count} for i, count in enumerate(tokens)]


def job_of(lengths: list[int], batch_size: int) -> Prepared:
    job = SimpleNamespace(batch_size=batch_size, name="T", title="toy", max_length=64)
    return Prepared(job, Path("nowhere"), lengths, [n // 2 for n in lengths], 1e6, {"longest": max(lengths)})  # type: ignore[arg-type]


# ------------------------------------------------------------ arithmetic


def test_tokens_of_steps_are_sums_over_their_rows():
    assert step_sums([5, 7, 1, 2, 9], 2) == [12, 3, 9]


def test_speed_is_a_sum_over_a_sum_after_the_warm_up():
    run = [*steps(1000, 1000, seconds=100.0), *steps(30, seconds=1.0), *steps(10, seconds=4.0)]
    assert speed(run) == 40 / 5
    assert speed(run[:2]) == 10  # shorter than the warm-up: all of it


def test_the_ratio_is_taken_round_by_round():
    def rounds(*speeds: float) -> list[dict]:
        return [{"steps": steps(1, seconds=1 / speed)} if speed else {"error": "killed"} for speed in speeds]

    assert ratio(rounds(100, 200, 90), rounds(50, 40, 30)) == pytest.approx((3.0, 2.0, 5.0))
    assert ratio(rounds(100, 0, 90), rounds(50, 40, 30)) == pytest.approx((2.5, 2.0, 3.0))
    assert ratio(rounds(100, 200), rounds(0)) is None


def test_losses_are_compared_step_by_step():
    assert largest_difference([1.0, 2.0, 3.0], [1.0, 2.5, 2.75]) == 0.5
    with pytest.raises(ValueError, match="zip"):
        largest_difference([1.0], [1.0, 2.0])


def test_a_contestant_must_train_on_our_tokens():
    job = job_of([5, 7, 1, 2], 2)
    assert not wrong_tokens(IN_ORDER, steps(12, 3), job, None)
    assert "steps of [3, 12]" in wrong_tokens(IN_ORDER, steps(3, 12), job, None)
    assert not wrong_tokens(IN_ORDER, steps(12), job, 1)
    assert not wrong_tokens(PACKED, steps(3, 12), job, None)
    assert "14 tokens trained on instead of 15" in wrong_tokens(PACKED, steps(2, 12), job, None)
    assert not wrong_tokens(PACKED, steps(2), job, 1)


def test_padding_is_no_token():
    assert real_tokens({"input_ids": [1, 2, 3]}) == 3
    assert real_tokens({"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 2, 0]}) == 3


def test_packs_of_a_step_hold_the_rows_of_a_step():
    rows = [{"input_ids": [0] * n} for n in (100, 300)]
    assert packs_per_step(rows, {"batch_size": 16, "max_length": 1024}) == 3  # 16 * 200 / 1024 = 3.1
    assert packs_per_step(rows, {"batch_size": 1, "max_length": 1024}) == 1


def test_the_clock_counts_batches_that_were_trained_on(monkeypatch):
    now = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock, loader = StepClock(), SimpleNamespace(collate_fn=len)
    clock.on_train_begin(None, None, None, train_dataloader=SimpleNamespace(base_dataloader=loader))
    batches = [[{"input_ids": [1, 2]}], [{"input_ids": [1]}, {"input_ids": [1, 2, 3]}], [{"input_ids": [1]}]]
    assert [loader.collate_fn(batch) for batch in batches] == [1, 2, 1]  # one of them ahead of its step
    for loss in (3.0, 2.5):
        clock.on_step_end(None, None, None)
        clock.on_log(None, None, None, logs={"loss": loss})
    clock.on_log(None, None, None, logs={"train_runtime": 5.0})
    assert clock.steps == [{"loss": 3.0, "seconds": 2.0, "tokens": 2}, {"loss": 2.5, "seconds": 3.0, "tokens": 4}]


# ------------------------------------------------------------ who takes part


def test_rivals_are_chosen_by_the_beginning_of_their_names():
    names = [one.name for one in chosen(False, ["trl-bf16", "llama"], "bf16")]
    assert names[0] == "tunery-bf16"
    assert {"trl-bf16", "trl-bf16-packed", "llamafactory-bf16", "llamafactory-default"} <= set(names)
    assert not {"tunery-fp32", "trl-fp32", "trainer-bf16"} & set(names)
    assert [one.name for one in chosen(False, ["none"], None)] == ["tunery-bf16", "tunery-fp32"]
    assert len(chosen(False, ["all"], None)) == len(contestants(False))
    with pytest.raises(ValueError, match=r"no rival 'axolotl'; there are tunery-bf16"):
        chosen(False, ["axolotl"], None)


@pytest.mark.parametrize("words", [["--rivals", "axolotl"], ["--assets", "/nowhere"], ["--job", "Z"]])
def test_a_wrong_word_on_the_command_line_is_said_before_anything_runs(words, capsys):
    with pytest.raises(SystemExit):
        sft.parse(words)
    assert f"{words[0]}: " in capsys.readouterr().err


def test_a_result_names_no_place_on_this_machine():
    words = ["--job", "A", "--python", "/a/b", "--llamafactory=/c/d", "--rounds", "3"]
    assert sft.command(words) == "python -m bench.sft --job A --python PYTHON --llamafactory=PYTHON --rounds 3"


def test_full_fine_tuning_keeps_float32_weights_in_every_bf16_run():
    found = [one for one in contestants(True) if one.precision == "bf16" and one.runner in ("trl", "trainer")]
    assert {one.runner for one in found} == {"trl", "trainer"}
    for one in found:
        assert one.settings["dtype"] == "float32", one.name


@pytest.mark.parametrize("one", ablation("fp32"), ids=lambda one: one.name)
def test_tunerys_configuration_is_one_that_tunery_takes(one):
    job = tiny(JOBS["A"])
    spec = Prepared(job, Path("folder"), [], [], 0.0).spec() | {"steps": None, "settings": {"precision": "bf16"}}
    loaded = load_job(values(spec, "out"), one.settings["overrides"])
    assert (loaded.train.batch_size, loaded.train.shuffle, loaded.schedule.kind) == (4, False, "constant")
    assert (loaded.adapter.rank, loaded.adapter.alpha, loaded.adapter.dropout) == (8, 16, 0)  # type: ignore[attr-defined]
    off = [name for name, switch in loaded.kernels if switch == "reference"]
    kind = one.name.removeprefix("without ")
    everything = list(type(loaded.kernels).model_fields)
    expected = {"everything on": [], "packing": [], "all kernels": everything, "packing and kernels": everything}
    assert off == expected.get(kind, [kind])
    assert loaded.train.packing == ("packing" not in kind)


def test_an_override_that_is_none_is_refused():
    spec = Prepared(tiny(JOBS["D"]), Path("folder"), [], [], 0.0).spec() | {"steps": 3}
    with pytest.raises(ConfigError, match="kernels"):
        load_job(values(spec | {"settings": {"precision": "fp32"}}, "out"), ["kernels.warp=reference"])


# ------------------------------------------------------------ the race


def test_contestants_take_turns_and_who_failed_is_not_asked_again(monkeypatch):
    order = []

    def run_one(_prepared, one, _options):
        order.append(one.name)
        return {"error": "no"} if one.name == "b" else {"steps": steps(1, 1, 1), "peak_bytes": 1, "load": 0.0}

    monkeypatch.setattr(sft, "run_one", run_one)
    field = [Contestant(name, "trl", "", "bf16") for name in "abc"]
    runs = sft.race(None, field, argparse.Namespace(rounds=3))
    assert order == ["a", "b", "c", "c", "a", "c", "a"]
    assert [len(runs[name]) for name in "abc"] == [3, 1, 3]


def test_a_run_that_fails_says_why():
    job = Prepared(tiny(JOBS["A"]), Path("folder"), [], [], 0.0)
    options = argparse.Namespace(python=sys.executable, llamafactory=None, steps=None, timeout=60)
    missing = sft.run_one(job, Contestant("x", "nobody", "", ""), options)
    assert "No module named bench.rivals.nobody" in missing["error"]
    assert "--llamafactory" in sft.run_one(job, Contestant("x", "llamafactory", "", ""), options)["error"]


def results(tmp_path: Path) -> dict:
    """Three rounds of Tunery (100 tokens/s), of a rival (50) with other losses, and one failure."""
    field = [Contestant("tunery-fp32", "tunery", "defaults", "fp32"), IN_ORDER,
             Contestant("broken", "trl", "as it comes", "")]  # fmt: skip
    shared = {"settings": {}, "load": 0.1, "versions": {"torch": "2"}}
    mine = {**shared, "steps": steps(100, 100, 100, 100), "peak_bytes": 2**30}
    other = {**shared, "steps": steps(100, 100, 100, 100, seconds=2.0, loss=3.5), "peak_bytes": 2**31}
    runs = {"tunery-fp32": [mine] * 3, "rival": [other] * 3, "broken": [{"error": "ValueError: a | b"}]}
    return summarise(job_of([60, 40] * 4, 2), field, runs, None)


def test_a_table_has_everyone_with_ratio_difference_and_error(tmp_path):
    result = results(tmp_path)
    ours, rival, _ = result["contestants"]
    assert (ours["tokens_per_second"], rival["tokens_per_second"]) == (100, 50)
    assert rival["ratio"] == (2.0, 2.0, 2.0) and rival["difference"] == pytest.approx(0.5)
    assert ours["mfu"] == pytest.approx(100 * 1e6 / result["peak_flops"]["fp32"])
    text = table(result)
    assert "| rival | plain | 50 | 2.00 x (2.00 to 2.00) | 2.00 GiB |" in text
    assert "| **0.5000** |" in text, "a difference beyond the tolerance stands out"
    assert "| broken | as it comes | did not run: ValueError: a / b |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_an_ablation_gives_each_technique_its_share():
    field = [Contestant("everything on", "tunery", "defaults", "bf16"),
             Contestant("without head", "tunery", "kernels.head=reference", "bf16")]  # fmt: skip
    shared = {"settings": {}, "load": 0.1, "versions": {}, "peak_bytes": 2**30}
    runs = {
        "everything on": [{**shared, "steps": steps(100, 100, 100)}],
        "without head": [{**shared, "steps": steps(100, 100, 100, seconds=1.25)}],
    }
    text = table(summarise(job_of([100] * 3, 1), field, runs, None))
    assert "| without head | `kernels.head=reference` | 80 | 1.25 x (1.25 to 1.25) | 20% | 1.00 GiB | 0.0000 |" in text


def test_the_page_has_every_job_measured(tmp_path):
    from bench.results_page import save_result

    for name in "AC":
        result = results(tmp_path)
        result["job"]["name"] = name
        save_result(f"sft_{name}", json.loads(json.dumps(result)), tmp_path)
    text = page(tmp_path)
    assert text.index("### Job A") < text.index("### Job C")
    assert "Rivals: trainer with torch 2." in text


# ------------------------------------------------------------ jobs


@pytest.mark.slow
def test_a_cut_tokenizer_is_the_whole_one_with_fewer_merges(tmp_path):
    from tunery.models.load import ModelConfig, load_tokenizer

    whole = assets() / "tokenizers/qwen2.5"
    save_tokenizer(whole, 1000, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    cut, full = (load_tokenizer(ModelConfig(name=str(folder))) for folder in (tmp_path, whole))
    text = "Making crêpes is an easy process!\n1. 你好"
    ids = cut(text).input_ids
    assert len(cut) == 1000 and max(ids) < 1000 and cut.decode(ids) == text
    assert len(ids) > len(full(text).input_ids)
    first = {token for token, number in full.get_vocab().items() if number < 997}
    assert set(cut.get_vocab()) - first == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "C", "E"])
def test_a_prepared_job_is_the_rows_it_says(tmp_path, name):
    job = tiny(JOBS[name])
    prepared = prepare(job, assets(), tmp_path / "job")
    spec = prepared.spec()
    rows = [json.loads(line) for line in Path(spec["tokens_file"]).read_text().splitlines()]
    assert [len(row["input_ids"]) for row in rows] == prepared.lengths and len(rows) == job.rows
    assert prepared.labelled == [sum(label >= 0 for label in row["labels"]) for row in rows]
    assert all(label in (-100, i) for row in rows for i, label in zip(row["input_ids"], row["labels"], strict=True))
    assert max(prepared.lengths) <= job.max_length
    if job.long:
        assert min(prepared.lengths) > job.max_length / 2
    assert Path(spec["adapter"], "adapter_config.json").is_file()
