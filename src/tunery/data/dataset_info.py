"""LLaMA-Factory's dataset_info.json: its names, read with the same meaning, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunery.data.sources import Located, Source, local_files
from tunery.errors import ConfigError, DataError

_KEYS = {
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "file_sha1",
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
}
_OPTIONAL = ("system", "tools", "label", "chosen", "rejected", "margin", "images", "videos", "audios")
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


def read_info(folder: Path) -> dict[str, Any]:
    """The entries of <folder>/dataset_info.json by name. Raises ConfigError where there is none, or it is broken."""
    path = folder / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"data.dataset_dir: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.dataset_dir: {path} cannot be read: {error}") from None
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise ConfigError(f"data.dataset_dir: {path} must map names to objects")
    return info


def look_up(source: Source, key: str, folder: Path, entry: dict[str, Any]) -> Located:
    """The source that an entry stands for. What the configuration says beside the name wins over the entry."""
    where = f"{folder / 'dataset_info.json'}: {source.path!r}"
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise ConfigError(f"{where} has the key {unknown[0]!r}, which Tunery does not know")
    meant, defaults = translate(source, entry, where)
    ranking = where if entry.get("ranking") else ""
    if "file_name" in entry:
        path = folder / entry["file_name"]
        if not path.exists():
            raise DataError(f"{where}: the file {path} does not exist")
        return Located(meant, key, files=local_files(path, meant, key), defaults=defaults, ranking=ranking)
    if "hf_hub_url" in entry:
        hub, folder_there = entry["hf_hub_url"], entry.get("folder")
        return Located(meant, key, hub=hub, hub_folder=folder_there, defaults=defaults, ranking=ranking)
    for other, what in (
        ("script_url", "a loading script, which would run somebody's code"),
        ("ms_hub_url", "ModelScope"),
        ("om_hub_url", "Modelers"),
        ("cloud_file_name", "a cloud bucket"),
    ):
        if other in entry:
            raise ConfigError(f"{where} comes from {other} ({what}); download it and give its file_name or hf_hub_url")
    raise ConfigError(f"{where} has neither file_name nor hf_hub_url")


def translate(source: Source, entry: dict[str, Any], where: str) -> tuple[Source, dict[str, str]]:
    """(an entry's options as ours, the columns it implies). There, a column that is not named is not read, even under
    its usual name, except for those that make up the format's plainest row."""
    named = {("label" if name == "kto_tag" else name): column for name, column in entry.get("columns", {}).items()}
    tags = entry.get("tags", {})
    formatting = entry.get("formatting", "alpaca")
    ranking = entry.get("ranking", False)
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{where}: formatting {formatting!r} is unknown (known: alpaca, sharegpt, openai)")
    defaults: dict[str, str] = dict.fromkeys(_OPTIONAL, "")
    if ranking:
        defaults |= {"chosen": "chosen", "rejected": "rejected"}
    else:
        named = {name: column for name, column in named.items() if name not in ("chosen", "rejected")}
    if formatting == "openai" and any(_OPENAI_TAGS.get(tag) != word for tag, word in tags.items()):
        formatting = "sharegpt"  # OpenAI's shape under other names
    if formatting == "alpaca" and "prompt" in named and "response" not in named and not ranking:
        formatting, named, defaults = "text", {"text": named["prompt"]}, {}  # rows for pretraining
    elif formatting == "alpaca":
        rest = {"query": "", "response": ""} if entry.get("columns") else {"query": "input", "response": "output"}
        defaults |= {"prompt": "instruction", "history": "", **rest}
    if source.format not in ("auto", formatting):  # then the entry's names mean nothing
        formatting, named, defaults, tags = source.format, {}, {}, {}
    local = "file_name" in entry
    meant = source.model_copy(
        update={
            "format": formatting,
            "columns": {**named, **source.columns},
            "tags": {**(tags if formatting == "sharegpt" else {}), **source.tags},
            "samples": source.samples or entry.get("num_samples"),
            "split": source.split or (None if local else entry.get("split")),
            "subset": source.subset or (None if local else entry.get("subset")),
        }
    )
    return meant, defaults
