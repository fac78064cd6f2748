"""Who is measured, and with which settings. A job demands rows, batch, LoRA's shape, loss and learning rate of all of
them; here is what remains to choose: each trainer as it comes, and the best we know to make of it on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CPU = {"use_cpu": True}
PLAIN = {**CPU, "gradient_checkpointing": False}


@dataclass(frozen=True)
class Contestant:
    """`runner`: a module of bench.rivals; `precision`: of the arithmetic, "" where the trainer chooses; `settings`:
    what the runner reads; `in_order`: its steps hold the same rows as ours, so that losses compare step by step."""

    name: str
    runner: str
    about: str
    precision: str
    settings: dict[str, Any] = field(default_factory=dict)
    in_order: bool = True


def tunery(precision: str, name: str = "", overrides: Sequence[str] = (), about: str = "") -> Contestant:
    """Tunery with `overrides` of its configuration."""
    return Contestant(
        name or f"tunery-{precision}", "tunery", about or f"defaults, {precision}", precision,
        {"overrides": list(overrides)},
    )  # fmt: skip


def _with(runner: str, name: str, about: str, precision: str, dtype: str | None, **arguments: Any) -> Contestant:
    packed = arguments.get("packing") or arguments.get("neat_packing")
    in_order = not packed and arguments.get("train_sampling_strategy") != "group_by_length"
    settings = {"dtype": dtype, "arguments": arguments}
    return Contestant(f"{runner}-{name}", runner, about, precision, settings, in_order)


def contestants(full: bool) -> list[Contestant]:
    """All of them. In full fine-tuning the bfloat16 runs keep float32 weights, as Tunery does; with LoRA the frozen
    base is bfloat16 in all of them. (What plain Trainer does as it comes has no float32 weights in either.)"""
    base = "float32" if full else "bfloat16"
    bf16 = {**PLAIN, "bf16": True}
    grouped = {"train_sampling_strategy": "group_by_length"}
    # LLaMA-Factory raises what trains to float32
    stored, as_it_comes = ("fp32 weights", "fp32") if full else ("weights as stored (bf16)", "")
    factory = {**CPU, "disable_gradient_checkpointing": True}
    return [
        tunery("bf16"),
        tunery("fp32"),
        _with("trl", "default", "as it comes: bf16, checkpointing on", "", "float32"),
        _with("trl", "default-cpu", "as it comes, with use_cpu: fp32 weights, bf16 autocast, checkpointing on", "bf16",
              "float32", **CPU),
        _with("trl", "fp32", "fp32, checkpointing off", "fp32", "float32", **PLAIN, bf16=False),
        _with("trl", "fp32-packed", "fp32, checkpointing off, packing (bfd) to the cut-off", "fp32", "float32", **PLAIN,
              bf16=False, packing=True),
        _with("trl", "bf16", "bf16, checkpointing off", "bf16", base, **bf16),
        _with("trl", "bf16-grouped", "bf16, checkpointing off, group_by_length", "bf16", base, **bf16, **grouped),
        _with("trl", "bf16-packed", "bf16, checkpointing off, packing (bfd) to the cut-off", "bf16", base, **bf16,
              packing=True),
        _with("trl", "bf16-padding-free", "bf16, checkpointing off, padding_free", "bf16", base, **bf16,
              padding_free=True, max_length=None),
        _with("trainer", "default", "as it comes: weights as stored (bf16), no autocast", "", None),
        _with("trainer", "fp32", "fp32", "fp32", "float32", **PLAIN),
        _with("trainer", "fp32-grouped", "fp32, group_by_length", "fp32", "float32", **PLAIN, **grouped),
        _with("trainer", "bf16", "bf16", "bf16", base, **bf16),
        _with("trainer", "bf16-grouped", "bf16, group_by_length", "bf16", base, **bf16, **grouped),
        _with("llamafactory", "default", f"as it comes: {stored}, no autocast, checkpointing on", as_it_comes, None),
        _with("llamafactory", "fp32", "fp32, checkpointing off", "fp32", "float32", **factory),
        _with("llamafactory", "fp32-packed", "fp32, checkpointing off, neat_packing to the cut-off", "fp32", "float32",
              **factory, neat_packing=True),
        _with("llamafactory", "bf16", "use_cpu, bf16, checkpointing off", "bf16", None, **factory, bf16=True),
        _with("llamafactory", "bf16-packed", "use_cpu, bf16, checkpointing off, neat_packing to the cut-off", "bf16",
              None, **factory, bf16=True, neat_packing=True),
    ]  # fmt: skip


def chosen(full: bool, rivals: Sequence[str], precision: str | None) -> list[Contestant]:
    """Tunery and the rivals whose names begin with one of `rivals` ("all": everyone), of one precision or both.
    Raises ValueError for a beginning that nobody has."""
    everyone = contestants(full)
    for word in rivals:
        if word not in ("all", "none") and not any(one.name.startswith(word) for one in everyone):
            raise ValueError(f"no rival {word!r}; there are {', '.join(one.name for one in everyone)}")
    return [
        one
        for one in everyone
        if (one.runner == "tunery" or "all" in rivals or any(one.name.startswith(word) for word in rivals))
        and (precision is None or one.precision in (precision, ""))
    ]


def ablation(precision: str) -> list[Contestant]:
    """Tunery with everything on, and with one technique after the other switched off."""
    from tunery.kernels import KernelsConfig

    off = {"packing": ["train.packing=false"]}
    off |= {name: [f"kernels.{name}=reference"] for name in KernelsConfig.model_fields}
    off |= {"all kernels": ["kernels=reference"], "packing and kernels": ["train.packing=false", "kernels=reference"]}
    return [tunery(precision, "everything on")] + [
        tunery(precision, f"without {name}", overrides, " ".join(overrides)) for name, overrides in off.items()
    ]
