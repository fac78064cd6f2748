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
    meant = translate(source, entry, where)
    if "file_name" in entry:
        path = folder / entry["file_name"]
        if not path.exists():
            raise DataError(f"{where}: the file {path} does not exist")
        return Located(meant, key, files=local_files(path, meant, key))
    if "hf_hub_url" in entry:
        return Located(meant, key, hub=entry["hf_hub_url"], hub_folder=entry.get("folder"))
    for other, what in (
        ("script_url", "a loading script, which would run somebody's code"),
        ("ms_hub_url", "ModelScope"),
        ("om_hub_url", "Modelers"),
        ("cloud_file_name", "a cloud bucket"),
    ):
        if other in entry:
            raise ConfigError(f"{where} comes from {other} ({what}); download it and give its file_name or hf_hub_url")
    raise ConfigError(f"{where} has neither file_name nor hf_hub_url")


def translate(source: Source, entry: dict[str, Any], where: str) -> Source:
    """An entry's options as ours. There, a column that is not named is not read, even under its usual name."""
    given = {("label" if name == "kto_tag" else name): column for name, column in entry.get("columns", {}).items()}
    tags = entry.get("tags", {})
    formatting = entry.get("formatting", "alpaca")
    ranking = entry.get("ranking", False)
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{where}: formatting {formatting!r} is unknown (known: alpaca, sharegpt, openai)")
    media = {"images": "", "videos": "", "audios": ""}
    optional = {"system": "", "tools": "", "label": "", "chosen": "", "rejected": "", **media}
    if ranking:
        optional |= {"chosen": "chosen", "rejected": "rejected"}
    else:
        given = {name: column for name, column in given.items() if name not in ("chosen", "rejected")}
    if formatting == "alpaca":
        if "prompt" in given and "response" not in given and not ranking:  # rows for pretraining
            formatting, columns, tags = "text", {"text": given["prompt"]}, {}
        else:
            usual = {"prompt": "instruction", "query": "input", "response": "output"}
            if entry.get("columns"):
                usual = {"prompt": "instruction", "query": "", "response": ""}
            columns, tags = {**usual, "history": "", **optional, **given}, {}
    else:
        if formatting == "openai" and any(_OPENAI_TAGS.get(tag) != word for tag, word in tags.items()):
            formatting = "sharegpt"  # OpenAI's shape under other names
        columns = {"messages": "conversations" if formatting == "sharegpt" else "messages", **optional, **given}
        tags = tags if formatting == "sharegpt" else {}
    return source.model_copy(
        update={
            "format": formatting if source.format == "auto" else source.format,
            "columns": {**(columns if source.format in ("auto", formatting) else {}), **source.columns},
            "tags": {**(tags if source.format in ("auto", formatting) else {}), **source.tags},
            "samples": source.samples or entry.get("num_samples"),
            "split": source.split or (entry.get("split") if "file_name" not in entry else None),
            "subset": source.subset or (entry.get("subset") if "file_name" not in entry else None),
        }
    )
