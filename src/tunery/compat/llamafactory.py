"""LLaMA-Factory's YAML files, read as they are: every option is translated with the same meaning, ignored with a note
because it cannot change the result here, or refused by name with the nearest thing. Where the file says nothing,
LLaMA-Factory's defaults hold. The tables are in llamafactory_options.py."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tunery.compat.llamafactory_data import data_section
from tunery.compat.llamafactory_method import adapter_section
from tunery.compat.llamafactory_objective import objective_section
from tunery.compat.llamafactory_options import STAGES
from tunery.compat.llamafactory_ppo import rewards_section, rollout_section, steps_per_rollout
from tunery.compat.llamafactory_reader import Options
from tunery.config import nearest
from tunery.config_file import apply_overrides, read_config
from tunery.errors import ConfigError

SECTIONS = (
    "model",
    "data",
    "objective",
    "rewards",
    "rollout",
    "adapter",
    "optimizer",
    "schedule",
    "train",
    "eval",
    "report",
    "output",
)
MARKS = ("model_name_or_path", "stage", "finetuning_type", "export_dir", "cutoff_len", "per_device_train_batch_size")
TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab")
NEVER = 1_000_000  # steps; the end of a run counts always


@dataclass(slots=True)
class Converted:
    """`config`: the mapping of our job file (for action "train"). `notes`: what a person should know, a sentence each.
    `export`: for action "export", the arguments of `tunery.export.merge.export`."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    action: str = "train"
    export: dict[str, Any] | None = None


def is_llamafactory(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is in LLaMA-Factory's vocabulary, not in ours. Raises ConfigError where it is in both."""
    theirs, ours = ([name for name in names if name in values] for names in (MARKS, SECTIONS))
    if theirs and ours:
        raise ConfigError(
            f"the file mixes LLaMA-Factory's keys ({', '.join(theirs)}) with ours ({', '.join(ours)}): keep to one; "
            "`tunery convert` prints a file of theirs as ours"
        )
    return bool(theirs)


def convert(values: Mapping[str, Any], where: str = "") -> Converted:
    """Their mapping (after command-line overrides) as ours. `where` (a file name) begins each line of an error.

    Raises ConfigError with every problem at once: unknown options, values of the wrong type, refused options."""
    options = Options(values)
    if options("export_dir") and not options("do_train"):
        result = Converted({}, action="export", export=_export(options))
    else:
        result = Converted(_job(options))
    if options.problems:
        prefix = f"{where}: " if where else ""
        raise ConfigError("\n".join(prefix + line for line in dict.fromkeys(options.problems)))
    result.notes = list(dict.fromkeys(options.notes))
    return result


def load(path: str | Path, overrides: Sequence[str] = ()) -> Converted:
    """A file of theirs, with `key=value` words from the command line in either vocabulary: `learning_rate=1e-4` is read
    before the conversion, `optimizer.lr=1e-4` after it. Raises ConfigError."""
    ours = [word for word in overrides if word.partition("=")[0].split(".")[0] in SECTIONS]
    theirs = [word for word in overrides if word not in ours]
    values = read_config(path)
    try:
        if not is_llamafactory(values) and any(name in values for name in SECTIONS):
            raise ConfigError("is in Tunery's shape already; there is nothing to convert")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    converted = convert(apply_overrides(values, theirs), where=str(path))
    if ours and converted.action != "train":
        raise ConfigError(f"{path}: is an export file, and {ours[0]!r} is about training")
    converted.config = apply_overrides(converted.config, ours)
    return converted


def to_yaml(converted: Converted) -> str:
    """Our job file as text, with the notes as comments above; for an export file, the command that does it."""
    lines = [f"# {note}" for note in converted.notes]
    if converted.export is not None:
        options = dict(converted.export)
        words = ["tunery", "export", options.pop("target"), options.pop("out")]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", value] if value is not None else []
        return "\n".join([*lines, f"# {shlex.join(words)}", ""])
    text = yaml.safe_dump(converted.config, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, text])


# ---------------------------------------------------------------- section by section


def _job(o: Options) -> dict[str, Any]:
    _check_stage(o)
    config = {
        "model": _model(o),
        "data": data_section(o),
        "objective": objective_section(o),
        "rewards": rewards_section(o) if o("stage") == "ppo" else {},
        "rollout": rollout_section(o) if o("stage") == "ppo" else {},
        "adapter": adapter_section(o),
        "optimizer": _optimizer(o),
        "schedule": _schedule(o),
        "train": _train(o),
        "eval": _eval(o),
        "report": _report(o),
        "output": o("output_dir") or "trainer_output",
    }
    return {name: section for name, section in config.items() if section != {}}


def _check_stage(o: Options) -> None:
    stage = o("stage")
    if stage not in STAGES:
        o.problems.append(f"stage: unknown stage {stage!r}{nearest(stage, list(STAGES))}")
    if o("do_train") is None:
        if o("do_eval") or o("do_predict"):
            o.problems.append("do_train: is missing; nearest to evaluation alone: tunery generate TARGET data.jsonl")
        else:
            o.note("do_train: not set, where LLaMA-Factory would do nothing; this trains")
    elif not o("do_train"):
        o.problems.append("do_train: false; nearest to evaluation alone: tunery generate TARGET data.jsonl")


def _base(o: Options) -> dict[str, Any]:
    if not o("model_name_or_path"):
        o.problems.append("model_name_or_path: is required")
    model: dict[str, Any] = {"name": o("model_name_or_path") or ""}
    if o("model_revision") != "main":
        model["revision"] = o("model_revision")
    if o("trust_remote_code"):
        model["trust_remote_code"] = True
    return model


def _model(o: Options) -> dict[str, Any]:
    model = _base(o)
    if o("pure_bf16"):
        model["dtype"] = "bfloat16"
        o.note("pure_bf16: the arithmetic is bfloat16; what trains is still kept in float32")
    elif o("bf16") or o("fp16"):
        if o("bf16") and o("fp16"):
            o.problems.append("fp16: bf16 is on as well; choose one")
        model["dtype"] = "bfloat16" if o("bf16") else "float16"
    if o("flash_attn") not in ("auto", "disabled", "sdpa", "fa2", "fa3"):
        o.problems.append(f"flash_attn: unknown value {o('flash_attn')!r} (known: auto, disabled, sdpa, fa2, fa3)")
    elif o("flash_attn") != "auto":
        o.note("flash_attn: model.attention stays auto, the fastest that is exact on this device")
    if o("train_from_scratch"):
        model["random_init"] = True
    adapters = o("adapter_name_or_path")
    if len(adapters) > 1:
        o.refuse(
            "adapter_name_or_path", "merge all but the last into the base with `tunery export`, then name the last"
        )
    elif adapters and o("create_new_adapter"):
        o.refuse("create_new_adapter", "merge the old adapter with `tunery export`, then train on the merged folder")
    elif adapters:
        model["init_from"] = adapters[0]
    return model


def _optimizer(o: Options) -> dict[str, Any]:
    if o("optim") not in ("adamw_torch", "adamw_torch_fused"):
        o.refuse("optim", "adamw_torch")
    return {
        "kind": "adamw",
        "lr": o("learning_rate"),
        "weight_decay": o("weight_decay"),
        "betas": [o("adam_beta1"), o("adam_beta2")],
        "eps": o("adam_epsilon"),
    }


def _schedule(o: Options) -> dict[str, Any]:
    kinds = {
        "linear": "linear",
        "cosine": "cosine",
        "cosine_with_min_lr": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
        "warmup_stable_decay": "wsd",
    }
    name = o("lr_scheduler_type")
    if name not in kinds:
        o.refuse("lr_scheduler_type", f"one of {', '.join(kinds)}")
        return {}
    schedule: dict[str, Any] = {"kind": kinds[name], "warmup": 0 if name == "constant" else _warmup(o)}
    extra = dict(o("lr_scheduler_kwargs"))
    if name == "cosine_with_min_lr":
        rate, floor = extra.pop("min_lr_rate", None), extra.pop("min_lr", None)
        if (rate is None) == (floor is None):
            o.problems.append("lr_scheduler_kwargs: cosine_with_min_lr needs min_lr or min_lr_rate")
        else:
            schedule["min_ratio"] = float(rate) if rate is not None else float(floor) / o("learning_rate")
    if name == "warmup_stable_decay":
        if extra.pop("decay_type", "cosine") != "linear" or "num_decay_steps" not in extra:
            o.refuse("lr_scheduler_type", "lr_scheduler_kwargs: {decay_type: linear, num_decay_steps: N}, or cosine")
        schedule |= {"decay": int(extra.pop("num_decay_steps", 1)), "min_ratio": float(extra.pop("min_lr_ratio", 0))}
    if extra:
        o.refuse("lr_scheduler_kwargs", f"{name} without {', '.join(extra)}")
    return schedule


def _warmup(o: Options) -> float | int:
    """Steps win over the share, as in transformers; a number of steps below 1 is a share there too."""
    if not 0 <= o("warmup_ratio") < 1:
        o.problems.append(f"warmup_ratio: expected a share below 1, got {o('warmup_ratio')!r}")
    steps = o("warmup_steps")
    warmup = (steps * steps_per_rollout(o) if steps >= 1 else steps) or o("warmup_ratio")
    if warmup:
        o.note("warm-up: the first update has 1/w of the learning rate here and 0 in LLaMA-Factory, one step ahead")
    return warmup


def _train(o: Options) -> dict[str, Any]:
    parts = o("per_device_train_batch_size"), o("gradient_accumulation_steps"), int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = parts[0] * parts[1] * parts[2]
    o.note(
        f"train.batch_size: {batch_size} = {parts[0]} a device x {parts[1]} accumulated x {parts[2]} devices, "
        "counted over all ranks; it stays the same on another number of devices"
    )
    if o("stage") == "ppo":
        batch_size *= o("ppo_buffer_size")
        o.note(
            f"stage: ppo: a step there is a rollout of {batch_size} rows ({o('ppo_buffer_size')} times the above) and "
            f"{steps_per_rollout(o)} optimizer steps here, which train.batch_size, max_steps and the like allow for"
        )
    train: dict[str, Any] = {"epochs": o("num_train_epochs"), "batch_size": batch_size, "seed": o("seed")}
    if o("max_steps") > 0:
        train["max_steps"] = o("max_steps") * steps_per_rollout(o)
    train |= _packing(o)
    if o("disable_shuffling"):
        train["shuffle"] = False
    train["max_grad_norm"] = o("max_grad_norm") if o("max_grad_norm") > 0 else None
    if o("neftune_noise_alpha"):
        train["neftune"] = o("neftune_noise_alpha")
    if o("gradient_checkpointing") or o("disable_gradient_checkpointing") is False:
        train["checkpointing"] = "full"
    elif o("disable_gradient_checkpointing"):
        train["checkpointing"] = "none"
    else:
        o.note("train.checkpointing: only as far as memory needs it, where LLaMA-Factory's is on; same result, faster")
    if o("data_seed") not in (None, o("seed")):
        o.note("data_seed: ignored; one seed drives everything random, the order of the rows too")
    train["save_every"] = _interval(o, "save_strategy", o("save_steps"))
    if o("save_strategy") == "epoch":
        o.note("save_strategy: epoch saves after every epoch, and every 500 steps where an epoch is longer")
    train["keep"] = o("save_total_limit") or None
    train["resume"] = _resume(o)
    if o("logging_strategy") == "steps" and o("logging_steps") >= 1:
        train["log_every"] = o("logging_steps") * steps_per_rollout(o)
    else:
        o.note("logging: every 5 steps; train.log_every is another number of steps")
    return train


def _packing(o: Options) -> dict[str, Any]:
    packing = o("packing") or o("neat_packing")
    if o("stage") == "pt":
        o.note(
            f"packing: train.batch_size counts sequences of up to {o('cutoff_len')} tokens (a long document gives "
            "several), where LLaMA-Factory joins documents into full blocks: raise it where documents are short"
        )
    elif packing and o("stage") != "sft":
        o.note(f"packing: changes nothing but speed in stage: {o('stage')}; train.batch_size counts rows")
    elif packing:
        o.note(
            "packing: sequences in one stream never see one another (as with neat_packing), and train.batch_size "
            f"counts rows, where LLaMA-Factory counts packed blocks of {o('cutoff_len')} tokens: raise it to keep as "
            "many tokens in a step"
        )
    return {} if o("packing") is None else {"packing": packing}


def _resume(o: Options) -> bool | str:
    """LLaMA-Factory goes on from the newest checkpoint in output_dir unless told to overwrite it."""
    given = o("resume_from_checkpoint")
    if o("overwrite_output_dir") and not given:
        o.note("overwrite_output_dir: a run that is there already is moved aside, to a folder ending in .old-1")
    return given if given else not o("overwrite_output_dir")


def _interval(o: Options, strategy: str, steps: float | int | None) -> float | int | None:
    """How often: steps, a share of the run below 1, None for every epoch, or NEVER."""
    kind = o(strategy)
    if kind == "steps":
        return steps * steps_per_rollout(o) if steps and steps >= 1 else steps
    if kind not in ("epoch", "no"):
        o.refuse(strategy, "steps, epoch or no")
    return NEVER if kind == "no" else None


def _eval(o: Options) -> dict[str, Any]:
    if o("metric_for_best_model") not in ("loss", "eval_loss"):
        o.refuse("metric_for_best_model", "loss")
    every = _interval(o, "eval_strategy", o("eval_steps") or o("logging_steps"))
    section: dict[str, Any] = {"every": every, "best": o("load_best_model_at_end")}
    if o("early_stopping_steps"):
        section["patience"] = o("early_stopping_steps")
    if o("predict_with_generate") or o("do_predict"):
        rows = o("max_samples") or 1000
        section |= {"generate": rows, "max_new_tokens": o("max_new_tokens")}
        o.note(
            f"predict_with_generate: up to {rows} held-out rows are answered greedily, before and after training, and "
            "scored; generated_predictions.jsonl has the answers"
        )
    return section


def _report(o: Options) -> dict[str, Any]:
    asked = [name for name in o("report_to") if name != "none"]
    if "all" in asked:
        asked = [name for name in TRACKERS if find_spec(name)]
        o.note(f"report_to: all is {', '.join(asked) or 'none'}, the trackers that are installed")
    for name in asked:
        if name not in TRACKERS:
            o.refuse("report_to", f"one of {', '.join(TRACKERS)}")
    if o("use_swanlab") and "swanlab" not in asked:
        asked.append("swanlab")
    report: dict[str, Any] = {"to": asked} if asked else {}
    if o("swanlab_project"):
        report["project"] = o("swanlab_project")
    if o("run_name") or o("swanlab_run_name"):
        report["name"] = o("run_name") or o("swanlab_run_name")
    return report


def _export(o: Options) -> dict[str, Any]:
    base = _base(o)
    adapters = o("adapter_name_or_path")
    if len(adapters) > 1:
        o.refuse("adapter_name_or_path", "one adapter at a time: export with the first, then with the next on that")
    if "revision" in base:
        o.refuse("model_revision", "download that revision into a folder and name the folder")
    if base.get("trust_remote_code"):
        o.note("trust_remote_code: exporting runs no code that comes with a model, but what the run itself was allowed")
    if adapters and (named := _base_in(adapters[0])) not in (None, base["name"]):
        o.problems.append(
            f"model_name_or_path: {base['name']}, but the adapter {adapters[0]} was trained on {named}; name that one, "
            "or put the new place into base_model_name_or_path in its adapter_config.json"
        )
    if o("infer_dtype") == "auto":
        o.note("infer_dtype: auto is the base's own, where LLaMA-Factory rounds a float32 base to bfloat16")
    return {
        "target": adapters[0] if adapters else base["name"],
        "out": o("export_dir"),
        "dtype": None if o("infer_dtype") == "auto" else o("infer_dtype"),
        "max_shard_size": f"{o('export_size')}GB",
    }


def _base_in(adapter: str) -> str | None:
    """The base an adapter folder names, or None when it cannot be read here."""
    try:
        return json.loads((Path(adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
