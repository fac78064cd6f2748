"""Distillation. Oracles: the divergence by its definition from both models' own logits, one sequence after the other,
TRL's GKD loss, and the same numbers for every cut of a step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from processes import runs_on_two_ranks
from tiny_models import random_sequences, tiny_model
from tiny_runs import final_weights, losses, model_folder, tiny_job, write_pairs
from tunery.data.collate import collate
from tunery.errors import ConfigError, DataError, ModelError
from tunery.job import load_job
from tunery.loop import run_job
from tunery.objectives import distill
from tunery.policy import CausalPolicy
from tunery.read import read_data
from tunery.teacher import Teacher
from tunery.types import Example, Message, Refused, Tokens

KINDS = [{"divergence": "forward_kl"}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.3}]


def student_and_teacher(family: str = "llama") -> tuple[CausalPolicy, Any]:
    """A student of one width, a teacher of another."""
    student = CausalPolicy(tiny_model(family).eval(), dtype=torch.float64)
    teacher = tiny_model("qwen2", hidden_size=48, num_hidden_layers=3).eval()
    student.teacher = Teacher(CausalPolicy(teacher, dtype=torch.float64))
    return student, teacher


def measured(policy: CausalPolicy, objective: Any, batches: list[Any]) -> list[torch.Tensor]:
    policy.model.zero_grad()
    made = [objective.loss(policy, batch) for batch in batches]
    total = torch.stack([loss.sum for loss in made]).sum()
    total.backward()
    grads = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    means = [torch.stack([loss.metrics[name][0] for loss in made]).sum() for name in ("divergence", "nll")]
    return [total.detach(), *means, torch.cat(grads)]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_loss_by_definition_and_trls(options):
    trl = pytest.importorskip("trl.experimental.gkd")
    policy, teacher = student_and_teacher()
    objective = distill.Objective(distill.Config(teacher="t", temperature=1.3, sft_weight=0.2, **options))
    expected = torch.zeros((), dtype=torch.float64)
    for tokens in random_sequences():
        ids = torch.from_numpy(tokens.ids.astype(np.int64))
        z, z_teacher = (model(input_ids=ids[None]).logits[0, :-1] for model in (policy.model, teacher))
        for row, weight in enumerate(tokens.weights[1:].tolist()):
            pair = z[row : row + 1], z_teacher[row : row + 1]
            beta = objective.mixture.beta
            apart = trl.GKDTrainer.generalized_jsd_loss(*pair, beta=beta, temperature=1.3, reduction="sum")
            expected += weight * (apart - 0.2 * z[row].log_softmax(-1)[ids[row + 1]])
    made = objective.loss(policy, collate(random_sequences()))
    torch.testing.assert_close(made.sum, expected, rtol=1e-6, atol=1e-8)
    assert float(objective.weight(collate(random_sequences()))) == float(made.metrics["loss"][1])


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_every_cut_and_every_head_gives_the_same(family, options):
    policy, teacher = student_and_teacher(family)
    objective = distill.Objective(distill.Config(teacher="t", temperature=0.7, sft_weight=0.5, **options))
    alone = [collate([s]) for s in random_sequences()]
    results = [measured(policy, objective, alone), measured(policy, objective, [collate(random_sequences())])]
    assert policy.parts is not None
    policy.parts.head = torch.nn.Sequential(policy.parts.head)
    results.append(measured(policy, objective, alone))
    policy.parts = None
    results.append(measured(policy, objective, alone))
    for result in results[1:]:
        for mine, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_shared_prompt_gives_the_same():
    policy, _ = student_and_teacher()
    random = np.random.default_rng(0)
    prompt = random.integers(3, 131, 11)
    answers = [
        Tokens(
            np.concatenate([prompt, random.integers(3, 131, n)]).astype(np.int32),
            np.repeat([0.0, 1.0], [11, n]).astype(np.float32),
        )
        for n in (4, 7, 3)
    ]
    objective = distill.Objective(distill.Config(teacher="t", divergence="jsd"))
    shared, whole = collate(answers, [0, 0, 0], share=True), collate(answers, [0, 0, 0])
    assert shared.n_tokens < whole.n_tokens and policy.shares and isinstance(policy.teacher, Teacher)
    assert policy.teacher.shares
    for mine, expected in zip(measured(policy, objective, [shared]), measured(policy, objective, [whole]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def test_a_teacher_is_required():
    with pytest.raises(ConfigError, match=r"teacher.*required"):
        load_job({"objective": {"kind": "distill"}, "data": {"train": "x"}})


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    tiny_job(tmp_path)  # makes model and rows
    other = model_folder(tmp_path / "other")
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    job = tiny_job(tmp_path, objective={"kind": "distill", "teacher": str(other)})
    with pytest.raises(ModelError, match=r"2 of .* tokens differ"):
        run_job(job)


@pytest.mark.slow
def test_a_run_comes_near_its_teacher_and_a_resumed_one_is_the_same(tmp_path):
    tiny_job(tmp_path)  # makes model and rows
    teacher = moved(model_folder(tmp_path / "teacher"))
    changes: dict[str, Any] = {
        "objective": {"kind": "distill", "teacher": str(teacher), "divergence": "jsd"}, "adapter": {"kind": "full"},
        "train": {"epochs": 3, "save_every": 4, "keep": None}, "eval": {"best": False},
    }  # fmt: skip
    run_job(tiny_job(tmp_path, **changes))
    seen = losses(tmp_path / "run")
    assert seen[-1] < 0.8 * seen[0]
    resumed = {**changes["train"], "resume": str(tmp_path / "run" / "checkpoint-4")}
    run_job(tiny_job(tmp_path, **{**changes, "train": resumed, "output": str(tmp_path / "again")}))
    assert losses(tmp_path / "again") == seen[4:]


@pytest.mark.slow
def test_on_policy_the_student_answers_and_needs_no_rewards(tmp_path):
    tiny_job(tmp_path)
    teacher = str(model_folder(tmp_path / "teacher"))
    job = tiny_job(
        tmp_path, objective={"kind": "distill", "teacher": teacher, "on_policy": True}, data={"eval": None},
        rollout={"group": 1, "max_new_tokens": 6}, train={"max_steps": 2},
    )  # fmt: skip
    run_job(job)
    seen = losses(tmp_path / "run")
    assert len(seen) == 2 and abs(seen[0]) < 1e-9 and np.isfinite(seen[1])  # the teacher begins as the student does


# ------------------------------------------------------------ log-probs kept in the rows


class OneSequence:
    """A template that makes of any row the same sequence, of which three tokens are trained."""

    def encode_many(self, examples, train):
        return [
            [Tokens(np.arange(3, 9, dtype=np.int32), np.array([0, 0, 0, 1, 1, 1], dtype=np.float32))] for _ in examples
        ]


def row_with(teacher: Any) -> Example:
    return Example([Message("user", "q"), Message("assistant", "a")], meta={"columns": {"teacher": teacher}})


def test_kept_log_probs_stand_where_they_are_predicted_from():
    objective = distill.Objective(distill.Config(top_k=2))
    given = {"ids": [[5, 6], [7, 8], [9, 10]], "logps": [[-0.5, -1.5], [-1.0, -2.0], [-0.7, -3.0]]}
    twice = {"ids": [[5, 5], [7, 8], [9, 10]], "logps": given["logps"]}
    more = {"ids": given["ids"], "logps": [[-0.1, -0.1]] * 3}
    halves = {"ids": [[5.5, 6], [7, 8], [9, 10]], "logps": given["logps"]}
    rows = objective.rows(
        [row_with(g) for g in (given, None, {"ids": [[1]], "logps": [[0]]}, twice, more, halves)], OneSequence()
    )
    made, *refused = rows
    assert [r.reason.split(" are ")[0] for r in refused if isinstance(r, Refused)] == [
        "no teacher's log-probs", "teacher's log-probs do not fit", *["teacher's log-probs"] * 2,
        "no teacher's log-probs",
    ]  # fmt: skip
    assert not isinstance(made, Refused)
    batch = collate([made[0], *made])
    assert batch.extra["teacher_id_1"][batch.labelled_N].tolist() == [6, 8, 10] * 2
    policy = CausalPolicy(tiny_model().eval(), dtype=torch.float64)
    both, one = (measured(policy, objective, batches) for batches in ([batch], [collate(made)] * 2))
    for mine, expected in zip(both, one, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def test_a_kept_token_that_the_model_does_not_have_names_the_row(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "teacher": {"ids": [[5], [last]], "logps": [[-0.5]] * 2}} for last in (2047, 2048)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(tmp_path / "rows.jsonl"), "cache": False}
    job = load_job({"model": "builtin:tiny", "data": data, "objective": {"kind": "distill", "top_k": 1}})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* token 2,048, and builtin:tiny has 2,048"):
        read_data(job)


@pytest.mark.slow
def test_a_run_on_kept_log_probs(tmp_path):
    """The ids of the embedded tokenizer's answers are found as the objective will find them: by its own rows."""
    tiny_job(tmp_path)
    job = tiny_job(tmp_path, data={"eval": None}, train={"max_steps": 2})
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    store = read_data(job).data.train
    for number, line in enumerate(lines):
        (tokens,) = store.sequences(number)
        trained = tokens.ids[1:][tokens.weights[1:] != 0].tolist()
        line["teacher"] = {"ids": [[i, (i + 1) % 64] for i in trained], "logps": [[-0.1, -3.0]] * len(trained)}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_job(tiny_job(
        tmp_path, objective={"kind": "distill", "top_k": 2}, data={"eval": None}, train={"epochs": 4},
    ))  # fmt: skip
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]


# ------------------------------------------------------------ held-out prompts, teachers, ranks


def moved(folder: Path, seed: int = 1) -> Path:
    """The model of a folder, its weights moved: a teacher that does not think as the student does."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def on_policy(folder: Path, **changes: Any) -> dict[str, Any]:
    """A job's sections."""
    tiny_job(folder)  # makes model and rows
    teacher = folder / "teacher"
    if not teacher.is_dir():
        moved(model_folder(teacher))
    return {
        "objective": {"kind": "distill", "teacher": str(teacher), "divergence": "reverse_kl", "on_policy": True},
        "rollout": {"group": 1, "max_new_tokens": 6}, "adapter": {"kind": "full"},
        "train": {"max_steps": 4, "batch_size": 7, "micro_tokens": 60}, "eval": {"every": 2}, **changes,
    }  # fmt: skip


@pytest.mark.slow
def test_held_out_prompts_are_answered_and_the_answers_compared_with_the_teacher(tmp_path):
    """Before training: transformers' greedy answers, and KL(student || teacher) by its definition on their tokens."""
    job = tiny_job(tmp_path, **on_policy(tmp_path))
    run_job(job)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float64) for n in ("model", "teacher")]
    total, count = 0.0, 0
    read = read_data(job)
    for number in range(6):
        ids = torch.from_numpy(read.data.eval.sequences(number)[0].ids.astype(np.int64))[None]
        made = models[0].generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=read.template.end_ids, pad_token_id=0
        )
        with torch.no_grad():
            log_s, log_t = (model(made).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1) for model in models)
        total += float((log_s.exp() * (log_s - log_t)).sum())
        count += made.shape[1] - ids.shape[1]
    seen = evaluations(tmp_path / "run")
    assert seen[0]["eval_loss"] == pytest.approx(total / count, rel=1e-6) == seen[0]["divergence"]
    assert [line["current_steps"] for line in seen] == [0, 2, 4] and "reward" not in seen[0]
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert "eval_perplexity" not in results
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- held-out loss" in report and "- reward" not in report and "held-out reward" not in report
    assert not list((tmp_path / "run").glob("*reward*.png")) and list((tmp_path / "run").glob("*eval*.png"))


@pytest.mark.slow
def test_the_best_step_is_the_nearest_to_the_teacher(tmp_path):
    """A learning rate that leads away from the teacher again: the run ends with the weights that were nearest."""
    changes = on_policy(
        tmp_path, optimizer={"lr": 3e-2}, eval={"every": 1, "best": True, "patience": 3},
        schedule={"kind": "constant", "warmup": 0}, train={"max_steps": 40, "batch_size": 8},
    )  # fmt: skip
    run_job(tiny_job(tmp_path, **changes))
    seen = {line["current_steps"]: line["eval_loss"] for line in evaluations(tmp_path / "run")}
    best = min((step for step in seen if step), key=lambda step: seen[step])
    assert max(seen) < 40 and max(seen) == best + 3  # three evaluations without a better one
    assert f"the run ends with the weights of step {best}" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_with_rewards_they_are_what_counts(tmp_path):
    (tmp_path / "long.py").write_text(
        "def long(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    )
    changes = on_policy(tmp_path, rewards=[f"{tmp_path / 'long.py'}:long"], train={"max_steps": 1})
    run_job(tiny_job(tmp_path, **changes))
    for line in evaluations(tmp_path / "run"):
        assert line["eval_loss"] == -line["reward"] and line["divergence"] > 0


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    """On the student's own answers. (test_whole_runs.py has those of the data.)"""
    run_job(tiny_job(tmp_path, **on_policy(tmp_path), output=str(tmp_path / "one")))
    both = tiny_job(tmp_path, **on_policy(tmp_path), output=str(tmp_path / "two"))
    status, text = runs_on_two_ranks(tmp_path, both)
    assert status == 0, text
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-10) and len(losses(one)) == 4
    for mine, other in zip(evaluations(one), evaluations(two), strict=True):
        assert mine["divergence"] > 1e-3
        for name in ("eval_loss", "divergence", "nll"):
            assert other[name] == pytest.approx(mine[name], rel=1e-10)
    for name, weight in final_weights(one).items():
        torch.testing.assert_close(final_weights(two)[name], weight, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_a_run_or_an_adapter_can_be_the_teacher(tmp_path):
    """An adapter on its base teaches what the two merged would; a run of a reward model teaches nobody."""
    from peft import AutoPeftModelForCausalLM

    run_job(tiny_job(tmp_path, optimizer={"lr": 5e-2}, train={"max_steps": 6}, output=str(tmp_path / "lora")))
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float64).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "model" / name, tmp_path / "merged" / name)
    found = {}
    for name in ("lora", "merged"):
        objective = {"kind": "distill", "teacher": str(tmp_path / name)}
        run_job(tiny_job(tmp_path, objective=objective, train={"max_steps": 3}, output=str(tmp_path / f"of {name}")))
        found[name] = losses(tmp_path / f"of {name}")
    assert found["lora"] == pytest.approx(found["merged"], rel=1e-5) and found["lora"][0] > 1e-3
    write_pairs(tmp_path / "pairs.jsonl", 8)
    run_job(tiny_job(
        tmp_path, objective={"kind": "reward"}, data={"train": str(tmp_path / "pairs.jsonl"), "eval": None},
        train={"max_steps": 1}, output=str(tmp_path / "reward"),
    ))  # fmt: skip
    for name, what in (("reward", "is a reward model"), ("nobody", "no such folder")):
        with pytest.raises(ModelError, match=rf"objective\.teacher: .*{what}"):
            run_job(tiny_job(tmp_path, objective={"kind": "distill", "teacher": str(tmp_path / name)}))
