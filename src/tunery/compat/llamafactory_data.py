"""LLaMA-Factory's data options as our `data:` section: datasets, mixing, length, and whose chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunery.compat.llamafactory_options import FAMILIES, REFUSED_STYLES, STYLES
from tunery.compat.llamafactory_reader import Options


def data_section(o: Options) -> dict[str, Any]:
    """Our `data:` mapping."""
    if not o("dataset"):
        o.problems.append("dataset: is required for training (to talk to a model: tunery chat TARGET)")
    data: dict[str, Any] = {"train": _sources(o, "dataset")}
    val_size = o("val_size")
    if o("eval_dataset") and val_size:
        o.problems.append("val_size: eval_dataset is set as well; choose one")
    elif o("eval_dataset"):
        data["eval"] = _sources(o, "eval_dataset")
    elif val_size >= 1:
        o.refuse("val_size", "a share of the rows, such as 0.02, or eval_dataset")
    elif val_size:
        data["eval"] = val_size
    folder = o("dataset_dir")
    if folder.startswith("REMOTE:"):
        o.refuse("dataset_dir", "download that dataset_info.json into a folder and name the folder")
    elif folder != "ONLINE":
        data["dataset_dir"] = folder
    data["template"] = _template(o)
    if o("default_system"):
        data["system"] = o("default_system")
    data["max_length"] = o("cutoff_len")
    if o("stage") != "pt":
        data["too_long"] = "truncate"
        o.note(
            f"cutoff_len: rows over {o('cutoff_len')} tokens lose their oldest turns first and keep the answer's end, "
            "where LLaMA-Factory cuts the end off; data.too_long: drop or error are the other choices"
        )
    data |= _mix(o, data["train"])
    if o("streaming"):
        data |= {"streaming": True, "shuffle_buffer": o("buffer_size")}
    if o("preprocessing_num_workers"):
        data["workers"] = o("preprocessing_num_workers")
    return data


def _sources(o: Options, name: str) -> list[dict[str, Any]]:
    samples = {"samples": o("max_samples")} if o("max_samples") else {}
    return [{"path": path, **samples} for path in o(name)]


def _mix(o: Options, sources: list[dict[str, Any]]) -> dict[str, Any]:
    strategy = o("mix_strategy")
    if strategy == "concat" or len(sources) < 2:
        return {}
    if strategy == "interleave_once":
        o.note("mix_strategy: interleave_once takes every row once, which is data.mix: concat, shuffled")
        return {}
    if strategy not in ("interleave_under", "interleave_over"):
        o.problems.append(
            f"mix_strategy: unknown value {strategy!r} "
            "(known: concat, interleave_under, interleave_over, interleave_once)"
        )
        return {}
    try:
        shares = [float(share) for share in o("interleave_probs")] or [1.0] * len(sources)
    except ValueError:
        shares = []
    if len(shares) != len(sources) or min(shares) <= 0:
        o.problems.append(f"interleave_probs: expected {len(sources)} positive numbers, one for each dataset")
        return {}
    for source, share in zip(sources, shares, strict=True):
        source["weight"] = share
    if o("max_steps") <= 0:
        ends = "first" if strategy == "interleave_under" else "last"
        o.note(
            "mix_strategy: rows come in the same shares; an epoch has as many rows as the datasets have together, "
            f"where LLaMA-Factory's ends when the {ends} of them is used up: set max_steps to fix the length"
        )
    return {"mix": "weighted"}


def _template(o: Options) -> str:
    """The tokenizer's own chat template is what training and every server use; a style that the file asks for by name
    (alpaca, vicuna) is kept; a family's name stands for its tokenizer's own."""
    name = o("template")
    if name is None or o("stage") == "pt":
        return "auto"
    if name in STYLES:
        return STYLES[name]
    if name in REFUSED_STYLES:
        o.refuse("template", REFUSED_STYLES[name])
        return "auto"
    ours = FAMILIES.get(name)
    own = _has_own_template(o("model_name_or_path") or "", o("model_revision"))
    if own is False and ours is None:
        o.refuse("template", f"one of {', '.join(sorted({*STYLES.values(), *FAMILIES.values()}))}, or a .jinja file")
    elif own is False and ours is not None:
        o.note(f"template: {name} is {ours}, as the tokenizer has no chat template of its own")
        return ours
    else:
        o.note(f"template: {name} is auto, the tokenizer's own chat template, which servers will use too")
    return "auto"


def _has_own_template(model: str, revision: str) -> bool | None:
    """Whether the model's tokenizer brings a chat template; None when that cannot be known without the network."""
    if model.startswith("builtin:"):
        return True
    files = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
    if Path(model).is_dir():
        found = [Path(model) / name for name in files]
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(model, name, revision=revision) for name in files] if "/" in model else []
        found = [Path(path) for path in cached if isinstance(path, str)]
        if not found:
            return None
    return any(path.is_file() and (path.suffix == ".jinja" or _names_template(path)) for path in found)


def _names_template(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))
    except ValueError:  # said by whoever loads the tokenizer
        return False
