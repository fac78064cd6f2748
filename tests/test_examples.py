"""Every shipped YAML and every command of the READMEs runs. What a run of the quickstart achieves is shown by
`make quickstart`, which CI runs; here all are cut to a few steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from test_cli import tunery
from tunery.config_file import read_config
from tunery.job import head_of, load_job
from tunery.models.load import resolve_name

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
OUTPUT = ("output", "output_dir")
MADE = {values[key]: path for path in EXAMPLES for key in OUTPUT if key in (values := read_config(path))}
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
SHORT = ["train.max_steps=2", "eval.generate=2", "eval.max_new_tokens=8", "eval.every=2", "train.save_every=2"]


def needed(values: dict) -> tuple[str, str | None]:
    """Where a job says which run it needs, and which: its teacher, or its reward model."""
    objective = values.get("objective")
    if isinstance(objective, dict) and "teacher" in objective:
        return "objective.teacher", objective["teacher"]
    return "reward_model", values.get("reward_model")


def short(values: dict, output: Path) -> list[str]:
    """Overrides for a few steps into a folder of the test's."""
    if "export_dir" in values:
        return [f"export_dir={output}"]
    if "output" not in values:
        return [f"output_dir={output}", "max_steps=2"]
    answers = head_of(load_job(values)) is None  # a reward model generates nothing
    return [f"output={output}", *(word for word in SHORT if answers or "eval.generate" not in word)]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # their paths are relative to the project
    values = read_config(path)
    key, run = needed(values)
    overrides = short(values, tmp_path / "run")
    if run in MADE:  # what another example leaves behind
        done = tunery("train", MADE[run], *short(read_config(MADE[run]), tmp_path / "needed"))
        assert done.returncode == 0, done.stderr
        overrides.append(f"{key}={tmp_path / 'needed'}")
    done = tunery("train", path, *overrides)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / ("config.json" if "export_dir" in values else "report.md")).is_file()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.stem)
def test_readme_commands_run(readme, tmp_path, monkeypatch):
    """The job of one's own, on the embedded base instead of a hub model, and each command after it, in order."""
    monkeypatch.chdir(tmp_path)
    rows = (ROOT / "examples/data/quickstart_train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "my_rows.jsonl").write_text("\n".join(rows[:60]), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(rows[60:62]), encoding="utf-8")
    job = next(b for b in blocks(readme, "yaml") if "my_rows.jsonl" in b)
    assert resolve_name("Qwen/Qwen2.5-7B-Instruct") in job
    (tmp_path / "my_job.yaml").write_text(job, encoding="utf-8")
    commands = [
        line.partition("#")[0] for b in blocks(readme, "bash") for line in b.splitlines() if line.startswith("tunery")
    ]
    assert [c.split()[1] for c in commands] == ["check", "inspect", "plan", "train", "chat", "generate", "export"]
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] in ("check", "inspect", "plan", "train"):
            words.append("model=builtin:tiny")
        if words[0] == "train":
            words += [*SHORT, "optimizer.lr=1e-2"]  # two steps must still be worth exporting
        if words[0] == "chat":
            words += ["--prompt", "hi"]
        if words[0] in ("chat", "generate"):
            words += ["--max-new-tokens", "4"]
        done = tunery(*words)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.stem)
def test_readme_preferences_run(readme, tmp_path, monkeypatch):
    """The job of pairs on the embedded base, and its commands, in order."""
    monkeypatch.chdir(tmp_path)
    pairs = (ROOT / "examples/data/preferences_eval.jsonl").read_text(encoding="utf-8")
    (tmp_path / "my_pairs.jsonl").write_text(pairs, encoding="utf-8")
    job = next(b for b in blocks(readme, "yaml") if "my_pairs.jsonl" in b)
    (tmp_path / "my_preferences.yaml").write_text(job, encoding="utf-8")
    commands = [line.partition("#")[0].split()[1:] for b in blocks(readme, "sh") for line in b.splitlines()]
    assert [words[0] for words in commands] == ["inspect", "train"]
    for words in commands:
        done = tunery(*words, "model=builtin:tiny", *(SHORT if words[0] == "train" else []))
        assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "runs/preferences/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.stem)
def test_readme_python_runs(readme, tmp_path, monkeypatch, capsys):
    (code,) = blocks(readme, "python")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(readme), "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "runs/from_python/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.stem)
def test_readme_links_and_make_targets_exist(readme):
    text = readme.read_text(encoding="utf-8")
    links, targets = re.findall(r"\]\(([^)#:]+)\)", text), re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert links and targets
    for link in links:
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
