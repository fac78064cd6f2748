"""LLaMA-Factory's method options (finetuning_type and what goes with it) as our `adapter:` section: which parameters
train."""

from __future__ import annotations

from typing import Any

from tunery.compat.llamafactory_options import READ
from tunery.compat.llamafactory_reader import Options
from tunery.config import nearest


def adapter_section(o: Options) -> dict[str, Any]:
    """Our `adapter:` mapping."""
    kind = o("finetuning_type")
    if kind == "lora":
        return _lora(o)
    if o("adapter_name_or_path"):
        o.problems.append("adapter_name_or_path: only goes with finetuning_type: lora; merge it with `tunery export`")
    if kind == "freeze":
        return _freeze(o)
    if kind == "oft":
        o.refuse("finetuning_type", "finetuning_type: lora")
    elif kind != "full":
        o.problems.append(f"finetuning_type: unknown value {kind!r}{nearest(kind, ['lora', 'freeze', 'full'])}")
    return {"kind": "full"}


def _lora(o: Options) -> dict[str, Any]:
    adapter = {"kind": "lora"} | (_lora_shape(o) if not o("adapter_name_or_path") else {})
    if o("adapter_name_or_path"):
        o.note("adapter_name_or_path: training goes on from this adapter, with its own rank, alpha and targets")
    if o("loraplus_lr_ratio") is not None:
        adapter["loraplus_ratio"] = o("loraplus_lr_ratio")
        if o("loraplus_lr_embedding") != READ["loraplus_lr_embedding"][1]:
            o.refuse("loraplus_lr_embedding", "loraplus_lr_ratio for all matrices; leave embeddings out of lora_target")
    return adapter


def _lora_shape(o: Options) -> dict[str, Any]:
    targets = o("lora_target")
    if "all" in targets and len(targets) > 1:
        o.problems.append("lora_target: `all` stands alone, or leave it out of the list")
    adapter: dict[str, Any] = {
        "rank": o("lora_rank"),
        "alpha": o("lora_alpha") if o("lora_alpha") is not None else 2 * o("lora_rank"),
        "dropout": _dropout(o),
        "targets": "all-linear" if targets == ["all"] else targets,
    }
    if o("additional_target"):
        adapter["modules_to_save"] = o("additional_target")
    if o("use_rslora"):
        adapter["rslora"] = True
    if o("use_dora"):
        adapter["dora"] = True
    if o("pissa_init"):
        adapter |= {"init": "pissa", "pissa_iter": o("pissa_iter")}
        o.note("pissa_init: the saved adapter is one plain LoRA for the original base, as with pissa_convert")
        if o("use_dora") or o("lora_dropout"):
            o.problems.append("pissa_init: goes with neither use_dora nor lora_dropout")
    return adapter


def _dropout(o: Options) -> float:
    """There, no dropout where answers are compared by their log-probabilities."""
    if o("lora_dropout") and o("stage") in ("dpo", "kto"):
        o.note(f"lora_dropout: 0, as LLaMA-Factory turns dropout off in stage: {o('stage')}")
        return 0.0
    return o("lora_dropout")


def _freeze(o: Options) -> dict[str, Any]:
    adapter: dict[str, Any] = {"kind": "freeze", "layers": o("freeze_trainable_layers")}
    if o("freeze_trainable_modules") != ["all"]:
        adapter["modules"] = o("freeze_trainable_modules")
    if o("freeze_extra_modules"):
        adapter["extra"] = o("freeze_extra_modules")
    return adapter
