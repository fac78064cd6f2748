"""The GPU benchmark where there is no GPU. Oracles: published parameter counts, FLOPs worked by hand, Alpaca's own
lengths, and the two contestants' first losses, which must agree because rows and weights are the same."""

from __future__ import annotations

import json
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from bench.gpu_check import Check, compared, run_checks
from bench.gpu_contestants import Stopwatch, pad, run_trainer, run_tunery
from bench.gpu_job import ANSWER, INSTRUCTION, Rows, Spec, make_rows, parameters, too_large, useful_flops

from assets_path import assets
from bench import gpu


def spec(**changes) -> Spec:
    usual = {
        "contestant": "x", "kind": "tunery", "method": "lora", "shape": "tiny", "data": ["ragged"], "seconds": 0.0,
        "warmup": 1, "deadline": time.time() + 600,
    }  # fmt: skip
    return Spec(**{**usual, **changes})


def few_rows() -> Rows:
    """Tiny ragged ones, 8 a step."""
    rows = make_rows("ragged", tiny=True)
    return Rows(rows.prompts[:64], rows.answers[:64], 8)


# ------------------------------------------------------------ arithmetic


def test_the_shapes_are_those_of_llama():
    """As published with the models."""
    assert [parameters(shape) for shape in ("8b", "3b", "1b")] == [8_030_261_248, 3_212_749_824, 1_235_814_400]


def test_flops_of_llama_3_8b():
    """A token of 4,096 with LoRA costs 4P + 4E + 6P_lora + 3A, in full 6P + 6E + 3A, and recomputing it 2P + A."""
    H, M, V, L, kv = 4096, 14336, 128256, 32, 1024
    P = L * (2 * H * H + 2 * H * kv + 3 * H * M)
    lora = 16 * L * (2 * (H + H) + 2 * (H + kv) + 3 * (H + M))
    A, E = 2 * 4096 * H * L, H * V
    rows = Rows(np.zeros(2, np.int64), np.full(2, 4096), 2)
    f = 4095 / 4096  # the first token is nobody's target
    found = useful_flops("8b", "lora", rows)
    assert found["useful"] == pytest.approx(4 * P + 4 * f * E + 6 * lora + 3 * A)
    assert found["recomputed"] == pytest.approx(2 * P + 2 * lora + A, rel=1e-6)
    full = useful_flops("8b", "full", rows)
    assert full["useful"] == pytest.approx(6 * P + 6 * f * E + 3 * A)
    assert full["recomputed"] == pytest.approx(2 * P + A)


def test_what_cannot_fit_is_known_beforehand():
    assert too_large("lora", "8b", 1) is None
    assert too_large("full", "3b", 80 * 2**30) is None
    assert "does not fit: 135 GiB" in str(too_large("full", "8b", 80 * 2**30))


def test_rows_are_the_same_every_time():
    rows, again = make_rows("ragged"), make_rows("ragged")
    assert np.array_equal(rows.lengths, again.lengths)
    assert all(np.array_equal(a, b) for a, b in zip(rows.ids(100), again.ids(100), strict=True))
    assert make_rows("dense").lengths.tolist() == [4096] * 256
    assert make_rows("dense").mean_length == 4096
    assert Rows(np.array([2, 1]), np.array([2, 1]), 1).labelled == 0.5


def test_ragged_lengths_are_alpacas():
    """Every tenth row of the data with the real tokenizer."""
    from tokenizers import Tokenizer

    folder = assets()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers/llama3/tokenizer.json"))
    rows = json.loads((folder / "datasets/alpaca/alpaca_data.json").read_text())[::10]
    asked = [row["instruction"] + ("\n" + row["input"] if row["input"] else "") for row in rows]
    for texts, (mu, sigma) in ((asked, INSTRUCTION), ([row["output"] for row in rows], ANSWER)):
        lengths = np.array([len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)])
        assert np.exp(mu + sigma**2 / 2) == pytest.approx(lengths.mean(), rel=0.03)
        assert np.sqrt(np.exp(sigma**2) - 1) == pytest.approx(lengths.std() / lengths.mean(), rel=0.05)


def test_the_stopwatch_counts_real_tokens_after_the_warm_up():
    watch = Stopwatch(torch.device("cpu"), np.array([1, 2, 30, 40, 500, 600]), 2, 1, 0.0, time.time() + 60)
    assert [watch.step() for _ in range(3)] == [False, False, True]
    assert (watch.steps, watch.tokens) == (2, 30 + 40 + 500 + 600)
    assert watch.speed == watch.tokens / watch.seconds


def test_a_padded_batch():
    rows = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])},
            {"input_ids": torch.tensor([7]), "labels": torch.tensor([7])}]  # fmt: skip
    batch = pad(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]


# ------------------------------------------------------------ contestants


@pytest.mark.parametrize("method", ["lora", "full"])
def test_contestants_train_the_same(method):
    """The loss of the first step is the same number, so rows, weights and the averaging are."""
    rows = few_rows()
    ours = run_tunery(spec(method=method), rows)
    theirs = run_trainer(spec(method=method, kind="trainer", checkpointing=True), rows, 4)
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    assert ours["steps"] == theirs["steps"] == 2
    assert ours["tokens"] == theirs["tokens"] == rows.lengths[8:24].sum()
    assert ours["speed"] > 0 and ours["notes"] == [] and not ours["recomputes"]
    assert theirs["recomputes"] and "batches of 4" in theirs["setting"]


def test_the_trainers_batch_size_is_searched():
    """And leaves the weights as they were."""
    rows = few_rows()
    result = run_trainer(spec(kind="trainer"), rows, None)
    assert result["size"] in (1, 2, 4, 8)
    assert result["first_loss"] == pytest.approx(run_tunery(spec(), rows)["first_loss"], rel=1e-5)


def test_what_cannot_run_is_a_line_and_no_failure():
    result = run_tunery(spec(overrides=["adapter.targets=[nothing]"]), few_rows())
    assert "nothing" in result["error"]


def test_variants_are_contestants_with_keys_of_the_job():
    found = gpu.contestants(["one by one: train.packing=false train.checkpointing=full"])
    overrides = found["Tunery, one by one"]["overrides"]
    assert overrides == ["train.packing=false", "train.checkpointing=full"]
    result = run_tunery(spec(overrides=overrides), few_rows())
    assert result["recomputes"] and "checkpointing full" in result["setting"]


@pytest.mark.slow
def test_the_script_measures_in_processes_and_stops_in_time():
    given = Namespace(
        method="lora", shape="tiny", data=["ragged"], rounds=1, minutes=5, seconds=0.1, warmup=1, variant=[]
    )
    *_, found = gpu.measure(given)
    assert [m["contestant"] for m in found] == ["Tunery", *gpu.RIVALS]
    assert all(m["speed"] > 0 and m["flops_useful"] > 0 for m in found)
    began = time.time()
    assert list(gpu.measure(Namespace(**{**vars(given), "minutes": 0}))) == []
    assert list(gpu.run(spec(seconds=600.0), time.time() + 3)) == []
    assert time.time() - began < 30


# ------------------------------------------------------------ the page


def measurement(**changes):
    usual = {
        "round": 0, "contestant": "Tunery", "data": "dense", "speed": 100.0, "peak_bytes": 2**30, "setting": "s",
        "recomputes": False, "flops_useful": 2.0, "flops_recomputed": 1.0, "peak_flops": 1000.0,
    }  # fmt: skip
    return {**usual, **changes}


def test_the_table():
    rival, other = gpu.RIVALS
    measurements = [
        measurement(), measurement(contestant=rival, speed=50.0, recomputes=True),
        measurement(contestant=other, speed=40.0),
        measurement(round=1, speed=120.0), measurement(round=1, contestant=rival, speed=40.0, recomputes=True),
        measurement(round=1, contestant=other, speed=30.0),
        {"round": 0, "data": "ragged", "contestant": "Tunery", "error": "out of memory"},
    ]  # fmt: skip
    assert gpu.ratios([m for m in measurements if m["data"] == "dense"], "Tunery") == [2.0, 3.0]
    lines = gpu.table(measurements)
    assert lines[2] == "| dense | Tunery | 110 | 2.50 (2.00 to 3.00) | 24.0% | 24.0% | 1.0 GiB | s |"
    assert gpu.utilisation(measurements[1]) == 0.1 and gpu.utilisation(measurements[1], hardware=True) == 0.15
    assert lines[-1].endswith("out of memory |")


def test_the_section_of_a_result():
    result = {
        "method": "lora", "shape": "8b", "parameters": 8_030_261_248, "measurements": [measurement()],
        "command": "c", "machine": "m", "versions": {}, "date": "d",
    }  # fmt: skip
    checked = {**result, "checks": [{"what": "attention", "error": 1e-3, "allowed": 1e-2}]}
    text = gpu.section([result], checked)
    assert "### LoRA, Llama's 8B shape (8.03B parameters), dense rows" in text
    assert "1 round. `c` on m;" in text and "| attention | 1.0e-03 | 1e-02 |" in text


def test_the_page_without_measurements_says_so():
    text = gpu.section([], None)
    assert "Speed: not measured." in text and text.endswith("Not measured.")


# ------------------------------------------------------------ the kernels


@pytest.mark.slow
def test_checks_pass_on_a_cpu():
    checks = run_checks("cpu")
    assert checks and all(check.passed for check in checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_checks_pass_on_cuda():
    checks = run_checks("cuda")
    assert checks and all(check.passed for check in checks)


def test_a_wrong_kernel_is_found():
    inputs = [torch.randn(50, 20)]
    value, gradients = compared("x", lambda x: x.tanh(), lambda x: x.tanh(), inputs, torch.float32)
    assert value.passed and gradients.passed
    value, gradients = compared("x", lambda x: x.tanh() * 1.001, lambda x: x.tanh(), inputs, torch.float32)
    assert not value.passed and not gradients.passed
    value, gradients = compared("x", lambda x: x.tanh().detach() + 0 * x, lambda x: x.tanh(), inputs, torch.float32)
    assert value.passed and not gradients.passed
    assert not Check("x", float("nan"), 1.0).passed
