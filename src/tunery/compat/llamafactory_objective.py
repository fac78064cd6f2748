"""LLaMA-Factory's stage, and the options that say what it minimises, as our `objective:` section."""

from __future__ import annotations

from typing import Any

from tunery.compat.llamafactory_options import OF_STAGES, STAGES
from tunery.compat.llamafactory_ppo import ppo_objective
from tunery.compat.llamafactory_reader import Options
from tunery.config import nearest

PREFERENCES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
WITHOUT_REFERENCE = ("orpo", "simpo")


def objective_section(o: Options) -> dict[str, Any]:
    """Our `objective:` mapping."""
    stage = o("stage")
    for names, stages in OF_STAGES.items():
        if stage not in stages:
            for name in names.split():
                if name in o.values:
                    o.note(f"{name}: ignored; no effect without stage: {' or '.join(stages)}")
    if stage == "dpo":
        return _preference(o)
    if stage == "kto":
        return _thumbs(o)
    if stage == "ppo":
        _reference(o)
        return ppo_objective(o)
    if stage == "rm":
        o.note(
            "stage: rm is saved as a sequence classification with one label, which transformers loads, where "
            "LLaMA-Factory saves a value head beside a language model"
        )
    kind = STAGES.get(stage, "sft")
    return _sft(o) if kind == "sft" else {"kind": kind}


def _sft(o: Options) -> dict[str, Any]:
    if o("train_on_prompt") and o("mask_history"):
        o.problems.append("mask_history: train_on_prompt is on as well; choose one")
    train_on = "all" if o("train_on_prompt") else "last" if o("mask_history") else "answers"
    return {"kind": "sft", "train_on": train_on} | ({"loss": "dft"} if o("use_dft_loss") else {})


def _preference(o: Options) -> dict[str, Any]:
    """stage: dpo. Its pref_loss orpo and simpo are objectives of their own here."""
    loss, beta = o("pref_loss"), o("pref_beta")
    if loss not in PREFERENCES:
        o.problems.append(f"pref_loss: unknown value {loss!r}{nearest(loss, PREFERENCES)}")
        return {"kind": "dpo"}
    if o("dpo_label_smoothing") and loss != "sigmoid":
        o.problems.append(f"dpo_label_smoothing: is for pref_loss: sigmoid, not for {loss}")
    _reference(o, "pref_loss" if loss in WITHOUT_REFERENCE else "")
    if loss in WITHOUT_REFERENCE:
        if o("ld_alpha") is not None:
            o.refuse("ld_alpha", "pref_loss: sigmoid, where it is objective.ld_alpha")
        if o("pref_bco_weight"):
            o.note(f"pref_bco_weight: ignored; no effect with pref_loss: {loss}")
        if loss == "simpo":
            return {"kind": "simpo", "beta": beta, "gamma": o("simpo_gamma"), **_ftx(o)}
        if o("pref_ftx"):
            o.refuse("pref_ftx", "pref_loss: orpo alone, which has the chosen answer's log-likelihood in it already")
        return {"kind": "orpo", "beta": beta}
    if loss == "kto_pair":
        return _paired_thumbs(o)
    if loss != "sigmoid":
        o.note(
            f"pref_loss: {loss} is that loss; LLaMA-Factory 0.9.5 does not tell its library which one, and "
            "the library (TRL 0.24) takes sigmoid"
        )
    section: dict[str, Any] = {"kind": "dpo", "loss": loss, "beta": beta, **_bco(o, loss)}
    if o("dpo_label_smoothing") and loss == "sigmoid":
        section["label_smoothing"] = o("dpo_label_smoothing")
    if o("ld_alpha") is not None:
        section["ld_alpha"] = o("ld_alpha")
        o.note(
            "ld_alpha: weighs the reference's tokens like the policy's, and leaves pref_ftx's alone; LLaMA-Factory "
            "weighs the policy's in both and none of the reference's"
        )
    return section | _ftx(o)


def _ftx(o: Options) -> dict[str, Any]:
    return {"sft_weight": o("pref_ftx")} if o("pref_ftx") else {}


def _bco(o: Options, loss: str) -> dict[str, Any]:
    """pref_bco_weight g is (loss + g BCO) / (1 + g) there."""
    weight = o("pref_bco_weight")
    if not weight:
        return {}
    if loss == "ipo":
        o.refuse("pref_bco_weight", "pref_loss: sigmoid or hinge; with ipo it would go by mean log-probabilities")
        return {}
    o.note(
        "pref_bco_weight: the reward shift is the mean of all rewards of training so far, step by step, where "
        "LLaMA-Factory takes in one micro-batch after the other, those of evaluations too"
    )
    return {"loss": [loss, "bco_pair"], "loss_weights": [1 / (1 + weight), weight / (1 + weight)]}


def _paired_thumbs(o: Options) -> dict[str, Any]:
    for name in ("pref_ftx", "pref_bco_weight", "ld_alpha"):
        if o(name):
            o.refuse(name, "pref_loss: sigmoid, which takes it")
    o.note(
        "pref_loss: kto_pair is objective: kto on the two answers of each pair, its distance from the reference taken "
        "from answers to other prompts of the step (the paper's way); the library's own was the other side's mean"
    )
    return {"kind": "kto", "beta": o("pref_beta")}


def _thumbs(o: Options) -> dict[str, Any]:
    """stage: kto."""
    _reference(o)
    o.note(
        "stage: kto takes the distance from the reference of the answers of the whole step, where LLaMA-Factory takes "
        "those of a micro-batch, each beside an answer chosen before training"
    )
    if o("pref_ftx"):
        o.note(
            "pref_ftx: adds so much of each wanted answer's mean negative log-likelihood; LLaMA-Factory multiplies it "
            "by (answers / wanted answers) squared of the micro-batch, 4 times as much where half are wanted"
        )
    weights = {"desirable_weight": o("kto_chosen_weight"), "undesirable_weight": o("kto_rejected_weight")}
    return {"kind": "kto", "beta": o("pref_beta"), **weights, **_ftx(o)}


def _reference(o: Options, unused: str = "") -> None:
    """The reference is the policy as the run starts. `unused`: the option by which there is none."""
    model, adapters = o("ref_model"), o("ref_model_adapters")
    start = o("model_name_or_path") or "", o("adapter_name_or_path")
    if unused:
        for name in ("ref_model", "ref_model_adapters"):
            if name in o.values:
                o.note(f"{name}: ignored; {unused}: {o(unused)} has no reference")
    elif model is None:
        if adapters:
            o.note("ref_model_adapters: ignored; no effect without ref_model")
        if start[1]:
            o.note(
                "adapter_name_or_path: the reference is this adapter as the run finds it, where LLaMA-Factory's is the "
                "base under it; for that one, merge nothing and leave adapter_name_or_path out"
            )
    elif _path(model) != _path(start[0]) or [*map(_path, adapters)] != [*map(_path, start[1])]:
        named = " with ".join([model, *adapters])
        o.problems.append(
            f"ref_model: {named} is not what training starts from ({' with '.join([start[0], *start[1]])}), and the "
            "reference always is; nearest: leave ref_model out, or start from it"
        )


def _path(name: str) -> str:
    return name.rstrip("/")
