"""Oracle: what a person at a terminal should see. Commands run in this process, which has torch loaded already; what
loading costs is looked at in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny_model import byte_tokenizer, random_llama
from tiny_runs import tiny_job, write_rows
from tunery.errors import ConfigError, DataError, ModelError
from tunery.run_folder import write_config


@dataclass
class Done:
    """What a command printed, and what it exits with."""

    returncode: int
    stdout: str
    stderr: str


def tunery(*words: object) -> Done:
    """Run a command as `tunery WORDS` would be."""
    from tunery import cli

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["tunery", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, rows and a job file."""
    path = tmp_path_factory.mktemp("cli")
    job = tiny_job(path, model={"dtype": "float32"}, eval={"generate": 2, "max_new_tokens": 8})
    write_config(job, path)
    return path


def test_help_is_grouped_and_loads_no_torch():
    code = "import sys, tunery.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
    text = tunery("--help").stdout
    for words in ("Train", "Use the result", "Data and configuration", "train", "chat", "export", "inspect", "check"):
        assert words in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer: {lrr: 1e-4}", ["bad.yaml", "optimizer.lrr", "unknown key", "'lr'"]),
        ("lr: 1e-4", ["bad.yaml", "lr", "optimizer.lr"]),
        ("train: {epochs: many}", ["train.epochs", "number", "'many'"]),
        ("objective: sfft", ["objective", "'sfft'", "'sft'"]),
        ("model: builtin:tiny", ["data.train", "required"]),
        ("data: {train: nothing.jsonl}", ["nothing.jsonl"]),
        ("model: {name: ./no/such/model}\ndata: {train: x}", ["no such folder"]),
        ("model: {name: builtin:tiny, dtype: float16}\ndata: {train: x}", ["float16", "bfloat16"]),
        ("a: [", ["bad.yaml", "YAML"]),
    ],
)
def test_wrong_configurations_are_one_clear_error(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    done = tunery("train", path, f"output={tmp_path / 'run'}")
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 6
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_job_from_file_to_answers(folder):
    done = tunery("train", folder / "tunery.yaml")
    assert done.returncode == 0, done.stderr
    output = folder / "run"
    for words in ("training_loss.png", f"tunery chat {output}", f"tunery export {output}"):
        assert words in done.stdout
    assert "exact" in done.stderr.lower()  # the table before and after
    again = tunery("train", folder / "tunery.yaml")
    assert again.returncode == 0 and "finished" in again.stdout

    answer = tunery("chat", output, "--prompt", "3: alpha", "--max-new-tokens", 5)
    assert answer.returncode == 0, answer.stderr
    predictions = folder / "predictions.jsonl"
    rows = write_rows(folder / "rows.jsonl", 3)
    done = tunery("generate", output, rows, "--out", predictions, "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(lines) == 3 and set(lines[0]) == {"prompt", "predict", "label"}
    assert {"exact", "chrf"} <= {key.lower() for key in json.loads(done.stdout)}
    merged = folder / "merged"
    done = tunery("export", output, merged)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote the merged model to {merged} (") and "{" not in done.stdout
    for words in ("relative error", "(allowed ", "the adapter moves its base's logits by "):
        assert words in done.stdout
    assert (merged / "model.safetensors").is_file() and (merged / "chat_template.jinja").is_file()
    done = tunery("export", output, folder / "adapter", "--adapter-only", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "adapter"
    theirs = folder / "export.yaml"
    theirs.write_text(
        f"model_name_or_path: {folder / 'model'}\nadapter_name_or_path: {output}\nfinetuning_type: lora\n"
        f"export_dir: {folder / 'theirs'}\n"
    )
    done = tunery("train", theirs)
    assert done.returncode == 0 and done.stdout.startswith("Wrote the merged model to "), done.stderr
    refused = tunery("export", output, merged)
    assert refused.returncode == 1 and "not an empty folder" in refused.stderr


def test_check_inspect_and_schema(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "no answer"}]}\n')
    done = tunery("check", folder / "tunery.yaml", f"data.train={rows}", "data.eval=null")
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl:31" in done.stdout and "no assistant turn" in done.stdout
    done = tunery("inspect", folder / "tunery.yaml", "--rows", 1)
    assert done.returncode == 0 and "trained:" in done.stdout and "tokens per example" in done.stdout
    schema = json.loads(tunery("schema").stdout)
    assert "objective" in schema["properties"] and "max_length" in json.dumps(schema)


def test_llamafactory_files_are_converted_and_run(folder, tmp_path):
    theirs = tmp_path / "theirs.yaml"
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(12)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    theirs.write_text(
        f"model_name_or_path: {folder / 'model'}\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 4\n"
        f"dataset: mine\ndataset_dir: {tmp_path}\ntemplate: default\ncutoff_len: 128\nlearning_rate: 1.0e-3\n"
        f"num_train_epochs: 1.0\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 2\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    ours = tunery("convert", theirs)
    assert ours.returncode == 0 and "batch_size: 4" in ours.stdout and "rank: 4" in ours.stdout
    done = tunery("train", theirs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    theirs.write_text(theirs.read_text() + "use_galore: true\n")
    refused = tunery("train", theirs)
    assert refused.returncode == 2 and "use_galore" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("ranks", "error", "said"),
    [
        ({}, ConfigError("a\nb"), "tunery: a\nb\n"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, ModelError("a\nb"), "tunery: a\nb\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ConfigError("a\nb"), ""),
        ({"RANK": "1", "LOCAL_RANK": "1"}, DataError("a\nb"), ""),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ModelError("a\nb"), "tunery: rank 1: a\n"),
        ({"RANK": "8", "LOCAL_RANK": "0"}, DataError("a\nb"), "tunery: rank 8: a\nb\n"),  # another machine's disk
    ],
)
def test_what_all_ranks_know_is_said_once(monkeypatch, tmp_path, ranks, error, said):
    def fails(*args):
        raise error

    monkeypatch.setattr("tunery.cli.read_job", fails)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    done = tunery("train", tmp_path)
    assert (done.stderr, done.returncode) == (said, error.exit_code)


def test_a_model_without_a_template_is_told_of_the_option(tmp_path):
    random_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(template=None).save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    for words in (("chat", "--prompt", "hi"), ("generate", rows, "--out", tmp_path / "out.jsonl")):
        done = tunery(words[0], tmp_path / "model", *words[1:])
        assert done.returncode == 1 and "--template NAME" in done.stderr and "chatml" in done.stderr, done.stderr
        assert "data.template" not in done.stderr
    done = tunery("chat", tmp_path / "model", "--prompt", "hi", "--template", "chatml", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "tunery.yaml").write_text("{}")
    done = tunery("train", tmp_path)
    assert (
        done.returncode == 2 and f"is a folder; give a YAML or JSON file, such as {tmp_path}/tunery.yaml" in done.stderr
    )
    theirs = Path(__file__).parents[1] / "examples" / "llamafactory" / "lora_sft.yaml"
    done = tunery("convert", theirs, "--out", tmp_path)
    assert done.returncode == 2 and f"{tmp_path}: cannot be written: Is a directory" in done.stderr


def test_a_run_without_failures_has_nothing_to_replay(tmp_path):
    done = tunery("replay", tmp_path)
    assert done.returncode == 1 and "nothing to replay" in done.stderr
