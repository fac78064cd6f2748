"""From a target to a folder that others can use: a merged Hugging Face model, or the adapter alone.

Nothing wrong is left behind: the folder is written beside its place, loaded back from disk, compared with what was
trained (verify.py), and renamed into place only when it agrees."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tunery.data.template import load_template
from tunery.errors import ModelError
from tunery.export.verify import Check, compare, probe_logits, probes
from tunery.files import make_readable
from tunery.host import free_memory
from tunery.models.load import load_config, load_tokenizer
from tunery.models.score import agree_on_padding
from tunery.models.target import Target, is_reward_model, load_adapter, load_base, model_config, resolve_target
from tunery.types import Message

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def export(
    target: str | Path,
    out: str | Path,
    *,
    adapter_only: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    template: str | None = None,
) -> dict[str, Any]:
    """Writes `target` to the new folder `out`, with its tokenizer and the chat template trained with.

    Without `adapter_only`: one model, the adapter merged into its base in float32 (in `dtype` where memory is short),
    rounded once to `dtype` ("float32", "bfloat16", "float16"; default: the base's own) and cut into safetensors of at
    most `max_shard_size`. A target that is a whole model is rewritten likewise. `template` replaces the chat template.

    Returns {"out", "kind": "merged" | "model" | "adapter", "scores": whether it is a reward model, "dtype",
    "parameters", "bytes", "written": how the folder compares with what was trained, and for a merge also "merge": the
    same before rounding, "effect": how far the adapter moves the base}, comparisons as in verify.Check (the effect has
    no tolerance; summary.py puts all into words). Raises ModelError, leaving nothing behind, when `out` is
    not empty, the disk is too small, the base is quantised, or the result differs from what was trained."""
    shard = _shard_size(max_shard_size)
    place = _free_place(Path(out).expanduser())
    found = resolve_target(target)
    if adapter_only and found.adapter is None:
        raise ModelError(f"{found.name}: is a whole model, there is no adapter to export; leave out adapter_only")
    config = load_config(found.base)
    if getattr(config, "quantization_config", None) is not None and not adapter_only:
        raise ModelError(
            f"{found.base.name}: is quantised; merging into rounded weights gives another model than was trained. "
            "Export the adapter alone, or name the unquantised base in the adapter's base_model_name_or_path"
        )
    tokenizer = load_tokenizer(model_config(found.tokenizer, trust_remote_code=found.base.trust_remote_code))
    chat = load_template(template or found.template, tokenizer)
    tokenizer.chat_template = chat.source
    streams = probes(config.get_text_config().vocab_size, [_prompt_of(chat)])
    if adapter_only:
        report = _adapter(found, place, tokenizer, streams)
    else:
        stored = _stored_dtype(config) if dtype is None else _dtype(dtype)
        report = _model(found, place, tokenizer, chat, stored, shard, streams)
    report["bytes"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return {"out": str(place), **report}


# ---------------------------------------------------------------- the two kinds


def _adapter(found: Target, place: Path, tokenizer: Any, streams: list[list[int]]) -> dict[str, Any]:
    assert found.adapter is not None
    files = [found.adapter / name for name in ADAPTER_FILES if (found.adapter / name).is_file()]
    size = sum(file.stat().st_size for file in files)
    with _written(place, size) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        tokenizer.save_pretrained(folder)
        model = load_adapter(load_base(found, torch.float32), found.adapter)
        trained = probe_logits(model, streams)
        count = sum(p.numel() for name, p in model.named_parameters() if ".default" in name)
        again = load_adapter(model.unload(), folder)
        check = compare(probe_logits(again, streams), trained, torch.float32)
        _insist(check, found, "the written adapter")
    report = {"kind": "adapter", "scores": is_reward_model(found), "dtype": None}
    return {**report, "parameters": count, "written": check.as_dict()}


def _model(
    found: Target, place: Path, tokenizer: Any, chat: Any, stored: torch.dtype, shard: int, streams: list[list[int]]
) -> dict[str, Any]:
    scores = is_reward_model(found)
    model: Any = load_base(found, _stored_dtype(load_config(found.base)))
    computed = _arithmetic(model)
    model = model.to(computed)
    report: dict[str, Any] = {"kind": "model", "scores": scores, "dtype": str(stored).removeprefix("torch.")}
    effect: Check | None = None
    if found.adapter is None:
        trained = probe_logits(model, streams)
    else:
        report["kind"] = "merged"
        plain = probe_logits(model, streams)
        model = load_adapter(model, found.adapter)
        trained = probe_logits(model, streams)
        effect = compare(trained, plain, model.dtype)
        del plain
        model = _merge(model)
        merged = compare(probe_logits(model, streams), trained, model.dtype)
        _insist(merged, found, "the merged model")
        moved = {name: value for name, value in effect.as_dict().items() if name != "tolerance"}
        report |= {"effect": moved, "merge": merged.as_dict()}
    model = model.to(stored)
    if not scores:
        _set_ends(model, chat, tokenizer)
    elif chat.source is not None:
        agree_on_padding(model, tokenizer, chat)
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with _written(place, report["parameters"] * stored.itemsize) as folder:
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        del model
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        again = kind.from_pretrained(folder, dtype=computed, trust_remote_code=found.base.trust_remote_code)
        check = compare(probe_logits(again, streams), trained, stored)
        _insist(check, found, "the written model", effect)
        report["written"] = check.as_dict()
    return report


def _merge(model: Any) -> PreTrainedModel:
    """The adapter merged into the base. Input and output embeddings that share a tensor get one each first, so that
    a change meant for one does not reach the other, and share again when the merge left both alone."""
    base = model.get_base_model()
    output = _unwrapped(base.get_output_embeddings())
    source = _unwrapped(base.get_input_embeddings())
    tied = getattr(output, "weight", None) is source.weight
    if tied:
        output.weight = nn.Parameter(output.weight.detach().clone())
    with warnings.catch_warnings():
        # PEFT warns of embeddings that are no longer tied; whether they are is decided below.
        warnings.simplefilter("ignore", UserWarning)
        merged = model.merge_and_unload(safe_merge=True)
    if tied:
        first, last = merged.get_input_embeddings(), merged.get_output_embeddings()
        same = torch.equal(first.weight, last.weight)
        if same:
            last.weight = first.weight
        for config in {id(c): c for c in (merged.config, merged.config.get_text_config())}.values():
            config.tie_word_embeddings = same
    return merged


def _unwrapped(module: Any) -> Any:
    """An embedding or output layer without what PEFT has wrapped it in."""
    for inner in ("original_module", "base_layer"):
        module = getattr(module, inner, module)
    return module


def _set_ends(model: PreTrainedModel, chat: Any, tokenizer: Any) -> None:
    """Every token that ends an answer under the template trained with, for those who stop by generation_config."""
    config = model.generation_config
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys([*chat.end_ids, *(token for token in known if token is not None)]))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]


# ---------------------------------------------------------------- checks


def _insist(check: Check, found: Target, what: str, effect: Check | None = None) -> None:
    if not check.passed:
        raise ModelError(
            f"{found.name}: {what} does not compute what was trained: relative difference of what the head gives "
            f"{check.error:.2g} (allowed {check.tolerance:.2g}). Nothing was written"
        )
    if effect is not None and effect.error > effect.tolerance and check.error > 0.5 * effect.error:
        raise ModelError(
            f"{found.name}: rounding the weights moves the logits by {check.error:.2g}, more than half of what the "
            f"adapter does ({effect.error:.2g}), so most of the training would be lost. Export with dtype float32, or "
            "the adapter alone. Nothing was written"
        )


def _free_place(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: already exists and is not an empty folder; choose another or remove it first")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=f".{out.name}."):
            pass
    except OSError as error:
        raise ModelError(f"{out}: cannot be written: {error.strerror or error}; choose another place") from None
    return out


def _shard_size(text: str) -> int:
    """Bytes in "5GB" or "500 MB" (decimal units, as transformers reads them)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** ("KMGT".index(found[2].upper()) + 1)) if found else 0
    if size < 1:
        raise ModelError(f"max_shard_size {text!r}: expected a size with its unit (KB, MB, GB, TB), such as 5GB")
    return size


@contextmanager
def _written(place: Path, size: int) -> Iterator[Path]:
    """A folder beside `place` that becomes `place` when the block ends well and disappears when it does not."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
        needed = int(size * 1.02) + 32 * 2**20  # tokenizer files, headers
        if free < needed:
            raise ModelError(f"{place}: needs {needed / 2**30:.2f} GiB, its disk has {free / 2**30:.2f} GiB free")
        folder = place.parent / f".{place.name}.{secrets.token_hex(4)}"
        folder.mkdir()
    except OSError as error:
        raise ModelError(f"{place}: cannot be written: {error}") from error
    try:
        yield folder
        make_readable(folder)
        os.replace(folder, place)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ModelError(f"{place}: cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ---------------------------------------------------------------- precision


def _dtype(name: str) -> torch.dtype:
    known = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    if name not in known:
        raise ModelError(f"dtype {name!r}: not one of {', '.join(known)}")
    return known[name]


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _arithmetic(model: PreTrainedModel) -> torch.dtype:
    """float32, or the model's own precision where the memory that is left does not hold it in float32."""
    wide = torch.promote_types(model.dtype, torch.float32)
    free = free_memory()
    needed = sum(parameter.numel() for parameter in model.parameters()) * wide.itemsize
    return wide if free is None or needed < 0.9 * free else model.dtype


def _prompt_of(chat: Any) -> list[int]:
    return chat.prompt([Message("user", "What comes first?")]) if chat.source is not None else []
