"""Oracles: hand-worked sums for every logged mean; an uninterrupted run for a resumed one, line for line; the keys
that LLaMA-Factory's and Hugging Face's users read."""

import io
import json
import math

import pytest
from rich.console import Console

from tunery.diagnose import DataCounts
from tunery.errors import TuneryError
from tunery.files import json_line, write_json
from tunery.job import ReportConfig
from tunery.progress import Display, Reading, clock_text, human
from tunery.report import NullReport, Report


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Recorder:
    """A tracker that keeps what it gets, and fails from a step on if told to."""

    def __init__(self, fails_at=math.inf):
        self.logged, self.finished, self.fails_at = [], False, fails_at

    def log(self, numbers, step):
        if step >= self.fails_at:
            raise ConnectionError("gone")
        self.logged.append((step, dict(numbers)))

    def finish(self):
        self.finished = True


def make(folder, total=20, log_every=5, start=0, clock=None, **more):
    console = Console(file=io.StringIO(), width=200)
    report = Report(
        folder,
        ReportConfig(),
        total_steps=total,
        total_epochs=2.0,
        start_step=start,
        log_every=log_every,
        console=console,
        clock=clock or Clock(),
        **more,
    )
    report.text = lambda: console.file.getvalue()
    return report


def advance(report, clock, first, last, evaluate_every=None):
    """Steps that differ in loss, weight and tokens; half a second each, evaluations two."""
    for step in range(first, last + 1):
        clock.now += 0.5
        report.step(
            step,
            loss=3 - 0.1 * step,
            weight=10.0 * step,
            lr=1e-3 / step,
            grad_norm=1.0 + step,
            tokens=100 + step,
            examples=4,
            epoch=step / 10,
            metrics={"loss": (1.0, 1.0), "accuracy": (1.0 * step, 10.0 * step)},
            memory_bytes=2**30,
        )
        if evaluate_every and step % evaluate_every == 0:
            clock.now += 2.0
            report.evaluation(step, 2.0 - 0.01 * step, {"accuracy": 0.5})


def log(folder, name="trainer_log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ------------------------------------------------------------ the log


def test_a_line_is_the_exact_mean_over_its_steps(tmp_path):
    clock = Clock()
    with make(tmp_path, clock=clock) as report:
        advance(report, clock, 1, 10)
    first, second = log(tmp_path)
    weights = [10.0 * step for step in range(6, 11)]
    losses = [3 - 0.1 * step for step in range(6, 11)]
    assert second["loss"] == pytest.approx(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights))
    assert second["loss"] != pytest.approx(sum(losses) / 5, abs=1e-3)
    assert first == {
        "current_steps": 5,
        "total_steps": 20,
        "percentage": 25.0,
        "elapsed_time": "0:00:02",
        "remaining_time": "0:00:07",
        "loss": pytest.approx((2.9 + 2 * 2.8 + 3 * 2.7 + 4 * 2.6 + 5 * 2.5) / 15),
        "accuracy": pytest.approx(0.1),
        "lr": 2e-4,
        "grad_norm": 6.0,
        "epoch": 0.5,
        "throughput": pytest.approx(515 / 2.5),
        "total_tokens": 515,
    }


def test_the_last_step_is_logged_though_no_multiple(tmp_path):
    clock = Clock()
    report = make(tmp_path, total=7, clock=clock)
    advance(report, clock, 1, 7)
    assert [line["current_steps"] for line in log(tmp_path)] == [5, 7]


def test_stopping_early_logs_the_rest(tmp_path):
    clock = Clock()
    report = make(tmp_path, clock=clock)
    advance(report, clock, 1, 7)
    report.finish()
    assert [line["current_steps"] for line in log(tmp_path)] == [5, 7]


def test_evaluating_and_saving_are_not_training_time(tmp_path):
    clock = Clock()
    report = make(tmp_path, clock=clock)
    advance(report, clock, 1, 5, evaluate_every=5)
    clock.now += 7  # saving
    report.mark()
    advance(report, clock, 6, 10)
    _, evaluation, second = log(tmp_path)
    assert evaluation["eval_loss"] == 1.95 and evaluation["accuracy"] == 0.5 and "loss" not in evaluation
    assert second["throughput"] == pytest.approx(540 / 2.5)
    assert second["elapsed_time"] == "0:00:14"


def test_a_second_evaluation_takes_the_place_of_the_first(tmp_path):
    clock = Clock()
    report = make(tmp_path, clock=clock)
    advance(report, clock, 1, 5, evaluate_every=5)
    report.evaluation(5, 1.0)
    advance(report, clock, 6, 10)
    assert [(line["current_steps"], line.get("eval_loss")) for line in log(tmp_path)] == [
        (5, None),
        (5, 1.0),
        (10, None),
    ]
    assert [evaluation.eval_loss for evaluation in report.history.evaluations] == [1.0]


@pytest.mark.parametrize("killed_at", [12, 13, 15])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path, killed_at):
    whole, clock = tmp_path / "whole", Clock()
    report = make(whole, clock=clock)
    advance(report, clock, 1, 20, evaluate_every=6)
    expected = report.finish()

    cut, clock = tmp_path / "cut", Clock()
    report = make(cut, clock=clock)
    advance(report, clock, 1, killed_at, evaluate_every=6)  # no close: the process was killed
    with (cut / "steps.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # in the middle of a line
    clock.now += 1000
    resumed = make(cut, start=12, clock=clock)
    assert [line["current_steps"] for line in log(cut)] == [5, 6, 10, 12]
    advance(resumed, clock, 13, 20, evaluate_every=6)
    assert resumed.finish() == expected
    assert log(cut) == log(whole)
    assert (cut / "steps.jsonl").read_text() == (whole / "steps.jsonl").read_text()
    assert (cut / "trainer_state.json").read_text() == (whole / "trainer_state.json").read_text()


def test_a_new_start_in_a_used_folder_begins_anew(tmp_path):
    clock = Clock()
    advance(make(tmp_path, clock=clock), clock, 1, 10, evaluate_every=5)
    make(tmp_path)
    assert log(tmp_path) == [] and log(tmp_path, "steps.jsonl") == []


def test_a_damaged_log_is_named(tmp_path):
    clock = Clock()
    advance(make(tmp_path, clock=clock), clock, 1, 10)
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    (tmp_path / "steps.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    with pytest.raises(TuneryError, match=r"steps\.jsonl: line 2"):
        make(tmp_path, start=8)


# ------------------------------------------------------------ at the end


def test_results_have_the_known_names_and_right_rates(tmp_path):
    clock = Clock()
    report = make(tmp_path, clock=clock, flops_per_token=2e6, peak_flops=1e9)
    advance(report, clock, 1, 20, evaluate_every=10)
    assert report.finish({"train_extra": 1}, model_step=10) == json.loads((tmp_path / "all_results.json").read_text())
    train = json.loads((tmp_path / "train_results.json").read_text())
    tokens = sum(100 + step for step in range(1, 21))
    weights = [10.0 * step for step in range(1, 21)]
    losses = [3 - 0.1 * step for step in range(1, 21)]
    assert train == {
        "epoch": 2.0,
        "train_loss": pytest.approx(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)),
        "train_runtime": 14.0,
        "train_samples_per_second": pytest.approx(80 / 14, abs=1e-3),
        "train_steps_per_second": pytest.approx(20 / 14, abs=1e-3),
        "train_tokens_per_second": pytest.approx(tokens / 14, abs=1e-3),
        "train_steps_seconds": 10.0,
        "tokens_per_second": tokens / 10,
        "num_input_tokens_seen": tokens,
        "total_flos": tokens * 2e6,
        "mfu": pytest.approx(tokens / 10 * 2e6 / 1e9),
        "train_extra": 1,
    }
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {
        "epoch": 1.0,
        "eval_loss": 1.9,
        "eval_perplexity": pytest.approx(math.exp(1.9)),
        "eval_accuracy": 0.5,
    }
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["best_metric"], state["best_global_step"]) == (
        20,
        20,
        1.8,
        20,
    )
    steps = [(entry["step"], "loss" in entry, "eval_loss" in entry) for entry in state["log_history"]]
    assert steps == [(5, True, False), (10, True, False), (10, False, True), (15, True, False), (20, True, False),
                     (20, False, True), (20, False, False)]  # fmt: skip
    assert state["log_history"][0]["loss"] == log(tmp_path)[0]["loss"]
    assert state["log_history"][0]["learning_rate"] == 2e-4
    assert state["log_history"][-1]["train_loss"] == train["train_loss"]


def test_the_page_tells_the_run(tmp_path):
    clock = Clock()
    counts = DataCounts(100, 90, {"no assistant turn": 10}, 0, 4000, 1000, 0)
    job = {"model": {"name": "builtin:tiny"}, "train": {"epochs": 2}}
    report = make(tmp_path / "my_run", clock=clock, counts=counts, job=job, versions={"torch": "2.x"})
    report.evaluation(0, 2.5)
    advance(report, clock, 1, 20, evaluate_every=10)
    report.warn("the disk is nearly full")
    report.note("streams of one sequence")
    samples = [{"prompt": "a|b\n<i>c</i>", "label": "*好*", "before": "x" * 700, "after": "[ok]"}]
    report.before_after({"exact": 0.1, "chrf": 40.0}, {"exact": 0.9, "chrf": 80.5}, samples)
    results = report.finish()
    assert results["before_exact"] == 0.1 and results["after_chrf"] == 80.5
    page = (tmp_path / "my_run" / "report.md").read_text()
    for line in (
        "# my_run",
        "- held-out loss 2.5000 (step 0) → 1.8000 (step 20)",
        "- the disk is nearly full",
        "- streams of one sequence",
        "| exact | 0.1000 | 0.9000 | +0.8 |",
        "| chrf | 40.00 | 80.50 | +40.5 |",
        "| refused: no assistant turn | 10 |",
        "| of them trained on | 1,000 (25.0%) |",
        "| 10 | 1.00 | 1.9000 | 6.69 | 0.5000 |",
        "| whole run | 0:00:14 |",
        "| torch | 2.x |",
        "model: {name: 'builtin:tiny'}",
        "![training loss](training_loss.png)",
        "![training eval loss](training_eval_loss.png)",
    ):
        assert line in page.splitlines(), line
    assert "- **dropped rows**: 10 of 100 rows (10.0%)" in page
    assert r"| a\|b<br>\<i\>c\</i\> | \*好\* | " + "x" * 600 + r"… (100 more characters) | \[ok\] |" in page
    assert (tmp_path / "my_run" / "training_loss.png").exists()
    terminal = report.text()
    assert "warning: the disk is nearly full" in terminal and "0.9000" in terminal and "<i>c</i>" in terminal
    assert terminal.count("10 of 100 rows") == 1


def test_a_finished_run_takes_an_earlier_ones_files_away(tmp_path):
    for name in ("eval_results.json", "training_eval_loss.png"):
        (tmp_path / name).write_text("old")
    clock = Clock()
    report = make(tmp_path, clock=clock)
    advance(report, clock, 1, 20)
    report.finish()
    assert not (tmp_path / "eval_results.json").exists() and not (tmp_path / "training_eval_loss.png").exists()
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_a_diagnosis_is_said_once_while_it_runs_and_stands_in_the_page(tmp_path):
    clock = Clock()
    report = make(tmp_path, total=100, clock=clock)
    for step in range(1, 101):
        clock.now += 1
        report.step(
            step, loss=2 / step, weight=1, lr=1e-4, grad_norm=None, tokens=9, examples=1, epoch=step / 50, metrics={}
        )
        if step % 20 == 0:
            report.evaluation(step, 1 + abs(step - 40) / 100)
    assert report.text().count("Overfitting since about step 40") == 1
    report.finish()
    page = (tmp_path / "report.md").read_text()
    assert "**overfitting**" in page and "1.6000 (step 100)" in page


# ------------------------------------------------------------ trackers


def test_trackers_get_the_lines_and_the_results(tmp_path):
    clock, tracker = Clock(), Recorder()
    report = make(tmp_path, clock=clock, trackers=[tracker], flops_per_token=2e6, peak_flops=1e9)
    advance(report, clock, 1, 20, evaluate_every=20)
    report.finish()
    assert [step for step, _ in tracker.logged] == [5, 10, 15, 20, 20, 20] and tracker.finished
    first = tracker.logged[0][1]
    assert first["train/loss"] == log(tmp_path)[0]["loss"] and first["train/learning_rate"] == 2e-4
    assert first["train/mfu"] == pytest.approx(515 / 2.5 * 2e6 / 1e9) and first["train/memory_bytes"] == 2**30
    assert tracker.logged[4][1] == {"eval/loss": 1.8, "eval/accuracy": 0.5}
    assert tracker.logged[5][1]["train_loss"] > 0


def test_a_failing_tracker_does_not_end_the_run(tmp_path):
    clock, good, bad = Clock(), Recorder(), Recorder(fails_at=10)
    report = make(tmp_path, clock=clock, trackers=[bad, good])
    advance(report, clock, 1, 20)
    report.finish()
    assert [step for step, _ in bad.logged] == [5] and len(good.logged) == 5
    assert report.text().count("Recorder failed") == 1 and "gone" in report.text()


# ------------------------------------------------------------ on the screen


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    clock = Clock()
    report = make(tmp_path, clock=clock, flops_per_token=2e6, peak_flops=1e9)
    advance(report, clock, 1, 10, evaluate_every=10)
    first, second, evaluation = report.text().splitlines()
    assert first == ("step 5/20  loss 2.6333  lr 2.00e-04  206 tokens/s  MFU 41%  1.0 GiB  0:00:07 left")
    assert second.startswith("step 10/20  loss ") and evaluation == "step 10/20  evaluation loss 1.9000"


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_on_a_terminal_and_silence_when_quiet(width):
    reading = Reading(3, 1.25, 1e-4, 3456.0, 0.4, 2**30, 61)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    display = Display(terminal, 10, quiet=False)
    display.show(reading, logged=False)
    display.close()
    shown = terminal.file.getvalue()
    assert "3/10" in shown and "loss 1.2500  lr 1.00e-04  3.5k tokens/s  MFU 40%  1.0 GiB  0:01:01 left" in shown
    assert ("━" in shown) == (width == 120)
    silent = Console(file=io.StringIO(), width=120)
    quiet = Display(silent, 10, quiet=True)
    quiet.show(reading, logged=True)
    quiet.say("hello")
    assert silent.file.getvalue() == ""
    quiet.warn("look [here]")
    assert silent.file.getvalue() == "warning: look [here]\n"


def test_other_ranks_record_nothing(tmp_path):
    with NullReport() as report:
        advance(report, Clock(), 1, 10, evaluate_every=5)
        report.warn("x")
        assert report.finish() == {}
    assert list(tmp_path.iterdir()) == []


def test_clock_and_human_numbers():
    assert [clock_text(seconds) for seconds in (0, 59.9, 3600, 90061)] == ["0:00:00", "0:00:59", "1:00:00", "25:01:01"]
    assert [human(value) for value in (812, 3400, 12_345, 1.2e6, 3e9)] == ["812", "3.4k", "12k", "1.2M", "3.0G"]


# ------------------------------------------------------------ files


def test_what_is_no_number_is_still_valid_json(tmp_path):
    line = json_line({"loss": math.nan, "norms": [math.inf, 1.0]})
    assert json.loads(line, parse_constant=pytest.fail) == {"loss": "nan", "norms": ["inf", 1.0]}
    clock = Clock()
    report = make(tmp_path, clock=clock)
    report.evaluation(0, math.inf)
    assert make(tmp_path, start=1, clock=clock).history.evaluations[0].eval_loss == math.inf


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "b.json", {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "b.json"]
