"""LLaMA-Factory's stage: ppo, as our `objective:`, `rewards:` and `rollout:` sections. What it does not let one choose
are the defaults of its library (TRL's PPOConfig before 0.12)."""

from __future__ import annotations

from typing import Any

from tunery.compat.llamafactory_reader import Options

KL_COEFFICIENT = 0.2  # TRL's init_kl_coef; the other defaults are ours too


def steps_per_rollout(o: Options) -> int:
    """Optimizer steps for one step as LLaMA-Factory counts them, which is a rollout in stage: ppo."""
    return o("ppo_buffer_size") * o("ppo_epochs") if o("stage") == "ppo" else 1


def ppo_objective(o: Options) -> dict[str, Any]:
    """Our `objective:` mapping."""
    o.note(
        "stage: ppo: the value is learned by a new head on the policy; its KL coefficient begins at "
        f"{KL_COEFFICIENT} and is adapted to ppo_target, as there"
    )
    section: dict[str, Any] = {"kind": "ppo", "beta": KL_COEFFICIENT, "kl_target": o("ppo_target")}
    if o("ppo_score_norm"):
        section["score_norm"] = True
    if o("ppo_whiten_rewards"):
        section["whiten_rewards"] = True
    return section


def rewards_section(o: Options) -> list[dict[str, Any]]:
    """Our `rewards:` list: the reward model."""
    target, kind = o("reward_model"), o("reward_model_type")
    adapters = o("reward_model_adapters")
    if not target:
        o.problems.append("reward_model: is required for stage: ppo")
        return []
    if (kind == "api") != target.startswith(("http://", "https://")):
        o.problems.append(
            f"reward_model: {target!r} with reward_model_type: {kind}: an address goes with api, and only it"
        )
        return []
    if kind == "api":
        o.note(
            "reward_model: the server is asked for each answer by itself, with the text that LLaMA-Factory sends, and "
            "again where it is busy"
        )
        return [{"kind": "endpoint", "url": target, "protocol": "llamafactory"}]
    if kind not in ("lora", "full"):
        o.problems.append(f"reward_model_type: unknown value {kind!r} (known: lora, full, api)")
    if len(adapters) > 1:
        o.refuse("reward_model_adapters", "merge all but the last with `tunery export`, then name the last")
    if kind == "full" and adapters:
        target = adapters[0]
        o.note("reward_model: the base that its adapter names is loaded, or the policy's used where it is the same")
    o.note(
        "reward_model: one that stage: rm trained here, or that transformers loads as sequence classification; the "
        "value head file that LLaMA-Factory writes is not read"
    )
    return [{"kind": "model", "target": target}]


def rollout_section(o: Options) -> dict[str, Any]:
    """Our `rollout:` mapping."""
    if not o("do_sample"):
        o.refuse("do_sample", "true: answers that are to be learned from are sampled")
    for name in ("num_beams", "repetition_penalty"):
        if o(name) != 1:
            o.refuse(name, "1: answers are trained on with the probabilities that they were sampled with")
    o.note(
        f"temperature: {o('temperature')} is that of the sampling and of the probabilities that are trained, where "
        "LLaMA-Factory trains those of temperature 1"
    )
    return {
        "group": 1,
        "max_new_tokens": o("max_new_tokens"),
        "temperature": o("temperature"),
        "top_p": o("top_p"),
        "top_k": o("top_k"),
        "minibatches": o("ppo_buffer_size"),
        "iterations": o("ppo_epochs"),
    }
